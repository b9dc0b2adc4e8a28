"""`python -m benchmarks.plan --cards`: plans of Llama 3's sizes for six cards, beside what other projects document.

No weights, data or GPU are needed. Writes docs/benchmarks/plan-cards.json and the tables in docs/planning.md.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.plan import DOCS, SHAPES, describe_base, replace_between
from budwood.model.ops import tiles
from budwood.planning.devices import find_device
from budwood.planning.estimate import Estimate, estimate, gib
from budwood.recipe.schema import Recipe

CARDS = ("RTX 4060 8G", "RTX 3060 12G", "RTX 4060 Ti 16G", "RTX 4090 24G", "L40S 48G", "A100 80G")
TOKENS = 2048
SHORT, LONG = (2048, 8192), (12288, 65536, 131072)
"""Lengths that are planned: MLPs compute longer ones in tiles. The place of the peak, and so the bytes a token, changes
between them."""
SMALL = (64, 512, 2048)
"""Lengths that are planned for a card that does not hold those."""
MARKS = ("<!-- cards -->\n", "<!-- end of cards -->\n")

UNSLOTH = "https://unsloth.ai/docs/basics/unsloth-benchmarks"
CLAIMS = {  # tokens of the longest example by gigabytes: Unsloth, and Hugging Face with FA2, as Unsloth measured it
    "8B": {8: (2972, 0), 12: (21848, 932), 16: (40724, 2551), 24: (78475, 5789), 48: (191728, 15502),
           80: (342733, 28454)},
    "70B": {48: (12106, 0), 80: (89389, 6916)},
}  # fmt: skip
"""From Unsloth's page: QLoRA of rank 32 on all linears, batches of one example, padded to the length."""
TORCHTUNE = {
    "peak_gib": 7.4,
    "tokens_per_second": 2413,
    "card": "RTX 4090 24G",
    "page": "https://github.com/pytorch/torchtune",
}
"""From the README: Llama 3.1 8B, QLoRA, two rows of 2,048 packed tokens, compiled. Its configuration has rank 8."""


