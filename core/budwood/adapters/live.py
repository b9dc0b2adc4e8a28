"""What the owner of an adapter does to a live model: seen, and undone where it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


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
