"""`make gpu-record` on a CPU: every stage runs, and the commands of the last one exist."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks import arms, gpu_record, train
from benchmarks import workload as w
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent, Kernel


def test_every_stage_runs_on_a_cpu_with_tiny_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert gpu_record.main(["--dry", "--out", str(tmp_path)]) == 0
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in gpu_record.STAGES}
    assert not any("failed" in stage or stage.get("late") for stage in found.values())
    assert capsys.readouterr().out.count("done after") == len(gpu_record.STAGES)
    assert set(found["layers"]) > {f"64 tokens, recomputed, {name}" for name in ("halves", "modules")}
    for stage in found["train"].values():
        if isinstance(stage, dict):
            chosen = train.make_parser().parse_args(stage["command"][3:])
            assert chosen.warmup >= 3 and chosen.steps >= 5 and len(chosen.arms) == 1
            examples, rows = chosen.examples, chosen.arms[0].partition("trainer-")[2]
            assert not rows or examples % int(rows) == 0


def test_a_stage_that_fails_or_is_late_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(bench: gpu_record.Bench) -> dict[str, object]:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_record, "STAGES", {"broken": broken, "after": lambda bench: {"fine": True}})
    bench = gpu_record.Bench(True, tmp_path, 60)
    found = gpu_record.record(bench, ["broken", "after"])
    assert "no kernel image" in found["broken"]["failed"] and found["after"]["fine"]
    bench.limit = 0
    assert gpu_record.record(bench, ["after"])["after"]["late"]


def test_without_a_gpu_nothing_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert gpu_record.main(["--out", str(tmp_path / "out")]) == 3
    assert "no CUDA device" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_time_of_a_kernel_counts_once() -> None:
    """torch adds it to the operation that launched the kernel too."""

    def event(name: str, start: int, end: int, kind: DeviceType) -> FunctionEvent:
        return FunctionEvent(len(name), name, 1, start, end, device_type=kind, use_device="cuda", stack=[])

    operation, launch = event("aten::mm", 0, 90, DeviceType.CPU), event("cudaLaunchKernel", 10, 20, DeviceType.CPU)
    operation.kernels.append(Kernel("gemm", 0, 70))
    kernels = [event("gemm", 20, 90, DeviceType.CUDA), event("copy", 90, 100, DeviceType.CUDA)]
    events = EventList([operation, launch, *kernels], use_device="cuda")
    events._build_tree()
    averages = events.key_averages()
    assert sum(found.self_device_time_total for found in averages) == 150
    on_device = gpu_record.on_device(averages, "cuda")
    assert sum(found.self_device_time_total for found in on_device) == 80
    assert {found.key for found in gpu_record.on_device(averages, "cpu")} == {"aten::mm", "cudaLaunchKernel"}


def test_the_arms_of_a_size_share_a_base_and_are_compared_with_the_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {
        "budwood": 13_000.0,
        "budwood-auto": 15_000.0,
        "trl-packed": 5_000.0,
        "trainer-16": 2_000.0,
        "trainer-11": 1_300.0,
    }
    bases: dict[str, set[Path]] = {"1b": set(), "8b": set()}

    def finish(command: list[str], seconds: float, folder: Path) -> tuple[int | None, str]:
        chosen = train.make_parser().parse_args(command[3:])
        (name,) = chosen.arms
        if chosen.size == "1b" and name == "trl-packed":
            return 1, "no memory"
        bases[chosen.size].add(chosen.base)
        assert folder in chosen.base.parents and folder.is_dir() and 0 < seconds <= 60
        arm = {"tokens_per_second": rates[name], "share_of_matmul_rate": 0.5, "peak_bytes": 12 * 10**9}
        chosen.out.write_text(json.dumps({"arms": {name: arm}, "examples_per_step": chosen.examples}))
        return 0, ""

    monkeypatch.setattr(gpu_record, "finish", finish)
    bench = gpu_record.Bench(True, tmp_path, 60)
    bench.dry = False
    found = gpu_record.train(bench)
    assert found["8b, budwood"]["examples_per_step"] == 44 and found["1b, trainer-16"]["examples_per_step"] == 16
    assert found["8b, unsloth"] == found["1b, unsloth"] == {"skipped": "unsloth is not installed"}
    assert found["1b, trl-packed"] == {"failed": "no memory"}
    assert all(len(shared) == 1 and not next(iter(shared)).parent.exists() for shared in bases.values())
    rows = {(row["size"], row["arm"], row["what"]): (row["found"], row.get("met")) for row in found["compared"]}
    assert rows["8b", "budwood", "tokens_per_second"] == (13_000, True)
    assert rows["8b", "budwood-auto", "tokens_per_second"] == (15_000, False)
    assert rows["8b", "budwood", "times trl-packed"] == (2.6, True)
    assert rows["8b", "budwood", "peak_bytes"] == (12 * 10**9, False)
    assert rows["8b", "budwood-auto", "times trl-packed"] == (3.0, None), "there is no target"
    assert rows["8b", "budwood", "share_of_matmul_rate"] == (0.5, True)
    assert rows["8b", "budwood", "times trainer-11"] == (10.0, None)
    assert rows["1b", "budwood", "times trainer-16"] == (6.5, None)
    assert rows["1b", "budwood", "times trl-packed"] == (None, None), "the peer failed"


def test_a_step_of_the_8b_arms_is_a_micro_batch_of_8k_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w, "_write_base", lambda folder, size: folder.mkdir())
    workload = w.build(tmp_path / "work", 18, w.SIZES["8b"], examples=gpu_record.EXAMPLES["8b"])
    tokens = workload.step_sizes()[0][3:]
    assert len(tokens) == 15 and 8_000 < tokens.mean() < 8_800 and tokens.max() <= arms.WHOLE
    assert len(arms._packed_dataset(workload)) == 18 * arms.PACKED_ROWS


def test_a_base_is_kept_and_the_data_has_as_many_examples_as_asked_for(tmp_path: Path) -> None:
    small, kept = w.Size(1, 32, 48, 4, 2, 300), tmp_path / "kept"
    first = w.build(tmp_path / "one", 2, small, examples=3, kept=kept)
    written = {file: file.stat().st_mtime_ns for file in kept.iterdir()}
    second = w.build(tmp_path / "two", 2, small, examples=5, kept=kept)
    assert first.base == second.base == kept and len(written) > 2
    assert {file: file.stat().st_mtime_ns for file in kept.iterdir()} == written
    assert [len(each.tokens()) for each in (first, second)] == [6, 10] and len(second.step_sizes()[0]) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kept", "one", "two"]


def test_the_measurements_of_an_arm_say_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Arm(train.Arm):
        def __init__(self, name: str, workload: w.Workload, steps: int, threads: int) -> None:
            self.name, self.peak, self.steps = name, 5, steps
            self.seconds, self.processor, self.losses = [], [], []

        def _receive(self) -> dict[str, Any]:
            return {"peak": 5, "notes": {"gradient_checkpointing": 3}}

        def run(self, steps: int) -> float:
            self.seconds.append(2.0)
            self.processor.append(1.0)
            return 2.0

        def stop(self) -> None:
            pass

    monkeypatch.setattr(train, "Arm", Arm)
    monkeypatch.setattr(train, "matmul_rate", lambda threads, dtype: 1e9)
    monkeypatch.setattr(w, "_write_base", lambda folder, size: folder.mkdir())
    found = train.measure(["budwood-auto"], 2, 3, 1, 1, tmp_path, "8b", examples=4)
    assert found["examples_per_step"] == 4 and found["arms"]["budwood-auto"]["gradient_checkpointing"] == 3
    tokens = w.Workload(tmp_path, examples=4).step_sizes()[0]
    assert found["tokens_per_step"] == pytest.approx(tokens[1:].mean(), abs=0.1)


def test_an_arm_chooses_the_layers_that_recompute_for_a_card_of_80_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    from budwood.planning import admission

    seen: list[int] = []
    monkeypatch.setattr(admission, "admit", lambda run, skeleton: seen.append(admission.available(run)))
    for free in (139 << 30, 40 << 30):
        monkeypatch.setattr(admission, "available", lambda run, free=free: free)
        arms.plan_for_card(SimpleNamespace(), None)  # type: ignore[arg-type]
        assert admission.available(None) == free  # type: ignore[arg-type]
    assert seen == [80 << 30, 40 << 30]


def test_an_arm_whose_time_has_come_ends_with_the_processes_that_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, tempfile, time\n"
        "folder = tempfile.mkdtemp()\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(folder + '/pid', 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code]
    assert gpu_record.finish([sys.executable, "-c", "import sys; sys.exit('no')"], 60, tmp_path) == (1, "no\n")
    while not list(tmp_path.glob("*/pid")):  # a process may take longer to start than the time that it is given
        assert gpu_record.finish(command, 1, tmp_path) == (None, "")
    for file in tmp_path.glob("*/pid"):
        for _ in range(600):
            if not _runs(int(file.read_text() or 0)):
                break
            time.sleep(0.05)
        else:
            pytest.fail("it still runs")


def _runs(process: int) -> bool:
    try:
        return process > 0 and " Z" not in Path(f"/proc/{process}/stat").read_text() and os.kill(process, 0) is None
    except (OSError, ProcessLookupError):
        return False


def test_a_stage_begins_without_the_memory_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(gpu_record, "release_memory", lambda: order.append("released"))
    stages = {name: lambda bench, name=name: order.append(name) or {} for name in ("layers", "train")}
    monkeypatch.setattr(gpu_record, "STAGES", stages)
    gpu_record.record(gpu_record.Bench(True, tmp_path, 60), ["layers", "train"])
    assert order == ["released", "layers", "released", "train"]


@pytest.mark.parametrize(("words", "line"), [("--arms trainer-4 --examples 6", "trainer-4 needs a multiple of 4")])
def test_steps_that_an_arm_cannot_split_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, line: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *words.split()])
    with pytest.raises(SystemExit):
        train.main()
    assert line in capsys.readouterr().err


def test_the_error_of_an_arm_that_ended_early_is_shown(tmp_path: Path) -> None:
    """Not that of the pipe to it, by which it would have been told to stop."""
    arm: Any = train.Arm.__new__(train.Arm)
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    arm.name, arm.log, arm.connection, arm.joined = "unsloth", tmp_path / "log", ours, []
    arm.process = SimpleNamespace(is_alive=lambda: True, join=lambda: arm.joined.append(True))
    arm.log.write_text("ModuleNotFoundError: No module named 'unsloth'")
    with pytest.raises(SystemExit, match="the arm unsloth ended early:\n.*No module named 'unsloth'"):
        try:
            arm.wait()
        finally:
            arm.stop()
    assert arm.joined


@pytest.mark.parametrize(("precision", "met"), [("bf16", [True, False, False, True]), ("fp32", [True, True])])
def test_each_arm_is_held_to_its_own_target(precision: str, met: list[bool]) -> None:
    """2.8 times the fastest Trainer, 3 times it with a compiler; 3.5 times the one with 8 rows, 3 times in fp32."""
    results: dict[str, Any] = {
        name: {"tokens_per_second_by_round": [rate], "tokens_per_second": rate, "processor_seconds_by_round": [1.0],
               "peak_bytes": size, "losses": [1.0]}
        for name, rate, size in (("budwood", 29.0, 1), ("budwood-compile", 29.5, 1), ("trainer-1", 10.0, 3),
                                 ("trainer-8", 9.0, 4))
    }  # fmt: skip
    train.compare(results)
    assert [reached for _, reached in train.verdicts(results, precision)] == met
