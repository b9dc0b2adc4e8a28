"""Adapters on a live model: load, use, swap, unload, generate. An adapter's owner does everything method-specific."""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from budwood.adapters.golden import measure
from budwood.adapters.live import module_ids, serialised, unchanged_on_error
from budwood.adapters.manifest import ChatRecord
from budwood.adapters.match import check_task, mismatch
from budwood.adapters.owner import owner_options, start_owner
from budwood.adapters.peft_config import MisfitError
from budwood.adapters.store import SavedAdapter, read_adapter
from budwood.adapters.use import use_adapters
from budwood.contract.calls import ask_owner
from budwood.contract.discovery import plugin_fault
from budwood.contract.examples import Example
from budwood.contract.loading import create, load_strategy
from budwood.contract.strategy import Strategy
from budwood.data.encoder import Encoder, encode_chat, encode_prompt
from budwood.errors import BudwoodError, InputError, did_you_mean
from budwood.model.base import Base, load_base, pick_device_precision
from budwood.model.embeddings import resize_base
from budwood.model.generate import Generated, generate
from budwood.model.limits import check_tokens, positions_of
from budwood.model.quiet import silence_libraries
from budwood.model.task import Task
from budwood.model.text_tasks import as_probe
from budwood.untrusted.files import check_name

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""Text, chat messages, or token ids."""


@dataclass(frozen=True)
class _Loaded:
    """An adapter on the model; `key` is its internal name there, independent of the user's name for it."""

    key: str
    owner: Strategy
    saved: SavedAdapter


@dataclass(frozen=True)
class Classified:
    """The predicted class of a text, and the probability of every class."""

    label: str
    probabilities: dict[str, float]


