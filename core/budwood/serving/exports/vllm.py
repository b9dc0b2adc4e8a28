"""An adapter for vLLM: what its LoRA loader reads, and what it passes over in silence, as of its sources of 2026.

`vllm/lora/peft_helper.py` takes r, lora_alpha and use_rslora from the config and one scale from them for all modules;
rank_pattern and alpha_pattern are ignored. `vllm/config/lora.py` lists the ranks; `vllm/lora/utils.py` the names of
tensors.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from budwood.adapters.store import SavedAdapter
from budwood.errors import InputError
from budwood.serving.exports.factors import Factors, largest_rank, padded

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's --max-lora-rank."""


def check_limit(limit: int | None) -> None:
    """Refuse a --max-lora-rank that vLLM does not have.

    Raises:
        InputError: it is none of `RANKS`.
    """
    if limit is not None and limit not in RANKS:
        raise InputError(f"--max-lora-rank {limit}: vLLM knows {', '.join(map(str, RANKS))}.")


def fitted(saved: SavedAdapter, factors: Factors, limit: int | None) -> Factors:
    """Return the updates padded to the smallest rank that vLLM knows.

    Raises:
        InputError: their rank is larger than `limit`, or than any that vLLM knows.
    """
    rank, most = largest_rank(factors), limit or RANKS[-1]
    if rank > most:
        worst = next(path for path, (a, _) in factors.items() if len(a) == rank)
        raise InputError(
            f"{saved.directory}: '{worst}' has rank {rank}, more than --max-lora-rank {most}: "
            f"cut it with --as lora --rank {most}, or merge it: --for merged"
        )
    return padded(factors, next(known for known in RANKS if known >= rank))


def command(base: str, out: Path, rank: int, template: Path | None) -> str:
    """Return the command that serves the base with the adapter."""
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(rank)]
    words += ["--lora-modules", f"{out.name}={out.absolute()}"]
    words += ["--chat-template", str(template.absolute())] if template is not None else []
    return shlex.join(words)
