"""A run on two machines that share no files, under torchrun over a network of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.core.conftest import write_rows
from tests.faulty import difference, tune_with, write_recipe
from tests.scale.machines import Machine, tune_on, two_machines, why_not

WORKER = """
import os, sys
from importlib import metadata
from budwood.cli.app import run
from budwood.data import build, cache
from budwood.training import agreement, run_data
from budwood.training.report import Report
Report.plot = lambda self, directory: None
run_data.PARALLEL = 0
save = cache.save
def note(*args, **options):
    open("encoded", "a").write(os.environ["LOCAL_RANK"])
    return save(*args, **options)
cache.save = note
{fault}
code = run(sys.argv[1:])
sys.stdout.flush()
if code: os._exit(code)
"""
"""The command, which takes every data file for a large one, and notes which process of a machine encodes it."""
SLOWLY = """
import time
from budwood.training import loop
exchange = loop.sum_gradients
def sum_gradients(run):
    time.sleep(4 * (run.step == 3))
    exchange(run)
loop.sum_gradients = sum_gradients
"""
"""A fault that leaves time to kill a machine."""
OTHER = "metadata.version = lambda name, whole=metadata.version: '9.9' if name == '{}' else whole(name)"


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    if reason := why_not():
        pytest.skip(reason)
    with two_machines(tmp_path_factory.mktemp("machines")) as made:
        yield made


@pytest.fixture
def ready(machines: tuple[Machine, Machine], tiny_base: Path) -> tuple[Machine, Machine]:
    """Both machines with the recipe, its data and base in their own folders, and nothing else."""
    for machine in machines:
        for path in machine.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(tiny_base, machine.folder / "base")
        write_rows(machine.folder / "train.jsonl")
        write_recipe(machine.folder, Path("base"), {})
        (machine.folder / "worker.py").write_text(WORKER.format(fault=""))
    return machines


def test_two_machines_write_one_adapter_on_the_first(ready: tuple[Machine, Machine], tmp_path: Path) -> None:
    """As one process would, sharded over all four; one process of each machine encodes the data."""
    first, second = ready
    shutil.copytree(first.folder, tmp_path / "alone")
    assert tune_with(tmp_path / "alone", 1).codes == [0]
    ended = tune_on(ready, ["--overwrite", "-o", "train.parallel=shard"])
    assert ended.codes == [0, 0], first.output + second.output
    assert difference(first.folder / "run", tmp_path / "alone" / "run") < 1e-5
    assert not (second.folder / "run").exists()
    assert [(machine.folder / "encoded").read_text() for machine in ready] == ["0", "0"]
    for machine in ready:
        assert len(list((machine.folder / "cache" / "tokens").glob("*/facts.json"))) == 1
    assert "4 processes: each holds its share" in first.output and "loss" not in second.output
    assert json.loads((first.folder / "run" / "manifest.json").read_text())["processes"] == 4


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("os.remove('train.jsonl') if os.path.exists('train.jsonl') else None", 2, "no such file: train.jsonl"),
        (OTHER.format("peft"), 3, "install the same versions on every machine"),
        ("agreement._code = lambda plugin: 'x'", 3, "install the same plugins on every machine"),
    ],
)
def test_a_machine_that_differs_is_named_before_the_base_loads(
    ready: tuple[Machine, Machine], fault: str, code: int, words: str
) -> None:
    first, second = ready
    (second.folder / "worker.py").write_text(WORKER.format(fault=fault))
    ended = tune_on(ready, each=1)
    assert ended.codes == [1, 1], "torchrun's own code"
    assert [len(lines) for lines in ended.errors] == [1, 0], first.output + second.output
    assert "rank 1 on node-b" in ended.errors[0][0] and words in ended.errors[0][0]
    assert f"exitcode  : {code} " in first.output and f"exitcode  : {code} " in second.output
    assert "base base:" not in first.output and not (first.folder / "run").exists()


def test_a_machine_that_is_gone_ends_the_other_which_resumes(ready: tuple[Machine, Machine], tmp_path: Path) -> None:
    first, second = ready
    assert tune_on(ready).codes == [0, 0], first.output + second.output
    (first.folder / "run").rename(tmp_path / "whole")
    (first.folder / "worker.py").write_text(WORKER.format(fault=SLOWLY))
    ended = tune_on(ready, kills=1)
    assert ended.codes == [1, -9] and ended.seconds < 100, first.output + second.output
    assert [len(lines) for lines in ended.errors] == [1, 0], first.output
    assert "--resume" in ended.errors[0][0]
    assert tune_on(ready, ["--resume"]).codes == [0, 0], first.output + second.output
    assert "resuming from step " in first.output
    weights = [
        folder / "adapter" / "adapter_model.safetensors" for folder in (first.folder / "run", tmp_path / "whole")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
