"""`budwood plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer


def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML or JSON).")],
    override: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("-o", "--override", metavar="KEY=VALUE", help="Change a value of the recipe."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show how a recipe's strategies are composed, hook by hook, and all that is wrong with it. Reads no data."""
    from rich.console import Console

    from budwood.planning.composition import plan as make_plan
    from budwood.planning.composition import show_plan

    made = make_plan(recipe, override or [])
    if as_json:
        typer.echo(json.dumps(made.as_dict(), ensure_ascii=False))
    else:
        show_plan(made, Console(highlight=False))
    for problem in made.problems:
        line = "".join(c if c.isprintable() else "?" for c in " ".join(problem.split()))
        typer.echo(f"error: {line}", err=True)
    if made.problems:
        raise typer.Exit(made.exit_code)
