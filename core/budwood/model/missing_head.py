"""Refuses a checkpoint without the language-model head that a task needs, from its header."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from budwood.errors import BudwoodError, InputError
from budwood.model.checkpoint import read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_head(name: str, model: PreTrainedModel, auto_class: str, folder: Path) -> None:
    """Refuse a checkpoint without the language-model head that the class needs, such as that of a sentence encoder.

    Args:
        model: its modules, without weights.
        folder: that of the checkpoint; without safetensors files, nothing is checked.

    Raises:
        InputError: it has no tensor of a head that has weights of its own.
    """
    if auto_class == "AutoModelForCausalLM" or model.get_output_embeddings() is None or model.base_model is model:
        return  # a decoder without its head is incomplete, which loading reports
    try:
        stored = read_tensors(folder) if any(folder.glob("*.safetensors")) else {}
    except BudwoodError:  # `check_base` reports it
        return
    if not stored:
        return
    shared = {id(parameter) for parameter in model.base_model.parameters()}
    configs = (model.config, model.config.get_text_config())
    if any(getattr(config, "tie_word_embeddings", False) for config in configs):
        shared |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    parts = {part for key in stored for part in key.split(".")}
    for head, module in model.named_children():
        if head != model.base_model_prefix and head not in parts and {*map(id, module.parameters())} - shared:
            raise InputError(
                f"base '{name}': its checkpoint has no '{head}', the head that {auto_class} predicts tokens with: take "
                f"a base that has one, or add an untrained one with transformers, {auto_class}.from_pretrained(…)."
                "save_pretrained(…), and train it whole (modules_to_save)."
            )
