"""Whether a saved adapter fits an open base: task, classes and tensors; differences that matter are noted."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from budwood.adapters.manifest import template_hash, tokenizer_hash
from budwood.adapters.peft_config import PREFIX, MisfitError
from budwood.adapters.store import SavedAdapter
from budwood.errors import BudwoodError, CorruptError, InputError
from budwood.model.base import Base
from budwood.model.task import Task


def mismatch(saved: SavedAdapter, fingerprint: str) -> type[BudwoodError]:
    """Return the class of the error for an adapter that fits its base badly, or computes something else than recorded.

    On its own base the adapter is corrupt. On one that it does not record, or that `--allow-other-base` allowed, it may
    be the wrong base.
    """
    own = saved.manifest is not None and saved.manifest.base.fingerprint == fingerprint
    return CorruptError if own else InputError


def check_task(saved: SavedAdapter, task: str, base: Base) -> None:
    """Reject a different task or number of classes; note a different tokenizer, template or quantization.

    Raises:
        InputError: the adapter is for another task or number of classes, lacks what the base's checkpoint lacks, or
            belongs to another quantisation.
    """
    lacking = [key for key in base.new if PREFIX + key not in saved.infos]
    if lacking:
        raise InputError(
            f"{saved.directory}: holds no '{lacking[0]}', nor does the base's checkpoint, so it would be random: train "
            "the adapter again, or add it to the base."
        )
    manifest = saved.manifest
    if manifest is None:
        return
    config: Any = base.model.config
    if manifest.task != task:
        raise InputError(f"{saved.directory}: was trained for the task {manifest.task}, but the pool's task is {task}.")
    if manifest.labels and len(manifest.labels) != config.num_labels:
        raise InputError(
            f"{saved.directory}: has {len(manifest.labels)} labels, but the pool was opened with {config.num_labels}."
        )
    if manifest.tokenizer and manifest.tokenizer != tokenizer_hash(base.tokenizer):
        saved.notes.append("the base's tokenizer is not the one it was trained with.")
    own_template = manifest.chat is not None and manifest.chat.template is not None
    if manifest.template and not own_template and manifest.template != template_hash(base.tokenizer):
        saved.notes.append("the base's chat template is not the one it was trained with.")
    if manifest.base.quantization != base.quantization:
        trained, current = manifest.base.quantization, base.quantization
        if manifest.needs_quantization:
            raise InputError(
                f"{saved.directory}: makes up for the error of its base in {trained}, and the base is in {current}: "
                f"open the base with quantization {trained}."
            )
        saved.notes.append(
            f"was trained with base quantization {trained} and is used with {current}: answers may differ."
        )


def check_task_options(saved: SavedAdapter, task: Task) -> None:
    """Reject an adapter whose task's options differ from `task`'s in more than training.

    Raises:
        InputError: the message names the first option that differs.
    """
    if saved.manifest is None:
        return
    theirs, ours = saved.manifest.task_options, task.options.model_dump(mode="json", exclude_none=True)
    for name in sorted({*theirs, *ours} - {*task.training_options}):
        if theirs.get(name) != ours.get(name):
            raise InputError(
                f"{saved.directory}: was trained with {task.name}.{name} = {theirs.get(name)!r}, but the pool was "
                f"opened with {ours.get(name)!r}: use them apart."
            )


def copy_adapter_tensors(slots: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Copy an adapter's tensors to the model, after a check that keys and shapes match exactly.

    Args:
        slots: the model's live tensor for each key on disk.
        tensors: the adapter's tensors.

    Raises:
        MisfitError: see `check_adapter_tensors`; nothing is copied then.
    """
    check_adapter_tensors({key: tuple(slot.shape) for key, slot in slots.items()}, tensors)
    for key, slot in slots.items():
        slot.copy_(tensors[key])


def check_adapter_tensors(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Any]) -> None:
    """Check that an adapter's tensors are exactly those that its config and the model require.

    Call this before modifying the model or allocating memory.

    Args:
        expected: shape of every tensor, keyed as on disk.
        tensors: the adapter's tensors; anything with a `shape`.

    Raises:
        MisfitError: a tensor is missing, unexpected (the nearest expected key is named), or of another shape.
    """
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    if missing or unexpected:
        parts = []
        if unexpected:
            near = difflib.get_close_matches(unexpected[0], missing[:2000], n=1, cutoff=0.5)
            parts.append(f"{_abbreviated(unexpected)} not expected" + (f" (nearest: '{near[0]}')" if near else ""))
        if missing:
            parts.append(f"{_abbreviated(missing)} missing")
        raise MisfitError(f"the adapter's tensors do not fit config and base: {'; '.join(parts)}.")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != tuple(shape):
            actual = list(tensors[name].shape)
            raise MisfitError(f"the adapter's tensor '{name}' is {actual}; config and base require {list(shape)}.")


def _abbreviated(names: list[str]) -> str:
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
