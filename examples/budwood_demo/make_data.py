"""Generates the demo's two tasks from data/sections: name the section of a description, and describe a section.

Run it from a checkout: python -m budwood_demo.make_data
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

DATA = Path(__file__).parent / "data"


def name_section(row: dict[str, str]) -> dict[str, str]:
    """Return a row with the description as prompt and its section as completion."""
    return {"prompt": f"{row['text']}\nSection:", "completion": f" {row['label']}"}


def describe_section(row: dict[str, str]) -> dict[str, str]:
    """Return a row with the section as prompt and the description of one of its packages as completion."""
    return {"prompt": f"A package of the section {row['label']}:", "completion": f" {row['text']}"}


def convert(task: str, make: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Write data/TASK/train.jsonl and eval.jsonl, row by row from data/sections."""
    (DATA / task).mkdir(exist_ok=True)
    for part in ("train", "eval"):
        rows = (DATA / "sections" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        lines = [json.dumps(make(json.loads(row)), ensure_ascii=False) for row in rows]
        (DATA / task / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    convert("name", name_section)
    convert("describe", describe_section)
