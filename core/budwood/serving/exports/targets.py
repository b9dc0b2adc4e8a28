"""`budwood adapter export --for TARGET`: writes an adapter for another program, loads it again, and compares it."""

from __future__ import annotations

import json
from pathlib import Path

from budwood.adapters.export import write_peft
from budwood.adapters.store import SavedAdapter, read_adapter
from budwood.errors import plural
from budwood.model.checks import stored_quantization
from budwood.serving.exports import vllm
from budwood.serving.exports.compare import check_weights, compare, other_weights
from budwood.serving.exports.difference import plain_updates
from budwood.serving.exports.factors import write_lora
from budwood.serving.exports.llama_cpp import write_gguf, write_ollama
from budwood.serving.exports.wanted import PROGRAMS, Exported, Wanted
from budwood.serving.merge import merge
from budwood.untrusted.files import check_new_folder, complete_directory

TEMPLATE = "chat_template.jinja"


def export_for(directory: str | Path, out: str | Path, wanted: Wanted) -> Exported:
    """Write an adapter for another program; the folder appears once it has been loaded again and compared.

    Args:
        directory: the adapter's folder.
        out: the new folder; it may not exist yet.

    Raises:
        InputError: the target cannot hold the adapter, or the base is missing or another one. Nothing is written.
        CorruptError: the adapter is damaged, or on its base it is not what training recorded.
        BudwoodError: the export computes something else than the adapter.
    """
    wanted.validate()
    out = Path(out)
    check_new_folder(out)
    saved = read_adapter(directory)
    if wanted.target in ("gguf", "ollama") and not wanted.merged:
        check_weights(saved, PROGRAMS[wanted.target])
    if wanted.target == "merged":
        return _merged(saved, out, wanted)
    with complete_directory(out) as folder:
        if wanted.target == "peft":
            return _peft(saved, folder, out, wanted)
        if wanted.target == "vllm":
            return _vllm(saved, folder, out, wanted)
        return (write_gguf if wanted.target == "gguf" else write_ollama)(saved, folder, out, wanted)


def _merged(saved: SavedAdapter, out: Path, wanted: Wanted) -> Exported:
    report = merge(
        saved.directory, out, base=wanted.base, dtype=wanted.dtype, device=wanted.merge_device, force=wanted.force,
        allow_other_base=wanted.allow_other_base, again=True,
    )  # fmt: skip
    lines = [f"{plural(report.weights, 'weight')} changed, saved in {report.dtype}"]
    return Exported(out, wanted.target, lines, merged=report, notes=report.notes)


def _peft(saved: SavedAdapter, folder: Path, out: Path, wanted: Wanted) -> Exported:
    approximate = False
    if wanted.rank is None:
        write_peft(saved, folder, wanted.as_type or "peft")
        lines = ["config and weights for PeftModel.from_pretrained"]
    else:
        factors, approximate = plain_updates(saved, wanted)
        rank = write_lora(folder, factors, saved)
        lines = [f"LoRA of rank {rank} on {plural(len(factors), 'linear')}"]
    bound = saved.manifest is not None and saved.manifest.needs_quantization
    notes = other_weights(saved, "PEFT", wanted) if bound else []
    return Exported(out, wanted.target, lines, compare(saved, folder, wanted, approximate), None, approximate, notes)


def _vllm(saved: SavedAdapter, folder: Path, out: Path, wanted: Wanted) -> Exported:
    factors, approximate = plain_updates(saved, wanted)
    rank = write_lora(folder, vllm.fitted(saved, factors, wanted.max_lora_rank), saved)
    chat = saved.manifest.chat if saved.manifest is not None else None
    template = out / TEMPLATE if chat is not None and chat.template is not None else None
    if template is not None and chat is not None and chat.template is not None:
        (folder / TEMPLATE).write_text(chat.template, encoding="utf-8")
    base = wanted.base or (saved.manifest.base.name if saved.manifest is not None else "BASE")
    stored = saved.manifest is not None and saved.manifest.base.quantization == stored_quantization(base)
    notes = [] if stored else other_weights(saved, "vLLM", wanted)
    if saved.manifest is not None and saved.manifest.on_messages is False:
        notes.append("it was trained on texts, not on messages: ask /v1/completions, which applies no chat template.")
    if chat is not None and chat.options:
        notes.append(f"send chat_template_kwargs with each request, as in training: {json.dumps(chat.options)}")
    lines = [
        f"LoRA of rank {rank} on {plural(len(factors), 'linear')}, alpha {rank}",
        vllm.command(base, out, rank, template),
    ]
    return Exported(
        out, wanted.target, lines, compare(saved, folder, wanted, approximate), None, approximate, notes
    )  # fmt: skip
