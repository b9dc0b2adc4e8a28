"""Adapters on a live model: load, use, swap, unload, generate. An adapter's owner does everything method-specific."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from budwood.adapters.golden import measure
from budwood.adapters.manifest import ChatRecord
from budwood.adapters.store import SavedAdapter
from budwood.contract.calls import attribute_errors
from budwood.contract.examples import Example
from budwood.contract.loading import build_task
from budwood.data.encoder import encode_chat, encode_prompt
from budwood.errors import InputError
from budwood.model.base import Base, load_base, pick_device_precision
from budwood.model.checkpoint import resolve
from budwood.model.decoding import Generated
from budwood.model.embeddings import resize_base
from budwood.model.quiet import silence_libraries
from budwood.model.task import Task
from budwood.model.text_tasks import as_probe
from budwood.serving.engine import Engine
from budwood.serving.requests import Answer, Sampling, check_weights

log = logging.getLogger("budwood.pool")

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""Text, chat messages, or token ids."""


@dataclass(frozen=True)
class Classified:
    """The predicted class of a text, and the probability of every class."""

    label: str
    probabilities: dict[str, float]


class AdapterPool:
    """A base with any number of adapters of any installed types, of which one, several or none are in use.

    With none in use, the model's output is bitwise identical to the base's.

    Any number of threads may share a pool. A pool is a client of an `Engine`, whose thread owns the model: calls of
    `generate` share batches, and each answer is that of its adapter alone. `use` selects the adapter for the calling
    thread; a thread that has not selected one follows the last selection of any thread.
    """

    def __init__(
        self,
        base: str | Path | Base,
        quantization: str | None = "none",
        *,
        task: str | Task = "causal-lm",
        labels: Sequence[str] | None = None,
        task_options: Mapping[str, Any] | None = None,
        precision: str = "auto",
        device: str = "auto",
        double_quantization: bool = True,
        embeddings: int = 0,
        adapter_bytes: int | None = None,
        prefix_bytes: int = 0,
    ) -> None:
        """Load the base.

        Args:
            base: a folder, a hub name, or a loaded `Base`, which only the pool may use from then on.
            quantization: none, int8, nf4, fp4; None: as the base is stored.
            task: the task that the adapters were trained for, or its name.
            labels: class names, for classification.
            task_options: options of a task given by name, as an adapter's manifest has them.
            precision: fp32, bf16, fp16, or auto: the fastest on this machine.
            device: cpu, cuda, or auto.
            double_quantization: also quantise the constants of nf4 and fp4.
            embeddings: least number of token embeddings; the base is resized to it, as in a run with
                `base.resize_embeddings`. An adapter that has rows for new tokens brings them along without it.
            adapter_bytes: memory for adapters: those unused for the longest leave it, and are read from their folders
                again for the next request; None: no limit.
            prefix_bytes: memory for the keys and values of prompts, for later prompts that begin alike; 0: none.

        Raises:
            InputError: there is no such base, quantization or task.
            ResourceError: the machine cannot load it.
            CorruptError: the base is damaged.
        """
        silence_libraries()
        self.task_plugin: Task = build_task(task, dict(task_options or {})) if isinstance(task, str) else task
        self.task = self.task_plugin.name
        if not isinstance(base, Base):
            base = load_for_task(
                base, quantization, self.task_plugin, list(labels or ()), precision=precision, device=device,
                double_quantization=double_quantization,
            )  # fmt: skip
        if embeddings:
            resize_base(base, embeddings)
        read_base(self.task_plugin, base.path)
        self.base = base
        self.engine = Engine(base, self.task, adapter_bytes=adapter_bytes, prefix_bytes=prefix_bytes)
        self.engine.loader.task_plugin = self.task_plugin
        self.model: nn.Module = base.model
        self.tokenizer = base.tokenizer
        self._current: str | None = None  # the last selection of any thread
        self._own = threading.local()  # .name: that of this thread
        self._warned: set[Path] = set()

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, in loading order."""
        return list(self.engine.names)

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
        saved = self.engine.find(name).saved
        assert saved is not None
        return saved

    def load(
        self, name: str, directory: str | Path, *, allow_other_base: bool = False, pinned: bool = False
    ) -> SavedAdapter:
        """Load an adapter without using it. On failure the model stays unchanged.

        Args:
            name: what it is called from then on.
            directory: its folder.
            allow_other_base: whether it may have been trained on another base.
            pinned: keep it in memory, also if other adapters need the room that `adapter_bytes` leaves.

        Returns:
            The adapter; its `notes` are messages for the user.

        Raises:
            InputError: the name is taken or invalid; the base, task or labels differ; no strategy owns the type; a part
                of the model is neither in the base's checkpoint nor in the adapter; it does not fit a base that it
                does not record.
            CorruptError: the folder is damaged or altered, or its tensors do not fit its own base.
        """
        return self.engine.load(name, directory, allow_other_base=allow_other_base, pinned=pinned)

    def use(self, name: str | None) -> None:
        """Use one adapter from now on; None: the base alone.

        Raises:
            InputError: no adapter of that name is loaded.
        """
        self.engine.use(name)
        self._current = self._own.name = name

    def unload(self, name: str) -> None:
        """Remove an adapter; after the last one, the model's modules are the base's own again.

        Raises:
            InputError: no adapter of that name is loaded.
            PluginError: the adapter's owner left modules on the model.
        """
        self.engine.unload(name)
        if self.current == name:
            self._own.name = None
        if self._current == name:
            self._current = None

    def alias(self, name: str, target: str) -> None:
        """Let a name, new or taken, stand for the adapter that `target` stands for; running calls keep theirs.

        Raises:
            InputError: the name is invalid, or no adapter is called `target`.
        """
        self.engine.alias(name, target)

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapters: Sequence[str | Mapping[str, float] | None] | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        stream: Callable[[int, str], None] | None = None,
    ) -> list[Generated]:
        """Generate answers to prompts, in one batch even with different adapters, and with calls of other threads.

        Args:
            prompts: texts, lists of chat messages, or token ids. A text to an adapter that was trained on messages is
                logged once as a warning.
            adapters: adapter name per prompt, weights of several adapters whose sum answers, such as
                {"a": 0.7, "b": 0.3}, or None for the base; absent: the adapter in use for all prompts.
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
        if isinstance(prompts, str):
            raise InputError("prompts: is one text; pass a list of prompts.")
        if adapters is None:
            adapters = [self.current] * len(prompts)
        elif len(adapters) != len(prompts):
            raise InputError(
                f"{len(prompts)} prompts but {len(adapters)} adapters: pass one (or None) for each prompt."
            )
        names = [leading(adapter) for adapter in adapters]
        encoded = [
            self._encode(p, name, f"prompt {i}") for i, (p, name) in enumerate(zip(prompts, names, strict=True), 1)
        ]
        pieces: queue.SimpleQueue[tuple[int, str | None]] = queue.SimpleQueue()
        answers: list[Answer] = []
        try:
            for number, (ids, adapter) in enumerate(zip(encoded, adapters, strict=True)):
                sampling = Sampling(
                    max_new_tokens, temperature, top_p, seed=(seed, number), stop=tuple(stop),
                    stop_ids=tuple(self._stop_ids(adapter)),
                )  # fmt: skip
                listener = None if stream is None else partial(_pass_on, pieces, number)
                where = f"prompt {number + 1}"
                answers.append(self.engine.submit(ids, adapter, sampling, listener=listener, stream=False, where=where))
            left = len(answers) if stream is not None else 0
            while left:
                number, piece = pieces.get()
                if piece is None:
                    left -= 1
                elif stream is not None:
                    stream(number, piece)
            return [answer.result() for answer in answers]
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise

    def _stop_ids(self, adapter: str | Mapping[str, float] | None) -> set[int]:
        names = [adapter] if isinstance(adapter, str) else list(adapter or ())
        manifests = [self.adapter(name).manifest for name in names]
        return {token for manifest in manifests if manifest is not None for token in manifest.stop_ids}

    def logits(self, prompts: Sequence[Prompt | Example]) -> Tensor:
        """Return the logits after each prompt with the adapter in use, [prompts, vocabulary or classes] fp32, CPU."""
        name = self.current
        rows = [
            p if isinstance(p, Example) else self._encode(p, name, f"prompt {number}")
            for number, p in enumerate(prompts, 1)
        ]
        dtype = torch.float32 if name is None else self.base.dtype

        def compute() -> Tensor:
            for number, row in enumerate(rows, 1):
                if not isinstance(row, Example):
                    self.engine.check_tokens(row, name, f"prompt {number}")
            probes = [row if isinstance(row, Example) else as_probe(row) for row in rows]
            return measure(self.task_plugin, self.model, self.tokenizer, probes, dtype)

        return self.engine.with_adapter(name, compute)

    def measure(self, probes: Sequence[Example]) -> Tensor:
        """Return the logits at each probe's position with the adapter in use, [probes, …] fp32 on the CPU."""
        return self.engine.with_adapter(
            self.current, lambda: measure(self.task_plugin, self.model, self.tokenizer, probes, self.base.dtype)
        )

    def respond(self, texts: Sequence[str]) -> list[Any]:
        """Return the task's answers to texts with the adapter in use, as JSON values; see `Task.respond`.

        Raises:
            InputError: the task does not answer texts, or a text cannot be used.
        """
        task, labels, dtype = self.task_plugin, self._labels(), self.base.dtype
        device = torch.device(self.base.device).type

        def compute() -> list[Any]:
            narrow = dtype in (torch.bfloat16, torch.float16)
            with (
                torch.no_grad(),
                torch.autocast(device, dtype=dtype, enabled=narrow),
                attribute_errors(task, "respond"),
            ):
                return task.respond(self.model, self.tokenizer, texts, labels)

        return self.engine.with_adapter(self.current, compute)

    def classify(self, texts: Sequence[str]) -> list[Classified]:
        """Classify texts with the adapter in use.

        Raises:
            InputError: the pool's task is not sequence classification.
        """
        if self.task != "sequence-classification":
            raise InputError(f"the pool's task is {self.task}: open it with task='sequence-classification'.")
        return [Classified(**answer) for answer in self.respond(texts)]

    def merge(self, name: str) -> None:
        """Merge an adapter permanently into the weights of an unquantised base, and remove it.

        Raises:
            InputError: the base is quantised, other adapters are loaded, or the adapter's type cannot be merged.
        """
        self.engine.find(name)
        if self.base.quantization != "none":
            raise InputError(
                "an adapter can only be merged into unquantised weights: open the base with quantization none."
            )
        self.use(None)
        self.engine.merge(name)

    def _labels(self) -> list[str]:
        manifest = self.adapter(self.current).manifest if self.current is not None else None
        if manifest is not None and manifest.labels:
            return manifest.labels
        names: dict[int, str] = self.model.config.id2label  # type: ignore[union-attr,assignment]
        return [names[i] for i in range(len(names))]

    def _encode(self, prompt: Prompt, name: str | None, where: str = "prompt") -> list[int]:
        if isinstance(prompt, str):
            self._warn_of_text(name, where)
            return encode_prompt(self.tokenizer, prompt)
        if prompt and not all(isinstance(part, Mapping) for part in prompt):
            for part in prompt:
                if isinstance(part, bool) or not isinstance(part, int | np.integer):
                    raise InputError(f"{where}: {part!r} is neither a token id nor a message.")
            return [int(part) for part in prompt]  # type: ignore[arg-type]
        manifest = self.adapter(name).manifest if name is not None else None
        chat = (manifest.chat if manifest else None) or ChatRecord()
        return encode_chat(self.tokenizer, prompt, chat.options, chat.template, chat.date)  # type: ignore[arg-type]

    def _warn_of_text(self, name: str | None, where: str) -> None:
        """Warn once of an adapter that was trained on messages and is sent plain text."""
        saved = self.adapter(name) if name is not None else None
        if saved is None or saved.manifest is None or not saved.manifest.on_messages or saved.directory in self._warned:
            return
        self._warned.add(saved.directory)
        log.warning(
            "adapter '%s' was trained on messages, but %s is plain text: pass [{'role': 'user', 'content': …}]",
            name,
            where,
        )


