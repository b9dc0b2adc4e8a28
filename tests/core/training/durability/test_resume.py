"""A resumed run is bitwise identical to an uninterrupted one; changes are rejected by name."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_two_processes

from budwood.cli.app import run as command
from budwood.contract.strategy import hookimpl
from budwood.contract.types import Run
from budwood.errors import CorruptError, DivergedError, InputError, Interrupted
from budwood.recipe.schema import Recipe
from budwood.training import finish, loop, setup
from budwood.training.durability.reading import steps_in
from budwood.training.loop import tune
from budwood.training.report import Report

Make = Callable[..., Recipe]
Kill = Callable[[int | None], None]


class Killed(BaseException):
    """Simulates a killed process."""


def records(directory: Path) -> list[dict[str, Any]]:
    """Return all logged values except times."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((directory / "adapter").iterdir())}


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest.json").read_text())


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kill]:
    """Function `kill_at(step)`: from then on, a run dies in the middle of the step after `step`, or never if None."""
    at: list[int | None] = [None]
    original = loop.sum_gradients

    def sum_gradients(run: Run) -> None:
        if run.step == at[0]:
            raise Killed
        original(run)

    monkeypatch.setattr(loop, "sum_gradients", sum_gradients)
    yield lambda step: at.__setitem__(0, step)


@pytest.fixture
def killed(make_recipe: Make, kill_at: Kill) -> Callable[..., Recipe]:
    """Function `killed(step, **sections)` -> the recipe of a run that died there; by default it saves every step."""

    def make(step: int = 3, **sections: Any) -> Recipe:
        sections["train"] = {"save_every": 1, **sections.get("train", {})}
        recipe = make_recipe(**sections)
        kill_at(step)
        with pytest.raises(Killed):
            tune(recipe, quiet=True)
        kill_at(None)
        return recipe

    return make


@dataclass(frozen=True)
class Whole:
    """What an uninterrupted run logged and wrote."""

    records: list[dict[str, Any]]
    metrics: dict[str, float]
    files: dict[str, bytes]


@pytest.fixture(scope="module")
def kept_wholes() -> dict[str, Whole]:
    return {}


@pytest.fixture
def whole(make_recipe: Make, kept_wholes: dict[str, Whole]) -> Callable[..., Whole]:
    """Function of `make_recipe`'s arguments: what such a run gives without an interruption, trained once per module."""

    def make(**sections: Any) -> Whole:
        key = repr(sections)
        if key not in kept_wholes:
            run = tune(make_recipe("whole", **sections), quiet=True)
            kept_wholes[key] = Whole(records(run.directory), run.metrics, files(run.directory))
        return kept_wholes[key]

    return make


@pytest.fixture
def same(make_recipe: Make, kill_at: Kill, tmp_path: Path) -> Callable[..., Run]:
    """Function of `make_recipe`'s arguments and `kills`: compares a complete run with one killed at these steps.

    `kills` may be a function of the complete run's last step.
    """

    def check(*, kills: tuple[int, ...] | Callable[[int], tuple[int, ...]], **sections: Any) -> Run:
        kill_at(None)
        uninterrupted = tune(make_recipe(**sections), quiet=True)
        kept = tmp_path / "kept"
        uninterrupted.directory.rename(kept)
        if callable(kills):
            kills = kills(uninterrupted.step)
        for number, step in enumerate(kills):
            kill_at(step)
            with pytest.raises(Killed):
                tune(make_recipe(**sections), quiet=True, resume=number > 0)
        kill_at(None)
        run = tune(make_recipe(**sections), quiet=True, resume=True)
        assert 0 < manifest(run.directory)["resumed_from_step"] <= kills[-1]
        assert records(run.directory) == records(kept)
        assert run.metrics == uninterrupted.metrics
        assert run.before == uninterrupted.before
        assert files(run.directory) == files(kept)
        assert manifest(run.directory)["finished"] is True
        return run

    return check


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_dropout_accumulation_and_evaluations_in_between(same: Callable[..., Run], quantization: str) -> None:
    strategies = [{"lora": {"rank": 4, "dropout": 0.2, "learning_rate_ratio": 4}}]
    train = {
        "epochs": 3, "save_every": 2, "eval_every": 3, "micro_tokens": 128, "batch_tokens": 400, "schedule": "cosine",
        "warmup": 2, "eval_generate": 2, "weight_decay": 0.1,
    }  # fmt: skip
    run = same(kills=(3, 6), strategies=strategies, evaluate=True, train=train, base={"quantization": quantization})
    assert run.steps == 9


