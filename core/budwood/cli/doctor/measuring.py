"""Measures this machine's devices for `budwood plan`."""

from __future__ import annotations

from collections.abc import Iterator

from budwood.cli.doctor.finding import Finding
from budwood.errors import BudwoodError, describe


def take_measurements() -> Iterator[Finding]:
    """Measure the CPU, and the GPU if torch finds one, and keep both for plans."""
    try:
        import torch

        from budwood.planning.measurement import conditions, keep, measure

        kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    except Exception as error:  # the checks have said so already
        yield Finding("measured", "problem", f"nothing can be measured: {describe(error)}")
        return
    for kind in kinds:
        try:
            found = measure(kind)
            path = keep(kind, found)
        except BudwoodError as error:
            yield Finding("measured", "problem", str(error), "set BUDWOOD_CACHE to a writable folder.")
            continue
        except Exception as error:  # a driver may raise any exception
            yield Finding("measured", "problem", f"{kind} cannot be measured: {describe(error)}")
            continue
        held = conditions(kind)
        threads = f", {held['threads']} threads" if "threads" in held else ""
        text = f"{held['device']}{threads}, in {found.seconds:.0f} s: {found}; kept in {path} for `budwood plan`"
        values = {"kind": kind, "file": str(path), "conditions": held, **vars(found)}
        yield Finding("measured", "ok", text, values=values)
