"""`budwood plan`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from budwood.cli.options import AllowCode, Override
from budwood.cli.streams import echo, echo_json
from budwood.garbage import uncollected

if TYPE_CHECKING:
    from budwood.planning.early import Early


def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML or JSON).")],
    override: Override = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="A card such as 4090, or memory such as cuda:24GiB or cpu:8GiB. Default: the recipe's device, here.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", min=8, max=1 << 22, help="Plan micro-batches of this many tokens, without reading data."
        ),
    ] = None,
    fits: Annotated[
        str | None,
        typer.Option("--fit", metavar="DEVICE", help="Search the settings that fit a card, or memory such as 24GiB."),
    ] = None,
    allow: Annotated[
        str,
        typer.Option(
            "--allow",
            metavar="NAMES",
            help="With --fit: may change optimizer,quantization,rank,max_length.",
        ),
    ] = "",
    write: Annotated[
        Path | None,
        typer.Option("--write", help="With --fit: file for the recipe that fits. Default: RECIPE-fit.yaml beside it."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes", min=1, max=4096, help="Plan so many processes: the memory and the traffic of each."
        ),
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option("--parallel", metavar="replicate|shard", help="With --processes: as train.parallel."),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            "--link",
            metavar="BANDWIDTH",
            help="With --processes: between them, such as 16GB/s or 100Gbit/s. Default: the card's, within a machine.",
        ),
    ] = None,
    composition: Annotated[
        bool, typer.Option("--composition", help="Only compose the strategies: no memory, no time, no data.")
    ] = False,
    allow_code: AllowCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a recipe will do and need: order of hooks, problems, memory, time, disk. Loads no weights."""
    from budwood.cli.streams import Output
    from budwood.errors import BudwoodError, InputError, ResourceError
    from budwood.planning.early import look
    from budwood.planning.options import allowed, fit_name, named_device, parse_link
    from budwood.planning.waiting import PlanningProcess, saves_time
    from budwood.recipe.device import stated_kind
    from budwood.untrusted.redaction import shorten

    if composition and any(given is not None for given in (device, tokens, fits, processes)):
        raise InputError(
            "--composition: --device, --tokens, --fit and --processes have no effect with it; leave them out."
        )
    if (parallel is not None or link is not None) and (processes or 1) == 1:
        raise InputError("--parallel and --link need --processes, from 2 on.")
    if parallel not in (None, "replicate", "shard"):
        raise InputError(f"--parallel: '{shorten(str(parallel))}': give replicate or shard.")
    if device is not None and fits is not None:
        raise InputError("--fit names the device itself: leave --device out.")
    if (allow or write) and fits is None:
        raise InputError("--allow and --write need --fit.")
    if write is not None and write.exists():
        raise InputError(f"--write: {write} exists: name another file.")
    permitted, bandwidth = allowed(allow), None if link is None else parse_link(link)
    kind = None
    if fits is not None or device is not None:
        wanted, option = (device, "--device") if device is not None else (fit_name(fits or "", "cuda"), "--fit")
        named = named_device(wanted, option)
        kind = named.kind if named is not None else stated_kind(wanted)
    overrides = [*(override or []), *([f"train.parallel={parallel}"] if parallel else [])]
    early = look(recipe, overrides, without_data=tokens is not None, rows=not composition, kind=kind)
    if tokens is None and any("data." in text and "no such file" in text for text in early.problems.texts):
        echo("note: --tokens 2048 plans without data, for micro-batches of so many tokens", err=True)
    if early.problems.texts:
        refuse(early, as_json, early.as_dict())
    with PlanningProcess() if fits is None and not composition and saves_time() else nullcontext() as waiting:
        with uncollected():
            from budwood.planning.composition import plan as make_plan
            from budwood.planning.composition import show_plan
            from budwood.planning.fit import fit
            from budwood.planning.frontier import draw, fit_device, free_path, show_fit, write_recipe
            from budwood.planning.process import estimate_in_process, find_device, shared_device
            from budwood.planning.table import show_estimate

        chosen = fit_device(fits) if fits is not None else None if device is None else find_device(device)
        run_plan = make_plan(recipe, overrides, allow_code, without_data=tokens is not None)
        error: BudwoodError | None = None
        found = None
        if not composition and not run_plan.problems:
            try:
                chosen = chosen or find_device(run_plan.recipe.base.device)
                chosen = shared_device(chosen, processes or 1, bandwidth)
                if fits is not None:
                    found = fit(
                        run_plan.recipe, lambda recipe: estimate_in_process(
                            recipe, chosen, tokens, keep=True, processes=processes or 1,
                        ), permitted, sized=tokens is None,
                    )  # fmt: skip
                    run_plan.estimate = (found.chosen or found.candidates[-1]).estimate
                else:
                    run_plan.estimate = estimate_in_process(
                        run_plan.recipe, chosen, tokens, processes=processes or 1, waiting=waiting
                    )
            except BudwoodError as failure:  # the composition is shown all the same
                error = failure
    files: list[Path] = []
    if found is not None and len(found.candidates) > 1:
        files.append(free_path(write or recipe, ".png"))
        draw(found, files[0])
        if found.chosen is not None:
            files.append(write or free_path(recipe, ".yaml"))
            write_recipe(found, files[1])
    if as_json:
        values = run_plan.as_dict()
        if found is not None:
            values["fit"] = {**found.as_dict(), "files": [str(path) for path in files]}
        echo_json(values)
    else:
        show_plan(run_plan, Output(highlight=False))
        if run_plan.estimate is not None:
            show_estimate(run_plan.estimate, run_plan.recipe, Output(highlight=False), advised=found is None)
        if found is not None:
            show_fit(found, Output(highlight=False))
            if files:
                echo(f"written: {', '.join(map(str, files))}")
    _show_problems(run_plan.problems)
    if run_plan.problems:
        raise typer.Exit(run_plan.exit_code)
    if error is not None:
        raise error
    if found is not None and found.chosen is None:
        raise typer.Exit(ResourceError.exit_code)


def refuse(early: Early, as_json: bool, values: dict[str, Any]) -> NoReturn:
    """Print the problems that the recipe's files show, and end the command."""
    if as_json:
        echo_json(values)
    _show_problems(early.problems.texts)
    raise typer.Exit(early.problems.exit_code)


def _show_problems(problems: Sequence[str]) -> None:
    for problem in problems:
        line = "".join(c if c.isprintable() else "?" for c in " ".join(problem.split()))
        echo(f"error: {line}", err=True)
