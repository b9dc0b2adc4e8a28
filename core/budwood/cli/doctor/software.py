"""Checks the versions of Python, Budwood and its dependencies."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import budwood
from budwood.cli.doctor.finding import OURS, Finding


def check_python() -> Iterator[Finding]:
    """Check the version of Python; report that of Budwood."""
    from packaging.specifiers import SpecifierSet

    version, required = platform.python_version(), str(metadata.metadata(OURS).json.get("requires_python", ""))
    values = {"version": version, "executable": sys.executable, "budwood": budwood.__version__}
    text = f"Python {version} ({sys.executable}), budwood {budwood.__version__}"
    if SpecifierSet(required).contains(version, prereleases=True):
        yield Finding("python", "ok", text, values=values)
    else:
        yield Finding(
            "python", "problem", f"{text}: Python {required} is needed", "use another version of Python.", values
        )
    if sys.platform != "linux":
        yield Finding("python", "note", f"{platform.system()} is not tested, only Linux is")


def tested_versions() -> dict[str, str]:
    """Return the package versions that the tests, demo and benchmarks ran on; empty if constraints.txt is missing."""
    package = Path(budwood.__file__).parent
    for file in (package / "constraints.txt", package.parents[1] / "constraints.txt"):  # in a wheel, in a checkout
        if file.is_file():
            lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
            return {_canonical(name): pin for name, _, pin in (line.partition("==") for line in lines if line)}
    return {}


def check_versions() -> Iterator[Finding]:
    """Check that the dependencies are in their required ranges; note versions other than the tested ones."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    tested = tested_versions()
    if not tested:
        yield Finding("versions", "note", "constraints.txt is missing: versions are not compared with the tested ones")
    as_tested: list[str] = []
    direct = [r for r in map(Requirement, metadata.requires(OURS) or ()) if _applies(r)]
    for requirement in direct:
        name, pin = requirement.name, tested.get(_canonical(requirement.name), "")
        version = _version(name)
        values = {"package": name, "version": version, "tested": pin, "needed": str(requirement.specifier)}
        if version is None:
            text = f"{name} is not installed"
            yield Finding("versions", "problem", text, f"pip install '{requirement}'", values)
        elif not requirement.specifier.contains(version, prereleases=True):
            text = f"{name} {version}: {requirement.specifier} is needed"
            yield Finding("versions", "problem", text, f"pip install '{requirement}'", values)
        elif pin and Version(version).public != Version(pin).public:
            age = "newer" if Version(version) > Version(pin) else "older"
            text = f"{name} {version} is {age} than the tested {pin}"
            yield Finding("versions", "note", text, f"pip install {name}=={pin}, if something fails", values)
        else:
            as_tested.append(f"{name} {version}")
    yield Finding(
        "versions", "ok", f"{len(as_tested)} of {len(direct)} direct dependencies as tested: {', '.join(as_tested)}"
    )
    differing = []
    for name in sorted(_with_transitive(direct) - {_canonical(r.name) for r in direct}):
        installed, pin = _version(name), tested.get(name, "")
        if installed and pin and Version(installed).public != Version(pin).public:
            differing.append(f"{name} {installed} (tested: {pin})")
    if differing:
        yield Finding("versions", "note", f"indirect dependencies not as tested: {', '.join(differing)}")


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _applies(requirement: Any) -> bool:
    """Return whether a requirement applies on this machine without any extra."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _with_transitive(direct: Sequence[Any]) -> set[str]:
    """Return the canonical names of the installed direct and indirect dependencies."""
    from packaging.requirements import Requirement

    seen: set[str] = set()
    pending = [_canonical(r.name) for r in direct]
    while pending:
        name = pending.pop()
        if name not in seen and _version(name) is not None:
            seen.add(name)
            pending += [_canonical(r.name) for r in map(Requirement, metadata.requires(name) or ()) if _applies(r)]
    return seen
