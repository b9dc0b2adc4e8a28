"""Checks whether this machine can fine-tune: software, devices, plugins, and a remedy for each problem.

Native libraries and plugins run in a separate process, so that a crash is reported like any other failure.
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

from budwood.cli.doctor.devices import check_bitsandbytes, check_torch, check_torchvision
from budwood.cli.doctor.finding import OURS, Finding
from budwood.cli.doctor.machine import check_cache, check_disk, check_memory
from budwood.cli.doctor.software import check_python, check_versions
from budwood.contract.discovery import WORDS, Installed
from budwood.contract.loading import check_plugin, every_installed
from budwood.errors import describe
from budwood.model.quiet import silence_libraries

TIMEOUT = 180.0
"""Seconds without a result after which a library or plugin counts as hanging."""


def examine() -> list[Finding]:
    """Run every check: software first, plugins last."""
    findings: list[Finding] = []
    for topic, check in (
        ("python", check_python), ("versions", check_versions), ("memory", check_memory), ("disk", check_disk),
        ("cache", check_cache),
    ):  # fmt: skip
        try:
            findings += check()
        except Exception as error:  # packaging or psutil is missing or broken
            remedy = "install budwood again in this environment: pip install --force-reinstall budwood"
            findings.append(Finding(topic, "problem", f"{topic} cannot be checked: {describe(error)}", remedy))
    isolated = {"torch": check_torch, "torchvision": check_torchvision, "bitsandbytes": check_bitsandbytes}
    return findings + run_isolated({**isolated, "plugins": check_plugins})


def check_plugins(skip: int = 0) -> Iterator[Finding]:
    """Import and check every installed plugin after the first `skip`."""
    for group, entry in every_installed()[skip:]:
        status = check_plugin(group, entry)
        yield _plugin_finding(status.kind, entry, status.problem)


def _plugin_finding(kind: str, entry: Installed, problem: str) -> Finding:
    """Return a plugin's finding. Tuning needs Budwood's own plugins; any other fails only the recipes that name it."""
    values = {"kind": kind, "name": entry.name, "distribution": entry.distribution, "version": entry.version}
    if not problem:
        return Finding("plugins", "ok", f"{kind} {entry.name} of {entry.owner}", values=values)
    required = any(other.distribution == OURS for _, other in every_installed() if other.name == entry.name)
    return Finding("plugins", "problem" if required else "warning", problem, values=values)


def run_isolated(checks: dict[str, Callable[..., Iterator[Finding]]], timeout: float = TIMEOUT) -> list[Finding]:
    """Run checks in a separate process; a crash or hang becomes a finding, and the remaining checks still run."""
    findings: list[Finding] = []
    topics = {check.__name__: topic for topic, check in checks.items()}
    names, skip = list(topics), 0
    while names:
        lines, outcome = _child(names, skip, timeout)
        findings += [Finding(**line["finding"]) for line in lines if "finding" in line]
        done = [line["done"] for line in lines if "done" in line]
        names = [name for name in names if name not in done]
        if not names:
            break
        broken = names[0]
        if broken == check_plugins.__name__:  # the first plugin without a finding; those after it can still be tried
            plugins = every_installed()
            skip += sum(finding.topic == "plugins" for finding in findings) - skip
            group, entry = plugins[skip]
            text = f"plugin '{entry.name}' of {entry.owner} ({entry.value}) {outcome} when it is imported. "
            text += f"Repair or update it (pip install -U {entry.distribution}), or leave it out of the recipe."
            findings.append(_plugin_finding(WORDS.get(group, group), entry, text))
            skip += 1
            names = names if skip < len(plugins) else []
        else:
            remedy = f"pip install --force-reinstall {topics[broken]}"
            findings.append(Finding(topics[broken], "problem", f"{topics[broken]} {outcome}", remedy))
            names = names[1:]
            if broken == check_torch.__name__:
                findings += [_unchecked(topics[name]) for name in names]
                break
    return findings


def _child(names: Sequence[str], skip: int, timeout: float) -> tuple[list[dict[str, Any]], str]:
    """Run checks in a child process; return what it reported, and how it ended."""
    source, sink = os.pipe()
    code = f"from budwood.cli.doctor.checks import report; report({sink}, {list(names)!r}, {skip})"
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", code], pass_fds=[sink],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(sink)
    text, timed_out = b"", False
    with os.fdopen(source, "rb", buffering=0) as pipe:
        while not timed_out:
            timed_out = not select.select([pipe], [], [], timeout)[0]
            chunk = b"" if timed_out else pipe.read(65536)
            text += chunk
            if not chunk:
                break
    if timed_out:
        child.kill()
    exit_code = child.wait()
    try:
        ended = signal.Signals(-exit_code).name
    except ValueError:
        ended = f"exit code {exit_code}"
    return _lines(text), f"does not respond for {timeout:g} s" if timed_out else f"ends the process ({ended})"


def _lines(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split(b"\n")[:-1]]


def report(sink: int, names: Sequence[str], skip: int) -> None:
    """Run checks by name, and write their findings to a file descriptor, one JSON object per line."""
    silence_libraries()
    broken = False
    with os.fdopen(sink, "w", encoding="utf-8") as file:
        for name in names:
            arguments = {"skip": skip} if name == check_plugins.__name__ else {}
            findings = [_unchecked(name.removeprefix("check_"))] if broken else globals()[name](**arguments)
            for finding in findings:
                print(json.dumps({"finding": asdict(finding)}), file=file, flush=True)
                broken = broken or (finding.topic, finding.status) == ("torch", "problem")
            print(json.dumps({"done": name}), file=file, flush=True)


def _unchecked(topic: str) -> Finding:
    return Finding(topic, "note", f"{topic} cannot be checked while torch does not work")
