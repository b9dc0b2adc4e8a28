"""Checks torch, the GPUs it detects, and bitsandbytes by running each."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from budwood.cli.doctor.finding import LOW_MEMORY, Finding, gib
from budwood.errors import BudwoodError, describe, plural
from budwood.model.quiet import import_bitsandbytes

NF4_GAP = 0.1520
"""Half of the widest gap between two NF4 levels (-1 and -0.6962), rounded up: the largest error of a weight, relative
to the largest of its block."""


def check_torch() -> Iterator[Finding]:
    """Run torch on the CPU and on each GPU it detects; report the device that a run would use."""
    try:
        import torch

        a = torch.ones(8, 8, requires_grad=True)
        (a @ a).sum().backward()
        version, built_for = torch.__version__, torch.version.cuda
    except Exception as error:
        text = f"torch does not work: {describe(error)}"
        yield Finding("torch", "problem", text, "install it in this environment as described on pytorch.org.")
        return
    kind = f"CUDA {built_for}" if built_for else "the CPU only" if torch.version.hip is None else "ROCm"
    values = {"version": version, "cuda": built_for, "threads": torch.get_num_threads()}
    yield Finding(
        "torch", "ok", f"torch {version}, built for {kind}, {plural(torch.get_num_threads(), 'thread')}", values=values
    )
    yield from _check_cuda(torch)
    try:
        from budwood.model.machine import pick_device_precision

        device, dtype, reason = pick_device_precision("auto", "auto")
        name = str(dtype).removeprefix("torch.")
        values = {"device": str(device), "dtype": name}
        yield Finding("device", "ok", f"a run would compute on {device} in {name} ({reason})", values=values)
    except BudwoodError as error:
        yield Finding("device", "problem", str(error))


def check_torchvision() -> Iterator[Finding]:
    """Check that torchvision, if it is installed, loads with this torch: transformers imports it if it is there."""
    try:
        version = metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return
    try:
        importlib.import_module("torchvision")
        yield Finding("torchvision", "ok", f"torchvision {version}", values={"version": version})
    except Exception as error:
        text = f"torchvision {version} does not load with torch {metadata.version('torch')}, and stops transformers"
        remedy = (
            "pip uninstall torchvision, which Budwood does not need, or install its build for this torch: that of PyPI "
            "is for CUDA."
        )
        yield Finding("torchvision", "problem", f"{text}: {describe(error)}", remedy, {"version": version})


def _check_cuda(torch: Any) -> Iterator[Finding]:
    driver = _driver()
    if not torch.cuda.is_available():
        if driver is None:
            yield Finding("device", "ok", "no CUDA device")
        elif torch.version.cuda is None:
            text = f"NVIDIA driver {driver} is installed, but this torch is built for the CPU only"
            yield Finding(
                "device", "warning", text, "install torch for CUDA as described on pytorch.org to use the GPU."
            )
        else:
            text = f"NVIDIA driver {driver} is installed, but torch (for CUDA {torch.version.cuda}) finds no device"
            remedy = "update the driver, or install torch for an older CUDA; check CUDA_VISIBLE_DEVICES."
            yield Finding("device", "warning", text, remedy)
        return
    for index in range(torch.cuda.device_count()):
        device = f"cuda:{index}"
        try:
            properties = torch.cuda.get_device_properties(index)
            a = torch.ones(64, 64, device=device)
            if float((a @ a).sum()) != 64.0**3:
                raise RuntimeError("a matrix product is wrong")
            free, total = torch.cuda.mem_get_info(index)
        except Exception as error:
            remedy = "install torch for this device and driver as described on pytorch.org, or use base.device: cpu."
            yield Finding("device", "problem", f"{device} does not work: {describe(error)}", remedy)
            continue
        values = {
            "device": device, "name": properties.name, "capability": [properties.major, properties.minor],
            "memory": total, "free": free, "driver": driver, "cuda": torch.version.cuda,
        }  # fmt: skip
        text = f"{device}: {properties.name}, capability {properties.major}.{properties.minor}, "
        text += f"{gib(free)} of {gib(total)} free, driver {driver or 'unknown'}"
        low = free < LOW_MEMORY
        remedy = "end other processes that use it (nvidia-smi lists them)." if low else ""
        yield Finding("device", "warning" if low else "ok", text, remedy, values)


def _driver() -> str | None:
    """Return the version of the NVIDIA driver, or None if there is none."""
    try:
        match = re.search(r"Kernel Module[^\n]*?\s(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        return match[1] if match else "of unknown version"
    except OSError:
        pass
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        result = subprocess.run(query, capture_output=True, text=True, timeout=20)
        return result.stdout.split()[0] if result.returncode == 0 and result.stdout.strip() else None
    except (OSError, subprocess.SubprocessError):
        return None


def check_bitsandbytes() -> Iterator[Finding]:
    """Run bitsandbytes on the available device: an NF4 round trip, and a 4-bit linear layer forward and backward."""
    remedy = "pip install -U bitsandbytes; without it `quantization: none` still works."
    import torch

    import_bitsandbytes()  # quickly; if it fails, the next import says why
    try:
        bitsandbytes: Any = importlib.import_module("bitsandbytes")
    except Exception as error:
        yield Finding("bitsandbytes", "problem", f"bitsandbytes does not import: {describe(error)}", remedy)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    version = bitsandbytes.__version__
    try:
        error_share, forward, backward = exercise_four_bit(bitsandbytes, device)
    except Exception as error:
        text = f"bitsandbytes {version} fails on {device}: {describe(error)}"
        yield Finding("bitsandbytes", "problem", text, remedy)
        return
    values = {
        "version": version, "device": device, "nf4_error": error_share, "nf4_bound": NF4_GAP,
        "forward_error": forward, "backward_error": backward,
    }  # fmt: skip
    text = f"bitsandbytes {version} on {device}: NF4 within {error_share:.3f} of a block's largest weight "
    text += f"(bound {NF4_GAP}), Linear4bit forward within {forward:.0e}, backward within {backward:.0e}"
    if error_share <= NF4_GAP and forward <= 0.01 and backward <= 0.01:  # TF32 keeps three digits
        yield Finding("bitsandbytes", "ok", text, values=values)
    else:  # NaN included
        yield Finding("bitsandbytes", "problem", f"{text}: its results are wrong", remedy, values)


def exercise_four_bit(bitsandbytes: Any, device: str) -> tuple[float, float, float]:
    """Quantise a small tensor to NF4, and run a 4-bit linear layer.

    Returns:
        The largest error of a weight, relative to the largest weight of its block; the largest errors of the layer's
        output and input gradient against the dequantised weight, each relative to the largest value.
    """
    import torch

    functional = bitsandbytes.functional
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator).to(device)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    restored = functional.dequantize_4bit(packed, state)
    errors = (restored - weight).abs().view(-1, 64).amax(1) / weight.abs().view(-1, 64).amax(1)
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    layer = layer.to(device)
    inputs = torch.randn(4, 128, generator=generator).to(device).requires_grad_()
    outputs = layer(inputs)
    gradient = torch.randn(4, 64, generator=generator).to(device)
    outputs.backward(gradient)
    dense = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    assert inputs.grad is not None
    return (
        float(errors.max()),
        _relative_error(outputs, inputs @ dense.T),
        _relative_error(inputs.grad, gradient @ dense),
    )


def _relative_error(actual: Any, expected: Any) -> float:
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())
