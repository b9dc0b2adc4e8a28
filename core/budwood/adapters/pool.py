"""Adapters on a live model: load, use, swap, unload, generate. The pool knows no method; an adapter's owner does."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from budwood.adapters.golden import measure
from budwood.adapters.live import module_ids, unchanged_on_error
from budwood.adapters.owner import owner_options, start_owner
from budwood.adapters.peft_config import PREFIX
from budwood.adapters.store import SavedAdapter, read_adapter, template_hash, tokenizer_hash
from budwood.adapters.use import use_adapters
from budwood.contract.calls import ask_owner
from budwood.contract.discovery import PluginError
from budwood.contract.examples import Example
from budwood.contract.loading import create, load_strategy
from budwood.contract.strategy import Strategy
from budwood.data.encoder import Encoder, encode_chat, encode_prompt
from budwood.errors import BudwoodError, InputError, did_you_mean
from budwood.model.base import Base, load_base, pick_device_precision
from budwood.model.generate import Generated, generate
from budwood.model.quiet import silence_libraries
from budwood.model.task import Task
from budwood.model.text_tasks import as_probe
from budwood.untrusted.files import check_name

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""A text, chat messages, or token ids."""


@dataclass(frozen=True)
class _Loaded:
    """An adapter on the model; `key` is its name there, which no name of the user's can break."""

    key: str
    owner: Strategy
    saved: SavedAdapter


@dataclass(frozen=True)
class Classified:
    """The class of a text and every class's probability."""

    label: str
    probabilities: dict[str, float]


