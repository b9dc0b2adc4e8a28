"""`budwood doctor`: what is wrong with a machine is named with its remedy, and nothing that is broken breaks it."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch

from budwood.cli import app as cli
from budwood.cli.doctor import checks as doctor
from budwood.cli.doctor import devices, software
from budwood.cli.doctor.finding import Finding

ROOT = Path(__file__).parents[3]


def statuses(findings) -> list[str]:
    return [finding.status for finding in findings]


def test_pins_are_those_of_constraints_txt():
    pins = software.tested_versions()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"torch=={pins['torch']}" in lines
    assert len(pins) == sum("==" in line for line in lines)
    assert "ruamel-yaml" in pins  # as names are compared


def test_versions_as_installed_are_in_range():
    found = list(doctor.check_versions())
    assert "problem" not in statuses(found)
    assert any("direct dependencies as tested" in finding.text for finding in found)


@pytest.mark.parametrize(
    ("version", "status", "text"),
    [
        ("99.1", "note", "peft 99.1 is newer than the tested "),
        ("0.19.0", "note", "peft 0.19.0 is older than the tested "),
        ("0.3.0", "problem", "peft 0.3.0: >=0.19 is needed"),
        (None, "problem", "peft is not installed"),
    ],
)
def test_another_version_is_told_and_fails_only_out_of_range(monkeypatch, version, status, text):
    genuine = metadata.version

    def fake(name: str) -> str:
        if name != "peft":
            return genuine(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", fake)
    (finding,) = [finding for finding in doctor.check_versions() if finding.values.get("package") == "peft"]
    assert finding.status == status
    assert finding.text.startswith(text)
    assert "pip install" in finding.remedy


def test_a_local_build_of_the_tested_version_is_that_version(monkeypatch):
    pin = software.tested_versions()["torch"]
    genuine = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: f"{pin}+cu130" if name == "torch" else genuine(name))
    assert not [finding for finding in doctor.check_versions() if finding.values.get("package") == "torch"]


def test_folders_that_can_be_written(tmp_path):
    found = list(doctor.check_disk(tmp_path))
    assert statuses(found) == ["ok", "ok"]
    assert found[0].values["folder"] == str(tmp_path)
    assert list(tmp_path.iterdir()) == []  # the trial leaves nothing


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    working, *_ = doctor.check_disk(Path("/proc"))  # nobody writes there, root neither
    assert working.status == "problem"
    assert working.text.startswith("working folder: /proc cannot be written")
    assert working.remedy
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    monkeypatch.setattr("tempfile.tempdir", None)
    found = list(doctor.check_disk(tmp_path))
    assert statuses(found) == ["ok", "ok", "warning"]
    assert found[-1].text.startswith(f"TMPDIR is {tmp_path / 'absent'}, which cannot be used")


def test_little_memory_and_disk_are_warnings(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2**20))
    assert statuses(doctor.check_disk(tmp_path)) == ["warning", "warning"]
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2**34, available=2**30))
    (finding,) = doctor.check_memory()
    assert finding.status == "warning"
    assert finding.text.startswith("1.0 GiB of ")


def test_torch_and_the_device_that_a_run_would_take():
    found = list(doctor.check_torch())
    assert found[0].values["version"] == torch.__version__
    assert found[-1].values["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "problem" not in statuses(found)


@pytest.mark.gpu
def test_a_gpu_is_described_and_exercised():
    (device,) = [f for f in doctor.check_torch() if f.values.get("device") == "cuda:0"]
    assert device.status in ("ok", "warning")  # another program may fill it
    assert device.values["capability"] == list(torch.cuda.get_device_capability(0))
    assert device.values["memory"] > 2**30
    assert device.values["driver"]
    (finding,) = doctor.check_bitsandbytes()
    assert (finding.status, finding.values["device"]) == ("ok", "cuda")


def test_a_device_that_cannot_compute_is_a_problem(monkeypatch):
    def fail(index):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", fail)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    (finding,) = [finding for finding in doctor.check_torch() if finding.status == "problem"]
    assert finding.text.startswith("cuda:0 does not work: RuntimeError: no kernel image is available")


def test_a_gpu_that_torch_cannot_use_is_a_warning(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr(devices, "_driver", lambda: "570.86.15")
    (finding,) = [finding for finding in doctor.check_torch() if finding.status == "warning"]
    assert "570.86.15" in finding.text
    assert "install torch for CUDA" in finding.remedy


def test_bitsandbytes_is_exercised_within_its_bounds():
    weight, forward, backward = devices.exercise_four_bit(bitsandbytes, "cpu")
    levels = bitsandbytes.functional.get_4bit_type("nf4", device="cpu").sort().values
    assert float(levels.diff().max()) / 2 <= devices.NF4_GAP < float(levels.diff().max()) / 2 + 1e-3
    assert 0.1 < weight <= devices.NF4_GAP
    assert max(forward, backward) < 1e-2
    assert statuses(doctor.check_bitsandbytes()) == ["ok"]


@pytest.mark.parametrize("broken", ["dequantize", "forward", "nan"])
def test_a_bitsandbytes_that_computes_wrongly_is_a_problem(monkeypatch, broken):
    functional, linear = bitsandbytes.functional, bitsandbytes.nn.Linear4bit
    genuine, forward = functional.dequantize_4bit, linear.forward
    if broken == "dequantize":
        monkeypatch.setattr(functional, "dequantize_4bit", lambda *a, **k: genuine(*a, **k).roll(1))
    elif broken == "forward":
        monkeypatch.setattr(linear, "forward", lambda self, x: forward(self, x) * 1.1)
    else:
        monkeypatch.setattr(linear, "forward", lambda self, x: forward(self, x) * float("nan"))
    (finding,) = doctor.check_bitsandbytes()
    assert finding.status == "problem"
    assert "its results are wrong" in finding.text


@pytest.mark.parametrize(("fails", "text"), [("import", "does not import"), ("run", "fails on ")])
def test_a_bitsandbytes_that_does_not_work_is_a_problem(monkeypatch, fails, text):
    def raising(*args, **kwargs):
        raise OSError("libbitsandbytes_cpu.so: undefined symbol: x")

    if fails == "import":
        monkeypatch.setattr(importlib, "import_module", raising)
    else:
        monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", raising)
    (finding,) = doctor.check_bitsandbytes()
    assert finding.status == "problem"
    assert text in finding.text
    assert "undefined symbol" in finding.text
    assert "quantization: none" in finding.remedy


SOURCES = {
    "branch": "import not_there",
    "stalk": "class Mine(Strategy):\n    api = 99",
    "shoot": "class Mine(Strategy):\n    @hookimpl\n    def prepare_modle(self, run): ...",
    "thorn": "class Mine: pass",
}
SAYS = {
    "branch": "No module named 'not_there'",
    "stalk": "written for version 99",
    "shoot": "no hook 'prepare_modle'. Did you mean 'prepare_model'",
    "thorn": "is not a subclass of budwood.Strategy",
}


def test_plugins_with_problems_are_named_with_their_cause(distribution):
    for name, source in SOURCES.items():
        distribution(name, source, {name: "Mine"})
    for name in ("left", "right"):
        distribution(name, "class Mine(Strategy): pass", {"both": "Mine"})
    distribution("fine", "class Mine(Strategy): pass", {"fine": "Mine"})
    found = {(f.values["distribution"], f.values["name"]): f for f in doctor.check_plugins()}
    for name, says in SAYS.items():
        finding = found[name, name]
        assert finding.status == "warning"
        assert says in finding.text
        assert f"{name} 1.0" in finding.text
    for name in ("left", "right"):
        assert found[name, "both"].status == "warning"
        assert "left 1.0" in found[name, "both"].text
        assert "right 1.0" in found[name, "both"].text
    assert found["fine", "fine"].status == found["budwood", "lora"].status == "ok"


def test_a_name_that_hides_one_of_budwoods_own_makes_tuning_fail(distribution):
    distribution("rival", "class Mine(Strategy): pass", {"lora": "Mine"})
    found = [finding for finding in doctor.check_plugins() if finding.values["name"] == "lora"]
    assert statuses(found) == ["problem", "problem"]
    assert "pip uninstall" in found[0].text


def test_a_plugin_that_ends_the_process_is_a_warning_like_any_other(distribution, monkeypatch, capsys):
    monkeypatch.setattr(cli, "silence_libraries", lambda debug: None)
    before = signal.getsignal(signal.SIGTERM)
    distribution("crash", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", {"aaa": "Mine"})
    distribution("stalk", SOURCES["stalk"], {"aab": "Mine"})
    try:
        assert cli.run(["doctor", "--json"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    report = json.loads(capsys.readouterr().out)
    assert report["ready"]
    found = [Finding(**finding) for finding in report["findings"]]
    assert {finding.topic for finding in found} >= {
        "python", "versions", "memory", "disk", "torch", "device", "bitsandbytes", "plugins",
    }  # fmt: skip
    plugins = {finding.values["name"]: finding for finding in found if finding.topic == "plugins"}
    assert plugins["aaa"].status == plugins["aab"].status == "warning"
    assert "plugin 'aaa' of crash 1.0 (crash:Mine) ends the process (SIGSEGV)" in plugins["aaa"].text
    assert plugins["lora"].status == "ok"


BROKEN_TORCH = {
    "missing": ("raise ImportError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
    "crash": ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "torch ends the process (SIGILL)"),
    "exit": ("import os; os._exit(0)", "torch ends the process (exit code 0)"),
}


@pytest.mark.parametrize("way", BROKEN_TORCH)
def test_a_broken_torch_is_reported(tmp_path, way):
    source, says = BROKEN_TORCH[way]
    (tmp_path / "torch.py").write_text(source)
    code = "import sys; from budwood.cli.app import run; sys.exit(run(['doctor']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path
    )
    assert done.returncode == 3
    assert done.stderr == ""
    assert says in done.stdout
    assert "plugins cannot be checked while torch does not work" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("tuning would fail here; 1 problem")


def test_what_hangs_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import time; time.sleep(1000)")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = doctor.run_isolated({"torch": doctor.check_torch}, timeout=0.5)
    assert (finding.status, finding.text) == ("problem", "torch does not respond for 0.5 s")


def test_without_the_libraries_that_it_looks_with(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(doctor, "run_isolated", lambda checks: [])
    found = [finding for finding in doctor.examine() if finding.status == "problem"]
    assert [finding.topic for finding in found] == ["memory"]
    assert "psutil" in found[0].text
