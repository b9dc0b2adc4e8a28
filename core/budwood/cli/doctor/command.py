"""`budwood doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

MARKS = {
    "ok": ("ok", "green"),
    "note": ("note", "cyan"),
    "warning": ("warning", "yellow"),
    "problem": ("PROBLEM", "red"),
}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Check that this machine can tune: software, devices, memory, disk, every plugin; say what to do.

    Ends with exit code 3 where tuning would fail.
    """
    from budwood.cli.doctor.checks import examine

    found = examine()
    count = {status: sum(finding.status == status for finding in found) for status in MARKS}
    if as_json:
        typer.echo(json.dumps({"ready": not count["problem"], "findings": [asdict(finding) for finding in found]}))
    else:
        works = [f for f in found if f.topic == "plugins" and f.status == "ok"]
        for finding in (f for f in found if f not in works):
            _show(finding.status, finding.topic, finding.text, finding.remedy)
        if works:
            third = [f"{f.values['name']} of {f.values['distribution']} {f.values['version']}" for f in works]
            third = [text for text, f in zip(third, works, strict=True) if f.values["distribution"] != "budwood"]
            more = f"; of other distributions: {', '.join(third)}" if third else ""
            _show("ok", "plugins", f"{len(works)} plugins work{more}", "")
        words = ["tuning would fail here" if count["problem"] else "this machine can tune"]
        words += [
            f"{n} {status}{'s' if n > 1 else ''}" for status, n in reversed(count.items()) if n and status != "ok"
        ]
        typer.echo("; ".join(words))
    if count["problem"]:
        raise typer.Exit(3)


def _show(status: str, topic: str, text: str, remedy: str) -> None:
    word, colour = MARKS[status]
    line = "".join(c if c.isprintable() else "?" for c in f"{topic}: {text}")
    typer.echo(f"{typer.style(f'{word:8}', fg=colour)} {line}")
    if remedy:
        typer.echo(f"{'':8} → {remedy}")
