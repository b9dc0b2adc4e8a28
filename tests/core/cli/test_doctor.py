"""`budwood doctor`: each fault is reported with its remedy, and none makes the command itself fail."""

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
from tests.forked import once_anew

from budwood.cli import app as cli
from budwood.cli.doctor import checks as doctor
from budwood.cli.doctor import devices, software
from budwood.cli.doctor.finding import Finding
from budwood.cli.doctor.measuring import take_measurements
from budwood.planning import measurement
from budwood.planning.measurement import Measurement

ROOT = Path(__file__).parents[3]


def statuses(findings) -> list[str]:
    return [finding.status for finding in findings]


def test_tested_versions_are_those_of_constraints_txt():
    pins = software.tested_versions()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"torch=={pins['torch']}" in lines
    assert len(pins) == sum("==" in line for line in lines)
    assert "ruamel-yaml" in pins  # canonical names


def test_installed_versions_are_in_range():
    findings = list(doctor.check_versions())
    assert "problem" not in statuses(findings)
    assert any("direct dependencies as tested" in finding.text for finding in findings)


@pytest.mark.parametrize(
    ("version", "status", "text"),
    [
        ("99.1", "note", "peft 99.1 is newer than the tested "),
        ("0.21.0", "note", "peft 0.21.0 is older than the tested "),
        ("0.3.0", "problem", "peft 0.3.0: >=0.21 is needed"),
        (None, "problem", "peft is not installed"),
    ],
)
def test_an_untested_version_is_a_note_and_a_problem_only_out_of_range(monkeypatch, version, status, text):
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


def test_a_local_build_counts_as_the_tested_version(monkeypatch):
    pin = software.tested_versions()["torch"]
    genuine = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: f"{pin}+cu130" if name == "torch" else genuine(name))
    assert not [finding for finding in doctor.check_versions() if finding.values.get("package") == "torch"]


def test_a_torchvision_that_does_not_load_is_named(tmp_path, monkeypatch):
    assert not list(doctor.check_torchvision()), "it is not needed"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torchvision.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    info = tmp_path / "torchvision-0.28.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    [finding] = doctor.check_torchvision()
    assert finding.status == "problem" and "torchvision 0.28.0 does not load" in finding.text
    assert "nms does not exist" in finding.text and "pip uninstall torchvision" in finding.remedy


def test_writable_folders(tmp_path):
    findings = list(doctor.check_disk(tmp_path))
    assert statuses(findings) == ["ok", "ok"]
    assert findings[0].values["folder"] == str(tmp_path)
    assert list(tmp_path.iterdir()) == []  # the check leaves no file behind


def test_unwritable_folders(tmp_path, monkeypatch):
    working, *_ = doctor.check_disk(Path("/proc"))  # not writable, even by root
    assert working.status == "problem"
    assert working.text.startswith("working folder: /proc cannot be written")
    assert working.remedy
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    monkeypatch.setattr("tempfile.tempdir", None)
    findings = list(doctor.check_disk(tmp_path))
    assert statuses(findings) == ["ok", "ok", "warning"]
    assert findings[-1].text.startswith(f"TMPDIR is {tmp_path / 'absent'}, which cannot be used")


def test_low_memory_and_disk_are_warnings(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2**20))
    assert statuses(doctor.check_disk(tmp_path)) == ["warning", "warning"]
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2**34, available=2**30))
    (finding,) = doctor.check_memory()
    assert finding.status == "warning"
    assert finding.text.startswith("1.0 GiB of ")


