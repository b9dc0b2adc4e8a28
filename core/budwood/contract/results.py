"""Checks the results of hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from budwood.contract.types import LossTerm

# torch is imported only inside functions, because code that lists plugins without calling hooks does not need it.


def find_problem(hook: str, result: Any, wrapper: bool = False) -> str:
    """Return what is wrong with the result of an implementation of `hook`; empty if nothing is.

    A wrapper returns the result of the call that it wraps: for a collecting hook, the list of results.
    """
    expected, is_valid = _MUST_RETURN[hook]
    if wrapper and hook in _COLLECTED:
        expected = f"the list that its yield returned, each {expected}"
        valid = isinstance(result, list) and all(is_valid(item) for item in result)
        valid = valid or (result is None and hook == "export")
    else:
        valid = is_valid(result)
    if valid:
        return ""
    return f"returned {_described(result)}; it must return {expected}."


def _described(result: Any) -> str:
    if result is None:
        return "None"
    if isinstance(result, list | tuple) and result:
        types = list(dict.fromkeys(type(item).__name__ for item in result))
        return f"a {type(result).__name__} of {', '.join(types[:3])}"
    name = type(result).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _is_nothing(result: Any) -> bool:
    return result is None


def _is_base(result: Any) -> bool:
    return all(hasattr(result, name) for name in ("model", "tokenizer", "fingerprint", "quantization"))


def _are_examples(result: Any) -> bool:
    from budwood.contract.examples import Example

    if isinstance(result, list | tuple):
        return all(isinstance(item, Example) for item in result)
    return isinstance(result, Sequence) and (not len(result) or isinstance(result[0], Example))


def _are_steps(result: Any) -> bool:
    return isinstance(result, Sequence) and all(_are_examples(step) for step in result)


def _are_tensors(result: Any) -> bool:
    from torch import Tensor

    named = isinstance(result, dict) and all(isinstance(k, str) for k in result)
    return result is None or (named and all(isinstance(v, Tensor) and v.ndim > 0 for v in result.values()))


def _are_counts(result: Any) -> bool:
    return _are_metrics(result) and all(0 <= value < float("inf") for value in result.values())


def _is_model(result: Any) -> bool:
    from torch import nn

    return isinstance(result, nn.Module)


def _are_groups(result: Any) -> bool:
    from torch import nn

    from budwood.contract.types import ParameterGroup

    return isinstance(result, list | tuple) and all(
        isinstance(group, ParameterGroup)
        and isinstance(group.parameters, dict)
        and all(isinstance(p, nn.Parameter) for p in group.parameters.values())
        for group in result
    )


def _is_optimizer(result: Any) -> bool:
    from torch.optim import Optimizer

    return isinstance(result, Optimizer)


def _is_scheduler(result: Any) -> bool:
    from torch.optim.lr_scheduler import LRScheduler

    return isinstance(result, LRScheduler)


def _is_batch(result: Any) -> bool:
    from budwood.contract.examples import Batch

    return isinstance(result, Batch)


def _are_outputs(result: Any) -> bool:
    from budwood.contract.types import Outputs

    return isinstance(result, Outputs)


def _are_terms(result: Any) -> bool:
    from budwood.contract.types import LossTerm

    if result is None or isinstance(result, LossTerm):
        return result is None or _is_term(result)
    return isinstance(result, list | tuple) and all(isinstance(t, LossTerm) and _is_term(t) for t in result)


def _is_term(term: LossTerm) -> bool:
    from torch import Tensor

    values: Any = term.values
    return (
        isinstance(term.name, str)
        and isinstance(values, Tensor)
        and values.is_floating_point()
        and isinstance(term.unit, str)
        and isinstance(term.weight, Real)
    )


def _are_metrics(result: Any) -> bool:
    return isinstance(result, dict) and all(isinstance(k, str) and isinstance(v, Real) for k, v in result.items())


def _is_state(result: Any) -> bool:
    return isinstance(result, dict) and all(isinstance(key, str) for key in result)


def _is_conversion(result: Any) -> bool:
    return result is None or (
        isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, dict) for part in result)
    )


def _is_live(value: Any) -> bool:
    return value is None or type(value).__name__ == "LiveAdapter"  # of a room above this one


_TERMS = (
    "None, a LossTerm or a list of them, each with a name, a floating-point tensor of values, a unit and a weight",
    _are_terms,
)
_NOTHING = ("nothing", _is_nothing)
_MUST_RETURN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "check_plan": _NOTHING,
    "prepare_examples": ("the examples, a sequence of Example", _are_examples),
    "planned_examples": ("examples, a sequence of Example", _are_examples),
    "load_base": ("a Base", _is_base),
    "prepare_model": ("the model, a torch.nn.Module", _is_model),
    "trainable_parameters": ("a list of ParameterGroup, each with a dict of nn.Parameter by name", _are_groups),
    "build_optimizer": ("a torch.optim.Optimizer", _is_optimizer),
    "build_scheduler": ("a torch.optim.lr_scheduler.LRScheduler", _is_scheduler),
    "next_examples": ("one sequence of Example for each optimizer step that uses the set", _are_steps),
    "batch_counts": ("a dict of finite, non-negative counts by name", _are_counts),
    "prepare_batch": ("the batch, a Batch", _is_batch),
    "backward": _NOTHING,
    "forward": ("the outputs, an Outputs", _are_outputs),
    "token_terms": _TERMS,
    "sequence_terms": _TERMS,
    "loss_terms": _TERMS,
    "step_values": ("None or a dict of tensors [n, …] by name", _are_tensors),
    "step_terms": _TERMS,
    "before_clip": _NOTHING,
    "before_optimizer_step": _NOTHING,
    "after_optimizer_step": _NOTHING,
    "on_event": _NOTHING,
    "evaluate": ("a dict of numbers by metric name", _are_metrics),
    "state_dict": ("a dict with string keys", _is_state),
    "load_state_dict": _NOTHING,
    "export": _NOTHING,
    "attach_adapter": _NOTHING,
    "use_adapters": _NOTHING,
    "detach_adapter": _NOTHING,
    "live_adapter": ("None or a LiveAdapter", _is_live),
    "convert_adapter": ("None, or a tuple of two dicts: config and tensors", _is_conversion),
    "combine_adapters": ("None, or a tuple of two dicts: config and tensors", _is_conversion),
    "merge_adapter": _NOTHING,
}
_COLLECTED = ("evaluate", "export")
"""Wrappable hooks whose results are collected in a list."""
