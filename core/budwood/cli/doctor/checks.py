"""Whether this machine can tune: what is installed, what it computes with, and what to do where it cannot.

Libraries with native code, and plugins, are tried in a process of their own: one that crashes is named like any other
that fails.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from budwood.cli.doctor.devices import check_bitsandbytes, check_torch
from budwood.cli.doctor.finding import OURS, Finding
from budwood.cli.doctor.machine import check_cache, check_disk, check_memory
from budwood.cli.doctor.software import check_python, check_versions
from budwood.contract.discovery import WORDS, Installed
from budwood.contract.loading import check_plugin, every_installed
from budwood.errors import describe
from budwood.model.quiet import silence_libraries

PATIENCE = 180.0
"""Seconds after which a library or plugin that says nothing counts as hanging."""


def examine() -> list[Finding]:
    """Look at everything; the first findings name the software, the last ones the plugins."""
    found: list[Finding] = []
    for topic, check in (
        ("python", check_python), ("versions", check_versions), ("memory", check_memory), ("disk", check_disk),
        ("cache", check_cache),
    ):  # fmt: skip
        try:
            found += check()
        except Exception as error:  # packaging or psutil is missing or broken
            remedy = "install budwood again in this environment: pip install --force-reinstall budwood"
            found.append(Finding(topic, "problem", f"{topic} cannot be looked at: {describe(error)}", remedy))
    return found + try_apart({"torch": check_torch, "bitsandbytes": check_bitsandbytes, "plugins": check_plugins})


def check_plugins(skip: int = 0) -> Iterator[Finding]:
    """Every installed plugin, imported and checked, from number `skip` on."""
    for group, entry in every_installed()[skip:]:
        status = check_plugin(group, entry)
        yield _judge(status.kind, entry, status.problem)


def _judge(kind: str, entry: Installed, problem: str) -> Finding:
    """A broken plugin fails the recipes that name it; only one of Budwood's own is needed for tuning at all."""
    values = {"kind": kind, "name": entry.name, "distribution": entry.distribution, "version": entry.version}
    if not problem:
        return Finding("plugins", "ok", f"{kind} {entry.name} of {entry.owner}", values=values)
    needed = any(other.distribution == OURS for _, other in every_installed() if other.name == entry.name)
    return Finding("plugins", "problem" if needed else "warning", problem, values=values)


def try_apart(checks: dict[str, Callable[..., Iterator[Finding]]], patience: float = PATIENCE) -> list[Finding]:
    """Run checks in a process of their own; one that crashes or hangs is a finding, and others go on."""
    found: list[Finding] = []
    topics = {check.__name__: topic for topic, check in checks.items()}
    names, skip = list(topics), 0
    while names:
        lines, how = _child(names, skip, patience)
        found += [Finding(**line["finding"]) for line in lines if "finding" in line]
        done = [line["done"] for line in lines if "done" in line]
        names = [name for name in names if name not in done]
        if not names:
            break
        broken = names[0]
        if broken == check_plugins.__name__:  # the next plugin is the one; those after it can still be tried
            plugins = every_installed()
            skip += sum(finding.topic == "plugins" for finding in found) - skip
            group, entry = plugins[skip]
            text = f"plugin '{entry.name}' of {entry.owner} ({entry.value}) {how} when it is imported. "
            text += f"Repair or update it (pip install -U {entry.distribution}), or leave it out of the recipe."
            found.append(_judge(WORDS.get(group, group), entry, text))
            skip += 1
            names = names if skip < len(plugins) else []
        else:
            remedy = f"pip install --force-reinstall {topics[broken]}"
            found.append(Finding(topics[broken], "problem", f"{topics[broken]} {how}", remedy))
            names = names[1:]
            if broken == check_torch.__name__:
                found += [_untried(topics[name]) for name in names]
                break
    return found


def _child(names: Sequence[str], skip: int, patience: float) -> tuple[list[dict[str, Any]], str]:
    """What a process that runs the checks reports, and how it ended."""
    source, sink = os.pipe()
    code = f"from budwood.cli.doctor.checks import report; report({sink}, {list(names)!r}, {skip})"
    child = subprocess.Popen(
        [sys.executable, "-c", code], pass_fds=[sink], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(sink)
    text, silent = b"", False
    with os.fdopen(source, "rb", buffering=0) as pipe:
        while not silent:
            silent = not select.select([pipe], [], [], patience)[0]
            piece = b"" if silent else pipe.read(65536)
            text += piece
            if not piece:
                break
    if silent:
        child.kill()
    code_of_end = child.wait()
    try:
        ended = signal.Signals(-code_of_end).name
    except ValueError:
        ended = f"exit code {code_of_end}"
    return _lines(text), f"says nothing for {patience:g} s" if silent else f"ends the process ({ended})"


def _lines(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split(b"\n")[:-1]]


def report(sink: int, names: Sequence[str], skip: int) -> None:
    """Run checks by name, and write what they find to a file descriptor, one JSON object a line."""
    silence_libraries()
    broken = False
    with os.fdopen(sink, "w", encoding="utf-8") as file:
        for name in names:
            arguments = {"skip": skip} if name == check_plugins.__name__ else {}
            found = [_untried(name.removeprefix("check_"))] if broken else globals()[name](**arguments)
            for finding in found:
                print(json.dumps({"finding": asdict(finding)}), file=file, flush=True)
                broken = broken or (finding.topic, finding.status) == ("torch", "problem")
            print(json.dumps({"done": name}), file=file, flush=True)


def _untried(topic: str) -> Finding:
    return Finding(topic, "note", f"{topic} cannot be tried while torch does not work")
