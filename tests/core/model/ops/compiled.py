"""Compiles the Triton kernels for GPUs that need not be there, and prints a line of JSON for each."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from budwood.model.ops.kernels import launch
from budwood.model.ops.kernels import triton_code as code

WIDE = "*fp32"
TARGETS = [*itertools.product((80, 86, 89, 90), ("bf16",)), *itertools.product((80, 90), ("fp16", "fp32"))]
ROTATE = [
    "tokens", "heads", "more", "rotated", "width", "query_batch", "query_head", "query_token",
    "key_batch", "key_head", "key_token", "table_batch", "table_token",
]  # fmt: skip
TYPES = {
    **dict.fromkeys(("size", "width", "stride", "classes", *ROTATE), "i32"),
    **dict.fromkeys(("nested_code", "nested_absmax", "offset", "code", "scales", "losses", "sums"), WIDE),
    "epsilon": "fp32", "labels": "*i64",
}  # fmt: skip
WIDTHS = (8192, 16384)
"""Of the rows of norms."""
BOTH = (False, True)
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def cases() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Yield kernels, types that are not those of `TYPES` or of the computation, and constants."""
    for nested in BOTH:
        constants = {"NESTED": nested, "SHARE": 64, "NESTED_SHARE": 256, "BLOCK": launch.BLOCK}
        stored = {"packed": "*u8", "absmax": "*u8" if nested else WIDE}
        yield code.dequantize_4bit, stored, constants
        names = ("packed", "absmax", "nested_code", "nested_absmax", "offset", "code", "size")
        parts = itertools.product(names, (1, 2, 3))
        yield code.dequantize_4bit_group, {f"{name}_{n}": {**TYPES, **stored}[name] for name, n in parts}, constants
    for width in WIDTHS:
        row = launch._row(width)
        yield code.rms_norm_forward, {}, row
        yield code.rms_norm_forward, {"weight": WIDE, "out": WIDE}, row
        yield code.rms_norm_of_sum, {}, row
        for adds in BOTH:
            yield code.rms_norm_backward, {}, {"ADDS": adds, **row}
    for kind in launch.KINDS.values():
        yield code.gated_forward, {}, {"KIND": kind, "BLOCK": launch.BLOCK}
        for again in BOTH:
            yield code.gated_backward, {}, {"AGAIN": again, "KIND": kind, "BLOCK": launch.BLOCK}
    for backward in BOTH:
        yield code.rotate, {}, {"BACKWARD": backward, "BLOCK": 128, "num_warps": 1}
    yield code.cross_entropy_forward, {}, {"BLOCK": launch.CLASSES, "num_warps": 8}
    yield code.cross_entropy_backward, {"gradient": WIDE}, {"BLOCK": launch.CLASSES, "num_warps": 8}


def stack(binary: bytes) -> int:
    """Return the bytes of local memory per thread, which registers spill to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        printed = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sum(int(found) for found in re.findall(r"(?:STACK|LOCAL):(\d+)", printed))


for (target, number), (kernel, types, given) in itertools.product(TARGETS, cases()):
    constants = {name: value for name, value in given.items() if name != "num_warps"}
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: types.get(name) or TYPES.get(name, f"*{number}") for name in names}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(kernel.arg_names)
        if signature.get(name, "")[:1] == "*"
    }
    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, aligned)
    options = {"num_warps": given.get("num_warps", 4), "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    print(
        json.dumps(
            {
                "target": target, "kernel": kernel.__name__, "number": number, "constants": constants,
                "stack": stack(made.asm["cubin"]), "shared": made.metadata.shared,
            }
        )
    )  # fmt: skip