@pytest.mark.parametrize("method", ["fgm", "pgd", "freelb", "smart", "vat", "neftune"])
def test_every_adversary(same: Callable[..., Run], method: str) -> None:
    strategies = [{"lora": {"rank": 4, "dropout": 0.1}}, {"adversarial": {"method": method}}]
    same(kills=(2,), strategies=strategies, train={"steps": 3, "save_every": 1})


def test_adalora_in_each_of_its_phases(same: Callable[..., Run]) -> None:
    """Warm-up to step 3, pruning every second step to step 8, then final ranks."""
    options = {"initial_rank": 4, "target_rank": 1, "initial_phase": 3, "final_phase": 4, "interval": 2, "dropout": 0.1}
    train = {"steps": 12, "save_every": 1, "eval_every": 5}
    run = same(kills=(2, 5, 6, 8, 10), strategies=[{"adalora": options}], evaluate=True, train=train)
    ranks = run.strategies[0].ranks().values()
    assert sum(ranks) == 14 and len(set(ranks)) > 1


@pytest.mark.parametrize("average", [{"ema": {"decay": 0.5}}, {"swa": {"start": 4, "every": 2}}], ids=["ema", "swa"])
def test_an_average_with_adalora_in_each_of_its_phases(same: Callable[..., Run], average: dict[str, Any]) -> None:
    """As above; evaluation and adapter use the average, whose shadow tensors are pruned like the parameters."""
    options = {"initial_rank": 4, "target_rank": 1, "initial_phase": 3, "final_phase": 4, "interval": 2, "dropout": 0.1}
    train = {"steps": 12, "save_every": 1, "eval_every": 3}
    run = same(kills=(2, 5, 6, 8, 10), strategies=[{"adalora": options}, average], evaluate=True, train=train)
    assert run.average.updates == (12 if "ema" in average else 5)
    assert [tuple(s.shape) for s in run.average.shadows.values()] == [tuple(p.shape) for p in run.trainable]


