"""The strategies under examples/strategies, and one from `budwood new`, as third-party packages.

Built as wheels, installed into a new environment, planned, trained, evaluated, used with a LoRA, uninstalled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hatchling.build import build_wheel
from tests.forked import forking

from budwood.cli import app
from budwood.testing.files import Files, make_files

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "examples" / "strategies"
DRIVER = """
import contextlib, io, json, sys
from budwood.cli import app
results = []
for arguments in json.load(sys.stdin):
    out, err = io.TextIOWrapper(io.BytesIO(), write_through=True), io.TextIOWrapper(io.BytesIO(), write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = app.run(arguments)
    results.append([code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()])
json.dump(results, sys.stdout)
"""


class Done(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


class Environment:
    """A new virtual environment that inherits the installed packages of this one."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder)
        self.folder, self.python = folder, folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")
        here = sysconfig.get_paths()["purelib"]
        (self.site / "outer.pth").write_text(f"import site; site.addsitedir({here!r})\n", encoding="utf-8")

    def pip(self, *arguments: str) -> None:
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(self.python),
            *arguments,
            "-q",
            "--disable-pip-version-check",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def run(self, *arguments: str, cwd: Path) -> Done:
        """Run its Python."""
        done = subprocess.run([str(self.python), *arguments], cwd=cwd, capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    def budwood(self, *commands: Sequence[str], cwd: Path) -> list[Done]:
        """Run commands one after another in one process, forked with this environment's packages on its path."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(self.site)}
        with forking():
            done = subprocess.run(
                [sys.executable, "-c", DRIVER], cwd=cwd, input=json.dumps(commands), capture_output=True, text=True,
                env=environment, check=False,
            )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [Done(*values) for values in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def files() -> Files:
    return make_files("causal-lm")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheels of the example packages and of a generated one."""
    folder = tmp_path_factory.mktemp("packages")
    generated = folder / "budwood-mine"
    assert app.run(["new", "strategy", "mine", "--folder", str(generated)]) == 0
    for source in (PACKAGES / "budwood-base-kl", PACKAGES / "budwood-scaling", generated):
        with chdir(source):
            build_wheel(str(folder / "wheels"))
    environment = Environment(folder / "environment")
    wheels = sorted(map(str, (folder / "wheels").glob("*.whl")))
    assert len(wheels) == 3
    environment.pip("install", "--no-deps", "--no-index", *wheels)
    return environment


def recipe(files: Files, strategies: list[Any], output: str) -> str:
    return json.dumps(
        {
            "base": {"model": str(files.base), "quantization": "none"},
            "data": {"train": str(files.train), "eval": str(files.eval), "max_length": 12},
            "strategies": strategies,
            "train": {"steps": 3, "batch_examples": 4, "micro_tokens": 48, "learning_rate": 0.05, "precision": "fp32"},
            "output": output,
        }
    )


def test_packages_work_on_the_command_line_until_uninstalled(
    environment: Environment, files: Files, tmp_path: Path
) -> None:
    listed = environment.run("-m", "budwood", "plugins", cwd=tmp_path).out
    assert re.search(r"^  scaling +budwood-scaling 0.1.0 +Multiplies the outputs of linear", listed, re.MULTILINE)
    assert re.search(r"^  base-kl +budwood-base-kl 0.1.0 +Keeps the tuned model near its base", listed, re.MULTILINE)
    (tmp_path / "scaling.json").write_text(recipe(files, ["scaling", "mine"], "scaling"))
    (tmp_path / "lora.json").write_text(recipe(files, ["lora", "base-kl"], "lora"))
    base, pair = str(files.base), ["--adapter", "s=scaling/adapter", "--adapter", "l=lora/adapter"]
    answer = ["generate", base, "--quantization", "none", "--prompt", "bcd"]
    results = environment.budwood(
        ["plugins", "mine"],
        ["plan", "scaling.json"],
        ["tune", "scaling.json"],
        ["tune", "lora.json"],
        ["eval", "scaling/adapter", "--data", str(files.eval), "--generate", "0"],
        [*answer, *pair],
        ["adapter", "info", "scaling/adapter"],
        ["adapter", "verify", "scaling/adapter"],
        ["adapter", "merge", "scaling/adapter", "merged", "--dtype", "fp32"],
        ["adapter", "export", "scaling/adapter", "exported"],
        ["tune", "scaling.json", "--overwrite", "-o", "scaling.targets=[k_porj]"],
        cwd=tmp_path,
    )  # fmt: skip
    about, planned, tuned, other, evaluated, generated, info, verified, merged, exported, refused = results
    for done in results[:9]:
        assert done.code == 0, done.err
    assert "hooks: before_optimizer_step" in about.out
    assert "scaling" in planned.out and "mine" in planned.out
    assert "scaling, mine: " in tuned.err or "mine, scaling: " in tuned.err
    assert "base-kl" in other.err
    assert "loss" in evaluated.out
    assert all(f"{name}" in generated.out for name in ("s", "l"))
    assert "scaling" in info.out and "budwood-scaling 0.1.0" in info.out
    assert (tmp_path / "merged" / "config.json").exists() and not (tmp_path / "exported").exists()
    assert exported.code == 2 and "PEFT does not know the adapter type 'scaling'" in exported.err
    assert refused.code == 2 and "Did you mean 'k_proj'?" in refused.err
    manifest = json.loads((tmp_path / "scaling" / "adapter" / "budwood.json").read_text())
    assert (manifest["adapter_type"], manifest["distribution"]) == ("scaling", "budwood-scaling 0.1.0")

    environment.pip("uninstall", "-y", "budwood-scaling")
    after = environment.budwood(
        ["plugins"], [*answer, *pair], ["adapter", "info", "scaling/adapter"], ["tune", "scaling.json", "--overwrite"],
        cwd=tmp_path,
    )  # fmt: skip
    assert "budwood-scaling" not in after[0].out
    for done in after[1:3]:
        assert done.code == 2
        assert (
            "scaling/adapter: adapter type 'scaling' needs the strategy 'scaling' of budwood-scaling 0.1.0, which is "
            "not installed: pip install budwood-scaling" in done.err
        )
    assert after[3].code == 2 and "strategy 'scaling' is not installed" in after[3].err
    assert (tmp_path / "scaling" / "adapter").is_dir(), "a refused command does not change the run"
