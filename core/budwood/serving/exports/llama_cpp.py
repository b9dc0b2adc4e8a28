"""The targets gguf and ollama: an adapter, or a merged model, for llama.cpp and what is built on it."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from budwood.adapters.manifest import ChatRecord
from budwood.adapters.recorded_base import base_name
from budwood.adapters.store import SavedAdapter, read_adapter
from budwood.errors import InputError
from budwood.model.base import fingerprint, load_tokenizer
from budwood.model.checkpoint import one_revision, read_config, read_tensors, resolve
from budwood.serving.exports.architectures import Architecture, architecture_of, check_complete
from budwood.serving.exports.compare import compare, other_weights
from budwood.serving.exports.difference import plain_updates
from budwood.serving.exports.factors import check_language_model, write_lora
from budwood.serving.exports.gguf_files import (
    check_installed,
    compare_model_gguf,
    read_adapter_gguf,
    write_adapter_gguf,
    write_model_gguf,
)
from budwood.serving.exports.ollama import frames_of, go_template, modelfile
from budwood.serving.exports.replay import Replay
from budwood.serving.exports.vocabulary import Vocabulary, read_vocabulary
from budwood.serving.exports.wanted import Exported, Wanted
from budwood.serving.merge import MergeReport, merge

ADAPTER, MODEL, BASE, MODELFILE = "adapter.gguf", "model.gguf", "base.gguf", "Modelfile"


@dataclass(frozen=True)
class LlamaModel:
    """A base or a merged model, as llama.cpp knows it.

    Attributes:
        name: as the user gave it.
        folder: its folder.
        config: its config.json.
        tokenizer: its tokenizer.
        chat: how the adapter's messages are rendered.
        stops: tokens that end an answer besides the model's own.
        messages: whether the adapter was trained on messages, or it is unknown.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    arch: Architecture
    tokenizer: Any
    chat: ChatRecord
    stops: list[int]
    messages: bool

    @classmethod
    def open(cls, name: str, saved: SavedAdapter) -> LlamaModel:
        """Read a model folder's small files.

        Raises:
            InputError: it is no model that can be written.
        """
        folder = resolve(name)
        config = read_config(folder)
        manifest = saved.manifest
        return cls(
            name,
            folder,
            config,
            architecture_of(config, name),
            load_tokenizer(folder),
            (manifest.chat if manifest is not None else None) or ChatRecord(),
            list(manifest.stop_ids) if manifest is not None else [],
            manifest is None or manifest.on_messages is not False,
        )

    def vocabulary(self) -> Vocabulary:
        """Return its tokenizer, for the file of the complete model.

        Raises:
            InputError: llama.cpp would tokenise differently, or only adapters of it can be written.
        """
        check_complete(self.config, self.name)
        rows = next(info.shape[0] for name, info in read_tensors(self.folder).items() if "embed_tokens" in name)
        generation = self.folder / "generation_config.json"
        stated = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
        ends = [self.tokenizer.eos_token_id]
        for owner in (self.config.get("eos_token_id"), stated.get("eos_token_id"), self.stops):
            ends += owner if isinstance(owner, list) else [owner]
        known = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
        return read_vocabulary(self.folder, self.tokenizer, rows, known, self.chat.template, self.messages)


def base_of(saved: SavedAdapter, program: str, base: str | None, allow_other_base: bool) -> LlamaModel:
    """Return the base of an adapter, checked by its fingerprint.

    Raises:
        InputError: the base is missing, another one, or none that llama.cpp knows.
    """
    check_installed()
    check_language_model(saved, program)
    name = base_name(saved, base)
    if name is None:
        raise InputError(f"{saved.directory}: an adapter of stock PEFT records no base: pass it with --base.")
    revision = saved.manifest.base.revision if saved.manifest is not None and base is None else None
    with one_revision(name, revision):
        model = LlamaModel.open(name, saved)
    read_adapter(
        saved.directory, base_name=name, base_fingerprint=fingerprint(model.folder), hashes=False,
        allow_other_base=allow_other_base,
    )  # fmt: skip
    return model


def write_gguf(saved: SavedAdapter, folder: Path, out: Path, wanted: Wanted) -> Exported:
    """Write the adapter, or the merged model, as GGUF, and the base too if that is wanted."""
    model = base_of(saved, "llama.cpp", wanted.base, wanted.allow_other_base)
    if wanted.merged:
        report, merged, vocabulary = _merged(saved, folder, model, wanted)
        lines = [f"{MODEL}: {merged.arch.name}, {report.dtype}", f"llama-cli -m {shlex.quote(str(out / MODEL))}"]
        notes = [*report.notes, *vocabulary.notes, *_chat_notes(merged)]
        return Exported(out, wanted.target, lines, merged=report, notes=notes)
    own = model.vocabulary() if wanted.with_base else None
    lines, result, approximate = _adapter(saved, folder, model, wanted)
    base = "BASE.gguf"
    if own is not None:
        _model(folder / BASE, model, own)
        lines.append(f"{BASE}: {model.arch.name}, {len(own.tokens):,} tokens")
        base = shlex.quote(str(out / BASE))
    lines.append(f"llama-cli -m {base} --lora {shlex.quote(str(out / ADAPTER))}")
    notes = [*other_weights(saved, "llama.cpp", wanted), *(own.notes if own is not None else ()), *_chat_notes(model)]
    if not model.messages and own is None:
        notes.append("it was trained on texts, not on messages: let llama.cpp apply no chat template (-no-cnv).")
    return Exported(out, wanted.target, lines, result, None, approximate, notes)