def test_torch_and_the_device_that_a_run_would_use():
    findings = list(doctor.check_torch())
    assert findings[0].values["version"] == torch.__version__
    assert findings[-1].values["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "problem" not in statuses(findings)


@pytest.mark.gpu
def test_a_gpu_is_described_and_tested():
    (device,) = [f for f in doctor.check_torch() if f.values.get("device") == "cuda:0"]
    assert device.status in ("ok", "warning")  # its memory may be in use
    assert device.values["capability"] == list(torch.cuda.get_device_capability(0))
    assert device.values["memory"] > 2**30
    assert device.values["driver"]
    (finding,) = doctor.check_bitsandbytes()
    assert (finding.status, finding.values["device"]) == ("ok", "cuda")


def test_measurements_are_shown_and_kept(tmp_path, monkeypatch):
    quick = Measurement({"fp32": 2e11}, 5e10, None, 3e-6, "2025-01-31", 12.0)
    monkeypatch.setattr(measurement, "measure", lambda kind: quick)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("BUDWOOD_CACHE", str(tmp_path))
    (finding,) = take_measurements()
    assert finding.status == "ok"
    assert "in 12 s: products fp32 0.2 TFLOP/s; memory 50 GB/s; 3.0 µs an operation; kept in " in finding.text
    assert measurement.kept("cpu") == (quick, "")
    (tmp_path / "file").touch()
    monkeypatch.setenv("BUDWOOD_CACHE", str(tmp_path / "file"))
    (finding,) = take_measurements()
    assert finding.status == "problem" and "cannot be written" in finding.text and "BUDWOOD_CACHE" in finding.remedy


def test_a_failing_device_is_a_problem(monkeypatch):
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


def test_bitsandbytes_errors_are_within_bounds():
    weight, forward, backward = devices.exercise_four_bit(bitsandbytes, "cpu")
    levels = bitsandbytes.functional.get_4bit_type("nf4", device="cpu").sort().values
    assert float(levels.diff().max()) / 2 <= devices.NF4_GAP < float(levels.diff().max()) / 2 + 1e-3
    assert 0.1 < weight <= devices.NF4_GAP
    assert max(forward, backward) < 1e-2
    assert statuses(doctor.check_bitsandbytes()) == ["ok"]


@pytest.mark.parametrize("broken", ["dequantize", "forward", "nan"])
def test_wrong_results_of_bitsandbytes_are_a_problem(monkeypatch, broken):
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


@pytest.mark.parametrize(("stage", "text"), [("import", "does not import"), ("run", "fails on ")])
def test_a_failing_bitsandbytes_is_a_problem(monkeypatch, stage, text):
    def raising(*args, **kwargs):
        raise OSError("libbitsandbytes_cpu.so: undefined symbol: x")

    if stage == "import":
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
MESSAGES = {
    "branch": "No module named 'not_there'",
    "stalk": "written for version 99",
    "shoot": "no hook 'prepare_modle'. Did you mean 'prepare_model'",
    "thorn": "is not a subclass of budwood.Strategy",
}


def test_broken_plugins_are_reported_with_the_cause(distribution):
    for name, source in SOURCES.items():
        distribution(name, source, {name: "Mine"})
    for name in ("left", "right"):
        distribution(name, "class Mine(Strategy): pass", {"both": "Mine"})
    distribution("fine", "class Mine(Strategy): pass", {"fine": "Mine"})
    findings = {(f.values["distribution"], f.values["name"]): f for f in doctor.check_plugins()}
    for name, message in MESSAGES.items():
        finding = findings[name, name]
        assert finding.status == "warning"
        assert message in finding.text
        assert f"{name} 1.0" in finding.text
    for name in ("left", "right"):
        assert findings[name, "both"].status == "warning"
        assert "left 1.0" in findings[name, "both"].text
        assert "right 1.0" in findings[name, "both"].text
    assert findings["fine", "fine"].status == findings["budwood", "lora"].status == "ok"


def test_a_plugin_with_a_first_party_name_is_a_problem(distribution):
    distribution("rival", "class Mine(Strategy): pass", {"lora": "Mine"})
    findings = [finding for finding in doctor.check_plugins() if finding.values["name"] == "lora"]
    assert statuses(findings) == ["problem", "problem"]
    assert "pip uninstall" in findings[0].text


def test_a_crashing_plugin_is_a_warning(distribution, monkeypatch, capsys):
    monkeypatch.setattr(cli, "silence_libraries", lambda debug: None)
    monkeypatch.setattr(subprocess, "Popen", once_anew())
    before = signal.getsignal(signal.SIGTERM)
    distribution("crash", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", {"aaa": "Mine"})
    distribution("stalk", SOURCES["stalk"], {"aab": "Mine"})
    try:
        assert cli.run(["doctor", "--json"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    report = json.loads(capsys.readouterr().out)
    assert report["ready"]
    findings = [Finding(**finding) for finding in report["findings"]]
    assert {finding.topic for finding in findings} >= {
        "python", "versions", "memory", "disk", "torch", "device", "bitsandbytes", "plugins",
    }  # fmt: skip
    plugins = {finding.values["name"]: finding for finding in findings if finding.topic == "plugins"}
    assert plugins["aaa"].status == plugins["aab"].status == "warning"
    assert "plugin 'aaa' of crash 1.0 (crash:Mine) ends the process (SIGSEGV)" in plugins["aaa"].text
    assert plugins["lora"].status == "ok"


BROKEN_TORCH = {
    "missing": ("raise ImportError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
    "crash": ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "torch ends the process (SIGILL)"),
    "exit": ("import os; os._exit(0)", "torch ends the process (exit code 0)"),
}


@pytest.mark.parametrize("fault", BROKEN_TORCH)
def test_a_broken_torch_is_reported(tmp_path, fault):
    source, message = BROKEN_TORCH[fault]
    (tmp_path / "torch.py").write_text(source)
    code = "import sys; from budwood.cli.app import run; sys.exit(run(['doctor']))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path
    )
    assert result.returncode == 3
    assert result.stderr == ""
    assert message in result.stdout
    assert "plugins cannot be checked while torch does not work" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("tuning would fail here; 1 problem")


def test_a_hanging_import_times_out(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import time; time.sleep(1000)")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = doctor.run_isolated({"torch": doctor.check_torch}, timeout=0.5)
    assert (finding.status, finding.text) == ("problem", "torch does not respond for 0.5 s")


def test_a_missing_psutil_is_a_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(doctor, "run_isolated", lambda checks: [])
    findings = [finding for finding in doctor.examine() if finding.status == "problem"]
    assert [finding.topic for finding in findings] == ["memory"]
    assert "psutil" in findings[0].text
