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
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run Python files that the recipe names, such as rewards.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show how a recipe's strategies are composed, hook by hook, and list its problems. Reads no data."""
    from budwood.cli.streams import Output

    with uncollected():
        from budwood.planning.composition import plan as make_plan
        from budwood.planning.composition import show_plan

    run_plan = make_plan(recipe, override or [], allow_code)
    if as_json:
        echo_json(run_plan.as_dict())
    else:
        show_plan(run_plan, Output(highlight=False))
    for problem in run_plan.problems:
        line = "".join(c if c.isprintable() else "?" for c in " ".join(problem.split()))
        echo(f"error: {line}", err=True)
    if run_plan.problems:
        raise typer.Exit(run_plan.exit_code)
