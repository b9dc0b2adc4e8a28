"""Shows what a search for settings that fit has found: memory against time as a table and as a plot, and a recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from itertools import count
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from budwood.errors import InputError, ResourceError
from budwood.planning.composition import show
from budwood.planning.devices import find_device
from budwood.planning.estimate import Estimate, gib
from budwood.planning.fit import Candidate, Fit, fit
from budwood.planning.options import GIB, Device, fit_name
from budwood.planning.process import estimate_in_process
from budwood.planning.table import operations, span
from budwood.recipe.schema import Recipe

BAR = 24
"""Width of the bars, in characters."""


def show_fit(found: Fit, console: Console) -> None:
    """Print memory against time of every candidate, and the one to take or what would help."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for title in ("memory", "", "fits", "time", "changes"):
        table.add_column(title)
    most = max([c.estimate.needed for c in found.candidates] + [c.estimate.device.memory for c in found.candidates])
    for candidate in sorted(found.candidates, key=lambda c: -c.estimate.needed):
        result = candidate.estimate
        text = candidate.overrides or "none"
        if candidate.alters:
            text += f" (changes the result: {', '.join(candidate.alters)})"
        mark = " *" if candidate is found.chosen else ""
        table.add_row(
            gib(result.needed), _bar(result.needed, result.device.memory, most),
            ("yes" if result.fits else "no") + mark, _time(candidate), text,
        )  # fmt: skip
    show(Group(Text(), table, Text(), *map(Text, verdict(found))), console)


def verdict(found: Fit) -> list[str]:
    """Return the lines that say which settings to take, or what would help."""
    if found.chosen is not None:
        return [f"to fit: {found.chosen.overrides}" if found.chosen.changes else "the recipe fits as it is"]
    lines = [f"nothing fits without changing the result: {found.reason}"]
    lines += [
        f"would fit: {c.overrides} ({gib(c.estimate.needed)}); --allow {','.join(c.alters)} makes the change"
        for c in found.suggestions
    ]
    if not found.suggestions:
        lines.append(
            "no optimizer, quantisation, rank or length fits either: take a smaller base, or a device with more memory"
        )
    return lines


def fit_run(recipe: Recipe, target: str, allow: Collection[str], say: Callable[[str], None]) -> Recipe:
    """Return the recipe of a run with the settings that fit a device; each line about them goes to `say`.

    Args:
        target: a card, or memory such as 24GiB of this machine's kind of device.

    Raises:
        InputError: the device is not known.
        ResourceError: nothing fits.
    """
    kind = "cuda" if torch.cuda.is_available() and recipe.base.device != "cpu" else "cpu"
    device = fit_device(target, kind)
    found = fit(recipe, lambda changed: estimate_in_process(changed, device, keep=True), allow)
    if found.fitted is None:
        raise ResourceError("; ".join(verdict(found)) + ".")
    assert found.chosen is not None
    needed = f"{gib(found.chosen.estimate.needed)} of {gib(device.memory)}"
    say(f"fit: {needed}; {verdict(found)[0]}")
    return _settled(found.fitted, found.chosen.estimate)


def _settled(recipe: Recipe, result: Estimate) -> Recipe:
    """Return a recipe with the settings that it leaves open as an estimate chose them, for its device's memory."""
    train, settings = recipe.train, {}
    if train.micro_tokens is None:
        settings["micro_tokens"] = result.micro_tokens
    if train.gradient_checkpointing == "auto":
        settings["gradient_checkpointing"] = result.gradient_checkpointing
    return recipe.with_train(train.model_copy(update=settings))


def fit_device(text: str, kind: str = "cuda") -> Device:
    """Return the device that `--fit` names: as `--device`, or memory such as 24GiB of a kind of device.

    Raises:
        InputError: it is not known.
    """
    return find_device(fit_name(text, kind), "--fit")


def draw(found: Fit, path: Path) -> None:
    """Draw memory against time of every candidate.

    Raises:
        ResourceError: the plot cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4 + 0.2 * len(found.candidates)), layout="constrained")
    axes = figure.subplots()
    known = all(candidate.estimate.seconds for candidate in found.candidates)
    for number, candidate in enumerate(found.candidates, 1):
        result = candidate.estimate
        time = result.seconds[1] / 60 if known and result.seconds else result.flops / 1e12
        colour = "tab:green" if candidate is found.chosen else "tab:blue" if result.fits else "tab:red"
        label = f"{number}: {candidate.overrides.replace('-o ', '') or 'as it is'}"
        axes.plot(time, result.needed / GIB, "o", color=colour, label=label)
        axes.annotate(str(number), (time, result.needed / GIB), textcoords="offset points", xytext=(5, 4))
    device = found.candidates[0].estimate.device
    axes.axhline(device.memory / GIB, linestyle="--", color="grey")
    title = f"memory and time on {device.name} (red: does not fit)"
    axes.set(xlabel="minutes at worst" if known else "TFLOP a step", ylabel="GiB", title=title)
    axes.margins(0.1)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", fontsize="small")
    FigureCanvasAgg(figure)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror or error}.") from error


def free_path(recipe: Path, suffix: str) -> Path:
    """Return a path beside a recipe that does not exist yet: name-fit.yaml, name-fit-2.yaml, …"""
    for number in count(1):
        path = recipe.with_name(f"{recipe.stem}-fit{'' if number == 1 else f'-{number}'}{suffix}")
        if not os.path.lexists(path):
            return path
    raise AssertionError


def write_recipe(found: Fit, path: Path) -> None:
    """Write the recipe that fits to a new file.

    Raises:
        InputError: the file exists.
        ResourceError: it cannot be written.
    """
    fitted = found.fitted
    assert fitted is not None and found.chosen is not None
    device = found.chosen.estimate.device
    head = f"# Fits {device.name}: {found.chosen.overrides}\n"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(head + fitted.to_yaml())
    except FileExistsError:
        raise InputError(f"--write: {path} exists: name another file.") from None
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror or error}.") from error


def _bar(needed: int, memory: int, most: int) -> str:
    """Return a bar of the memory that is needed, with a mark where the device's ends."""
    filled, end = (min(round(size / most * BAR), BAR) for size in (needed, memory))
    cells = ["█" if cell < filled else " " for cell in range(BAR + 1)]
    cells[end] = "|"
    return "".join(cells)


def _time(candidate: Candidate) -> str:
    result = candidate.estimate
    if result.seconds is None:
        return f"{operations(result.flops)} a step"
    return f"{span(result.seconds[0])} to {span(result.seconds[1])}"