def plan_cards() -> None:
    """Plan both sizes, print the tables, and write them."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("8B", "70B"):
            describe_base(Path(folder) / name, SHAPES[name], length=1 << 20)

        def plan(name: str, card: str, tokens: int, length: int, rank: int, offloads: bool = False) -> Estimate:
            recipe = Recipe.from_dict(
                {
                    "base": {"model": str(Path(folder) / name), "quantization": "nf4"},
                    "data": {"train": "none.jsonl", "eval": "none", "max_length": length},
                    "strategies": [{"lora": {"rank": rank}}],
                    "train": {
                        "steps": 100, "batch_tokens": tokens, "gradient_checkpointing": True,
                        "activation_offloading": offloads,
                    },
                    "output": str(Path(folder) / "run"),
                }
            )  # fmt: skip
            return estimate(recipe, find_device(card), tokens)

        plans = [_row(name, plan(name, card, TOKENS, 1024, 16)) for name in ("8B", "70B") for card in CARDS]
        longest = {name: _longest(name, plan) for name in CLAIMS}
        alike = _row("8B", plan("8B", TORCHTUNE["card"], 4096, 2048, 8))  # type: ignore[arg-type]
    record = {"tokens": TOKENS, "plans": plans, "longest": longest, "as_torchtune": alike, "torchtune": TORCHTUNE}
    (DOCS / "benchmarks" / "plan-cards.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    text = tables(record)
    replace_between(DOCS / "planning.md", MARKS, text)
    print(text)


def _row(name: str, plan: Estimate) -> dict[str, Any]:
    assert plan.training is not None and plan.steps
    rates = [plan.tokens * plan.steps / seconds for seconds in reversed(plan.training)]
    return {
        "base": name, "card": plan.device.name, "memory": plan.device.memory, "peak": plan.peak, "parts": plan.parts,
        "where": plan.where, "fits": plan.fits, "tokens_per_second": rates, "seconds": round(plan.planned_in, 1),
    }  # fmt: skip


def _longest(name: str, plan: Callable[..., Estimate]) -> list[dict[str, Any]]:
    """Return the longest example that fits each card, with the inputs of layers on the device and on the host."""
    lengths: list[Callable[[int], int]] = []
    for offloads in (False, True):
        points = {tokens: plan(name, "A100 80G", tokens, tokens, 32, offloads).peak for tokens in (*SHORT, *LONG)}
        lengths.append(partial(_length, points))
        if name == "8B" and offloads:
            _check_line(points, plan)
    rows = []
    for size, (unsloth, hugging) in CLAIMS[name].items():
        card = find_device(next(card for card in CARDS if card.endswith(f" {size}G")))
        tokens, offloaded = (
            length(card.memory) or _length({t: plan(name, card.name, t, t, 32, moved).peak for t in SMALL}, card.memory)
            for moved, length in zip((False, True), lengths, strict=True)
        )  # the head's chunks of a small card are smaller than those of the A100
        rows.append(
            {
                "card": card.name, "tokens": tokens, "offloaded": offloaded, "unsloth": unsloth,
                "hugging_face_fa2": hugging,
            }
        )  # fmt: skip
    return rows


def _length(points: dict[int, int], memory: int) -> int:
    """Return the longest example whose peak fits, on lines through the points; 0: not even the shortest fits.

    A peak is the greatest of several lines, so one through two points is above it between them.
    """
    short = [length for length in points if length <= SHORT[-1]]
    for low, high in reversed([*pairwise(short), *pairwise(length for length in LONG if length in points)]):
        each = (points[high] - points[low]) / (high - low)
        tokens = int(low + (memory - points[low]) / each) // 64 * 64
        if tokens >= low and (low != LONG[0] or tokens > tiles.FROM):
            return min(tokens, tiles.FROM if high == SHORT[-1] else high) if high in short else tokens
    return 0


def _check_line(points: dict[int, int], plan: Callable[..., Estimate]) -> None:
    """Plan the longest example of one card, whose peak must be its memory."""
    card = find_device("RTX 4090 24G")
    tokens = _length(points, card.memory)
    peak = plan("8B", card.name, tokens, tokens, 32, True).peak
    if abs(peak / card.memory - 1) > 0.005:
        raise AssertionError(f"the peak at {tokens:,} tokens is {peak:,} of {card.memory:,}")


def tables(record: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    lines = [
        f"| base | card | memory | peak at {record['tokens']:,} tokens | fits | tokens/s | planned in |",
        "|---|---|--:|--:|---|--:|--:|",
    ]
    for row in record["plans"]:
        low, high = row["tokens_per_second"]
        speed = f"yes | {low:,.0f} to {high:,.0f}" if row["fits"] else "no | –"
        lines.append(
            f"| {row['base']} | {row['card']} | {gib(row['memory'])} | {gib(row['peak'])} | {speed} | "
            f"{row['seconds']:.0f} s |"
        )
    lines += [
        "",
        "| base | card | longest example, planned here | with activation_offloading | Unsloth's page | Hugging Face + "
        "FA2, on the same page |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name, rows in record["longest"].items():
        for row in rows:
            other = f"{row['hugging_face_fa2']:,}" if row["hugging_face_fa2"] else "out of memory"
            mine, moved = (f"{row[key]:,}" if row[key] else "does not fit" for key in ("tokens", "offloaded"))
            lines.append(f"| {name} | {row['card']} | {mine} | {moved} | {row['unsloth']:,} | {other} |")
    alike, theirs = record["as_torchtune"], record["torchtune"]
    low, high = alike["tokens_per_second"]
    lines += [
        "",
        "| 8B, rank 8, two rows of 2,048 tokens, RTX 4090 | peak | tokens/s |",
        "|---|--:|--:|",
        f"| planned here | {gib(alike['peak'])} | {low:,.0f} to {high:,.0f} |",
        f"| torchtune's README | {theirs['peak_gib']} GiB | {theirs['tokens_per_second']:,} |",
    ]
    return "\n" + "\n".join(lines) + "\n"
