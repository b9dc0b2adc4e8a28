"""Fields of a recipe that only one kind of device supports. Imports no torch."""

from __future__ import annotations

from importlib import metadata

from budwood.errors import InputError
from budwood.recipe.schema import Recipe


def stated_kind(device: str) -> str | None:
    """Return cpu or cuda for a recipe's `base.device` if the text, or the build of torch, decides; otherwise None."""
    if device == "auto":
        return "cpu" if metadata.version("torch").endswith("+cpu") else None
    return device.partition(":")[0]


def check_device(recipe: Recipe, kind: str | None) -> None:
    """Refuse fields that would change nothing on a run's device.

    Args:
        kind: cpu or cuda; None, if it is not known yet: nothing is refused.

    Raises:
        InputError: activations are offloaded on the CPU, or ops are compiled on a GPU.
    """
    if recipe.train.activation_offloading and kind == "cpu":
        raise InputError(
            f"{recipe.where('train', 'activation_offloading')}: train.activation_offloading: on the CPU, activations "
            "are in the host's memory already: leave it out, or train on a GPU."
        )
    if recipe.train.compile and kind == "cuda":
        raise InputError(
            f"{recipe.where('train', 'compile')}: train.compile: compiles what a CPU computes; on cuda, Triton's "
            "kernels compute it already: leave it out."
        )
