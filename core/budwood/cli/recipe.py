"""`budwood recipe`: describes what a recipe may contain."""

from __future__ import annotations

import typer

from budwood.cli.streams import echo, echo_json

app = typer.Typer(help="Show what a recipe may contain.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of a recipe, with the options of every installed strategy, for your editor."""
    from budwood.recipe.reference import recipe_schema

    result, problems = recipe_schema()
    for problem in problems:
        echo(f"warning: left out: {problem}", err=True)
    echo_json(result, indent=2)