def test_a_new_average_starts_at_the_resume(
    killed: Callable[..., Recipe], make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = killed(3, strategies=[{"lora": {"rank": 4}}])
    run = tune(
        make_recipe(strategies=[{"lora": {"rank": 4}}, "ema"], train={"save_every": 1}),
        quiet=True, resume=True, accept_changes=True,
    )  # fmt: skip
    assert run.directory == recipe.output and run.average.updates == run.step - 3 == 1


def test_a_teacher_from_its_cache_with_adalora_and_an_adversary(
    same: Callable[..., Run], tmp_path: Path, tiny_bases: Callable[..., Path]
) -> None:
    teacher = {"teacher": str(tiny_bases("teacher", seed=1)), "cache": str(tmp_path / "cache"), "weight": 0.5}
    adalora = {"initial_rank": 3, "target_rank": 2, "initial_phase": 1, "final_phase": 2, "interval": 1}
    strategies = [{"adalora": adalora}, {"distillation": teacher}, {"adversarial": {"method": "pgd", "steps": 2}}]
    same(kills=(2, 4), strategies=strategies, train={"steps": 5, "save_every": 2})


def test_the_best_adapter_and_an_early_stop(same: Callable[..., Run]) -> None:
    """The best step is long before the kill, and the run stops at the same evaluation."""
    train = {"steps": 60, "eval_every": 2, "patience": 2, "learning_rate": 0.3, "save_every": 3}
    run = same(kills=lambda last: (last - 1,), evaluate=True, train=train)
    resumed = manifest(run.directory)["resumed_from_step"]
    assert resumed == (run.step - 1) // 3 * 3
    assert run.metrics["best_step"] < resumed < run.step < 60


def test_an_early_stop_with_an_evaluation_after_each_epoch(same: Callable[..., Run]) -> None:
    """The recipe gives epochs and a patience, and leaves the interval of evaluations to the run."""
    train = {"epochs": 20, "patience": 1, "learning_rate": 0.3, "save_every": 2}
    run = same(kills=lambda last: (last - 1,), evaluate=True, train=train)
    assert run.recipe.train.eval_every == 3 and run.step % 3 == 0 and run.step < run.steps == 60


@pytest.mark.parametrize("where", ["evaluate", "write_results"])
def test_killed_after_the_last_step(
    whole: Callable[..., Whole], make_recipe: Make, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"steps": 20, "eval_every": 2, "patience": 1, "learning_rate": 0.3}
    uninterrupted = whole(evaluate=True, train=train)

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop if where == "evaluate" else finish, where, die)
        if where == "evaluate":  # only after the last step
            steps = loop.take_steps
            patch.undo()

            def take(*args: Any) -> None:
                steps(*args)
                raise Killed

            patch.setattr(loop, "take_steps", take)
        tune(make_recipe(evaluate=True, train=train), quiet=True)
    run = tune(make_recipe(evaluate=True, train=train), quiet=True, resume=True)
    assert run.metrics == uninterrupted.metrics
    assert records(run.directory) == uninterrupted.records
    assert files(run.directory).keys() == uninterrupted.files.keys()


def test_steps_skipped_by_fp16_are_counted_across_a_resume(
    same: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale starts too large, and the first steps halve it."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**22)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    train = {"steps": 8, "save_every": 2, "precision": "fp16", "learning_rate": 1e-3}
    run = same(kills=(3, 7), train=train)
    assert 2 < run.metrics["skipped"] < 7


def test_two_processes(make_recipe: Make, tmp_path: Path) -> None:
    """Each process restores its own random state: bitwise identical with dropout."""
    strategies = [{"lora": {"rank": 4, "dropout": 0.3}}, {"adversarial": {"method": "fgm"}}]
    train = {"micro_tokens": 128, "save_every": 2, "steps": 5, "eval_every": 2}
    recipe = make_recipe("two", strategies=strategies, evaluate=True, train=train)
    path = tmp_path / "two.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    run_in_two_processes(
        "import os, torch\n"
        "from budwood.training import loop\n"
        "from budwood.training.report import Report\n"
        "Report.plot = lambda self, directory: None\n"
        "class Killed(BaseException): pass\n"
        "whole, at = loop.sum_gradients, [None]\n"
        "def sum_gradients(run):\n"
        "    if run.step == at[0]: raise Killed\n"
        "    whole(run)\n"
        "loop.sum_gradients = sum_gradients\n"
        f"run = loop.tune({str(path)!r}, quiet=True)\n"
        "assert run.processes == 2\n"
        f"if run.process_index == 0: os.rename({str(tmp_path / 'two')!r}, {str(tmp_path / 'whole')!r})\n"
        "torch.distributed.barrier()\n"
        "at[0] = 3\n"
        f"try: loop.tune({str(path)!r}, quiet=True)\n"
        "except Killed: pass\n"
        "else: raise SystemExit('not killed')\n"
        "at[0] = None\n"
        "torch.distributed.barrier()\n"
        "torch.rand(3)\n"
        f"loop.tune({str(path)!r}, quiet=True, resume=True)\n",
        tmp_path,
    )
    assert manifest(tmp_path / "two")["resumed_from_step"] == 2
    assert records(tmp_path / "two") == records(tmp_path / "whole")
    assert files(tmp_path / "two") == files(tmp_path / "whole")


