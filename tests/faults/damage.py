"""Corrupts each file of a checkpoint and of an adapter: truncated, one bit flipped, deleted, from another run."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from budwood.adapters.store import read_adapter
from budwood.errors import CorruptError
from budwood.training.durability.reading import FOLDER, read_checkpoint, steps_in

from .harness import Outcome, Shop

LISTS = ("manifest.json", "budwood.json")
FLIPS = 12
"""Random positions in a file at which a bit is flipped, in addition to the first and last byte."""


def damage(shop: Shop, every: int = 1, seed: int = 0) -> Iterator[Outcome]:
    """Corrupt every (or every n-th) file in every way: an error names it, exit 4, and a resume reports its fallback."""
    first, second = "lora, dropout", "adalora, fgm"
    stopped, foreign = (shop.stopped(shop.recipe(m, f"of {m}"), 5) for m in (first, second))
    yield from _resumes(shop, first, stopped, foreign, every, seed)
    whole, foreign = shop.reference(first) / "adapter", shop.reference(second) / "adapter"
    for what, path in list(_damaged(shop, whole, foreign, seed))[::every]:
        yield Outcome(f"adapter: {what.split(':')[0]}", what, _named(path, lambda p: read_adapter(p.parent), whole))


def _resumes(shop: Shop, method: str, stopped: Path, foreign: Path, every: int, seed: int) -> Iterator[Outcome]:
    """Corrupt the newest checkpoint of a run, then all of them."""
    recipe = shop.recipe(method, f"of {method}")
    found = steps_in(stopped / FOLDER)
    newest, other = found[max(found)], steps_in(foreign / FOLDER)[max(found)]
    for number, (what, path) in enumerate(list(_damaged(shop, newest, other, seed))[::every]):
        lost = _named(path, lambda p: read_checkpoint(p.parent), newest)
        if not lost and (number % 5 == 0 or "flipped" not in what):  # a resume costs a second
            shutil.copytree(stopped, recipe.output)
            shutil.rmtree(recipe.output / FOLDER / newest.name)
            shutil.copytree(path.parent, recipe.output / FOLDER / newest.name)
            ended = shop.tune(recipe, resume=True)
            lost = f"the resume ended with {ended.code}: {ended.error}" if ended.code else ""
            if not lost and not (newest.name in ended.said and "previous checkpoint" in ended.said):
                lost = "the resume did not report the corrupt checkpoint and the fallback to the one before it"
            lost = lost or shop.compare(method, recipe.output)
            shop.remove(recipe.output)
        yield Outcome(f"checkpoint: {what.split(':')[0]}", what, lost)
    shutil.copytree(stopped, recipe.output)
    for path in steps_in(recipe.output / FOLDER).values():
        (path / "state.json").unlink()
    ended = shop.tune(recipe, resume=True)
    lost = "" if ended.code == 4 and "state.json" in ended.said else f"exit code {ended.code}: {ended.error}"
    yield Outcome("checkpoint: all damaged", "every state.json deleted", lost)
    shop.remove(recipe.output)


def _damaged(shop: Shop, folder: Path, other: Path, seed: int) -> Iterator[tuple[str, Path]]:
    """Yield, for each kind of damage, its name and the corrupted file in a copy of the folder."""
    draw = random.Random(seed)
    ways: list[tuple[str, str, Callable[[Path], None]]] = []
    for file in sorted(path.name for path in folder.iterdir()):
        size = (folder / file).stat().st_size
        for kept in (0, 1, size // 2, size - 1):
            ways.append((f"truncated: {file} to {kept}", file, lambda p, n=kept: _cut(p, n)))  # type: ignore[misc]
        for place in sorted({0, size - 1, *(draw.randrange(size) for _ in range(FLIPS))}):
            bit = 1 << draw.randrange(8)
            text = f"one byte flipped: {file} at {place}"
            ways.append((text, file, lambda p, n=place, b=bit: _flip(p, n, b)))  # type: ignore[misc]
        ways.append((f"deleted: {file}", file, lambda p: p.unlink()))
        text = f"replaced by another run's: {file}"
        ways.append((text, file, lambda p, f=file: _replace(p, other / f)))  # type: ignore[misc]
    for number, (what, file, change) in enumerate(ways):
        copy = shop.folder / "copies" / str(number) / folder.name
        shutil.copytree(folder, copy)
        change(copy / file)
        yield what, copy / file


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def _replace(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


def _named(path: Path, read: Callable[[Path], object], original: Path) -> str:
    """Return "" if reading fails and names the file or the manifest of its folder, otherwise the problem."""
    if path.exists() and path.read_bytes() == (original / path.name).read_bytes():
        return ""  # both runs have the same file
    try:
        read(path)
    except CorruptError as error:
        # A manifest of another run contradicts every file; the error names one of them.
        names = [path.name, *(p.name for p in path.parent.iterdir() if path.name in LISTS)]
        return "" if any(name in str(error) for name in names) else f"the error names no file: {error}"
    except Exception as error:
        return f"{type(error).__name__}, not exit 4: {error}"
    return "it was read without an error"
