"""`train.compile`: refused where it cannot work, and the same run up to rounding where it does."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from budwood.cli.app import run
from budwood.errors import InputError
from budwood.model.ops import kernels
from budwood.recipe.device import check_device
from budwood.recipe.schema import Recipe
from budwood.training.loop import tune

Make = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    kernels.compile_ops(False)


def test_on_a_gpu_it_would_change_nothing(make_recipe: Make) -> None:
    recipe = make_recipe(train={"compile": True})
    check_device(recipe, "cpu")
    with pytest.raises(InputError, match=r"train\.compile: compiles what a CPU computes"):
        check_device(recipe, "cuda")


def test_without_a_compiler_it_is_refused(
    make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inductor = pytest.importorskip("torch._inductor.config")
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(make_recipe(train={"compile": True}).to_dict()), encoding="utf-8")
    with inductor.patch("cpp.cxx", (None, str(tmp_path / "no-compiler"))):
        assert run(["tune", str(path)]) == 3
    err = capsys.readouterr().err
    assert "train.compile: needs a C++ compiler" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.compiled
def test_a_compiled_run_is_the_same_up_to_rounding(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every op is compiled, and each step's loss is that of torch's ops within ten roundings of fp32."""
    ops = importlib.import_module("budwood.model.ops.kernels.compiled")
    calls: list[tuple[str, int]] = []

    def counted(function: Callable[..., Any], *arguments: Any) -> Any:
        calls.append((function.__name__, arguments[0].shape[-1]))
        return original(function, *arguments)

    original = ops._run
    monkeypatch.setattr(kernels, "LEAST", 1)
    monkeypatch.setattr(ops, "_run", counted)
    tune(make_recipe("plain"))
    assert calls == []
    tune(make_recipe("compiled", train={"compile": True}))
    assert kernels.problems == [] and "changes nothing" not in capsys.readouterr().err
    assert kernels.implementation("rms_norm", torch.empty(8)) is None  # the next run of the process is another
    in_model = {name for name, width in calls if width not in (16, 96, 200, 4173)}  # others are those of the checks
    assert {"_norm", "_norm_gradient", "_gate", "_gate_gradients", "_entropy", "_entropy_gradient"} <= in_model
    assert len([name for name, _ in calls if name == "_turn"]) > 20
    plain, compiled = (losses(tmp_path / name) for name in ("plain", "compiled"))
    assert len(plain) == 4
    assert compiled == pytest.approx(plain, rel=1e-6)
    monkeypatch.setattr(kernels, "LEAST", 1 << 40)
    tune(make_recipe("small", train={"compile": True}))
    assert capsys.readouterr().err.count("note: train.compile changes nothing so far: the first step had no norm") == 1


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]