def test_a_change_is_printed_and_rejected_or_accepted(
    killed: Callable[..., Recipe], make_recipe: Make, said: list[str]
) -> None:
    recipe = killed(2, train={"schedule": "linear"})
    train = {"save_every": 1, "schedule": "constant", "learning_rate": 0.5, "steps": 6}
    changed = make_recipe(train=train)
    with pytest.raises(InputError) as caught:
        tune(changed, resume=True)
    text = str(caught.value)
    assert "step-00000002 has different settings" in text and "--accept-changes" in text
    for change in ("learning_rate: 0.01 → 0.5", "schedule: linear → constant", "steps: 4 → 6"):
        assert f"recipe.train.{change}" in text
    run = tune(changed, resume=True, accept_changes=True)
    assert "accepted: recipe.train.learning_rate: 0.01 → 0.5" in said
    rates = [record["learning_rate"] for record in records(run.directory) if record["kind"] == "step"]
    assert rates == [0.01, 0.0075, 0.5, 0.5, 0.5, 0.5]
    accepted = manifest(run.directory)["accepted_changes"]
    assert {"step": 2, "field": "recipe.train.learning_rate", "before": 0.01, "now": 0.5} in accepted
    with pytest.raises(InputError, match="the finished run in .*learning_rate: 0.5 → 0.01"):
        tune(recipe, resume=True)


