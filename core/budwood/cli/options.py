"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def present(directory: Path) -> Path:
    """Return an adapter's folder; one that is not there is refused before any library is imported."""
    from budwood.adapters.store import check_there

    check_there(directory)
    return directory


def new_folder(directory: Path) -> Path:
    """Return the folder to write; one that holds something is refused before any library is imported."""
    from budwood.untrusted.files import check_new_folder

    check_new_folder(directory)
    return directory


def known_dtype(name: str | None) -> str | None:
    """Return the name of a dtype for weights; another one is refused before any library is imported."""
    from budwood.errors import InputError

    if name not in (None, "bf16", "fp16", "fp32"):
        raise InputError(f"--dtype {str(name)[:64]}: choose one of bf16, fp16, fp32.")
    return name


AdapterFolder = Annotated[Path, typer.Argument(metavar="DIR", help="An adapter's folder.", callback=present)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or auto.")]
Precision = Annotated[str, typer.Option(help="bf16, fp16, fp32 or auto.")]

# Of a command on a recipe.
Override = Annotated[
    list[str] | None,
    typer.Option("-o", "--override", metavar="KEY=VALUE", help="Override a value of the recipe."),
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run Python files that the recipe names, such as rewards.")
]

# Of a command on one adapter.
RecordedBase = Annotated[str | None, typer.Option("--base", help="Path of the base, if it has moved.")]
OtherBase = Annotated[bool, typer.Option("--allow-other-base", help="Accept a base it was not trained on.")]

# Of a command that answers with a base and its adapters.
AnyBase = Annotated[str, typer.Argument(help="A base: folder or hub name.")]
Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", metavar="NAME=DIR", help="An adapter; may be repeated.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")]
Temperature = Annotated[float, typer.Option(min=0, help="0: greedy decoding.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Sample from the top tokens of this total probability.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")]
Seed = Annotated[int, typer.Option(help="Sampling seed.")]
AdaptersQuantization = Annotated[
    str | None, typer.Option(help="none, int8, nf4 or fp4. Default: as the adapter was trained.")
]
OtherBases = Annotated[bool, typer.Option("--allow-other-base", help="Accept adapters trained on another base.")]
