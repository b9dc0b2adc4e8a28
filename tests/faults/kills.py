"""SIGKILL at random times, half of them inside a save; the run is resumed, possibly killed again, and compared."""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from budwood.recipe.schema import Recipe
from budwood.training.durability import checkpoint
from budwood.training.loop import tune

from .harness import Outcome, Shop, incomplete

ANYWHERE, INSIDE = "SIGKILL at a random instant", "SIGKILL inside a save"
CHAIN = 3
"""Maximum number of kills before a run may finish."""


def kills(shop: Shop, count: int, seed: int = 0) -> Iterator[Outcome]:
    """Kill runs `count` times; yield an outcome per kill once the run has been resumed and has finished."""
    draw, done, chain, saves, others = random.Random(seed), 0, 0, 0, 0
    methods = ["lora, dropout", "adalora, fgm"]
    length = {method: _seconds(shop, method) for method in methods}
    while done < count:
        method = methods[chain % len(methods)]
        recipe = shop.recipe(method, f"killed-{chain}")
        planned = min(draw.randint(1, CHAIN), count - done)
        hit: list[tuple[str, str]] = []
        lost = ""
        for _ in range(planned):
            inside = saves <= others
            if at := _kill(shop, recipe, draw, length[method], inside):
                hit.append((INSIDE if inside else ANYWHERE, at))
                saves, others = saves + inside, others + (not inside)
            lost = lost or incomplete(recipe.output)
            if lost:
                break
        if not lost:
            ended = shop.tune(recipe, resume=True)
            lost = f"the resume ended with {ended.code}: {ended.error}" if ended.code else ""
            lost = lost or shop.compare(method, recipe.output) or _leftovers(recipe.output)
        for kind, at in hit:
            yield Outcome(kind, f"{method}, {at} (chain {chain}, seed {seed})", lost)
        done, chain = done + len(hit), chain + 1
        shop.remove(recipe.output)


def _seconds(shop: Shop, method: str) -> float:
    """Return the duration of an uninterrupted run in seconds."""
    shop.reference(method)
    recipe, start = shop.recipe(method, "timed"), time.monotonic()
    shop.tune(recipe)
    shop.remove(recipe.output)
    return time.monotonic() - start


def _kill(shop: Shop, recipe: Recipe, draw: random.Random, seconds: float, inside: bool) -> str:
    """Resume a run and kill it; return the time of the kill, "" if the run finished before.

    Inside a save: the child signals the start of a save, and is killed within the duration of one.
    """
    reading, writing = os.pipe()
    chosen = draw.randint(1, 4)

    def work() -> None:
        os.close(reading)
        if inside:
            _signal_saves(writing)
        tune(recipe, resume=True)

    started = shop.fork(work)
    os.close(writing)
    begun = time.monotonic()
    at = f"after {(delay := draw.uniform(0, seconds)):.3f} s"
    try:
        if inside:
            saves = 0
            while saves < chosen and select.select([reading], [], [], 60)[0] and os.read(reading, 1):
                saves += 1
            delay = draw.uniform(0, 0.02)
            at = f"{delay * 1000:.1f} ms into save {saves}"
            time.sleep(delay)
        else:
            while time.monotonic() < begun + delay and not select.select([reading], [], [], 0.002)[0]:
                pass  # readable: the child is gone
    finally:
        os.close(reading)
    os.kill(started[0], signal.SIGKILL)
    return at if shop.finish(started).code == -signal.SIGKILL else ""


def _signal_saves(pipe: int) -> None:
    """Write a byte to the pipe whenever writing a checkpoint or an adapter starts."""
    from budwood.adapters import store

    for module in (checkpoint, store):
        original: Any = module.complete_directory

        def begin(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            os.write(pipe, b".")
            return original(*args, **kwargs)

        module.complete_directory = begin  # type: ignore[attr-defined]


def _leftovers(directory: Path) -> str:
    """Return "" if no temporary files remain after a finished run, otherwise their names."""
    remaining = [str(p.relative_to(directory)) for p in directory.rglob(".*")]
    return f"left behind: {', '.join(remaining)}" if remaining else ""
