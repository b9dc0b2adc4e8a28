"""A run that stops and goes on ends with the bytes of one that did not stop; what has changed is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from budwood.contract.types import Run
from budwood.training import loop
from budwood.training.loop import tune
from budwood.training.recipe import Recipe

Make = Callable[..., Recipe]


class Killed(BaseException):
    """The process goes, whatever it is doing."""


def records(directory: Path) -> list[dict[str, Any]]:
    """Every logged number but those of the clock."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((directory / "adapter").iterdir())}


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], None]]:
    """Function `kill_at(step)`: from then on a run dies in the middle of the step after `step`; None: no more."""
    at: list[int | None] = [None]
    whole = loop.sum_gradients

    def sum_gradients(run: Run) -> None:
        if run.step == at[0]:
            raise Killed
        whole(run)

    monkeypatch.setattr(loop, "sum_gradients", sum_gradients)
    yield lambda step: at.__setitem__(0, step)


@pytest.fixture
def same(make_recipe: Make, kill_at: Callable[[int | None], None], tmp_path: Path) -> Callable[..., Run]:
    """Function of `make_recipe`'s arguments and `kills`: runs it whole, and killed at these steps; compares all."""

    def check(*, kills: tuple[int, ...], **sections: Any) -> Run:
        kill_at(None)
        whole = tune(make_recipe("whole", **sections), quiet=True)
        kept = tmp_path / "kept"
        (tmp_path / "whole").rename(kept)
        for number, step in enumerate(kills):
            kill_at(step)
            with pytest.raises(Killed):
                tune(make_recipe("whole", **sections), quiet=True, resume=number > 0)
        kill_at(None)
        run = tune(make_recipe("whole", **sections), quiet=True, resume=True)
        manifest = json.loads((run.directory / "manifest.json").read_text())
        assert 0 < manifest["resumed_from_step"] <= kills[-1]
        assert records(run.directory) == records(kept)
        assert run.metrics == whole.metrics
        assert run.before == whole.before
        assert files(run.directory) == files(kept)
        return run

    return check


STRATEGIES: dict[str, list[Any]] = {
    "lora": [{"lora": {"rank": 4, "dropout": 0.2}}],
    **{
        method: [{"lora": {"rank": 4, "dropout": 0.1}}, {"adversarial": {"method": method}}]
        for method in ("fgm", "pgd", "freelb", "smart", "vat", "neftune")
    },
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_ends_with_the_same_bytes(same: Callable[..., Run], name: str) -> None:
    train = {"steps": 7, "save_every": 2, "eval_every": 3, "micro_tokens": 128, "batch_tokens": 300}
    same(kills=(3, 6), strategies=STRATEGIES[name], evaluate=True, train=train)