def test_a_finished_run_does_nothing_and_can_be_made_longer(make_recipe: Make, said: list[str]) -> None:
    first = tune(make_recipe(), quiet=True)
    before = {p: p.read_bytes() for p in first.directory.rglob("*") if p.is_file()}
    again = tune(make_recipe(), resume=True)
    assert said[-1].endswith("the run is finished at step 4; there is nothing to resume")
    assert again.metrics == first.metrics and again.step == 4
    assert {p: p.read_bytes() for p in first.directory.rglob("*") if p.is_file()} == before
    longer = make_recipe(train={"steps": 6})
    with pytest.raises(InputError, match="train.steps: 4 → 6"):
        tune(longer, resume=True)
    run = tune(longer, resume=True, accept_changes=True)
    assert [record["step"] for record in records(run.directory) if record["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    uninterrupted = tune(make_recipe("whole", train={"steps": 6}), quiet=True)  # the schedule is constant
    assert (
        files(run.directory)["adapter_model.safetensors"] == files(uninterrupted.directory)["adapter_model.safetensors"]
    )


def test_a_change_to_a_different_run_cannot_be_accepted(
    killed: Callable[..., Recipe], make_recipe: Make, tiny_bases: Callable[..., Path]
) -> None:
    killed(2)
    kept = {p: p.read_bytes() for p in Path(make_recipe().output).rglob("*.safetensors")}
    cases = {
        "base.fingerprint: .* cannot be accepted": {"base": {"model": str(tiny_bases("teacher", seed=1))}},
        "base.quantization: none → nf4.*cannot be accepted": {"base": {"quantization": "nf4"}},
        r"q_proj.lora_A: \[4, 64\] → \[8, 64\].*cannot be accepted": {"strategies": [{"lora": {"rank": 8}}]},
        "a run of 1 step ends before this checkpoint": {"train": {"steps": 1}},
    }
    for message, sections in cases.items():
        with pytest.raises(InputError, match=message):
            tune(make_recipe(**sections), quiet=True, resume=True, accept_changes=True)
    assert {p: p.read_bytes() for p in Path(make_recipe().output).rglob("*.safetensors")} == kept


def test_other_data_another_version_and_other_strategies_are_named(
    killed: Callable[..., Recipe], make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = killed(2)
    versions = setup.changes.version
    monkeypatch.setattr(setup.changes, "version", lambda name: "0.0" if name == "peft" else versions(name))
    strategies = [{"lora": {"rank": 4, "alpha": 3}}, {"adversarial": {"method": "fgm"}}]
    changed = recipe.model_copy(update={"strategies": make_recipe("other", strategies=strategies).strategies})
    path = Path(recipe.data.train)
    rows = path.read_text()
    path.write_text(rows + rows.splitlines(keepends=True)[0])
    with pytest.raises(InputError) as caught:
        tune(changed, quiet=True, resume=True)
    text = str(caught.value)
    for change in (
        "data.train: ", "versions.peft: ", "recipe.strategies: ['lora'] → ['lora', 'adversarial']",
        "strategies.lora.alpha: 16.0 → 3.0", "strategies.adversarial: none → budwood",
    ):  # fmt: skip
        assert change in text, text
    run = tune(changed, quiet=True, resume=True, accept_changes=True)
    assert run.step == 4


def test_with_nothing_to_resume_a_run_starts(make_recipe: Make, kill_at: Kill, said: list[str]) -> None:
    recipe = make_recipe(train={"save_every": 3})
    kill_at(1)
    with pytest.raises(Killed):
        tune(recipe, resume=True)
    assert "holds no run to resume: starting from the beginning" in said[0]
    kill_at(None)
    said.clear()
    run = tune(recipe, resume=True)
    assert "holds no checkpoint: starting from the beginning" in said[0]
    assert [record["step"] for record in records(run.directory)] == [1, 2, 3, 4]


def test_an_unfinished_run_is_rejected_without_resume(killed: Callable[..., Recipe]) -> None:
    recipe = killed(2)
    with pytest.raises(InputError, match="unfinished run: continue it with --resume, start over with --overwrite"):
        tune(recipe, quiet=True)
    with pytest.raises(InputError, match="give only one"):
        tune(recipe, quiet=True, resume=True, overwrite=True)
    run = tune(recipe, quiet=True, overwrite=True)
    assert "resumed_from_step" not in manifest(run.directory)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "flipped": flip,
    "missing": Path.unlink,
}


def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(
    killed: Callable[..., Recipe], said: list[str], tmp_path: Path
) -> None:
    recipe = killed(3)
    sound = tmp_path / "sound"
    shutil.copytree(recipe.output, sound)
    uninterrupted: dict[str, bytes] = {}
    for number, name in enumerate(["state.safetensors", "state.json", "manifest.json", "extra", "another"]):
        for damage in DAMAGE.values() if number < 3 else [None]:
            shutil.rmtree(recipe.output)
            shutil.copytree(sound, recipe.output)
            newest = recipe.output / "checkpoints" / "step-00000003"
            if damage is not None:
                damage(newest / name)
            elif name == "extra":
                (newest / "extra").write_text("x")
            else:
                name = "step-00000003"
                shutil.rmtree(newest)
                shutil.copytree(newest.with_name("step-00000002"), newest)
            said.clear()
            result = loop.find_resume(recipe, Report(), False)
            assert result.checkpoint.step == 2
            assert name in said[0] and said[0].startswith("warning: ") and "Trying the previous checkpoint" in said[0]
    run = tune(recipe, quiet=True, resume=True)
    assert sorted(steps_in(run.directory / "checkpoints")) == [3, 4], "the damaged one was replaced"
    shutil.rmtree(recipe.output)
    shutil.copytree(sound, recipe.output)
    uninterrupted |= files(tune(recipe, quiet=True, resume=True).directory)
    assert files(run.directory) == uninterrupted
    shutil.rmtree(recipe.output)
    shutil.copytree(sound, recipe.output)
    for folder in steps_in(recipe.output / "checkpoints").values():
        truncate(folder / "state.json")
    with pytest.raises(CorruptError, match="no checkpoint is valid") as caught:
        tune(recipe, quiet=True, resume=True)
    assert caught.value.exit_code == 4


class At:
    """Sends a signal to this process in a hook of a step."""

    def __init__(self, hook: str, step: int, number: int, times: int = 1) -> None:
        self.hook, self.step, self.number, self.times = hook, step, number, times

    def _send(self, hook: str, run: Run) -> None:
        if hook == self.hook and run.step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)

    @hookimpl
    def before_clip(self, run: Run) -> None:
        self._send("before_clip", run)

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run) -> Any:
        self._send("evaluate", run)
        return (yield)