class AdapterPool:
    """A base with any number of adapters of any installed types, of which one, several or none are in use.

    With none in use, the model's output is bitwise identical to the base's.

    Threads may share a pool: their calls run one after the other, and `load` waits for them. `use` selects the adapter
    for the calling thread; a thread that has not selected one follows the last selection of any thread.
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
        embeddings: int = 0,
    ) -> None:
        """Load the base.

        Args:
            base: a folder, a hub name, or a loaded `Base`, which only the pool may use from then on.
            quantization: none, int8, nf4, fp4.
            task: name of the task that the adapters were trained for.
            labels: class names, for classification.
            precision: fp32, bf16, fp16, or auto: the fastest on this machine.
            device: cpu, cuda, or auto.
            double_quantization: also quantise the constants of nf4 and fp4.
            embeddings: least number of token embeddings; the base is resized to it, as in a run with
                `base.resize_embeddings`. An adapter that has rows for new tokens brings them along without it.

        Raises:
            InputError: there is no such base, quantization or task.
            ResourceError: the machine cannot load it.
            CorruptError: the base is damaged.
        """
        silence_libraries()
        self.task = task
        self.task_plugin: Task = create(task, "budwood.tasks")
        if not isinstance(base, Base):
            chosen, dtype, _ = pick_device_precision(device, precision)
            kwargs, tokenizer = self.task_plugin.model_kwargs(list(labels or ())), self.task_plugin.needs_tokenizer
            base = load_base(
                base, quantization, self.task_plugin.auto_class, dtype, chosen, double_quantization=double_quantization,
                model_kwargs=kwargs, needs_tokenizer=tokenizer,
            )  # fmt: skip
        if embeddings:
            resize_base(base, embeddings)
        self.base = base
        self.model: nn.Module = base.model.eval().requires_grad_(False)
        self.tokenizer = base.tokenizer
        self._modules = module_ids(self.model)
        self._loaded: dict[str, _Loaded] = {}
        self._owners: dict[tuple[str, str], Strategy] = {}  # keyed by adapter type and options
        self._keys = (f"adapter{number}" for number in itertools.count(1))
        self._lock = threading.RLock()
        self._current: str | None = None  # the last selection of any thread
        self._own = threading.local()  # .name: that of this thread

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, in loading order."""
        return list(self._loaded)

    @property
    def current(self) -> str | None:
        """Name of the adapter in use by the calling thread, or None."""
        name: str | None = getattr(self._own, "name", self._current)
        return name

    def adapter(self, name: str) -> SavedAdapter:
        """Return the saved adapter behind a loaded name.

        Raises:
            InputError: no adapter of that name is loaded.
        """
        return self._find(name).saved

    @serialised
    def load(self, name: str, directory: str | Path, *, allow_other_base: bool = False) -> SavedAdapter:
        """Attach an adapter to the model without using it. On failure the model stays unchanged.

        Returns:
            The adapter; its `notes` are messages for the user.

        Raises:
            InputError: the name is taken or invalid; the base, task or labels differ; no strategy owns the type; a part
                of the model is neither in the base's checkpoint nor in the adapter; it does not fit a base that it
                does not record.
            CorruptError: the folder is damaged or altered, or its tensors do not fit its own base.
        """
        check_name(name)
        if name in self._loaded:
            raise InputError(f"adapter '{name}' is already loaded: unload it first, or choose another name.")
        saved = read_adapter(
            directory,
            base_name=self.base.name,
            base_fingerprint=self.base.fingerprint,
            allow_other_base=allow_other_base,
        )
        check_task(saved, self.task, self.base)
        owner = self._owner(saved)
        key = next(self._keys)
        tensors = saved.load_tensors()
        with unchanged_on_error(self.model):
            try:
                ask_owner(owner, "attach_adapter", model=self.model, config=saved.config, tensors=tensors, name=key)
                self.model.eval().requires_grad_(False)
                self._loaded[name] = _Loaded(key, owner, saved)
                self._select([self._current])
            except BudwoodError as error:
                self._loaded.pop(name, None)
                if isinstance(error, MisfitError) and mismatch(saved, self.base.fingerprint) is InputError:
                    raise InputError(f"{directory}: {error} Give the base that it was trained on.") from error
                raise type(error)(f"{directory}: {error}") from error
        return saved

    @serialised
    def use(self, name: str | None) -> None:
        """Use one adapter from now on; None: the base alone.

        Raises:
            InputError: no adapter of that name is loaded.
        """
        self._select([name])
        self._current = self._own.name = name

    @serialised
    def unload(self, name: str) -> None:
        """Remove an adapter; after the last one, the model's modules are the base's own again.

        Raises:
            InputError: no adapter of that name is loaded.
            PluginError: the adapter's owner left modules on the model.
        """
        loaded = self._find(name)
        if self.current == name:
            self._own.name = None
        if self._current == name:
            self._current = None
            self._select([None])
        ask_owner(loaded.owner, "detach_adapter", model=self.model, name=loaded.key)
        del self._loaded[name]
        self._select([self._current])
        if not self._loaded and module_ids(self.model) != self._modules:
            raise plugin_fault(loaded.owner.distribution, f"{loaded.owner} left its own modules on the base", True)

    @serialised
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
        """Generate answers to prompts, in one batch even with different adapters, if these support it.

        Args:
            prompts: texts, lists of chat messages, or token ids.
            adapters: adapter name per prompt, or None for the base; absent: the adapter in use for all prompts.
            max_new_tokens: largest number of tokens per answer.
            temperature: 0 selects the most probable token; above 0, tokens are sampled.
            top_p: sample from the smallest set of most probable tokens with at least this total probability.
            stop: texts that end an answer; they are not part of it.
            seed: seed of the sampling.
            stream: called with a prompt's index and each new piece of its answer.

        Raises:
            InputError: an unknown adapter, an empty prompt, messages without a chat template, or a task without text.
        """
        if not self.base.model.can_generate():
            raise InputError(f"the pool's task is {self.task}, which generates no text.")
        if adapters is None:
            adapters = [self.current] * len(prompts)
        elif len(adapters) != len(prompts):
            raise InputError(
                f"{len(prompts)} prompts but {len(adapters)} adapters: pass one (or None) for each prompt."
            )
        encoded = [self._encode(prompt, name) for prompt, name in zip(prompts, adapters, strict=True)]
        answers: dict[int, Generated] = {}
        try:
            for rows in self._groups(adapters):
                own = [adapters[i] for i in rows]
                self._select(own)
                group_answers = generate(
                    self.base.model, self.tokenizer, [encoded[i] for i in rows], max_new_tokens=max_new_tokens,
                    temperature=temperature, top_p=top_p, seed=seed, stop=stop,
                    stop_ids=[self._stop_ids(name) for name in own],
                    on_token=None if stream is None else _with_prompt_index(stream, rows),
                    before_batch=lambda batch, own=own: self._select([own[i] for i in batch]),  # type: ignore[misc]
                )  # fmt: skip
                answers |= dict(zip(rows, group_answers, strict=True))
        finally:
            self._select([self._current])
        return [answers[i] for i in range(len(prompts))]

    def _stop_ids(self, name: str | None) -> list[int]:
        manifest = self._find(name).saved.manifest if name is not None else None
        return manifest.stop_ids if manifest else []

    @serialised
    def logits(self, prompts: Sequence[Prompt | Example]) -> Tensor:
        """Return the logits after each prompt with the adapter in use, [prompts, vocabulary or classes] fp32, CPU."""
        rows = [p if isinstance(p, Example) else self._encode(p, self.current) for p in prompts]
        probes = [row if isinstance(row, Example) else as_probe(row) for row in rows]
        dtype = torch.float32 if self.current is None else self.base.dtype
        with self._own_selection():
            for number, row in enumerate(rows, 1):
                if not isinstance(row, Example):
                    check_tokens(row, self.model, self.tokenizer, f"prompt {number}")
            return measure(self.task_plugin, self.model, self.tokenizer, probes, dtype)

    @serialised
    def measure(self, probes: Sequence[Example]) -> Tensor:
        """Return the logits at each probe's position with the adapter in use, [probes, …] fp32 on the CPU."""
        with self._own_selection():
            return measure(self.task_plugin, self.model, self.tokenizer, probes, self.base.dtype)

    @serialised
    def classify(self, texts: Sequence[str]) -> list[Classified]:
        """Classify texts with the adapter in use.

        Raises:
            InputError: the pool's task is not sequence classification.
        """
        if self.task != "sequence-classification":
            raise InputError(f"the pool's task is {self.task}: open it with task='sequence-classification'.")
        encoder = Encoder(self.tokenizer)
        limit = min(self.tokenizer.model_max_length, positions_of(self.model) or sys.maxsize)
        rows = [
            ids if len(ids) <= limit else encoder.cut(t, limit)
            for t, ids in zip(texts, encoder.whole(texts), strict=True)
        ]
        labels = self._labels()
        results = []
        for probabilities in self.logits(rows).softmax(-1).tolist():
            by_label = dict(zip(labels, probabilities, strict=True))
            results.append(Classified(max(by_label, key=by_label.__getitem__), by_label))
        return results

    @serialised
    def merge(self, name: str) -> None:
        """Merge an adapter permanently into the weights of an unquantised base, and remove it.

        Raises:
            InputError: the base is quantised, other adapters are loaded, or the adapter's type cannot be merged.
        """
        loaded = self._find(name)
        if self.base.quantization != "none":
            raise InputError(
                "an adapter can only be merged into unquantised weights: open the base with quantization none."
            )
        if len(self._loaded) > 1:
            raise InputError(f"other adapters are loaded: unload them before merging '{name}'.")
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

    def _labels(self) -> list[str]:
        current = self._loaded.get(self.current or "")
        if current is not None and current.saved.manifest is not None and current.saved.manifest.labels:
            return current.saved.manifest.labels
        names: dict[int, str] = self.model.config.id2label  # type: ignore[union-attr,assignment]
        return [names[i] for i in range(len(names))]

    def _select(self, names: Sequence[str | None]) -> None:
        """Use one adapter (or None) for all rows, or one for each row of the next batches."""
        selected = [None if name is None else self._find(name) for name in names]
        active = {id(entry.owner): entry.owner for entry in selected if entry is not None}
        types = [owner.name for owner in active.values()]
        if repeated := [name for name in types if types.count(name) > 1]:
            raise InputError(f"adapters of type {repeated[0]} with different options cannot share a batch.")
        # Owners without an adapter in use first: an owner may store its selection on the model, per adapter type.
        for owner in sorted(self._owners.values(), key=lambda owner: id(owner) in active):
            keys = [None if entry is None or entry.owner is not owner else entry.key for entry in selected]
            own = [key for key in dict.fromkeys(keys) if key is not None]
            use_adapters(owner, self.model, own, [-1 if key is None else own.index(key) for key in keys])

    @contextmanager
    def _own_selection(self) -> Iterator[None]:
        """Use the calling thread's adapter inside the context."""
        if self.current != self._current:
            self._select([self.current])
        try:
            yield
        finally:
            if self.current != self._current:
                self._select([self._current])

    def _groups(self, adapters: Sequence[str | None]) -> list[list[int]]:
        """Group the rows that can share a batch: all of them, or if their adapters cannot, those of each adapter."""
        rows = list(range(len(adapters)))
        try:
            self._select(adapters)
        except InputError:
            groups = [[i for i in rows if adapters[i] == name] for name in dict.fromkeys(adapters)]
            if len(groups) == 1:
                raise
            return groups
        return [rows] if rows else []

    def _encode(self, prompt: Prompt, name: str | None) -> list[int]:
        if isinstance(prompt, str):
            return encode_prompt(self.tokenizer, prompt)
        if prompt and all(isinstance(part, int) for part in prompt):
            return [int(part) for part in prompt]  # type: ignore[arg-type]
        manifest = self._find(name).saved.manifest if name is not None else None
        chat = (manifest.chat if manifest else None) or ChatRecord()
        return encode_chat(self.tokenizer, prompt, chat.options, chat.template, chat.date)  # type: ignore[arg-type]


def _with_prompt_index(stream: Callable[[int, str], None], rows: list[int]) -> Callable[[int, str], None]:
    return lambda index, piece: stream(rows[index], piece)
