"""Whether a run can train on the kind of its data: preference pairs need an objective, and an objective its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from budwood.contract.discovery import STRATEGIES, installed
from budwood.contract.loading import create, load_strategy
from budwood.data.formats import GROUP, DataFormat
from budwood.errors import BudwoodError, InputError


def check_use(path: Path | str, data: Any, plugins: Sequence[Any], complete: bool = True) -> None:
    """Check that a run's strategies and task train on the kind of its data; see `Strategy.trains_on`.

    Args:
        path: the data, for messages.
        data: its `DataFormat`, or its `Examples`.
        plugins: the strategies and the task.
        complete: whether `plugins` are all; if not, data of a kind is not refused.

    Raises:
        InputError: the data needs an objective that the recipe does not have, or the other way round.
    """
    here, holds = " + ".join(data.columns), data.holds
    for plugin in plugins:
        if plugin.trains_on and holds not in plugin.trains_on:
            wanted = " or ".join(kind or "answers to learn" for kind in plugin.trains_on)
            accepted = "; ".join(" + ".join(f.columns) for f in _formats() if f.holds in plugin.trains_on)
            what = f"holds {holds}" if holds else f"was read as {here}"
            raise InputError(
                f"{path} {what}, but {plugin} trains on {wanted}: give {accepted}, or remove {plugin.name}."
            )
    if complete and holds and not any(plugin.trains_on for plugin in plugins):
        objectives = ", ".join(_objectives(holds))
        remedy = f"add a strategy such as {objectives}" if objectives else "none is installed"
        raise InputError(f"{path}: {here} are {holds}, which need an objective: {remedy}. {data.instead}")


def _formats() -> list[DataFormat]:
    formats: list[DataFormat] = []
    for name in installed(GROUP):
        try:
            formats.append(create(name, GROUP))
        except BudwoodError:
            continue  # `recognise` reports a broken one if it matters
    return formats


def _objectives(holds: str) -> list[str]:
    """Return the names of the installed strategies that train on a kind of data."""
    names: list[str] = []
    for name in installed(STRATEGIES):
        try:
            cls, _ = load_strategy(name)
        except BudwoodError:
            continue
        if holds in cls.trains_on:
            names.append(name)
    return names
