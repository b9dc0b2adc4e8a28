"""What is installed: Python, Budwood, and what they stand on."""

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
    """The interpreter, and Budwood itself."""
    from packaging.specifiers import SpecifierSet

    version, wanted = platform.python_version(), str(metadata.metadata(OURS).json.get("requires_python", ""))
    values = {"version": version, "executable": sys.executable, "budwood": budwood.__version__}
    text = f"Python {version} ({sys.executable}), budwood {budwood.__version__}"
    if SpecifierSet(wanted).contains(version, prereleases=True):
        yield Finding("python", "ok", text, values=values)
    else:
        yield Finding("python", "problem", f"{text}: Python {wanted} is needed", "use another Python.", values)
    if sys.platform != "linux":
        yield Finding("python", "note", f"{platform.system()} is not tested; Linux is")


def tested_versions() -> dict[str, str]:
    """Version of each package that the tests, the demo and the benchmarks ran on; empty where the list is not there."""
    package = Path(budwood.__file__).parent
    for file in (package / "constraints.txt", package.parents[1] / "constraints.txt"):  # in a wheel, in a checkout
        if file.is_file():
            lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
            return {_canonical(name): pin for name, _, pin in (line.partition("==") for line in lines if line)}
    return {}


def check_versions() -> Iterator[Finding]:
    """What Budwood stands on: in the range that it needs, and where it is not the version that was tested."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    tested = tested_versions()
    if not tested:
        yield Finding("versions", "note", "constraints.txt is not here, so that versions are not compared with it")
    same: list[str] = []
    direct = [r for r in map(Requirement, metadata.requires(OURS) or ()) if _applies(r)]
    for requirement in direct:
        name, pin = requirement.name, tested.get(_canonical(requirement.name), "")
        have = _version(name)
        values = {"package": name, "version": have, "tested": pin, "needed": str(requirement.specifier)}
        if have is None:
            text = f"{name} is not installed"
            yield Finding("versions", "problem", text, f"pip install '{requirement}'", values)
        elif not requirement.specifier.contains(have, prereleases=True):
            text = f"{name} {have}: {requirement.specifier} is needed"
            yield Finding("versions", "problem", text, f"pip install '{requirement}'", values)
        elif pin and Version(have).public != Version(pin).public:
            age = "newer" if Version(have) > Version(pin) else "older"
            text = f"{name} {have} is {age} than the tested {pin}"
            yield Finding("versions", "note", text, f"pip install {name}=={pin}, if something fails", values)
        else:
            same.append(f"{name} {have}")
    yield Finding("versions", "ok", f"{len(same)} of {len(direct)} direct dependencies as tested: {', '.join(same)}")
    beyond = []
    for name in sorted(_below(direct) - {_canonical(r.name) for r in direct}):
        installed, pin = _version(name), tested.get(name, "")
        if installed and pin and Version(installed).public != Version(pin).public:
            beyond.append(f"{name} {installed} (tested: {pin})")
    if beyond:
        yield Finding("versions", "note", f"further packages of other versions: {', '.join(beyond)}")


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _applies(requirement: Any) -> bool:
    """Whether a requirement holds on this machine without any extra."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _below(direct: Sequence[Any]) -> set[str]:
    """Canonical names of all that the direct dependencies need in turn."""
    from packaging.requirements import Requirement

    seen: set[str] = set()
    waiting = [_canonical(r.name) for r in direct]
    while waiting:
        name = waiting.pop()
        if name not in seen and _version(name) is not None:
            seen.add(name)
            waiting += [_canonical(r.name) for r in map(Requirement, metadata.requires(name) or ()) if _applies(r)]
    return seen