class AdapterPool:
    """A base with any number of adapters on it, of any installed types, one, another or none in use.

    With none in use the model computes the base's own bits.
    """

    def __init__(
        self,
        base: str | Path | Base,
        quantization: str = "none",
        *,
        task: str = "causal-lm",
        labels: Sequence[str] | None = None,
        precision: str = "auto",
        device: str = "auto",
        double_quantization: bool = True,
    ) -> None:
        """Load the base.

        Args:
            base: a folder, a hub name, or a loaded `Base`, which then belongs to the pool.
            quantization: none, int8, nf4, fp4.
            task: name of the task that the adapters were trained for.
            labels: classes, for a classification.
            precision: fp32, bf16, fp16, or auto: what is fast here.
            device: cpu, cuda, or auto.
            double_quantization: quantise the constants of nf4 and fp4 too.

        Raises:
            InputError: no such base, quantization or task.
            ResourceError: the machine cannot load it.
            CorruptError: the base is damaged.
        """
        silence_libraries()
        self.task = task
        self.kind: Task = create(task, "budwood.tasks")
        if not isinstance(base, Base):
            chosen, dtype, _ = pick_device_precision(device, precision)
            kwargs, tokenizer = self.kind.model_kwargs(list(labels or ())), self.kind.needs_tokenizer
            base = load_base(
                base, quantization, self.kind.auto_class, dtype, chosen, double_quantization=double_quantization,
                model_kwargs=kwargs, needs_tokenizer=tokenizer,
            )  # fmt: skip
        self.base = base
        self.model: nn.Module = base.model.eval().requires_grad_(False)
        self.tokenizer = base.tokenizer
        self._modules = module_ids(self.model)
        self._loaded: dict[str, _Loaded] = {}
        self._owners: dict[tuple[str, str], Strategy] = {}  # by adapter type and options
        self._keys = (f"adapter{number}" for number in itertools.count(1))
        self._current: str | None = None

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order in which they were loaded."""
        return list(self._loaded)

    @property
    def current(self) -> str | None:
        """Name of the adapter in use."""
        return self._current

    def adapter(self, name: str) -> SavedAdapter:
        """What is known of a loaded adapter.

        Raises:
            InputError: no adapter of that name is loaded.
        """
        return self._find(name).saved

    def load(self, name: str, directory: str | Path, *, allow_other_base: bool = False) -> SavedAdapter:
        """Put an adapter on the model, not in use. One that is refused leaves the model as it was.

        Returns:
            The adapter; its `notes` say what the user should know.

        Raises:
            InputError: the name is taken or impossible; another base, task or labels; no strategy owns its type;
                neither adapter nor checkpoint hold a part of the model.
            CorruptError: the folder is not what it claims to be, or its tensors do not fit the base.
        """
        check_name(name)
        if name in self._loaded:
            raise InputError(f"adapter '{name}' is loaded already: unload it first, or choose another name.")
        saved = read_adapter(
            directory,
            base_name=self.base.name,
            base_fingerprint=self.base.fingerprint,
            allow_other_base=allow_other_base,
        )
        self._check_task(saved)
        lacking = [key for key in self.base.new if PREFIX + key not in saved.infos]
        if lacking:
            raise InputError(
                f"{directory}: holds no '{lacking[0]}', nor does the base's checkpoint, so it would be random: train "
                "the adapter again, or add it to the base."
            )
        owner = self._owner(saved)
        key = next(self._keys)
        tensors = saved.load_tensors()
        with unchanged_on_error(self.model):
            try:
                ask_owner(owner, "attach_adapter", model=self.model, config=saved.config, tensors=tensors, name=key)
                self.model.eval().requires_grad_(False)
                self._loaded[name] = _Loaded(key, owner, saved)
                self.use(self._current)
            except BudwoodError as error:
                self._loaded.pop(name, None)
                raise type(error)(f"{directory}: {error}") from error
        return saved

    def use(self, name: str | None) -> None:
        """Use one adapter for everything that follows; None: the base alone.

        Raises:
            InputError: no adapter of that name is loaded.
        """
        self._select([name])
        self._current = name

    def unload(self, name: str) -> None:
        """Take an adapter off; without any left, the model's modules are the base's own.

        Raises:
            InputError: no adapter of that name is loaded.
            PluginError: its owner left something on the model.
        """
        loaded = self._find(name)
        if self._current == name:
            self.use(None)
        ask_owner(loaded.owner, "detach_adapter", model=self.model, name=loaded.key)
        del self._loaded[name]
        self.use(self._current)
        if not self._loaded and module_ids(self.model) != self._modules:
            raise PluginError(f"{loaded.owner} left modules of its own on the base. Report it to its author.")

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapters: Sequence[str | None] | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        stream: Callable[[int, str], None] | None = None,
    ) -> list[Generated]:
        """Answer prompts, in one batch whatever adapters they use, where these can share one.

        Args:
            prompts: texts, lists of chat messages, or token ids.
            adapters: name (or None for the base) for each prompt; absent: the adapter in use for all.
            max_new_tokens: of each answer.
            temperature: 0 takes the most probable token; else tokens are sampled.
            top_p: sample among the most probable tokens that hold this share of the probability.
            stop: texts that end an answer; they are not part of it.
            seed: of the sampling.
            stream: called with a prompt's index and each new piece of its answer.

        Raises:
            InputError: an unknown adapter, an empty prompt, messages without a chat template, a task without text.
        """
        if not self.base.model.can_generate():
            raise InputError(f"the pool's task is {self.task}, which generates no text.")
        if adapters is None:
            adapters = [self._current] * len(prompts)
        elif len(adapters) != len(prompts):
            raise InputError(
                f"{len(prompts)} prompts and {len(adapters)} adapters: give one (or None) for each prompt."
            )
        encoded = [self._encode(prompt) for prompt in prompts]
        answers: dict[int, Generated] = {}
        try:
            for rows in self._groups(adapters):
                found = generate(
                    self.base.model,
                    self.tokenizer,
                    [encoded[i] for i in rows],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    seed=seed,
                    stop=stop,
                    stop_ids=[self._stop_ids(adapters[i]) for i in rows],
                    on_token=None if stream is None else _renumbered(stream, rows),
                    before_batch=self._selector([adapters[i] for i in rows]),
                )
                answers |= dict(zip(rows, found, strict=True))
        finally:
            self.use(self._current)
        return [answers[i] for i in range(len(prompts))]

    def _stop_ids(self, name: str | None) -> list[int]:
        manifest = self._find(name).saved.manifest if name is not None else None
        return manifest.stop_ids if manifest else []

    def logits(self, prompts: Sequence[Prompt | Example]) -> Tensor:
        """Logits [prompts, vocabulary or classes] fp32 on the CPU after each prompt, by the adapter in use."""
        probes = [p if isinstance(p, Example) else as_probe(self._encode(p)) for p in prompts]
        dtype = torch.float32 if self._current is None else self.base.dtype
        return measure(self.kind, self.model, self.tokenizer, probes, dtype)

    def measure(self, probes: Sequence[Example]) -> Tensor:
        """Logits [probes, …] fp32 on the CPU at each probe's position, by the adapter in use, in the compute dtype."""
        return measure(self.kind, self.model, self.tokenizer, probes, self.base.dtype)

    def classify(self, texts: Sequence[str]) -> list[Classified]:
        """Classes of texts, by the adapter in use.

        Raises:
            InputError: the pool's task is not a classification.
        """
        if self.task != "sequence-classification":
            raise InputError(f"the pool's task is {self.task}: open it with task='sequence-classification'.")
        encoder = Encoder(self.tokenizer)
        limit = self.tokenizer.model_max_length
        rows = [
            ids if len(ids) <= limit else encoder.cut(t, limit)
            for t, ids in zip(texts, encoder.whole(texts), strict=True)
        ]
        labels = self._labels()
        found = []
        for probabilities in self.logits(rows).softmax(-1).tolist():
            by_label = dict(zip(labels, probabilities, strict=True))
            found.append(Classified(max(by_label, key=by_label.__getitem__), by_label))
        return found

    def merge(self, name: str) -> None:
        """Add an adapter into the model's weights for good and take it off; the base must not be quantised.

        Raises:
            InputError: the base is quantised, other adapters are loaded, or its type cannot be merged.
        """
        loaded = self._find(name)
        if self.base.quantization != "none":
            raise InputError(
                "an adapter is merged into unquantised weights only: open the base with quantization none."
            )
        if len(self._loaded) > 1:
            raise InputError(f"unload the other adapters before '{name}' is merged.")
        if not hasattr(type(loaded.owner), "merge_adapter"):
            raise InputError(f"{loaded.owner} cannot merge its adapters.")
        self.use(None)
        ask_owner(loaded.owner, "merge_adapter", model=self.model, name=loaded.key)
        del self._loaded[name]

    def _find(self, name: str) -> _Loaded:
        if name not in self._loaded:
            known = ", ".join(self._loaded) or "none"
            raise InputError(f"no adapter '{name[:64]}' is loaded.{did_you_mean(name, self._loaded)} Loaded: {known}.")
        return self._loaded[name]

    def _owner(self, saved: SavedAdapter) -> Strategy:
        cls, entry = load_strategy(saved.adapter_type)
        if not hasattr(cls, "attach_adapter"):
            raise InputError(f"strategy '{saved.adapter_type}' of {entry.owner} attaches no adapters.")
        key = saved.adapter_type, json.dumps(owner_options(saved), sort_keys=True)
        if key not in self._owners:
            self._owners[key] = start_owner(saved)
        return self._owners[key]

    def _check_task(self, saved: SavedAdapter) -> None:
        """Refuse another task or other classes; note another tokenizer, template or quantization."""
        manifest = saved.manifest
        if manifest is None:
            return
        if manifest.task != self.task:
            raise InputError(
                f"{saved.directory}: was trained for the task {manifest.task}, and the pool's is {self.task}."
            )
        if manifest.labels and len(manifest.labels) != self.model.config.num_labels:  # type: ignore[union-attr]
            have = self.model.config.num_labels  # type: ignore[union-attr]
            raise InputError(
                f"{saved.directory}: has {len(manifest.labels)} labels, and the pool was opened with {have}."
            )
        if manifest.tokenizer and manifest.tokenizer != tokenizer_hash(self.tokenizer):
            saved.notes.append("the base's tokenizer is not the one it was trained with.")
        if manifest.template and manifest.template != template_hash(self.tokenizer):
            saved.notes.append("the base's chat template is not the one it was trained with.")
        if manifest.base.quantization != self.base.quantization:
            trained, now = manifest.base.quantization, self.base.quantization
            saved.notes.append(f"was trained on the base in {trained} and is used on it in {now}: answers may differ.")

    def _labels(self) -> list[str]:
        current = self._loaded.get(self._current or "")
        if current is not None and current.saved.manifest is not None and current.saved.manifest.labels:
            return current.saved.manifest.labels
        names: dict[int, str] = self.model.config.id2label  # type: ignore[union-attr,assignment]
        return [names[i] for i in range(len(names))]

    def _select(self, names: Sequence[str | None]) -> None:
        """Use one adapter (or None) for all rows, or one for each row of the next batches."""
        chosen = [None if name is None else self._find(name) for name in names]
        computing = {id(entry.owner): entry.owner for entry in chosen if entry is not None}
        types = [owner.name for owner in computing.values()]
        if twice := [name for name in types if types.count(name) > 1]:
            raise InputError(f"adapters of type {twice[0]} that were trained with other options cannot share a batch.")
        # Those without an adapter in use first: an owner may keep its choice on the model, by adapter type.
        for owner in sorted(self._owners.values(), key=lambda owner: id(owner) in computing):
            keys = [None if entry is None or entry.owner is not owner else entry.key for entry in chosen]
            own = [key for key in dict.fromkeys(keys) if key is not None]
            use_adapters(owner, self.model, own, [-1 if key is None else own.index(key) for key in keys])

    def _groups(self, adapters: Sequence[str | None]) -> list[list[int]]:
        """Rows that may share a batch: all, or where their adapters cannot, those of each adapter."""
        rows = list(range(len(adapters)))
        try:
            self._select(adapters)
        except InputError:
            groups = [[i for i in rows if adapters[i] == name] for name in dict.fromkeys(adapters)]
            if len(groups) == 1:
                raise
            return groups
        return [rows] if rows else []

    def _selector(self, adapters: Sequence[str | None]) -> Callable[[list[int]], None]:
        return lambda batch: self._select([adapters[i] for i in batch])

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return encode_prompt(self.tokenizer, prompt)
        if prompt and all(isinstance(part, int) for part in prompt):
            return [int(part) for part in prompt]  # type: ignore[arg-type]
        return encode_chat(self.tokenizer, prompt)  # type: ignore[arg-type]


def _renumbered(stream: Callable[[int, str], None], rows: list[int]) -> Callable[[int, str], None]:
    return lambda index, piece: stream(rows[index], piece)
