"""Resolution of an adapter's targets to modules of the model."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import regex
from pydantic import AfterValidator, Field

from budwood.errors import InputError, did_you_mean
from budwood.model.quantizers import quantizer_of
from budwood.untrusted.redaction import shorten

if TYPE_CHECKING:  # option types are defined here too, and are checked before torch is imported
    from torch import nn

    from budwood.model.base import Base
    from budwood.model.task import Task

SECONDS = 5.0
"""Time limit for matching a regular expression against one name."""
WEIGHT_READ = re.compile(r"(?<!isinstance\()self\.(\w+)\.weight\b(?!\s*=|\[|\.(?:dtype|device|shape|size|data|to\b|_))")
"""A child's weight in the code of a module, other than its dtype, its shape, a part of it, or an assignment."""
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
    Field(
        description="all-linear (without heads and poolers), a list of module names or last components of names, or "
        "one regular expression that matches full names"
    ),
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
    Field(
        description="modules that train whole and are saved with the adapter, by name or last components of names; "
        "heads and modules that the checkpoint lacks are always included"
    ),
]
"""Option type: modules that are trained completely; see `match_modules`."""


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the path and module of each of the base's own modules: without adapters, and what they put around it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    from budwood.adapters.tokens import TokenRows

    wrapper = " "  # prefix of the current adapted layer, whose children are not modules of the model itself
    for name, module in model.named_modules():
        if name.startswith(wrapper):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper | TokenRows):
            wrapper = f"{name}."
            if isinstance(module, TokenRows):
                module = module.base_layer
            else:
                module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        yield name, module


def linear_modules(model: nn.Module) -> list[str]:
    """Return the names of the linear modules, however they are stored, with the heads."""
    return [name for name, module in base_modules(model) if quantizer_of(module) is not None]


def expert_modules(model: nn.Module) -> list[str]:
    """Return the names of the projections of a mixture's experts, which stand for the linears of all experts."""
    from budwood.model.quantizers.experts import experts_of

    return [name for name, module in base_modules(model) if experts_of(module)]


def all_linear(model: nn.Module, experts: bool = False) -> list[str]:
    """Return the names of the linear modules of the model's body: without its heads, a pooler, and routers.

    Those of which the model reads the weight itself are left out too; see `reads_weight`.

    Args:
        experts: with the projections of a mixture's experts.
    """
    from budwood.model.quantizers.experts import experts_of

    routers = {f"{owner}.{name}" for owner in _mixtures(model) for name in ("gate", "router")}
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, None) if prefix else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return [
        name
        for name, module in base_modules(model)
        if (quantizer_of(module) is not None or (experts and experts_of(module)))
        and module is not head
        and not routers & {name, name.rpartition(".")[0]}
        and (body is None or name.startswith(f"{prefix}."))
        and not {"score", "classifier", "pooler"} & set(name.split("."))
        and not reads_weight(model, name)
    ]


def reads_weight(model: nn.Module, name: str) -> bool:
    """Return whether the code of a linear's parent takes its weight without calling it, as fused kernels do.

    There, an adapter around the linear has no effect and gets no gradient. Mamba's `dt_proj` is one.
    """
    parent, _, child = name.rpartition(".")
    cls: Any = type(model.get_submodule(parent))
    return child in _weights_read(cls)


@functools.cache
def _weights_read(cls: type) -> frozenset[str]:
    """Return the names of the children of which a module's code takes the whole weight."""
    try:
        lines = inspect.getsource(cls).splitlines()
    except (OSError, TypeError):  # there is no file
        return frozenset()
    found = [match for line in lines if not line.lstrip().startswith("init.") for match in WEIGHT_READ.finditer(line)]
    return frozenset(match[1] for match in found)


def _mixtures(model: nn.Module) -> set[str]:
    """Return the paths of modules that hold a router beside their experts."""
    owners = {name.rpartition(".")[0] for name in expert_modules(model)}
    return {owner.rpartition(".")[0] for owner in owners}