def load_for_task(
    base: str | Path,
    quantization: str | None,
    task: Task,
    labels: list[str],
    *,
    precision: str,
    device: str,
    double_quantization: bool,
) -> Base:
    """Load a base with the model class and the tokenizer that a task needs; see `AdapterPool`."""
    chosen, dtype, _ = pick_device_precision(device, precision)
    read_base(task, resolve(base))
    return load_base(
        base, quantization, task.auto_class, dtype, chosen, double_quantization=double_quantization,
        model_kwargs=task.model_kwargs(labels), needs_tokenizer=task.needs_tokenizer, unused=task.unused_modules,
    )  # fmt: skip


def read_base(task: Task, folder: Path) -> None:
    """Let a task read its settings from a base's folder; see `Task.read_base`."""
    with attribute_errors(task, "read_base"):
        task.read_base(folder)


def leading(adapter: str | Mapping[str, float] | None) -> str | None:
    """Return the adapter by which messages are rendered: of several, the one with the largest weight."""
    if isinstance(adapter, Mapping):
        check_weights(adapter)
        return max(adapter, key=lambda name: abs(adapter[name]))
    return adapter


def _pass_on(pieces: queue.SimpleQueue[tuple[int, str | None]], number: int, piece: str | None) -> None:
    pieces.put((number, piece))
