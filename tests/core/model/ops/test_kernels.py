"""The Triton kernels without a GPU: computed by Triton's interpreter, and compiled for four generations of GPUs."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from budwood.model.ops import kernels

pytest.importorskip("triton", reason="Triton comes with torch for CUDA, and with the extra dev")
import triton

from budwood.model.ops.kernels import triton_code
from budwood.model.ops.kernels.checks import CHECKS

HERE = Path(__file__).parent


def run(*words: str, **environment: str) -> str:
    """Run Python in a process of its own, since Triton decides at its import whether it interprets."""
    found = subprocess.run(
        [sys.executable, *words], env={**os.environ, **environment}, cwd=HERE.parents[3], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    return found.stdout


def test_the_kernels_compute_what_torch_does():
    printed = run("-m", "pytest", "-p", "no:xdist", str(HERE / "interpreted.py"), TRITON_INTERPRET="1")
    assert " passed" in printed and "skipped" not in printed


def test_the_kernels_compile_for_gpus_without_spilling(tmp_path, forked):
    printed = run(str(HERE / "compiled.py"), TRITON_CACHE_DIR=str(tmp_path))
    found = [json.loads(line) for line in printed.splitlines()]
    names = {name for name, each in vars(triton_code).items() if isinstance(each, triton.JITFunction)}
    launched = {name for name in names if not name.startswith("_")}
    targets = [*itertools.product((80, 86, 89, 90), ("bf16",)), *itertools.product((80, 90), ("fp16", "fp32"))]
    made = {((kernel["target"], kernel["number"]), kernel["kernel"]) for kernel in found}
    assert made == set(itertools.product(targets, launched))
    for kernel in found:
        assert kernel["stack"] == 0, kernel  # registers spilled to memory
        assert kernel["shared"] < 99 * 1024, kernel  # of an sm_89


def test_the_kernels_are_prepared_for_the_device_that_tensors_have(monkeypatch):
    """A check is remembered by device, and its problem printed before the run: cuda and cuda:1 must be one."""
    asked = []
    monkeypatch.setattr(kernels, "_passes", lambda name, device, dtype: asked.append((name, device)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for device in ("cuda", "cuda:1"):
        kernels.prepare(torch.device(device), torch.float32)
    assert asked == 2 * [(name, torch.device("cuda", 1)) for name in CHECKS]


@pytest.mark.gpu
def test_the_kernels_pass_their_comparisons_on_the_device():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert kernels.prepare(torch.device("cuda", 0), dtype) == []
        for name in CHECKS:
            assert kernels.implementation(name, torch.empty(1, device="cuda"), dtype) is not None
