"""Vulnerable versions are excluded by the requirements, refused if installed, and reported by the audit."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tests.hostile import audit

from budwood import ResourceError
from budwood.model import checks

ROOT = Path(__file__).parents[2]
FIXED = {"torch": (2, 10), "transformers": (5, 3), "jinja2": (3, 1, 6)}
"""The first versions without a known way for a file to execute code."""


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def test_requirements_exclude_vulnerable_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = dict(re.match(r"([\w.-]+)>=([\d.]+)", line).groups() for line in project["dependencies"] if ">=" in line)
    pinned = dict(re.findall(r"^([\w.-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text().lower(), re.M))
    for name, fixed in FIXED.items():
        assert numbers(required[name]) >= fixed, name
        assert numbers(pinned[name]) >= numbers(required[name]), name


@pytest.mark.parametrize(
    ("name", "version", "accepted"),
    [
        ("torch", "2.9.1+cu128", False),
        ("torch", "2.10.0a0", True),
        ("torch", "3", True),
        ("transformers", "4.57.0", False),
        ("transformers", "5.2.9", False),
        ("transformers", "5.3", True),
        ("jinja2", "3.1.5", False),
        ("safetensors", "0.6.2", False),
    ],
)
def test_an_old_library_is_refused_before_a_base_is_read(tiny_base, monkeypatch, name, version, accepted):
    real = checks.metadata.version
    monkeypatch.setattr(checks.metadata, "version", lambda package: version if package == name else real(package))
    checks.check_versions.cache_clear()
    try:
        if accepted:
            checks.check_base(tiny_base)
            return
        for read in (checks.check_base, checks.load_tokenizer):
            with pytest.raises(ResourceError, match=rf"{name} {re.escape(version)} .*pip install -U '{name}>="):
                read(tiny_base)
    finally:
        checks.check_versions.cache_clear()


SAFE = {"name": "a", "version": "1", "vulns": []}
VULNERABLE = {
    "name": "b",
    "version": "2",
    "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}, {"id": "X", "fix_versions": []}],
}
SKIPPED = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("pins", "code", "words"),
    [
        ([SAFE], 0, ["no known vulnerabilities in 1 pins"]),
        ([SAFE, VULNERABLE], 1, ["b 2: CVE-1; fixed in 3", "b 2: X; fixed in no version yet"]),
        ([SAFE, SKIPPED], 3, ["1 of 2 pins could not be looked up (c): is there a network?"]),
        ([VULNERABLE, SKIPPED], 1, ["CVE-1", "could not be looked up"]),
        ([], 3, []),
    ],
)
def test_the_audit_fails_for_packages_that_were_not_looked_up(pins, code, words):
    actual, lines = audit.judge({"dependencies": pins})
    assert actual == code
    assert all(word in "\n".join(lines) for word in words)


def test_the_audit_reports_a_missing_network(tmp_path):
    """Through a proxy that does not respond, or without pip-audit, which only `make audit` installs."""
    dead = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.audit"], cwd=ROOT, env=dead, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert done.stderr.startswith("audit: ")
    assert done.stderr.count("\n") == 1
