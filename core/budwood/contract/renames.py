"""What keys of other trainers are called in a recipe: Axolotl's, LLaMA-Factory's, TRL's and transformers' Trainer's."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

_STEP = "train.batch_examples: the examples of an optimizer step, over all accumulation steps"
_EPOCHS, _RATE, _LENGTH, _DATA = "train.epochs", "train.learning_rate", "data.max_length", "data.train"
_DEVICES = "train.parallel, with torchrun or accelerate launch"

NAMES: dict[str, str] = {
    "base_model": "base.model", "model_name_or_path": "base.model", "model_name": "base.model", "model": "base.model",
    "load_in_4bit": "base.quantization: nf4", "load_in_8bit": "base.quantization: int8",
    "quantization_bit": "base.quantization: nf4 or int8", "quantization_method": "base.quantization",
    "bnb_4bit_quant_type": "base.quantization", "bnb_4bit_use_double_quant": "base.double_quantization",
    "double_quantization": "base.double_quantization", "resize_token_embeddings_to_32x": "base.resize_embeddings",
    "resize_vocab": "base.resize_embeddings", "trust_remote_code": "base.trust_remote_code",
    "dataset": _DATA, "datasets": _DATA, "dataset_name": _DATA, "train_file": _DATA, "train_dataset": _DATA,
    "test_datasets": "data.eval", "eval_dataset": "data.eval", "val_set_size": "data.eval", "val_size": "data.eval",
    "validation_file": "data.eval",
    "cutoff_len": _LENGTH, "sequence_len": _LENGTH, "max_seq_length": _LENGTH, "max_seq_len": _LENGTH,
    "max_length": _LENGTH, "model_max_length": _LENGTH,
    "train_on_inputs": "data.loss_on: all", "train_on_prompt": "data.loss_on: all",
    "completion_only_loss": "data.loss_on", "assistant_only_loss": "data.loss_on", "mask_history": "data.loss_on: last",
    "roles_to_train": "data.loss_on", "chat_template": "data.chat_template",
    "num_epochs": _EPOCHS, "num_train_epochs": _EPOCHS, "epochs": _EPOCHS,
    "max_steps": "train.steps", "lr": _RATE, "learning_rate": _RATE,
    "gradient_accumulation_steps": _STEP, "micro_batch_size": _STEP, "batch_size": _STEP, "train_batch_size": _STEP,
    "per_device_train_batch_size": _STEP,
    "weight_decay": "train.weight_decay", "lr_scheduler": "train.schedule", "lr_scheduler_type": "train.schedule",
    "warmup_steps": "train.warmup", "warmup_ratio": "train.warmup", "max_grad_norm": "train.clip",
    "gradient_clipping": "train.clip", "bf16": "train.precision: bf16", "fp16": "train.precision: fp16",
    "torch_dtype": "train.precision", "gradient_checkpointing": "train.gradient_checkpointing",
    "eval_steps": "train.eval_every", "evals_per_epoch": "train.eval_every", "save_steps": "train.save_every",
    "saves_per_epoch": "train.save_every", "save_total_limit": "train.keep_checkpoints",
    "early_stopping_patience": "train.patience", "report_to": "train.trackers", "seed": "train.seed",
    "deepspeed": _DEVICES, "fsdp": _DEVICES, "fsdp_config": _DEVICES, "output_dir": "output",
    "finetuning_type": "strategies", "rl": "strategies", "stage": "strategies",
    "optim": "strategies, such as adamw-8bit; without one it is AdamW",
    "optimizer": "strategies, such as adamw-8bit; without one it is AdamW",
    "r": "lora.rank", "lora_r": "lora.rank", "lora_rank": "lora.rank", "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout", "target_modules": "lora.targets", "lora_target": "lora.targets",
    "lora_target_modules": "lora.targets", "lora_target_linear": "lora.targets",
    "lora_modules_to_save": "lora.modules_to_save", "additional_target": "lora.modules_to_save",
    "use_dora": "lora.dora", "peft_use_dora": "lora.dora", "use_rslora": "lora.rslora",
    "peft_use_rslora": "lora.rslora", "loraplus_lr_ratio": "lora.learning_rate_ratio",
}  # fmt: skip
"""By key: the field of a recipe, or the strategy and its option; after a colon its value, or what it means here."""


def renamed(key: str, known: Collection[str], model: type[BaseModel], place: Sequence[str | int] = ()) -> str:
    """Return a sentence about where a recipe has what an unknown key asks for; "" if that is not known.

    Args:
        known: the fields of the key's section.
        model: the recipe's model, or that of a strategy's options.
        place: the location of the section in it.
    """
    if own := getattr(model, "other_names", {}).get(key):
        return f" Did you mean '{own}'?"
    target = NAMES.get(key.lower(), "")
    section, _, name = target.rpartition(".")
    is_here = section == ".".join(map(str, place)) or section.partition(".")[0] not in model.model_fields
    if is_here and name in known:
        return f" Did you mean '{name}'?"
    if section == "lora":
        return f" In a recipe, this is an option of the strategy: `- lora: {{{name}: …}}`."
    target = target or next(_elsewhere(model, key), "")
    return f" In a recipe, this is {target}." if target else ""


def _elsewhere(model: type[BaseModel], key: str) -> Iterator[str]:
    """Yield the fields of sections that are called `key`."""
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            section: Any = kind
            if isinstance(section, type) and issubclass(section, BaseModel) and key in section.model_fields:
                yield f"{name}.{key}"
