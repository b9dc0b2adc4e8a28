"""`budwood sweep`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from budwood.cli.options import AllowCode
from budwood.cli.streams import echo, echo_json
from budwood.errors import plural

if TYPE_CHECKING:
    from budwood.recipe.schema import Recipe
    from budwood.sweeps.space import Field

LOWER = ("loss", "perplexity", "error", "mae", "mse", "rmse", "wer", "cer", "kl", "length")
"""Words of metrics of which lower is better, unless the task says otherwise."""


def sweep(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML or JSON).")],
    search: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "-s",
            "--search",
            metavar="KEY=VALUES",
            help="A field to vary: lora.rank=4,8,16, train.learning_rate=1e-4..1e-2@log, or lora.rank=4..64@step=4.",
        ),
    ] = None,
    space: Annotated[Path | None, typer.Option("--space", help="A YAML file of KEY: VALUES.")] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="A metric of evaluations. Default: the task's, such as eval_loss.")
    ] = None,
    direction: Annotated[
        str | None, typer.Option("--direction", help="lower or higher. Default: what is better for the metric.")
    ] = None,
    target: Annotated[float | None, typer.Option("--target", help="Stop once the metric is as good as this.")] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Number of trials, over all workers.")] = 20,
    override: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("-o", "--override", metavar="KEY=VALUE", help="Override a value of the recipe in all trials."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Default: the recipe's output plus -sweep.")] = None,
    storage: Annotated[
        str | None,
        typer.Option("--storage", help="URL of a database that workers share. Default: SQLite in the output folder."),
    ] = None,
    study: Annotated[
        str | None, typer.Option("--study", help="Its name in the storage. Default: the folder's.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the sweep in the output folder, or join it.")
    ] = False,
    prune: Annotated[bool, typer.Option("--prune/--no-prune", help="Stop trials that lag behind the median.")] = True,
    test: Annotated[
        Path | None, typer.Option("--test", help="Data on which the best adapter alone is evaluated, once, at the end.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the values that a new sweep's worker draws.")] = 0,
    allow_code: AllowCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Search the best values of a recipe's fields: one run per trial, chosen by Optuna. Needs budwood[sweep]."""
    from rich.console import Console

    from budwood.errors import BudwoodError, InputError
    from budwood.model.checks import check_base
    from budwood.recipe.schema import load_recipe
    from budwood.sweeps.results import BEST, TABLE, rows, table_lines, write_results
    from budwood.sweeps.search import Sweep, best_trial, check_direction, counted
    from budwood.sweeps.space import check_space, read_space
    from budwood.sweeps.study import Goal, check_folder, need_optuna, open_study

    overrides = override or []
    if direction not in (None, "lower", "higher"):
        raise InputError(f"--direction {direction}: write lower or higher.")
    need_optuna()
    fields = read_space(search or [], space)
    loaded = load_recipe(recipe, overrides)
    directory = output or loaded.output.with_name(f"{loaded.output.name}-sweep")
    if not check_folder(directory, resume) and resume and storage is None:
        echo(f"note: {directory} holds no sweep yet: a new one starts", err=True)
    fields = check_space(fields, lambda given: _check(recipe, given, directory, allow_code), overrides)
    _check_data(loaded, test)
    check_base(loaded.base.model, loaded.base.quantization, loaded.base.trust_remote_code)
    metric, higher = _metric(loaded, metric, direction)
    goal = Goal({k: v for k, v in loaded.to_dict().items() if k != "output"}, fields, metric, higher)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    opened, new = open_study(directory, storage, study or directory.name, goal, seed, prune, trials)
    run = Sweep(opened, goal, recipe, overrides, directory, trials, target, allow_code, console)
    better = "higher" if higher else "lower"
    run.say(f"{metric}, {better} is better; {plural(len(fields), 'field')}; trials in {directory / 'trials'}")
    if not new:
        run.say(f"continues a sweep of {plural(counted(opened), 'trial')}")
    if prune and _evaluated_at_the_end(loaded, fields):
        run.say("note: trials are evaluated only at their end, so none is stopped early: set train.eval_every")
    try:
        run.run()
        check_direction(run)
    except BudwoodError as error:
        if new and isinstance(error, InputError) and best_trial(opened) is None:
            run.discard()
        else:
            write_results(opened, fields, metric, higher, directory, run.say)
        raise
    write_results(opened, fields, metric, higher, directory, run.say)
    table, best = rows(opened, fields, higher), best_trial(opened)
    tested = _test(run, best, test) if test is not None and best is not None else None
    if as_json:
        folder = str(directory / best.user_attrs["folder"]) if best is not None else None
        result: dict[str, Any] = {"metric": metric, "higher": higher, "trials": table, "output": str(directory)}
        result["best"] = {"trial": best.number, "value": best.value, "folder": folder} if best is not None else None
        echo_json({**result, "test": tested})
        return
    echo("\n".join(table_lines(table, fields, metric)))
    if best is None:
        raise run.error(f"no trial completed; {directory / TABLE} has their errors.")
    reached = f", which reaches the target {target:g}" if run.reached() else ""
    echo(f"best: trial {best.number}, {metric} {best.value:.4f}{reached}: {directory / best.user_attrs['folder']}")
    if tested is not None:
        echo("test: " + ", ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in tested.items()))
    echo(f"table: {directory / TABLE} · best recipe: {directory / BEST}")


def _evaluated_at_the_end(recipe: Recipe, fields: Sequence[Field]) -> bool:
    """Return whether no trial is evaluated during its run; the fields that are searched have a value in each."""
    from budwood.recipe.defaults import evaluates_each_epoch

    searched = {field.key.removeprefix("train."): 1 for field in fields if field.key.startswith("train.")}
    train = recipe.train.model_copy(update=searched)
    return train.eval_every is None and not evaluates_each_epoch(train)


def _check(recipe: Path, overrides: Sequence[str], directory: Path, allow_code: bool) -> None:
    from budwood.recipe.schema import build_composition, check_code, load_recipe

    loaded = load_recipe(recipe, overrides).allowing_code(allow_code)
    check_code(loaded, build_composition(loaded).strategies)


def _check_data(loaded: Any, test: Path | None) -> None:
    from budwood.data.files import exists
    from budwood.errors import InputError

    if loaded.data.eval == "none":
        raise InputError(f"{loaded.where('data', 'eval')}: data.eval: a sweep compares evaluations, so it needs data.")
    if test is None:
        return
    if not exists(str(test)):
        raise InputError(f"--test {test}: no such file (from {Path.cwd()}).")
    for name in ("train", "eval"):
        data = getattr(loaded.data, name)
        if isinstance(data, Path) and data.resolve() == test.resolve():
            raise InputError(f"--test {test}: is data.{name} of the recipe; a test needs data of its own.")


def _metric(loaded: Any, metric: str | None, direction: str | None) -> tuple[str, bool]:
    """Return the metric, and whether higher is better: as given, as the task says, or by the metric's name."""
    from budwood.recipe.data import recipe_task

    task = recipe_task(loaded)
    name = metric or task.best_metric
    if direction is not None:
        return name, direction == "higher"
    if name == task.best_metric:
        return name, not task.lower_is_better
    return name, not any(word in LOWER for word in name.split("_"))


def _test(run: Any, best: Any, data: Path) -> dict[str, float] | None:
    """Evaluate the best adapter on the test data, unless that was done; record it in the study."""
    known = run.study.user_attrs.get("test")
    if isinstance(known, dict) and (known["trial"], known["data"]) == (best.number, str(data)):
        return dict(known["metrics"])
    if isinstance(known, dict):
        run.say(f"warning: test data was already used for trial {known['trial']}; a choice that sees it is optimistic")
    adapter = run.directory / best.user_attrs["folder"] / "adapter"
    if not adapter.is_dir():
        run.say(f"note: trial {best.number}, the best, ran on another machine; run the test there")
        return None
    command = [sys.executable, "-P", "-m", "budwood", "eval", str(adapter), "--data", str(data), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        run.say(f"warning: the test failed: {last.removeprefix('error: ')}")
        return None
    metrics: dict[str, float] = json.loads(done.stdout)["adapter"]
    run.study.set_user_attr("test", {"trial": best.number, "data": str(data), "metrics": metrics})
    return metrics
