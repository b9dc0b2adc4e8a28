"""Compiles the Triton kernels in bf16 for GPUs that need not be there, and prints a line of JSON for each."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from budwood.model.ops.kernels import triton_code as code

NARROW, WIDE = "*bf16", "*fp32"
ROTATE = ["tokens", "heads", "rotated", "width", "x_batch", "x_head", "x_token", "table_batch", "table_token"]
BLOCKS = {"NESTED": True, "SHARE": 64, "NESTED_SHARE": 256, "BLOCK": 1024}
STORED = {
    "packed": "*u8", "absmax": "*u8", "nested_code": WIDE, "nested_absmax": WIDE, "offset": WIDE, "code": WIDE,
    "size": "i32",
}  # fmt: skip
PARTS = {f"{name}_{part}": kind for name, kind in STORED.items() for part in (1, 2, 3)}
CASES = [
    (code.dequantize_4bit, {"packed": "*u8", "absmax": "*u8"}, BLOCKS, 4),
    (code.rms_norm_forward, {}, {"BLOCK": 8192}, 16),
    (code.rms_norm_of_sum, {}, {"BLOCK": 8192}, 16),
    (code.dequantize_4bit_group, PARTS, BLOCKS, 4),
    (code.rms_norm_backward, {}, {"ADDS": True, "BLOCK": 8192}, 16),
    (code.gated_forward, {}, {"KIND": 0, "BLOCK": 1024}, 4),
    (code.gated_backward, {}, {"AGAIN": True, "KIND": 0, "BLOCK": 1024}, 4),
    (code.gated_backward, {}, {"AGAIN": True, "KIND": 1, "BLOCK": 1024}, 4),
    (code.rotate, {}, {"BACKWARD": True, "BLOCK": 64}, 1),
    (code.cross_entropy_forward, {}, {"BLOCK": 4096}, 8),
    (code.cross_entropy_backward, {"gradient": WIDE}, {"BLOCK": 4096}, 8),
]  # fmt: skip
TYPES = {
    **dict.fromkeys(("size", "width", "stride", "classes", *ROTATE), "i32"),
    **dict.fromkeys(("nested_code", "nested_absmax", "offset", "code", "scales", "losses", "sums"), WIDE),
    "epsilon": "fp32", "labels": "*i64",
}  # fmt: skip
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def stack(binary: bytes) -> int:
    """Return the bytes of local memory per thread, which registers spill to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        printed = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sum(int(found) for found in re.findall(r"(?:STACK|LOCAL):(\d+)", printed))


for target in (80, 86, 89, 90):
    for kernel, types, constants, warps in CASES:
        names = [name for name in kernel.arg_names if name not in constants]
        signature = {name: types.get(name) or TYPES.get(name, NARROW) for name in names}
        aligned = {
            (at,): [["tt.divisibility", 16]]
            for at, name in enumerate(kernel.arg_names)
            if signature.get(name, "")[:1] == "*"
        }
        source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, aligned)
        options = {"num_warps": warps, "enable_fp_fusion": False}
        made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        name = kernel.__name__
        print(
            json.dumps(
                {"target": target, "kernel": name, "stack": stack(made.asm["cubin"]), "shared": made.metadata.shared}
            )
        )
