"""`budwood check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from budwood.cli.options import AllowCode, Override
from budwood.cli.plan import refuse
from budwood.cli.streams import echo_json
from budwood.garbage import uncollected


def check(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML or JSON).")],
    override: Override = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Check for `tune --overwrite`.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Check for `tune --resume`.")] = False,
    allow_code: AllowCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check all of a run on this machine before it starts. Exit code 0: go; 2: the recipe or the data; 3: resources."""
    from budwood.planning.early import look

    early = look(recipe, override or [])
    if early.problems.texts:
        refuse(early, as_json, {"go": False, "problems": early.problems.texts, "checks": []})
    with uncollected():
        from budwood.cli.streams import Output
        from budwood.planning.check import check as check_all
        from budwood.planning.check import show_check

    assert early.recipe is not None
    result = check_all(early.recipe.allowing_code(allow_code), overwrite, resume)
    if as_json:
        echo_json(result.as_dict())
    else:
        show_check(result, Output(highlight=False))
    if result.problems.texts:
        raise typer.Exit(result.problems.exit_code)
