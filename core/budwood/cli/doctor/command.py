"""`budwood doctor`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from budwood.cli.streams import echo, echo_json

MARKS = {
    "ok": ("ok", "green"),
    "note": ("note", "cyan"),
    "warning": ("warning", "yellow"),
    "problem": ("PROBLEM", "red"),
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    measuring: Annotated[
        bool,
        typer.Option("--measure", help="Also measure this machine's device in less than a minute, for `budwood plan`."),
    ] = False,
) -> None:
    """Check that this machine can fine-tune: software, devices, memory, disk, plugins; suggest remedies.

    The exit code is 3 if tuning would fail.
    """
    from budwood.cli.doctor.checks import examine
    from budwood.cli.doctor.measuring import take_measurements

    findings = examine()
    if measuring:
        findings += take_measurements()
    count = {status: sum(finding.status == status for finding in findings) for status in MARKS}
    if as_json:
        echo_json({"ready": not count["problem"], "findings": [asdict(finding) for finding in findings]})
    else:
        working = [f for f in findings if f.topic == "plugins" and f.status == "ok"]
        for finding in (f for f in findings if f not in working):
            _show(finding.status, finding.topic, finding.text, finding.remedy)
        if working:
            third_party = [f"{f.values['name']} of {f.values['distribution']} {f.values['version']}" for f in working]
            third_party = [
                text for text, f in zip(third_party, working, strict=True) if f.values["distribution"] != "budwood"
            ]
            more = f"; from other distributions: {', '.join(third_party)}" if third_party else ""
            _show("ok", "plugins", f"{len(working)} plugins work{more}", "")
        summary = ["tuning would fail here" if count["problem"] else "this machine can tune"]
        summary += [
            f"{n} {status}{'s' if n > 1 else ''}" for status, n in reversed(count.items()) if n and status != "ok"
        ]
        echo("; ".join(summary))
    if count["problem"]:
        raise typer.Exit(3)


def _show(status: str, topic: str, text: str, remedy: str) -> None:
    word, colour = MARKS[status]
    line = "".join(c if c.isprintable() else "?" for c in f"{topic}: {text}")
    word = f"{word:8}"
    echo(f"{typer.style(word, fg=colour) if sys.stdout.isatty() else word} {line}")
    if remedy:
        echo(f"{'':8} → {remedy}")
