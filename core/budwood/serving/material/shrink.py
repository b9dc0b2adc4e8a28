"""Shrinks an adapter to a lower rank."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from budwood.adapters.export import converted
from budwood.adapters.golden import Distance
from budwood.adapters.manifest import MadeRecord, PartRecord
from budwood.adapters.peft_config import PREFIX
from budwood.adapters.store import CONFIG, WEIGHTS, SavedAdapter, read_adapter
from budwood.errors import InputError
from budwood.serving.exports.factors import factors_of, largest_rank, norm_share, padded, squared_norm, truncated
from budwood.serving.material.derived import Workbench
from budwood.serving.merge import MAX_ERROR
from budwood.untrusted.files import check_new_folder


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` wrote.

    Attributes:
        directory: the new adapter's folder.
        rank: its rank.
        was: the largest rank before.
        kept: share of the updates' squared norm that is left; 1 if they are zero.
        distance: distance of its answers from those before.
        error: the same as a fraction of the adapter's effect; None: it has none.
        bytes: size of the file, before and after.
        notes: messages for the user.
    """

    directory: Path
    rank: int
    was: int
    kept: float
    distance: Distance
    error: float | None
    bytes: tuple[int, int]
    notes: list[str] = field(default_factory=list)


def shrink(
    directory: str | Path,
    out: str | Path,
    rank: int,
    *,
    base: str | None = None,
    device: str = "auto",
    allow_other_base: bool = False,
    force: bool = False,
) -> Shrunk:
    """Write the nearest LoRA adapter of a lower rank (Eckart and Young, 1936), with golden logits of its own.

    What the adapter holds besides low-rank updates, such as a head, is unchanged.

    Args:
        directory: an adapter that is LoRA or can be converted to it.
        out: the new adapter's folder; it may not exist yet.
        rank: of every module that has a larger one.
        base: current location of the base; None: as recorded.
        device: cpu, cuda or auto.
        allow_other_base: accept a base that the adapter was not trained on.
        force: write even if a quarter of the adapter's effect is lost.

    Raises:
        InputError: the adapter is not LoRA, has no larger rank, or loses more than a quarter of its effect.
        CorruptError: the adapter is damaged.
    """
    if rank < 1:
        raise InputError(f"--rank {rank}: must be at least 1.")
    out = Path(out)
    check_new_folder(out)
    saved = read_adapter(directory)
    factors = factors_of(saved, "a shrunk adapter", alone=False)
    was = largest_rank(factors)
    if rank >= was:
        raise InputError(f"--rank {rank}: the largest rank of {saved.directory} is {was}: choose a lower one.")
    fewer = truncated(factors, rank)
    kept = norm_share(sum(map(squared_norm, fewer.values())), sum(map(squared_norm, factors.values())))
    config, tensors = _replaced(saved, padded(fewer, rank), rank)

    def write(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    bench = Workbench.open(saved, base, device, allow_other_base)
    before = bench.logits(saved.directory)
    after = bench.logits_of(write)
    distance, error = bench.compare(before, after)
    if error is not None and not error <= MAX_ERROR and not force:
        raise InputError(
            f"{saved.directory}: with rank {rank} the answers change by {error:.0%} of the adapter's effect, more than "
            f"{MAX_ERROR:.0%}: nothing was written. Use a larger --rank, or --force."
        )
    part = PartRecord(**saved.hashes.model_dump())
    bench.write(out, write, "LORA", MadeRecord(how="shrink", method="svd", parts=[part]), after)
    sizes = saved.bytes, sum(tensor.nbytes for tensor in tensors.values())
    return Shrunk(out, rank, was, kept, distance, error, sizes, bench.notes)


def _replaced(
    saved: SavedAdapter, factors: dict[str, tuple[Tensor, Tensor]], rank: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of the adapter as LoRA, with other updates of one rank, scaled by 1."""
    config, tensors = saved.config, saved.load_tensors()
    if config.get("peft_type") != "LORA":
        result = converted(saved, tensors, "lora")
        assert result is not None, "factors_of has converted it"
        config, tensors = result
    one = {
        "r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "target_modules": sorted(factors), "exclude_modules": None, "layers_to_transform": None,
        "layers_pattern": None,
    }  # fmt: skip
    dtype = next((t.dtype for key, t in tensors.items() if key.endswith(".lora_A.weight")), None)
    kept = {key: t for key, t in tensors.items() if not key.endswith((".lora_A.weight", ".lora_B.weight"))}
    for path, (a, b) in factors.items():
        kept[f"{PREFIX}{path}.lora_A.weight"] = a.to(dtype).contiguous()
        kept[f"{PREFIX}{path}.lora_B.weight"] = b.to(dtype).contiguous()
    return {**config, **one}, kept