def write_ollama(saved: SavedAdapter, folder: Path, out: Path, wanted: Wanted) -> Exported:
    """Write a Modelfile, and beside it the base with the adapter, or the merged model."""
    model = base_of(saved, "Ollama", wanted.base, wanted.allow_other_base)
    vocabulary = model.vocabulary()
    report, result, approximate, lines = None, None, False, []
    if wanted.merged:
        report, model, vocabulary = _merged(saved, folder, model, wanted)
        lines.append(f"{MODEL}: {model.arch.name}, {report.dtype}")
    else:
        lines, result, approximate = _adapter(saved, folder, model, wanted)
        _model(folder / BASE, model, vocabulary)
        lines.append(f"{BASE}: {model.arch.name}, {len(vocabulary.tokens):,} tokens")
    text, notes = _modelfile(model, vocabulary, wanted.merged)
    (folder / MODELFILE).write_text(text, encoding="utf-8")
    lines.append(f"ollama create {shlex.quote(out.name)} -f {shlex.quote(str(out / MODELFILE))}")
    before = report.notes if report is not None else other_weights(saved, "Ollama", wanted)
    notes = [*before, *vocabulary.notes, *notes]
    return Exported(out, wanted.target, lines, result, report, approximate, notes)


def _adapter(
    saved: SavedAdapter, folder: Path, model: LlamaModel, wanted: Wanted
) -> tuple[list[str], Replay | None, bool]:
    """Write and check adapter.gguf."""
    factors, approximate = plain_updates(saved, wanted)
    where, path = str(saved.directory), folder / ADAPTER
    rank = write_adapter_gguf(path, factors, model.arch, where)
    result = None
    with tempfile.TemporaryDirectory() as again:
        write_lora(Path(again), read_adapter_gguf(path, model.arch, factors, where), saved)
        result = compare(saved, Path(again), wanted, approximate)
    return [f"{ADAPTER}: LoRA of rank {rank} on {len(factors)} linears of {model.arch.name}"], result, approximate


def _merged(
    saved: SavedAdapter, folder: Path, model: LlamaModel, wanted: Wanted
) -> tuple[MergeReport, LlamaModel, Vocabulary]:
    """Merge into a temporary folder, and write model.gguf from it."""
    model.vocabulary()  # before the base loads
    place = folder / ".merged"
    report = merge(
        saved.directory, place, base=wanted.base, dtype=wanted.dtype, device=wanted.merge_device, force=wanted.force,
        allow_other_base=wanted.allow_other_base, again=True,
    )  # fmt: skip
    merged = replace(LlamaModel.open(str(place), saved), name=model.name)
    vocabulary = merged.vocabulary()
    _model(folder / MODEL, merged, vocabulary)
    shutil.rmtree(place)
    return report, merged, vocabulary


def _model(path: Path, model: LlamaModel, vocabulary: Vocabulary) -> None:
    name = Path(model.name).name
    write_model_gguf(path, model.folder, model.config, model.arch, vocabulary, name)
    compare_model_gguf(path, model.folder, model.arch)


def _modelfile(model: LlamaModel, vocabulary: Vocabulary, merged: bool) -> tuple[str, list[str]]:
    template, notes = None if model.messages else "{{ .Prompt }}", []
    if vocabulary.template is not None:
        frames = frames_of(vocabulary.template, model.tokenizer, model.chat.options)
        if frames is None:
            notes.append(
                "its chat template does more than a Go template of Ollama can be proved to do, so the Modelfile has no "
                "TEMPLATE: an Ollama that renders the chat template of a GGUF is needed."
            )
            notes += _chat_notes(model)
        else:
            bos = model.tokenizer.bos_token if vocabulary.add_bos else None
            template = go_template(frames, bos)
    names = [vocabulary.special[name] for name in ("eos", "eot", "eom") if name in vocabulary.special]
    stops = [vocabulary.tokens[token] for token in names]
    return modelfile(MODEL if merged else BASE, None if merged else ADAPTER, template, stops), notes


def _chat_notes(model: LlamaModel) -> list[str]:
    if not model.chat.options:
        return []
    return [f"send chat_template_kwargs with each request, as in training: {json.dumps(model.chat.options)}"]
