"""`budwood new strategy`: generated packages pass the linter, and invalid input is refused."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from budwood.cli import app
from budwood.cli.new import HOOKS, LICENSES, class_name


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def new(*arguments: str) -> int:
    return app.run(["new", "strategy", *arguments])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["a", "a" * 30])
def test_generated_packages_pass_the_linter(here: Path, name: str) -> None:
    for hook in HOOKS:
        assert new(name, "--hook", hook, "--folder", str(here / hook)) == 0
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--no-cache", "."]
        for hook in HOOKS:
            result = subprocess.run(command, cwd=here / hook, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stdout
    assert not [path for path, text in files(here).items() if b"{{" in text.replace(b"${{", b"")]


@pytest.mark.parametrize("license", LICENSES)
def test_author_and_license_are_written(here: Path, license: str) -> None:
    assert new("mine", "--author", 'Ada "A." Lovelace <ada@example.org>', "--license", license) == 0
    project = tomllib.loads((here / "budwood-mine/pyproject.toml").read_text())["project"]
    assert project["license"] == license
    assert project["authors"] == [{"name": 'Ada "A." Lovelace', "email": "ada@example.org"}]
    assert project["entry-points"] == {"budwood": {"mine": "budwood_mine:Mine"}}
    text = (here / "budwood-mine/LICENSE").read_text()
    assert ("Apache License" if license == "Apache-2.0" else 'Ada "A." Lovelace') in text


def test_the_author_is_optional(here: Path) -> None:
    assert new("mine") == 0
    assert "authors" not in tomllib.loads((here / "budwood-mine/pyproject.toml").read_text())["project"]
    assert set(files(here / "budwood-mine")) == {
        ".github/workflows/test.yml", ".gitignore", "LICENSE", "README.md", "pyproject.toml",
        "budwood_mine/__init__.py", "budwood_mine/strategy.py", "tests/test_mine.py",
    }  # fmt: skip


def test_the_readme_lists_every_option(here: Path) -> None:
    for hook in HOOKS:
        assert new("mine", "--hook", hook, "--folder", hook) == 0
        source, readme = (here / hook / "budwood_mine/strategy.py").read_text(), (here / hook / "README.md").read_text()
        assert source.count("= Field(") == readme.count("\n- `") > 0


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "broken link"])
def test_an_existing_target_is_not_changed(here: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    target = here / "budwood-mine"
    if kind == "file":
        target.write_text("mine")
    elif kind == "broken link":
        target.symlink_to("nowhere")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "mine.txt").write_text("mine")
    before = files(here)
    assert new("mine") == 2
    assert "budwood-mine already exists and was left unchanged" in capsys.readouterr().err
    assert files(here) == before and sorted(path.name for path in here.iterdir()) == ["budwood-mine"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GradientNoise", "'GradientNoise' is not a strategy name: use at most 30 lower-case letters and digits, in "
         "words joined by single dashes, starting with a letter. Did you mean 'gradient-noise'?"),
        ("gradient_noise", "Did you mean 'gradient-noise'?"),
        ("2nd", "starting with a letter."),
        ("a--b", "Did you mean 'a-b'?"),
        ("../mine", "Did you mean 'mine'?"),
        ("", "'' is not a strategy name"),
        ("a" * 31, "at most 30"),
        ("nöise", "is not a strategy name"),
        ("lambda", "'lambda' is a Python keyword"),
        ("none", "'none' is a Python keyword"),
        ("lora", "strategy 'lora' is already installed (budwood "),
        ("train", "'train' is a section of every recipe"),
        ("demo", "module budwood_demo is already installed"),
        ("budwood-mine", "leave out budwood"),
    ],
)  # fmt: skip
def test_invalid_names_are_refused(here: Path, capsys: pytest.CaptureFixture[str], name: str, message: str) -> None:
    assert new(name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hook", "before_optimiser_step"], "Did you mean 'before_optimizer_step'?"),
        (
            ["--license", "MTI"],
            "--license: 'MTI' is not supported. Did you mean 'MIT'? Available: Apache-2.0, MIT, BSD",
        ),
        (["--author", "<ada@example.org>"], "--author: '<ada@example.org>' does not look like 'Ada Lovelace <ada@"),
        (["--author", "Ada\nLovelace"], "--author: 'Ada\\nLovelace' does not look like"),
    ],
)
def test_other_invalid_input_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert new("mine", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(here.iterdir())


def test_the_command_imports_no_torch(here: Path) -> None:
    code = (
        "import sys\nfrom budwood.cli import app\nassert app.run(['new', 'strategy', 'mine']) == 0\n"
        "assert not {'torch', 'transformers', 'pytest'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=here, check=True, capture_output=True)


def test_class_names() -> None:
    assert class_name("gradient-noise-2") == "GradientNoise2"