def match_targets(
    model: nn.Module,
    targets: str | list[str],
    layers: list[int] | None,
    whole: Collection[str] = (),
    experts: bool = False,
) -> list[str]:
    """Return the full names of the linear modules that `targets` and `layers` select.

    Args:
        targets: all-linear (see `all_linear`); names of modules, or the last components of names; or a regular
            expression for whole names.
        layers: indices of the layers; None: all.
        whole: full names of modules that train whole, and are left out.
        experts: whether the method adapts the projections of a mixture's experts, which count as linears then.

    Raises:
        InputError: a target names experts and the method does not adapt them; a target or a layer matches nothing (the
            nearest names are listed), or is not a linear module.
    """
    linear, fused = linear_modules(model), expert_modules(model)
    if experts:
        either = {*linear, *fused}
        linear = [name for name, _ in base_modules(model) if name in either]
    if targets == "all-linear":
        chosen = all_linear(model, experts)
    elif isinstance(targets, str):
        chosen = [name for name in linear if matches(targets, name)]
        if not chosen:
            _reject_experts(f"the regular expression '{targets}'", [n for n in fused if matches(targets, n)])
            raise InputError(
                f"targets: the regular expression '{targets}' matches none of the linear modules, "
                f"whose full names look like '{linear[0] if linear else ''}'."
            )
        _reject_embedding(model, targets)
    else:
        chosen = []
        for target in targets:
            matching = [name for name in linear if ends_with(name, target)]
            if not matching:
                _reject_experts(f"'{target}'", [name for name in fused if ends_with(name, target)])
                _reject_container(model, target, experts)
                _reject_target(model, target, linear)
            chosen += [name for name in matching if name not in chosen]
    chosen = [name for name in chosen if not _lies(name, whole)]
    if layers is not None:
        indices = {int(m.group(1)) for m in map(LAYER_INDEX.search, linear) if m}
        for layer in (layer for layer in layers if layer not in indices):
            raise InputError(f"layers: there is no layer {layer}; the model has {min(indices)} to {max(indices)}.")
        chosen = [n for n in chosen if (m := LAYER_INDEX.search(n)) and int(m.group(1)) in layers]
    for name in chosen:
        if reads_weight(model, name):
            raise InputError(
                f"targets: '{name}': the model reads this weight without calling the module, so an adapter around it "
                "has no effect: leave it out."
            )
    if not chosen:
        without = f", apart from what trains whole ({', '.join(whole)})" if whole else ""
        raise InputError(f"targets and layers together match no linear module{without}.")
    return chosen


def ends_with(name: str, end: str) -> bool:
    """Return whether a module is called `end`, or its name ends in the components `end`."""
    return name == end or name.endswith(f".{end}")


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


def match_modules(model: nn.Module, names: Sequence[str], option: str = "modules_to_save") -> list[str]:
    """Return the full names of the modules called `names`, or whose names end in one of these, component by component.

    Args:
        option: that holds `names`, for messages.

    Raises:
        InputError: one matches no module, with the nearest name; or a list of modules, a module in another one, or
            what is quantised.
    """
    from torch.nn import Module

    modules = {name: module for name, module in base_modules(model) if name}
    known = list(modules)
    found: list[str] = []
    for wanted in names:
        hits = [name for name in known if ends_with(name, wanted)]
        if not hits:
            last = sorted({name.rpartition(".")[2] for name in known if not name.rpartition(".")[2].isdigit()})
            raise InputError(f"{option}: the model has no module '{wanted}'.{did_you_mean(wanted, last)}")
        listed = next((name for name in hits if type(modules[name]).forward is Module.forward), None)
        if listed is not None:
            raise InputError(f"{option}: '{listed}' is a list of modules: name those in it, such as {listed}.0.")
        found += [name for name in hits if name not in found]
    for name in found:
        reject_quantized(name, modules[name])
    for inner in found:
        outer = next((name for name in found if inner.startswith(f"{name}.")), None)
        if outer is not None:
            raise InputError(f"{option}: '{inner}' is part of '{outer}', which trains whole: name one of them.")
    return found


