"""The distribution: a complete wheel, pins that match what was tested, and a Makefile that lists its targets."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!\[; ]", requirement)[0].lower().replace("_", "-")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_core_plugins_and_demo(wheel):
    assert wheel.stat().st_size <= 20 * 2**20
    names = zipfile.ZipFile(wheel).namelist()
    plugins = {path.name for path in (ROOT / "plugins").glob("*/budwood_*")}
    packages = {name.partition("/")[0] for name in names} - {f"budwood-{wheel.name.split('-')[1]}.dist-info"}
    assert packages == {"budwood", "budwood_demo", *plugins}
    for needed in (
        "budwood/constraints.txt",
        "budwood_demo/base/model.safetensors",
        "budwood_demo/base/tokenizer.json",
        "budwood_demo/data/sections/train.jsonl",
        "budwood_demo/data/sections/eval.jsonl",
        "budwood/templates/strategy/pyproject.toml.template",
        "budwood/testing/plugin.py",
        "budwood/serving/http/page/index.html",
        "budwood/serving/http/page/page.css",
        "budwood/serving/http/page/page.js",
    ):
        assert needed in names
    assert any(name.startswith("budwood_demo/recipes/") for name in names)
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


def test_the_wheel_runs_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import budwood; from budwood.cli.app import run\n"
        "assert budwood.__file__.startswith(sys.path[0])\n"
        "from budwood.cli.doctor.software import tested_versions\n"
        "assert tested_versions()['torch'], 'the pins are not in the wheel'\n"
        "assert run(['new', 'strategy', 'mine']) == 0\n"
        "sys.exit(run(['plugins']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  lora +budwood ", done.stdout, re.MULTILINE)
    assert (tmp_path / "budwood-mine" / "budwood_mine" / "strategy.py").exists()


def test_what_was_tested_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", pin) for pin in pins), "names and versions, nothing else"
    pinned = {name_of(pin) for pin in pins}
    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *extras["dev"], *extras["bench"]]
    assert {name_of(requirement) for requirement in needed} <= pinned
    assert "torch==2.13.0" in pins


def test_make_alone_lists_the_targets():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {line.split()[1] for line in done.stdout.splitlines()}
    assert {"demo", "test", "lint", "bench"} <= listed
