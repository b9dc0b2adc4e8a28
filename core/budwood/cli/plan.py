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
    fits: Annotated[
        str | None,
        typer.Option("--fit", metavar="DEVICE", help="Search the settings that fit a card, or memory such as 24GiB."),
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

    if composition and (device or tokens or fits):
        raise InputError("--composition: --device, --tokens and --fit have no effect with it; leave them out.")
    if device and fits:
        raise InputError("--fit names the device itself: leave --device out.")
    with uncollected():
        from budwood.planning.composition import plan as make_plan
        from budwood.planning.composition import show_plan
        from budwood.planning.fit import fit, show_fit
        from budwood.planning.process import estimate_in_process, find_device
        from budwood.planning.table import show_estimate

    if fits is not None and fits[:1].isdigit() and fits[-1:] in "bBgGmM":  # a size alone
        fits = f"cuda:{fits}"
    chosen = find_device(fits or device) if fits or device else None
    run_plan = make_plan(recipe, override or [], allow_code, without_data=tokens is not None)
    error: BudwoodError | None = None
    found = None
    if not composition and not run_plan.problems:
        try:
            chosen = chosen or find_device(run_plan.recipe.base.device)
            if fits is not None:
                found = fit(run_plan.recipe, lambda recipe: estimate_in_process(recipe, chosen, tokens, keep=True))
                run_plan.estimate = (found.chosen or found.candidates[-1]).estimate
            else:
                run_plan.estimate = estimate_in_process(run_plan.recipe, chosen, tokens)
        except BudwoodError as failure:  # the composition is shown all the same
            error = failure
    if as_json:
        values = run_plan.as_dict()
        if found is not None:
            values["fit"] = {"overrides": found.chosen.overrides if found.chosen else None, "reason": found.reason}
        echo_json(values)
    else:
        show_plan(run_plan, Output(highlight=False))
        if run_plan.estimate is not None:
            show_estimate(run_plan.estimate, run_plan.recipe, Output(highlight=False))
        if found is not None:
            show_fit(found, run_plan.recipe, Output(highlight=False))
    for problem in run_plan.problems:
        line = "".join(c if c.isprintable() else "?" for c in " ".join(problem.split()))
        echo(f"error: {line}", err=True)
    if tokens is None and any("data." in problem and "no such file" in problem for problem in run_plan.problems):
        echo("note: --tokens 2048 plans without data, for micro-batches of so many tokens", err=True)
    if run_plan.problems:
        raise typer.Exit(run_plan.exit_code)
    if error is not None:
        raise error
