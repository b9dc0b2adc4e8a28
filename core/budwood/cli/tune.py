"""`budwood tune` and `budwood eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

DATA_SUFFIXES = {".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"}


def tune(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML or JSON); or a data file, together with --base.")],
    base: Annotated[str | None, typer.Option("--base", help="Base model for a data file: folder or hub name.")] = None,
    override: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("-o", "--override", metavar="KEY=VALUE", help="Change a value of the recipe, as in lora.rank=16."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the final metrics as JSON.")] = False,
) -> None:
    """Run a recipe: fine-tune, and leave the adapter, the log and a plot in its output folder."""
    from budwood.errors import InputError
    from budwood.training.preflight import preflight
    from budwood.training.recipe import default_recipe, load_recipe

    is_data = recipe.suffix.lower() in DATA_SUFFIXES or recipe.is_dir()
    if is_data and base is None:
        raise InputError(f"{recipe} is a data file: say which model to tune on it with --base DIR, or name a recipe.")
    if base is not None and not is_data:
        raise InputError("--base goes with a data file; in a recipe it is base.model (or -o base.model=DIR).")
    if base is not None:
        loaded = default_recipe(recipe, base, overrides=override or [])
    else:
        loaded = load_recipe(recipe, override or [])
    preflight(loaded, overwrite)  # before torch is imported, which takes seconds
    from budwood.training.loop import tune as run_recipe

    run = run_recipe(loaded, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps({"before": run.before, "metrics": run.metrics, "output": str(run.directory)}))


def eval_(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder.")],
    data: Annotated[Path, typer.Option("--data", help="Data in any form that `tune` takes.")],
    base: Annotated[Optional[str], typer.Option("--base", help="Base model, if not the one the adapter names.")] = None,  # noqa: UP045
    quantization: Annotated[str | None, typer.Option("--quantization", help="As the adapter's, if not given.")] = None,
    precision: Annotated[str, typer.Option("--precision", help="auto, bf16, fp16 or fp32.")] = "auto",
    max_length: Annotated[int, typer.Option("--max-length", help="Longer rows are cut and counted.")] = 1024,
    generate: Annotated[int, typer.Option("--generate", help="Prompts that are answered, for exact match.")] = 1000,
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Evaluate on a base that the adapter was not trained on.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Measure an adapter on data: loss and the task's metrics, with the adapter and without it."""
    from budwood.training.evaluate import evaluate_adapter

    result = evaluate_adapter(
        adapter, data, base, quantization, precision, max_length, generate, allow_other_base=allow_other_base
    )
    if as_json:
        typer.echo(json.dumps({"adapter": result.adapter, "base": result.base}))
        return
    width = max(map(len, result.adapter))
    typer.echo(f"{'':{width}}  {'adapter':>10}  {'base':>10}")
    for name, value in result.adapter.items():
        without = f"{result.base[name]:>10.4f}" if name in result.base else f"{'–':>10}"
        typer.echo(f"{name.removeprefix('eval_'):{width}}  {value:>10.4f}  {without}")
    if result.report:
        typer.echo("\n" + result.report)
