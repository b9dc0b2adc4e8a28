"""A live model under changes: those of an adapter's owner are detected, and undone after a failure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def module_ids(model: nn.Module) -> list[tuple[str, int]]:
    """Return path and identity of every module; the list is equal if no module was added, removed or replaced."""
    return [(path, id(module)) for path, module in model.named_modules(remove_duplicate=False)]


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Restore every module's children, parameters, hooks and attributes after an exception."""
    before = [(module, dict(vars(module)), _copies(vars(module))) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, attributes, copies in before:
            for name, items in copies.items():  # into the same dicts, to which hook handles refer
                attributes[name].clear()
                attributes[name].update(items)
            vars(module).clear()
            vars(module).update(attributes)
        raise


def _copies(attributes: dict[str, Any]) -> dict[str, dict[Any, Any]]:
    return {name: dict(value) for name, value in attributes.items() if isinstance(value, dict)}
