"""The loop of a sweep with trials that are functions: what is counted, stopped, resumed and refused."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("optuna")

from budwood.errors import BudwoodError, InputError, Interrupted, ResourceError
from budwood.recipe.file import read_recipe_file
from budwood.sweeps import search, trial
from budwood.sweeps.results import write_results
from budwood.sweeps.search import Sweep, best_trial, counted
from budwood.sweeps.space import read_space
from budwood.sweeps.study import Goal, check_folder, open_study, this_worker
from budwood.sweeps.trial import DOES_NOT_FIT, Outcome, Watch

Trial = Callable[[dict[str, float], Watch], Outcome]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    """Function `make(trial, options, trials, …)`; `trial(values, watch)` stands for the process of a trial."""

    def sweep(trial: Trial, options: list[str], trials: int = 20, target: float | None = None, **changes) -> Sweep:
        recipe = tmp_path / "recipe.yaml"
        if not recipe.exists():
            recipe.write_text("a: 1")

        def run_trial(recipe, overrides, directory, log, watch, allow_code) -> Outcome:
            directory.mkdir(exist_ok=True)
            (directory / "recipe.yaml").write_text(f"{json.dumps(overrides)[1:-1]}: 1\n".replace('", "', ", "))
            return trial({k: json.loads(v) for k, v in (item.split("=") for item in overrides)}, watch)

        monkeypatch.setattr(search, "run_trial", run_trial)
        goal = Goal({"base": "b"}, read_space(options, None), "eval_accuracy", True)
        goal = Goal(**{**vars(goal), **changes})
        study, _ = open_study(tmp_path / "out", None, "s", goal, 0, True, trials)
        console = Console(file=(tmp_path / "said").open("a"), soft_wrap=True)
        return Sweep(study, goal, recipe, [], tmp_path / "out", trials, target, False, console)

    return sweep


def said(tmp_path: Path) -> str:
    return (tmp_path / "said").read_text()


def test_all_combinations_once_then_the_results(make, tmp_path: Path) -> None:
    run = make(lambda v, _: Outcome("complete", v["x.a"] / 10 + v["x.b"]), ["x.a=1,2,3", "x.b=0.1,0.2"])
    run.run()
    assert counted(run.study) == 6 and best_trial(run.study).params == {"x.a": 3, "x.b": 0.2}
    run.run()  # nothing is left to do
    assert counted(run.study) == 6
    write_results(run.study, run.fields, "eval_accuracy", True, run.directory, pytest.fail)
    table = list(csv.DictReader((run.directory / "trials.csv").open()))
    assert [row["x.a"] for row in table[:2]] == ["3", "2"] and table[0]["folder"] == "trials/0005"
    values, _ = read_recipe_file(run.directory / "best.yaml")
    assert values == {"x.a=3, x.b=0.2": 1, "output": str(run.directory / "best")}
    for name in ("parallel.png", "importance.png"):
        assert (run.directory / name).read_bytes().startswith(b"\x89PNG")


def test_target_pruning_and_trials_that_cannot_be(make, tmp_path: Path) -> None:
    def trial(values: dict[str, float], watch: Watch) -> Outcome:
        if values["x.a"] > 0.85:
            return Outcome("does not fit", None, 3, f"{DOES_NOT_FIT} 9 GiB")
        if values["x.a"] > 0.7:
            return Outcome("diverged", None, 5, "loss is not finite")
        return Outcome("pruned" if watch.report(500, values["x.a"]) else "complete", values["x.a"])

    run = make(trial, ["x.a=0.0..1.0"], trials=12)
    run.run()
    outcomes = [t.user_attrs["outcome"] for t in run.study.trials]
    assert len(outcomes) == 12 and {"complete", "pruned", "diverged", "does not fit"} == set(outcomes)
    assert best_trial(run.study).value <= 0.7
    assert "not started: memory: the run needs 9 GiB" in said(tmp_path)
    again = make(trial, ["x.a=0.0..1.0"], trials=20, target=0.3)  # reached already
    again.run()
    assert counted(again.study) == 12 and again.reached()


def test_interrupted_trials_run_again_first(make, tmp_path: Path) -> None:
    seen: list[float] = []

    def trial(values: dict[str, float], watch: Watch) -> Outcome:
        seen.append(values["x.a"])
        if len(seen) == 2:
            raise Interrupted("terminated", 143)
        return Outcome("complete", values["x.a"])

    run = make(trial, ["x.a=0.0..1.0"], trials=4)
    with pytest.raises(Interrupted, match="trial 1, which is saved and in the queue") as caught:
        run.run()
    assert caught.value.exit_code == 143 and counted(run.study) == 1
    # A worker that was killed leaves a running trial, with a process that is no more.
    lost = run.study.ask(search.distributions(run.fields))  # takes the queued one
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lost.set_user_attr("worker", {**this_worker(), "process": dead.pid})
    other = run.study.ask(search.distributions(run.fields))  # of a live worker: left alone
    other.set_user_attr("worker", this_worker())
    make(trial, ["x.a=0.0..1.0"], trials=4).run()
    assert seen[2] == seen[1] and "trial 2 was interrupted when its worker ended" in said(tmp_path)
    folders = [t.user_attrs.get("folder") for t in run.study.trials if t.params.get("x.a") == seen[1]]
    assert folders == ["trials/0001"] * 3  # it resumes in its folder
    assert counted(run.study) == 4 and len(seen) == 4


def test_failures(make, tmp_path: Path) -> None:
    run = make(lambda v, _: Outcome("failed", None, 2, "data.train: no such file"), ["x.a=1,2,3"])
    with pytest.raises(InputError, match="every trial fails alike, so the sweep stops: data.train"):
        run.run()
    assert counted(run.study) == 1
    run.discard()
    assert not run.directory.exists()
    run = make(lambda v, _: Outcome("failed", None, 1, "a bug"), ["x.a=1,2,3,4,5"])
    with pytest.raises(BudwoodError, match="a bug"):
        run.run()
    assert counted(run.study) == 3
    run.discard()
    killed = Outcome("failed", None, -9, "killed by SIGKILL")
    run = make(lambda v, _: killed if v["x.a"] == 2 else Outcome("complete", v["x.a"]), ["x.a=1,2,3"])
    run.run()  # one that dies fails alone
    assert counted(run.study) == 3 and best_trial(run.study).value == 3
    assert "trial 1: failed: killed by SIGKILL" in said(tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: 2")
    changed = make(lambda v, _: (tmp_path / "recipe.yaml").write_text("a: 3") and killed, ["x.a=1,2,3"], trials=9)
    changed.study.enqueue_trial({"x.a": 2})
    changed.study.enqueue_trial({"x.a": 2})
    with pytest.raises(InputError, match="changed during the sweep"):
        changed.run()


def test_folder_of_another_sweep_and_storages(make, tmp_path: Path) -> None:
    run = make(lambda v, _: Outcome("complete", v["x.a"]), ["x.a=1,2"])
    with pytest.raises(InputError, match="holds another sweep .space.x.a.choices"):
        make(lambda v, _: None, ["x.a=1,2,3"])
    with pytest.raises(InputError, match="holds another sweep .metric: eval_accuracy → eval_loss"):
        make(lambda v, _: None, ["x.a=1,2"], metric="eval_loss")
    with pytest.raises(InputError, match="--resume"):
        check_folder(run.directory, resume=False)
    assert check_folder(run.directory, resume=True) and not check_folder(tmp_path / "new", resume=True)
    with pytest.raises(InputError, match="is not empty and does not hold a sweep"):
        check_folder(tmp_path, resume=True)
    for url, kind, message in (
        ("nonsense", InputError, "is not the URL"), ("foo://x", InputError, "is not the URL"),
        ("sqlite:////none/such/x.db", ResourceError, "cannot be used"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            open_study(tmp_path / "new", url, "s", run.goal, 0, True, 9)
        assert not (tmp_path / "new").exists()
    shared = f"sqlite:///{tmp_path / 'shared.db'}"
    for folder, new in (("one", True), ("two", False)):  # a worker on another machine joins
        assert open_study(tmp_path / folder, shared, "s", run.goal, 0, True, 9)[1] is new


def test_watch_reads_each_evaluation_once(tmp_path: Path) -> None:
    reported: list[tuple[int, float]] = []
    watch = Watch("eval_accuracy", lambda share, value: bool(reported.append((share, value))), lambda *_: None)
    manifest = {"budwood": "1", "steps": 8, "best_metric": {"name": "eval_loss", "higher": False}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        file.write('{"kind": "evaluation", "step": 0, "eval_accuracy": 0}\n{"kind": "evaluation", "step": 4, "eval_ac')
        file.flush()
        watch.look(tmp_path, 0)
        assert reported == []
        file.write('curacy": 0.5}\n{"kind": "evaluation", "step": 6}\n')
        file.flush()
        watch.look(tmp_path, 0)
        watch.look(tmp_path, 0)
    assert reported == [(500, 0.5)]
    path.write_text('{"kind": "evaluation", "step": 0, "eval_acuracy": 0, "eval_loss": 1}\n')
    wrong = Watch("eval_accuracy", lambda *_: False, lambda *_: None)
    with pytest.raises(InputError, match="Did you mean 'eval_acuracy'. They give eval_acuracy, eval_loss"):
        wrong.look(tmp_path, 0)
    wrong.look(tmp_path, path.stat().st_mtime + 60)  # that of the run which is resumed is not read


def test_runs_that_evaluate_nothing_are_refused_at_the_first_look(tmp_path: Path) -> None:
    """And a run that has ended without the metric ends the sweep, as each one would."""
    watch = Watch("eval_loss", lambda *_: False, lambda *_: None)
    manifest = {"budwood": "1", "steps": 4, "examples": {"train": {"examples": 40}}, "metrics": {"loss": 1.5}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="--metric eval_loss: the runs evaluate nothing.*-o data.eval=FILE"):
        watch.look(tmp_path, 0.0)
    assert not Watch("loss", lambda *_: False, lambda *_: None).look(tmp_path, 0.0)
    assert trial._result(tmp_path, "loss", 1.0) == Outcome("complete", 1.5, seconds=1.0)
    assert trial._result(tmp_path, "nosuch", 1.0).code == InputError.exit_code
