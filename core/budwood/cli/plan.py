"""`budwood plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from budwood.cli.imports import uncollected
from budwood.cli.streams import echo, echo_json


def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML or JSON).")],
    override: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("-o", "--override", metavar="KEY=VALUE", help="Override a value of the recipe."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="A card such as 4090, or memory such as cuda:24GiB. Default: this machine's."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=8, help="Plan micro-batches of this many tokens, without reading data."),
    ] = None,
    composition: Annotated[
        bool, typer.Option("--composition", help="Only compose the strategies: no memory, no time, no data.")
    ] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run Python files that the recipe names, such as rewards.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a recipe will do and need: order of hooks, problems, memory, time, disk. Loads no weights."""
    from budwood.cli.streams import Output
    from budwood.errors import BudwoodError, InputError

    if composition and (device or tokens):
        raise InputError("--composition: --device and --tokens have no effect with it; leave one out.")
    with uncollected():
        from budwood.planning.composition import plan as make_plan
        from budwood.planning.composition import show_plan
        from budwood.planning.process import estimate_in_process, find_device
        from budwood.planning.table import show_estimate

    chosen = None if composition else find_device(device)
    run_plan = make_plan(recipe, override or [], allow_code)
    error: BudwoodError | None = None
    if chosen is not None and not run_plan.problems:
        try:
            assert run_plan.recipe is not None
            run_plan.estimate = estimate_in_process(run_plan.recipe, chosen, tokens)
        except BudwoodError as failure:  # the composition is shown all the same
            error = failure
    if as_json:
        echo_json(run_plan.as_dict())
    else:
        show_plan(run_plan, Output(highlight=False))
        if run_plan.estimate is not None:
            show_estimate(run_plan.estimate, run_plan.recipe, Output(highlight=False))
    for problem in run_plan.problems:
        line = "".join(c if c.isprintable() else "?" for c in " ".join(problem.split()))
        echo(f"error: {line}", err=True)
    if run_plan.problems:
        raise typer.Exit(run_plan.exit_code)
    if error is not None:
        raise error