@pytest.mark.parametrize(
    ("hook", "step", "number", "times", "saved"),
    [
        ("before_clip", 2, signal.SIGTERM, 1, 3),  # the step is completed first
        ("before_clip", 2, signal.SIGINT, 2, 3),
        ("evaluate", 2, signal.SIGINT, 1, 2),  # the evaluation is interrupted
        ("evaluate", 2, signal.SIGTERM, 2, 2),
        ("evaluate", 5, signal.SIGINT, 1, 5),  # the last evaluation
    ],
)
def test_a_signal_saves_the_last_step_and_prints_how_to_resume(
    whole: Callable[..., Whole], make_recipe: Make, monkeypatch: pytest.MonkeyPatch,
    hook: str, step: int, number: int, times: int, saved: int,
) -> None:  # fmt: skip
    train = {"steps": 5, "eval_every": 2}
    strategies = [{"lora": {"rank": 4, "dropout": 0.2}}]
    uninterrupted = whole(strategies=strategies, evaluate=True, train=train)
    recipe = make_recipe(strategies=strategies, evaluate=True, train=train)
    prepare = loop.prepare

    def with_signal(*args: Any, **kwargs: Any) -> Any:
        run, hooks, engine = prepare(*args, **kwargs)
        hooks.register_core(At(hook, step, number, times), "signal")
        return run, hooks, engine

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
        patch.setattr(loop, "prepare", with_signal)
        tune(recipe, quiet=True)
    assert caught.value.exit_code == (130 if number == signal.SIGINT else 143)
    assert f"resume from step {saved} with: budwood tune {recipe.output}/recipe.yaml --resume" in str(caught.value)
    assert max(steps_in(recipe.output / "checkpoints")) == saved
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert command(["tune", str(recipe.output / "recipe.yaml"), "--resume"]) == 0
    assert records(recipe.output) == uninterrupted.records
    assert files(recipe.output)["adapter_model.safetensors"] == uninterrupted.files["adapter_model.safetensors"]


def test_a_third_signal_quits_immediately_and_keeps_what_was_saved(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(train={"save_every": 1})
    prepare = loop.prepare

    def with_signal(*args: Any, **kwargs: Any) -> Any:
        run, hooks, engine = prepare(*args, **kwargs)
        hooks.register_core(At("before_clip", 2, signal.SIGINT, 3), "signal")
        return run, hooks, engine

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="interrupted at step 2; resume from step"):
        patch.setattr(loop, "prepare", with_signal)
        tune(recipe, quiet=True)
    assert tune(recipe, quiet=True, resume=True).step == 4


def test_a_diverged_run_resumes_from_its_checkpoint_with_another_learning_rate(
    make_recipe: Make, test_strategies: object, said: list[str]
) -> None:
    strategies = [{"lora": {"rank": 4}}, {"poison": {"step": 3, "example": 3}}]
    recipe = make_recipe(strategies=strategies, train={"batch_examples": 24, "save_every": 1})
    with pytest.raises(DivergedError):
        tune(recipe, quiet=True)
    cured = make_recipe(strategies=[{"lora": {"rank": 4}}], train={"batch_examples": 24, "save_every": 1})
    run = tune(cured, resume=True, accept_changes=True)
    assert run.step == 4 and manifest(run.directory)["resumed_from_step"] == 3


def test_deterministic_kernels_are_enabled(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        run = tune(make_recipe(train={"deterministic": True, "steps": 2}), quiet=True)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    plain = tune(make_recipe("plain", train={"steps": 2}), quiet=True)
    assert files(run.directory)["adapter_model.safetensors"] == files(plain.directory)["adapter_model.safetensors"]
