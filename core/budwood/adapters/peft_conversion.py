"""What PEFT makes of target modules that had other names in transformers 4, and how a file says what it means.

When PEFT adds a LoRA adapter to some mixtures of experts, it takes `gate_proj`, `up_proj`, `down_proj` and `gate` for
the experts of transformers 4, even where they are linears of a shared expert or of a dense layer: it adapts the fused
experts in their place. There is no name of a module that it leaves alone, but `target_parameters` can name a linear's
weight, for which PEFT's file has the same keys and shapes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

_lock = threading.RLock()
WEIGHT = ".weight"


def moved_targets(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the target modules that PEFT would replace by experts, of a LoRA adapter on this model."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    if not getattr(getattr(model, "config", None), "model_type", None):
        return []
    moved = set()
    for last in {name.rpartition(".")[2] for name in names}:
        config: Any = LoraConfig(target_modules=[last])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it is one of several that only move together
            moved.add(last)
        if last not in config.target_modules:
            moved.add(last)
    return [name for name in names if name.rpartition(".")[2] in moved]


def name_moved(model: nn.Module, config: LoraConfig) -> bool:
    """Make a config for PEFT's file name the weights of linears that PEFT would replace; return whether there are any.

    PEFT has no dropout for parameters, so the file has none; a run that continues the adapter sets its own.
    """
    moved = moved_targets(model, sorted(config.target_modules or ()))
    if not moved:
        return False
    config.target_modules = sorted(set(config.target_modules or ()) - set(moved))
    config.target_parameters = [*(config.target_parameters or ()), *(f"{name}{WEIGHT}" for name in moved)]
    config.lora_dropout = 0.0
    return True


@contextmanager
def exact_targets() -> Iterator[None]:
    """Make PEFT add adapters to the modules that a config names, without its conversion."""
    from peft.utils import transformers_weight_conversion as peft

    with _lock:
        own = peft.convert_peft_config_for_transformers
        peft.convert_peft_config_for_transformers = lambda *args, **kwargs: None
        try:
            yield
        finally:
            peft.convert_peft_config_for_transformers = own
