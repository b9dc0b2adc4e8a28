"""A process of four that disagrees, fails or dies ends all, with one line on the first; nothing saved is lost."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.core.conftest import write_rows
from tests.faulty import SCRIPT, Ended, adapter, difference, tune_with, write_recipe


def refused(ended: Ended, code: int, *words: str) -> None:
    """Check that all processes ended with a code, and that the first alone printed one line with these words."""
    assert ended.codes == [code] * len(ended.codes), ended
    assert [len(lines) for lines in ended.errors] == [1] + [0] * (len(ended.codes) - 1), ended
    assert not [word for word in words if word not in ended.errors[0][0]], ended.errors[0][0]


HOST = socket.gethostname()
VERSION = "metadata.version = lambda name, whole=metadata.version: '9.9' if name == '{}' else whole(name)"


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("os.chdir('empty')", 2, ("data.train", "no such file: train.jsonl")),
        ("os.chdir('changed')", 2, ("data.train is ", "copy the same data to every machine")),
        ("arguments.append('--base')", 2, ("'--base' requires an argument",)),
        (VERSION.format("transformers"), 3, ("versions.transformers is ", "and 9.9 there", "same versions")),
        (VERSION.format("budwood"), 3, ("versions.budwood is ", "and 9.9 there")),
        ("arguments += ['-o', 'lora.rank=8']", 2, ("lora.rank", "is 4 in the first process", "and 8 there")),
        ("arguments += ['-o', 'output=elsewhere']", 2, ("recipe.output is run", "and elsewhere there")),
        ("os.chdir('moved')", 2, ("base.weights is ", "copy the same base to every machine")),
        ("from budwood.training import agreement; agreement._code = lambda plugin: 'x'", 3, ("plugins.lora", "and ")),
    ],
)
def test_a_process_that_disagrees_is_named_before_the_base_loads(
    folder: Path, tiny_base: Path, fault: str, code: int, words: tuple[str, ...]
) -> None:
    base = folder / "base"
    shutil.copytree(tiny_base, base)
    write_recipe(folder, Path("base"), {})
    for name in ("empty", "changed", "moved"):
        (folder / name).mkdir()
        (folder / name / "recipe.json").write_text((folder / "recipe.json").read_text())
        shutil.copytree(base, folder / name / "base")
    write_rows(folder / "changed" / "train.jsonl", 20)
    shutil.copy(folder / "train.jsonl", folder / "moved" / "train.jsonl")
    weights = folder / "moved" / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    ended = tune_with(folder, 4, f"if rank == 2: {fault}")
    refused(ended, code, "rank 2 on ", HOST, *words)
    assert "base base:" not in ended.output and not (folder / "run").exists()


def test_a_port_in_use_is_one_line(folder: Path) -> None:
    from tests.processes import end_of_processes

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        script = "import os, sys\nfrom budwood.cli.app import run\nos._exit(run(['tune', 'recipe.json']))"
        ((code, output),) = end_of_processes(
            script.replace("os._exit", "os.environ['WORLD_SIZE'] = '2'\nos._exit"), folder / "p", 1,
            port=taken.getsockname()[1],
        )  # fmt: skip
    assert code == 3 and output.count("error:") == 1 and "is in use" in output and "--master-port" in output


def test_a_bug_in_one_process_is_one_line(folder: Path) -> None:
    refused(tune_with(folder, 4, "if rank == 1: at(2, lambda: {}['x'])"), 1, "rank 1 on ", "KeyError", "a bug")


@pytest.mark.parametrize("killed", [0, 3])
def test_a_killed_process_ends_all_and_resume_gives_the_same_bytes(folder: Path, killed: int) -> None:
    whole = tune_with(folder, 4)
    assert whole.codes == [0] * 4, whole.output
    (folder / "run").rename(folder / "whole")
    ended = tune_with(folder, 4, f"if rank == {killed}: at(3, die)")
    codes = [3] * 4
    codes[killed] = -9
    assert ended.codes == codes
    speaks = 0 if killed else 1  # the lowest that lives
    assert [len(lines) for lines in ended.errors] == [int(rank == speaks) for rank in range(4)]
    assert "--resume" in ended.errors[speaks][0] and (not killed or f"rank {killed} on {HOST}" in ended.errors[0][0])
    resumed = tune_with(folder, 4, arguments=["--resume"])
    assert resumed.codes == [0] * 4 and "resuming from step " in resumed.output
    assert adapter(folder / "run") == adapter(folder / "whole")


def test_a_signal_to_all_makes_one_clean_checkpoint(folder: Path) -> None:
    whole = tune_with(folder, 4)
    (folder / "run").rename(folder / "whole")
    write = json.loads((folder / "recipe.json").read_text())
    write["train"]["save_every"] = 100
    (folder / "recipe.json").write_text(json.dumps(write))
    ended = tune_with(folder, 4, "at(2, lambda: os.kill(os.getpid(), signal.SIGINT))")
    refused(ended, 130, "interrupted at step 3", "resume from step 3")
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert whole.codes == tune_with(folder, 4, arguments=["--resume"]).codes == [0] * 4
    assert adapter(folder / "run") == adapter(folder / "whole")


def test_torchrun_restarts_and_continues(folder: Path) -> None:
    """To the bytes of an uninterrupted run, though the command says --overwrite."""
    assert tune_with(folder, 4).codes == [0] * 4
    (folder / "run").rename(folder / "whole")
    fault = "if rank == 2 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': at(3, die)"
    script = SCRIPT.format(arguments=["--overwrite"], folder=str(folder), fault=fault)
    (folder / "worker.py").write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    ended = subprocess.run(
        [*torchrun, "--max-restarts", "1", "worker.py"], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and f"rank 2 on {HOST}" in errors[0]
    assert "resuming from step 3" in ended.stdout + ended.stderr
    assert adapter(folder / "run") == adapter(folder / "whole")


@pytest.mark.parametrize("count", [1, 2])
def test_a_checkpoint_of_four_resumes_on_fewer(folder: Path, count: int) -> None:
    assert tune_with(folder, 4).codes == [0] * 4
    (folder / "run").rename(folder / "whole")
    assert tune_with(folder, 4, "if rank == 1: at(3, die)").codes == [3, -9, 3, 3]
    resumed = tune_with(folder, count, arguments=["--resume"])
    assert resumed.codes == [0] * count, resumed.output
    notes = [line for line in resumed.output.splitlines() if "processes: 4" in line]
    assert notes == [
        f"note: processes: 4 → {count}: results may differ in the last digits from an uninterrupted run, and dropout "
        "draws other masks"
    ]
    assert difference(folder / "run", folder / "whole") < 1e-5
