"""What the owner of an adapter does to a live model: asked by name, checked, and undone where it fails."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from budwood.contract.discovery import PluginError
from budwood.contract.strategy import Strategy
from budwood.errors import BudwoodError


def ask_owner(owner: Strategy, hook: str, **arguments: Any) -> Any:
    """Call one strategy's hook with those of the arguments that it takes; return its result.

    Raises:
        PluginError: it has no such hook, or an error that is not Budwood's own; the strategy is named.
    """
    method = getattr(owner, hook, None)
    if method is None:
        raise PluginError(f"{owner} has no hook '{hook}', which an adapter's owner needs. Report it to its author.")
    taken = inspect.signature(method).parameters
    try:
        return method(**{name: value for name, value in arguments.items() if name in taken})
    except BudwoodError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PluginError(f"{owner}, hook {hook}: {what}. --debug shows the traceback.") from error


def module_ids(model: nn.Module) -> list[tuple[str, int]]:
    """Path and identity of every module: equal where nothing was put in or taken out."""
    return [(path, id(module)) for path, module in model.named_modules(remove_duplicate=False)]


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """After an exception, put back every module's children, parameters, hooks and attributes."""
    before = [(module, dict(vars(module)), _copies(vars(module))) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, attributes, copies in before:
            for name, items in copies.items():  # into the same dicts, since handles of hooks refer to them
                attributes[name].clear()
                attributes[name].update(items)
            vars(module).clear()
            vars(module).update(attributes)
        raise


def _copies(attributes: dict[str, Any]) -> dict[str, dict[Any, Any]]:
    return {name: dict(value) for name, value in attributes.items() if isinstance(value, dict)}
