"""`budwood demo`: the whole workflow, on a base and data that ship with Budwood."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from budwood.cli.streams import echo_json


def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder for the demo's runs.")] = Path("runs/demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the demo's runs in that folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Fine-tune the tiny base that ships with Budwood twice, swap the adapters, and evaluate (takes minutes)."""
    from budwood.contract.discovery import find

    result = find("demo", "budwood.demos").load()(output, overwrite)
    if as_json:
        echo_json(result)
