"""`budwood adapter combine | shrink | diff`."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood.cli.given import check_adapter
from budwood.cli.options import AdapterFolder, AsJson, Device, OtherBase, RecordedBase, new_folder, present
from budwood.cli.streams import echo, echo_json, print_notes
from budwood.garbage import uncollected

if TYPE_CHECKING:
    from budwood.serving.material.diff import Difference, ModuleDifference

SHOWN = 10
"""Modules and fields that `diff` shows without --all."""


def combine(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR... OUT", help="Adapters, and the new folder.")],
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="0.7,0.3", help="One for each adapter. Default: 1/n each.")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="linear (exact), svd, ties, dare or magnitude.")] = "linear",
    rank: Annotated[
        int | None, typer.Option("--rank", help="Of the result. Default: the largest of the parts; linear: their sum.")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Fraction that ties, dare and magnitude keep. Default: 0.5.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of what dare keeps. Default: 0.")] = None,
    base: RecordedBase = None,
    device: Device = "auto",
    allow_other_base: OtherBase = False,
    as_json: AsJson = False,
) -> None:
    """Combine adapters of one base into one, LoRA or of their own type, and compare its answers with the exact sum."""
    from budwood.errors import InputError
    from budwood.serving.material.options import check_combination

    if len(directories) < 3:
        raise InputError("combine: give at least two adapters and the new folder: combine A B OUT.")
    for part in directories[:-1]:
        present(part)
    values = None if weights is None else [_number(text) for text in weights.split(",")]
    check_combination(len(directories) - 1, values, method, rank, density, seed)
    new_folder(directories[-1])
    for part in directories[:-1]:
        check_adapter(part, base, allow_other_base)
    with uncollected():
        from budwood.adapters.golden import share_text
        from budwood.serving.material.combine import combine as combine_into

    *parts, out = directories
    done = combine_into(
        parts, out, weights=values, method=method, rank=rank, density=density, seed=seed, base=base, device=device,
        allow_other_base=allow_other_base,
    )  # fmt: skip
    if as_json:
        echo_json(asdict(done) | {"directory": str(done.directory)})
        return
    if done.rank is None:
        echo(f"combined: {done.adapter_type} on {done.modules} modules, in {done.directory}")
    else:
        echo(f"combined: LoRA of rank {done.rank} on {done.modules} linears, in {done.directory}")
    if method == "linear":
        echo("it is the exact weighted sum")
    else:
        echo(f"its rank holds {done.kept:.1%} of the combination's squared norm")
        echo(f"vs. the exact weighted sum {done.distance}")
        echo(f"difference                 {share_text(done.error, 'the sum')}")
    print_notes(done.notes)


def shrink(
    directory: AdapterFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the new adapter.", callback=new_folder)],
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of every module that has a larger one.")],
    base: RecordedBase = None,
    device: Device = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Write even if a quarter of the adapter's effect is lost.")
    ] = False,
    allow_other_base: OtherBase = False,
    as_json: AsJson = False,
) -> None:
    """Write the nearest LoRA adapter of a lower rank, and compare its answers."""
    check_adapter(directory, base, allow_other_base)
    with uncollected():
        from budwood.adapters.golden import share_text
        from budwood.serving.material.shrink import shrink as shrink_to

    done = shrink_to(directory, out, rank, base=base, device=device, allow_other_base=allow_other_base, force=force)
    if as_json:
        echo_json(asdict(done) | {"directory": str(done.directory)})
        return
    before, after = done.bytes
    echo(f"shrunk: rank {done.was} to {done.rank}, {before:,} to {after:,} bytes, in {done.directory}")
    echo(f"the updates keep {done.kept:.1%} of their squared norm")
    echo(f"answers, after vs. before {done.distance}")
    echo(f"error                     {share_text(done.error)}")
    print_notes(done.notes)


def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="An adapter's folder.", callback=present)],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another adapter's folder.", callback=present)],
    everything: Annotated[bool, typer.Option("--all", help="Show every module and field.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two adapters: what they record, their updates of each linear, their golden answers. Loads no base."""
    with uncollected():
        from budwood.serving.material.diff import diff as compare

    found = compare(one, other)
    if as_json:
        echo_json(_as_json(found))
        return
    _show(found, everything)


def _as_json(found: Difference) -> dict[str, Any]:
    values = asdict(found)
    values["total"] = asdict(found.total) if found.modules else None
    for module in [*values["modules"], *([values["total"]] if found.modules else [])]:
        module["cosine"] = None if math.isnan(module["cosine"]) else module["cosine"]
    return values


def _show(found: Difference, everything: bool) -> None:
    if found.same:
        echo("the same adapter: equal configs and tensors")
    for name, one, other in found.fields:
        echo(f"{name}: {_short(one, everything)} | {_short(other, everything)}")
    if found.modules:
        echo(f"{len(found.modules)} linears; distance of the updates, relative to the larger; cosine; ranks")
        shown = found.modules if everything else found.modules[:SHOWN]
        for module in [found.total, *shown]:
            echo(_line(module))
        if len(shown) < len(found.modules):
            echo(f"… {len(found.modules) - len(shown)} more, less different: --all")
    for name, what in found.tensors:
        echo(f"{name}: {what}")
    if found.answers is not None:
        echo(f"golden answers, B vs. A: {found.answers}")
    print_notes(found.notes)


def _line(module: ModuleDifference) -> str:
    cosine = "none" if math.isnan(module.cosine) else f"{module.cosine:.3f}"
    ranks = "" if module.path == "all" else f"{module.ranks[0]:>4} {module.ranks[1]:>4}"
    return f"  {module.distance:7.3f}  {cosine:>6}  {ranks:>9}  {module.path}"


def _short(value: Any, everything: bool) -> str:
    value = f"{value:.4g}" if isinstance(value, float) else value
    text = "".join(c if c.isprintable() else "?" for c in str(value))  # the file may contain control codes
    return text if everything or len(text) <= 100 else f"{text[:97]}…"


def _number(text: str) -> float:
    from budwood.errors import InputError

    try:
        return float(text)
    except ValueError:
        raise InputError(f"--weights: '{text.strip()[:40]}' is not a number: write them as 0.7,0.3.") from None
