"""`python -m benchmarks.plan_cuda`: planned against actual peak memory on a CUDA device, at 1B and 8B shapes.

The bases have the shapes of Llama 3 and weights of zeros, whose file is sparse, so that nothing is downloaded and
`tune`'s own code loads and quantises them. Targets: 5 % of what torch has allocated, 10 % of what it has reserved.
Writes docs/benchmarks/plan-cuda.json. `make gpu` runs the same comparison as a test.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.plan import DOCS, SHAPES, build, describe_base, write_rows
from budwood.model.quiet import silence_libraries
from budwood.planning.devices import find_device
from budwood.planning.estimate import estimate
from budwood.planning.options import CONTEXT
from budwood.testing.allocations import measured_peak_cuda

ALLOCATED, RESERVED = 0.05, 0.10
SMALL = {"train": {"precision": "bf16", "batch_tokens": 4096}}
SAVING = {"train": {**SMALL["train"], "gradient_checkpointing": True}}
CASES: dict[str, dict[str, Any]] = {
    "1B, lora": {"strategies": [{"lora": {}}], **SMALL},
    "1B, lora, nf4": {"strategies": [{"lora": {}}], "quantization": "nf4", **SMALL},
    "1B, lora with dropout, int8, gradient checkpointing": {
        "strategies": [{"lora": {"dropout": 0.1}}], "quantization": "int8", **SAVING,
    },
    "1B, lora, dpo, nf4": {"strategies": [{"lora": {}}, {"dpo": {}}], "quantization": "nf4", "rows": "pairs", **SMALL},
    "8B, lora, nf4, gradient checkpointing": {"strategies": [{"lora": {}}], "quantization": "nf4", **SAVING},
    "8B, lora, r-drop, nf4, gradient checkpointing": {
        "strategies": [{"lora": {"dropout": 0.1}}, {"r-drop": {}}], "quantization": "nf4", **SAVING,
    },
}  # fmt: skip
"""Recipes by name, which begins with the shape of the base; see `benchmarks.plan.RECIPES`."""


def compare_case(name: str, folder: Path, words: int = 60) -> dict[str, Any]:
    """Plan a case, take two steps, and return the planned bytes, those allocated and reserved, and the differences.

    Args:
        folder: for the base and the rows, which may be there already.
        words: length of the rows.
    """
    shape = name.partition(",")[0]
    if not (folder / shape).is_dir():
        describe_base(folder / shape, SHAPES[shape])
    rows = write_rows(folder, words)
    recipe = build({**CASES[name], "base": shape, "device": "cuda"}, folder / "base", rows, folder / "run")
    planned = estimate(recipe, find_device("cuda"))
    gc.collect()
    return compared(planned.peak - CONTEXT, *measured_peak_cuda(recipe), planned.where)  # torch counts no context


def compared(planned: int, allocated: int, reserved: int, where: str) -> dict[str, Any]:
    """Return these bytes, the place of the planned peak, and the plan's differences from both measurements."""
    return {
        "planned": planned, "allocated": allocated, "reserved": reserved, "where": where,
        "of_allocated": planned / allocated - 1, "of_reserved": planned / reserved - 1,
    }  # fmt: skip


def is_within(row: dict[str, Any]) -> bool:
    """Whether a comparison meets both targets."""
    return abs(row["of_allocated"]) <= ALLOCATED and abs(row["of_reserved"]) <= RESERVED


def main() -> None:
    """Compare all cases, or those whose names are given, and write the record if all were compared."""
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device here.")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    silence_libraries()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or CASES:
            row = results[name] = compare_case(name, Path(folder))
            print(
                f"{name:52} planned {row['planned'] / 1e9:6.2f} GB, allocated {row['allocated'] / 1e9:6.2f} "
                f"({row['of_allocated']:+.1%}), reserved {row['reserved'] / 1e9:6.2f} ({row['of_reserved']:+.1%})",
                flush=True,
            )
    if not sys.argv[1:]:
        versions = {part: metadata.version(part) for part in ("torch", "transformers", "bitsandbytes", "peft")}
        record = {"device": torch.cuda.get_device_name(), "versions": versions, "recipes": results}
        (DOCS / "benchmarks" / "plan-cuda.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    failed = [name for name, row in results.items() if not is_within(row)]
    if failed:
        sys.exit(f"further apart than {ALLOCATED:.0%} of allocated or {RESERVED:.0%} of reserved: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
