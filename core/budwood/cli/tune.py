"""`budwood tune` and `budwood eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from budwood.cli.given import read_given
from budwood.cli.options import AdapterFolder, AllowCode
from budwood.cli.streams import echo, echo_json, print_notes
from budwood.garbage import uncollected
from budwood.untrusted.formats import json_numbers

if TYPE_CHECKING:
    from budwood.contract.types import Run
    from budwood.recipe.schema import Recipe


def tune(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML or JSON), or a data file together with --base.")],
    base: Annotated[str | None, typer.Option("--base", help="Base model for a data file: folder or hub name.")] = None,
    override: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "-o", "--override", metavar="KEY=VALUE", help="Override a value of the recipe, such as lora.rank=16."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in the output folder; if there is none, start it.")
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="With --resume: continue even if recipe, data or versions changed."),
    ] = False,
    allow_code: AllowCode = False,
    fits: Annotated[
        str | None,
        typer.Option("--fit", metavar="DEVICE", help="Run with settings that fit a card, or memory such as 24GiB."),
    ] = None,
    allow: Annotated[
        str,
        typer.Option("--allow", metavar="NAMES", help="With --fit: may change optimizer,quantization,rank,max_length."),
    ] = "",
    profile: Annotated[
        bool, typer.Option("--profile", help="At the end, show the time and memory of every strategy's hooks.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the final metrics as JSON.")] = False,
) -> None:
    """Run a recipe: fine-tune, and write the adapter, the log and a plot to its output folder."""
    from budwood.errors import InputError
    from budwood.parallel.processes import Processes
    from budwood.parallel.refusals import refuse_engines, without_effect
    from budwood.planning.options import allowed, fit_name, named_device

    if accept_changes and not resume:
        raise InputError("--accept-changes needs --resume.")
    if allow and fits is None:
        raise InputError("--allow needs --fit.")
    if fits is not None and resume:
        raise InputError(
            "--fit chooses settings for a new run, and a resumed one keeps its own: resume with the recipe.yaml in the "
            "output folder, without --fit."
        )
    permitted = allowed(allow)
    if fits is not None:
        named_device(fit_name(fits, "cuda"), "--fit")
    world = Processes.from_environment()
    refuse_engines()
    if world.first:
        print_notes(without_effect())
    if world.size > 1 and fits is not None:
        raise InputError(
            "--fit searches in one process: write the recipe that fits with budwood plan --fit, and start that one."
        )
    loaded = read_given(recipe, base, override or []).allowing_code(allow_code)
    run = _tune(loaded, overwrite, resume, accept_changes, profile, fits, permitted)
    if as_json and world.first:
        metrics = {"before": json_numbers(run.before), "metrics": json_numbers(run.metrics)}
        echo_json({**metrics, "output": str(run.directory)})


def _tune(
    loaded: Recipe,
    overwrite: bool,
    resume: bool,
    accept_changes: bool,
    profile: bool,
    fits: str | None,
    allow: set[str],
) -> Run:
    from budwood.training.output import after_restart
    from budwood.training.preflight import preflight

    overwrite, resume = after_restart(loaded.output, overwrite, resume)
    preflight(loaded, overwrite, resume)  # before torch is imported, which takes seconds
    with uncollected():
        from budwood.planning.run import tune as run_recipe
        from budwood.training.report import process_age

    if fits is not None:
        from budwood.planning.frontier import fit_run

        loaded = fit_run(loaded, fits, allow, lambda line: echo(line, err=True))
    return run_recipe(
        loaded, overwrite=overwrite, resume=resume, accept_changes=accept_changes, profile=profile,
        before=process_age(),
    )  # fmt: skip


def eval_(
    adapter: AdapterFolder,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Data in any format that `tune` accepts. Default: what its run evaluated on."),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model. Default: as recorded in the adapter.")] = None,
    quantization: Annotated[str | None, typer.Option("--quantization", help="Default: as recorded.")] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="auto, bf16, fp16 or fp32. Default: as recorded.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=1, help="Maximum tokens per example. Default: as recorded.")
    ] = None,
    generate: Annotated[
        int | None, typer.Option("--generate", min=0, help="Prompts answered for exact match. Default: as recorded.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or auto.")] = "auto",
    attack: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--attack",
            metavar="NAME:KEY=VALUE,…",
            help="Also evaluate under an attack, such as pgd:epsilon=0.5,steps=10 or typos:rate=0.1; may be repeated.",
        ),
    ] = None,
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Evaluate on a base that the adapter was not trained on.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Evaluate an adapter on data: loss and the task's metrics, with and without the adapter."""
    from budwood.training.evaluation_inputs import read_inputs

    inputs = read_inputs(adapter, data, base, quantization, max_length, generate, attack or [], allow_other_base)
    with uncollected():
        from budwood.training.evaluate import evaluate

    result = evaluate(inputs, quantization, precision, device, allow_other_base)
    if as_json:
        attacks = {text: json_numbers(values) for text, values in result.attacks.items()}
        metrics = {"adapter": json_numbers(result.adapter), "attacks": attacks, "base": json_numbers(result.base)}
        echo_json(metrics)
        return
    columns = {"adapter": result.adapter, **result.attacks, "base": result.base}
    width = max(map(len, result.adapter)) - len("eval_")
    echo("  ".join([" " * width, *(f"{title:>10}" for title in columns)]))
    for name in result.adapter:
        cells = (
            f"{values[name]:.4f}".rjust(max(10, len(title))) if name in values else "–".rjust(max(10, len(title)))
            for title, values in columns.items()
        )
        echo("  ".join([f"{name.removeprefix('eval_'):{width}}", *cells]))
    if result.report:
        echo("\n" + result.report)
