"""Which modules an adapter goes on."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import regex
from pydantic import AfterValidator, Field

from budwood.errors import InputError, did_you_mean
from budwood.model.quantizers import quantizer_of
from budwood.untrusted.redaction import shorten

if TYPE_CHECKING:  # the types of options are here too, and are checked before torch is imported
    from torch import nn

SECONDS = 5.0
"""For a regular expression on one name."""
LAYER_INDEX = re.compile(r"\.(\d+)\.")


def _targets_given(value: str | list[str]) -> str | list[str]:
    if not value or (isinstance(value, list) and not all(value)):
        raise ValueError("must name at least one module")
    if isinstance(value, str) and value != "all-linear":
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is not a valid regular expression: {error}") from error
    return value


def _layers_positive(value: list[int]) -> list[int]:
    if min(value) < 0:
        raise ValueError("layer indices start at 0")
    return value


def _named_once(value: list[str]) -> list[str]:
    if len(set(value)) != len(value):
        raise ValueError("modules_to_save names a module twice")
    return value


Targets = Annotated[
    str | list[str],
    AfterValidator(_targets_given),
    Field(description="all-linear, a list of module names, or one regular expression for whole names"),
]
"""Option type: which modules an adapter goes on; see `match_targets`."""
Layers = Annotated[
    Annotated[list[int], Field(min_length=1), AfterValidator(_layers_positive)] | None,
    Field(description="indices of the layers to adapt; all if absent"),
]
"""Option type: in which layers."""
ModulesToSave = Annotated[
    list[str],
    AfterValidator(_named_once),
    Field(description="modules that train whole and are saved with the adapter"),
]
"""Option type: what trains whole beside it; see `match_modules`."""


def linear_modules(model: nn.Module) -> list[str]:
    """Names of the model's linear modules, however they are stored, without its output head."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    heads = {"score", "classifier"}
    found = []
    inside = " "  # path of the adapted layer that we are in: its parts are none of the model's modules
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside = f"{name}."
            module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        if quantizer_of(module) is not None and module is not head and name.split(".")[0] not in heads:
            found.append(name)
    return found


def match_targets(model: nn.Module, targets: str | list[str], layers: list[int] | None) -> list[str]:
    """Return the full names of the linear modules that `targets` and `layers` select.

    Raises:
        InputError: a target or a layer matches nothing, with the nearest names; or a target is no linear module.
    """
    linear = linear_modules(model)
    if targets == "all-linear":
        chosen = linear
    elif isinstance(targets, str):
        chosen = [name for name in linear if matches(targets, name)]
        if not chosen:
            raise InputError(
                f"targets: the regular expression '{targets}' matches none of the linear modules, "
                f"whose full names are like '{linear[0] if linear else ''}'."
            )
    else:
        chosen = []
        for target in targets:
            hits = [name for name in linear if name == target or name.endswith("." + target)]
            if not hits:
                _refuse(model, target, linear)
            chosen += [name for name in hits if name not in chosen]
    if layers is not None:
        indices = {int(m.group(1)) for m in map(LAYER_INDEX.search, linear) if m}
        for layer in (layer for layer in layers if layer not in indices):
            raise InputError(f"layers: there is no layer {layer}; the model has {min(indices)} to {max(indices)}.")
        chosen = [n for n in chosen if (m := LAYER_INDEX.search(n)) and int(m.group(1)) in layers]
    if not chosen:
        raise InputError("targets and layers together match no linear module.")
    return chosen


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression, which a stranger may have written, matches all of a module's name.

    Raises:
        InputError: it is none, or takes longer than 5 s: nested repetitions can take for ever.
    """
    try:
        return regex.fullmatch(pattern, name, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise InputError(f"the regular expression '{shorten(pattern)}' takes too long on '{shorten(name)}'.") from error
    except (regex.error, RecursionError, MemoryError) as error:
        raise InputError(f"'{shorten(pattern)}' is no regular expression: {error}.") from error


def match_modules(model: nn.Module, names: list[str]) -> None:
    """Check that each of `names` is the end of a module's name.

    Raises:
        InputError: one is not, with the nearest name.
    """
    known = [name for name, _ in model.named_modules() if name]
    for wanted in names:
        if not any(name == wanted or name.endswith("." + wanted) for name in known):
            last = sorted({name.rpartition(".")[2] for name in known if not name.rpartition(".")[2].isdigit()})
            raise InputError(f"modules_to_save: the model has no module '{wanted}'.{did_you_mean(wanted, last)}")


def _refuse(model: nn.Module, target: str, linear: list[str]) -> None:
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    if any(name == target or name.endswith("." + target) for name, _ in model.named_modules()):
        raise InputError(f"targets: '{target}' is not a linear module; linear ones are {', '.join(last)}.")
    raise InputError(
        f"targets: no linear module is called '{target}'.{did_you_mean(target, last)} There are {', '.join(last)}."
    )