def reject_quantized(path: str, module: nn.Module) -> None:
    """Reject a module that is to train whole, or to be replaced by one that did, but is quantised or holds what is.

    Raises:
        InputError: it is, or does.
    """
    from budwood.model.quantizers import is_quantized
    from budwood.model.quantizers.experts import quantized_experts

    if is_quantized(module):
        holds, remedy = "is quantised and", "adapt it with the targets of a strategy"
    elif quantized_experts(module):
        holds, remedy = "holds quantised experts, which", "adapt them with the targets of lora or adalora"
    elif any(map(is_quantized, module.modules())):
        holds, remedy = "holds quantised linears, which", "adapt them with the targets of a strategy"
    else:
        return
    raise InputError(f"modules_to_save: '{path}' {holds} cannot train whole: {remedy}, or set `quantization: none`.")


def whole_modules(model: nn.Module, names: Sequence[str], task: Task, base: Base | None = None) -> list[str]:
    """Return the full names of what trains whole: `names`, the task's heads, and modules that the checkpoint lacks.

    Args:
        names: the recipe's `modules_to_save`; see `match_modules`.
        base: the base whose model it is; None while it has not been loaded.

    Raises:
        InputError: see `match_modules`.
    """
    new = {key.rpartition(".")[0] for key in base.new} if base is not None else set()
    found = list(dict.fromkeys([*match_modules(model, names), *task.head_modules(model), *sorted(new)]))
    return [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]


def _lies(name: str, outer: Collection[str]) -> bool:
    return any(f"{name}.".startswith(f"{path}.") for path in outer)


def _reject_embedding(model: nn.Module, pattern: str) -> None:
    """Reject an expression that also matches an embedding table, which PEFT would adapt."""
    from torch import nn

    for name, module in base_modules(model):
        if isinstance(module, nn.Embedding) and matches(pattern, name):
            raise InputError(
                f"targets: the regular expression '{pattern}' matches '{name}', an embedding, which has no low-rank "
                "updates: exclude it from the expression, or use modules_to_save for it."
            )


def _reject_experts(target: str, fused: list[str]) -> None:
    """Reject a target that is experts alone, for a method that does not adapt them."""
    if fused:
        raise InputError(
            f"targets: {target} stands for the experts of a mixture ('{fused[0]}'), which this strategy does not "
            "adapt: use lora or adalora, or leave it out."
        )


def _reject_container(model: nn.Module, target: str, experts: bool) -> None:
    """Reject the module of a mixture's experts as a target, or its name where there are none."""
    inside = [name for name in expert_modules(model) if ends_with(name.rpartition(".")[0], target)]
    if inside and experts:
        leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in inside))
        raise InputError(f"targets: '{target}' holds the experts of a mixture: name what to adapt in it: {leaves}.")
    _reject_experts(f"'{target}'", inside)
    if "experts" in target.split(".") and not expert_modules(model):
        raise InputError(f"targets: '{target}' names experts, and the base is no mixture of experts: leave it out.")


def _reject_target(model: nn.Module, target: str, linear: list[str]) -> None:
    from torch import nn

    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    named = next((module for name, module in base_modules(model) if ends_with(name, target)), None)
    if isinstance(named, nn.Embedding):
        raise InputError(f"targets: '{target}' is an embedding, which has no low-rank updates: use modules_to_save.")
    if named is not None:
        raise InputError(f"targets: '{target}' is not a linear module; linear modules: {', '.join(leaves)}.")
    raise InputError(
        f"targets: no linear module is called '{target}'.{did_you_mean(target, leaves)} "
        f"Linear modules: {', '.join(leaves)}."
    )
