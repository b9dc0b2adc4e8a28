"""Whether a saved adapter fits an open base: its task and classes; differences that matter are noted."""

from __future__ import annotations

from typing import Any

from budwood.adapters.peft_config import PREFIX
from budwood.adapters.store import SavedAdapter, template_hash, tokenizer_hash
from budwood.errors import InputError
from budwood.model.base import Base


def check_task(saved: SavedAdapter, task: str, base: Base) -> None:
    """Reject a different task or number of classes; note a different tokenizer, template or quantization.

    Raises:
        InputError: the adapter is for another task or number of classes, or lacks what the base's checkpoint lacks.
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
        saved.notes.append(
            f"was trained with base quantization {trained} and is used with {current}: answers may differ."
        )
