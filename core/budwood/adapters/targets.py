"""Resolution of an adapter's targets to modules of the model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import regex
from pydantic import AfterValidator, Field

from budwood.errors import InputError, did_you_mean
from budwood.model.quantizers import quantizer_of
from budwood.untrusted.redaction import shorten

if TYPE_CHECKING:  # option types are defined here too, and are checked before torch is imported
    from torch import nn

SECONDS = 5.0
"""Time limit for matching a regular expression against one name."""
LAYER_INDEX = re.compile(r"\.(\d+)\.")


def _check_targets(value: str | list[str]) -> str | list[str]:
    if not value or (isinstance(value, list) and not all(value)):
        raise ValueError("must name at least one module")
    if isinstance(value, str) and value != "all-linear":
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is not a valid regular expression: {error}") from error
    return value


def _check_layers(value: list[int]) -> list[int]:
    if min(value) < 0:
        raise ValueError("layer indices start at 0")
    return value


def _check_unique(value: list[str]) -> list[str]:
    if len(set(value)) != len(value):
        raise ValueError("modules_to_save names a module twice")
    return value


Targets = Annotated[
    str | list[str],
    AfterValidator(_check_targets),
    Field(description="all-linear, a list of module names, or one regular expression that matches full names"),
]
"""Option type: the modules to adapt; see `match_targets`."""
Layers = Annotated[
    Annotated[list[int], Field(min_length=1), AfterValidator(_check_layers)] | None,
    Field(description="indices of the layers to adapt; all if absent"),
]
"""Option type: the layers to adapt."""
ModulesToSave = Annotated[
    list[str],
    AfterValidator(_check_unique),
    Field(description="modules that are trained completely and saved with the adapter"),
]
"""Option type: modules that are trained completely; see `match_modules`."""


def linear_modules(model: nn.Module) -> list[str]:
    """Return the names of the model's linear modules, in any storage, without its output head."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    heads = {"score", "classifier"}
    names = []
    wrapper = " "  # prefix of the current adapted layer, whose children are not modules of the model itself
    for name, module in model.named_modules():
        if name.startswith(wrapper):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            wrapper = f"{name}."
            module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        if quantizer_of(module) is not None and module is not head and name.split(".")[0] not in heads:
            names.append(name)
    return names


def match_targets(model: nn.Module, targets: str | list[str], layers: list[int] | None) -> list[str]:
    """Return the full names of the linear modules that `targets` and `layers` select.

    Raises:
        InputError: a target or a layer matches nothing (the nearest names are listed), or is not a linear module.
    """
    linear = linear_modules(model)
    if targets == "all-linear":
        chosen = linear
    elif isinstance(targets, str):
        chosen = [name for name in linear if matches(targets, name)]
        if not chosen:
            raise InputError(
                f"targets: the regular expression '{targets}' matches none of the linear modules, "
                f"whose full names look like '{linear[0] if linear else ''}'."
            )
    else:
        chosen = []
        for target in targets:
            matching = [name for name in linear if name == target or name.endswith("." + target)]
            if not matching:
                _reject_target(model, target, linear)
            chosen += [name for name in matching if name not in chosen]
    if layers is not None:
        indices = {int(m.group(1)) for m in map(LAYER_INDEX.search, linear) if m}
        for layer in (layer for layer in layers if layer not in indices):
            raise InputError(f"layers: there is no layer {layer}; the model has {min(indices)} to {max(indices)}.")
        chosen = [n for n in chosen if (m := LAYER_INDEX.search(n)) and int(m.group(1)) in layers]
    if not chosen:
        raise InputError("targets and layers together match no linear module.")
    return chosen


def matches(pattern: str, name: str) -> bool:
    """Whether an untrusted regular expression matches a module's full name.

    Raises:
        InputError: it is invalid, or takes longer than 5 s, as nested repetitions can.
    """
    try:
        return regex.fullmatch(pattern, name, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise InputError(f"the regular expression '{shorten(pattern)}' takes too long on '{shorten(name)}'.") from error
    except (regex.error, RecursionError, MemoryError) as error:
        raise InputError(f"'{shorten(pattern)}' is not a regular expression: {error}.") from error


def match_modules(model: nn.Module, names: list[str]) -> None:
    """Check that each of `names` matches the end of a module's name.

    Raises:
        InputError: one does not; the nearest name is suggested.
    """
    known = [name for name, _ in model.named_modules() if name]
    for ending in names:
        if not any(name == ending or name.endswith("." + ending) for name in known):
            leaves = sorted({name.rpartition(".")[2] for name in known if not name.rpartition(".")[2].isdigit()})
            raise InputError(f"modules_to_save: the model has no module '{ending}'.{did_you_mean(ending, leaves)}")


def _reject_target(model: nn.Module, target: str, linear: list[str]) -> None:
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    if any(name == target or name.endswith("." + target) for name, _ in model.named_modules()):
        raise InputError(f"targets: '{target}' is not a linear module; linear modules: {', '.join(leaves)}.")
    raise InputError(
        f"targets: no linear module is called '{target}'.{did_you_mean(target, leaves)} "
        f"Linear modules: {', '.join(leaves)}."
    )
