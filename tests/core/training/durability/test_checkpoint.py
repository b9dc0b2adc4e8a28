"""Checkpoints: contents, complete or absent at every moment, retention, and the folder's lock."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import types
from collections import namedtuple
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from budwood.contract.discovery import PluginError
from budwood.contract.types import Run
from budwood.errors import InputError, ResourceError
from budwood.recipe.schema import Recipe
from budwood.training import loop
from budwood.training.durability import checkpoint
from budwood.training.durability.checkpoint import Saver
from budwood.training.durability.lock import locked
from budwood.training.durability.reading import read_checkpoint, steps_in
from budwood.training.durability.state import pack, unpack
from budwood.training.loop import tune
from budwood.training.preflight import preflight
from budwood.training.report import Report
from budwood.untrusted import files

Make = Callable[..., Recipe]
Usage = namedtuple("Usage", "total used free")


def saved(run: Run) -> list[int]:
    return sorted(steps_in(run.directory / "checkpoints"))


def test_nested_values_are_restored_unchanged() -> None:
    value = {
        "tensors": [torch.randn(2, 3).bfloat16(), torch.zeros(0, 4), torch.tensor(True), torch.tensor(3)],
        "state": {0: {"step": 1.5}, 1: {}},
        "betas": (0.9, (0.999, None)),
        "numbers": [float("inf"), float("-inf"), -0.0, 1e-300, True, 7, "text", np.float32(0.5)],
        "array": np.arange(4, dtype=np.uint32),
        "a": {"b": torch.ones(1)},
        "a/b": torch.zeros(1),
        "$odd": {"$tensor": "not a mark"},
    }
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(pack(value, tensors), allow_nan=False)
    back = unpack(json.loads(text), tensors)
    for old, new in zip(value["tensors"], back["tensors"], strict=True):
        assert old.dtype == new.dtype and old.shape == new.shape and torch.equal(old, new)
        assert not old.numel() or old.data_ptr() != new.data_ptr()
    assert back["array"].dtype == np.uint32 and back["array"].tolist() == [0, 1, 2, 3]
    assert float(back["a"]["b"]) == 1 and float(back["a/b"]) == 0
    for key in ("state", "betas", "numbers", "$odd"):
        assert back[key] == value[key], key
    assert str(back["numbers"][2]) == "-0.0"
    assert str(unpack(pack(float("nan"), {}), {})) == "nan"
    with pytest.raises(TypeError, match=r"a/0/b: a set cannot be saved"):
        pack({"a": [{"b": {1}}]}, {})


def test_the_state_is_complete_and_nothing_is_pickled(
    make_recipe: Make, test_strategies: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Includes a strategy that draws from the global random states, which the run does not seed."""
    sections = {"strategies": [{"lora": {"rank": 4}}, "counter"], "evaluate": True}
    train = {"steps": 6, "save_every": 3, "eval_every": 2, "keep_checkpoints": 9}
    random.seed(5)
    np.random.seed(5)
    run = tune(make_recipe(**sections, train=train), quiet=True)
    folder = run.directory / "checkpoints" / "step-00000003"
    assert {p.name for p in folder.iterdir()} == {"manifest.json", "state.json", "state.safetensors"}
    result = read_checkpoint(folder)
    assert result.setting["recipe"]["train"]["steps"] == 6
    assert result.setting["versions"]["torch"] == metadata.version("torch")
    state = result.load()
    assert state["strategies"]["counter"]["distribution"] == "budwood-test-strategies 1.0"
    assert state["strategies"]["counter"]["state"]["steps"] == 3
    assert state["step"] == 3 and state["examples"] == 24 and state["epoch"] == 0
    assert state["best"]["step"] == 2 and len(state["best"]["parameters"]) == len(run.trainable)
    assert state["before"] == run.before
    assert set(state) >= {"parameters", "optimizer", "scheduler", "scaler", "random", "metrics"}
    for step in saved(run):
        if step > 3:
            shutil.rmtree(run.directory / "checkpoints" / f"step-{step:08d}")
    manifest = json.loads((run.directory / "manifest.json").read_text())
    (run.directory / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("something is unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    again = tune(make_recipe(**sections, train=train), quiet=True, resume=True)
    assert again.metrics == run.metrics
    assert again.strategies[1].steps == 6 and torch.equal(again.strategies[1].sum, run.strategies[1].sum)


def test_a_state_that_cannot_be_saved_names_the_strategy(make_recipe: Make, test_strategies: object) -> None:
    recipe = make_recipe(strategies=["lora", "unsaveable"])
    with pytest.raises(PluginError, match=r"'unsaveable' \(.* 1.0\), hook state_dict: .*inner/0/a: a object"):
        tune(recipe, quiet=True)


def test_the_last_and_the_best_are_kept_at_every_moment(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With scripted losses, step 4 is the best of ten."""
    complete_counts: list[int] = []
    rmtree = shutil.rmtree

    def looking(path: Any, *args: Any, **kwargs: Any) -> None:
        if ".step-" in str(path) and Path(path).exists():
            folders = steps_in(Path(path).parent)
            for folder in folders.values():
                read_checkpoint(folder)
            complete_counts.append(len(folders))
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", looking)
    evaluate = loop.evaluate

    def scripted(run: Run, hooks: Any, report: Report, best: Any) -> Any:
        monkeypatch.setattr(type(run.task), "measure", lambda *_: {"eval_loss": abs(run.step - 4)})
        return evaluate(run, hooks, report, best)

    monkeypatch.setattr(loop, "evaluate", scripted)
    train = {"steps": 10, "save_every": 3, "eval_every": 2, "keep_checkpoints": 2}
    run = tune(make_recipe(evaluate=True, train=train), quiet=True)
    assert saved(run) == [4, 9, 10]
    assert run.metrics["best_step"] == 4
    assert complete_counts and min(complete_counts) >= 2
    assert not list((run.directory / "checkpoints").glob(".*"))


def test_without_save_every_saving_depends_on_time(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tune(make_recipe("a", train={"keep_checkpoints": 9}), quiet=True)
    assert saved(run) == [4], "the last step is always saved"
    monkeypatch.setattr(checkpoint, "SECONDS", 0)
    assert saved(tune(make_recipe("b", train={"keep_checkpoints": 9}), quiet=True)) == [1, 2, 3, 4]


def test_every_file_and_folder_is_synced_before_the_rename(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order holds per thread: one writes the checkpoint while the main thread may write the adapter."""
    done: list[tuple[str, str, int]] = []
    sync, rename, write = files._sync, Path.rename, Path.write_bytes

    def note(action: str, name: str) -> None:
        done.append((action, name, threading.get_ident()))

    monkeypatch.setattr(files, "_sync", lambda path: (note("sync", path.name), sync(path))[1])
    monkeypatch.setattr(Path, "rename", lambda p, to: (note("rename", Path(to).name), rename(p, to))[1])
    monkeypatch.setattr(Path, "write_bytes", lambda p, data: (note("write", p.name), write(p, data))[1])
    tune(make_recipe(train={"steps": 1}), quiet=True)
    first = next(i for i, (action, name, _) in enumerate(done) if (action, name) == ("write", "state.json"))
    assert any(event[:2] == ("sync", "run") for event in done[:first]), "the folder in which checkpoints/ was created"
    events = [(action, name) for action, name, thread in done[first:] if thread == done[first][2]]
    end = events.index(("rename", "step-00000001"))
    partial = ".step-00000001.partial"
    assert [name for action, name in events[:end] if action == "write"][-1] == "manifest.json"
    synced = [name for action, name in events[:end] if action == "sync"]
    assert set(synced) >= {"state.safetensors", "state.json", "manifest.json", partial} and synced[-1] == partial
    assert ("sync", "checkpoints") in events[end:]


def test_a_disk_that_is_too_small_is_rejected_before_the_first_step(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 1000))
    with pytest.raises(ResourceError, match=r"the run needs \d[\d,]+ bytes .* 1,000 are free") as caught:
        tune(make_recipe(), quiet=True)
    assert caught.value.exit_code == 3
    assert not (make_recipe().output / "metrics.jsonl").read_text()


@pytest.mark.parametrize("failure", ["space", "write"])
def test_a_disk_that_fills_up_ends_the_run_and_loses_nothing(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    train = {"steps": 6, "save_every": 2}
    uninterrupted = tune(make_recipe("whole", train=train), quiet=True)
    recipe = make_recipe(train=train)
    with monkeypatch.context() as patch:
        if failure == "space":  # detected before the write
            usage = shutil.disk_usage
            is_full = lambda: (recipe.output / "checkpoints" / "step-00000002").exists()  # noqa: E731
            patch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 5) if is_full() else usage(path))
        else:  # detected by the background write

            def fail(tensors: Any, path: Path) -> None:
                if "00000004" in str(path):
                    raise OSError(28, "No space left on device")
                save(tensors, path)

            save = checkpoint.save_file
            patch.setattr(checkpoint, "save_file", fail)
        with pytest.raises(ResourceError) as caught:
            tune(recipe, quiet=True)
    text = str(caught.value)
    assert "the checkpoint of step 4 cannot be written (No space left on device): it needs" in text
    assert "resume from step 2 with: budwood tune" in text and caught.value.exit_code == 3
    assert list(steps_in(recipe.output / "checkpoints")) == [2]
    run = tune(recipe, quiet=True, resume=True)
    assert run.metrics == uninterrupted.metrics and saved(run) == [4, 6]


def test_training_continues_while_a_checkpoint_is_written(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write of step 1 ends only after step 2; the write of step 3 waits for it."""
    made, order = threading.Event(), []
    save, snapshot = checkpoint.save_file, Saver.snapshot

    def slow(tensors: Any, path: Path) -> None:
        if "00000001" in str(path):
            assert made.wait(60)
        save(tensors, path)
        order.append(path.parent.name)

    def noted(self: Saver) -> Any:
        if self.run.step == 3:
            made.set()
        return snapshot(self)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    monkeypatch.setattr(Saver, "snapshot", noted)
    monkeypatch.setattr(Saver, "due", lambda self: self.run.step in (1, 3))
    run = tune(make_recipe(train={"keep_checkpoints": 9}), quiet=True)
    assert order == [f".step-{step:08d}.partial" for step in (1, 3, 4)] and saved(run) == [1, 3, 4]


def test_one_run_per_folder(make_recipe: Make, tmp_path: Path, said: list[str]) -> None:
    recipe = make_recipe()
    with locked(recipe.output, said.append):
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match=f"run is in use by process {os.getpid()} on .*: wait for it"):
                tune(recipe, quiet=True, **options)
    assert not recipe.output.exists(), "an empty folder is removed"
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom budwood.training.durability.lock import locked\n"
        f"with locked(Path({str(recipe.output)!r}), print):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", code])
    assert killed.wait() == -9
    tune(recipe)
    assert f"the lock of process {killed.pid} on" in said[0] and "is taken over" in said[0]
    assert not (recipe.output / ".lock").exists()


def test_a_slower_process_of_the_same_run_finds_its_folder_in_use(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process may already use the folder when the others check it."""
    recipe = make_recipe()
    with locked(recipe.output, print):
        (recipe.output / "manifest.json").write_text('{"budwood": "0"}')
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        preflight(recipe)
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(InputError, match="is in use by process"):
            preflight(recipe)


def _hold(folder: Path, ready: Any, go: Any) -> None:
    with locked(folder, print):
        ready.set()
        go.wait(60)


def test_a_run_of_another_process_is_not_touched(make_recipe: Make) -> None:
    recipe = make_recipe()
    tune(recipe, quiet=True)
    before = {p: p.read_bytes() for p in recipe.output.rglob("*") if p.is_file()}
    context = multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(recipe.output, ready, go))
    other.start()
    assert ready.wait(60)
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match=f"in use by process {other.pid} on"):
            tune(recipe, quiet=True, **options)
    go.set()
    other.join()
    assert {p: p.read_bytes() for p in recipe.output.rglob("*") if p.is_file()} == before
