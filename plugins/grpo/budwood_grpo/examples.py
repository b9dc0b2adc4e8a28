"""Samples as examples and as records of samples.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from budwood import Column, Example, Sample, complete_file

SAMPLES = "samples.jsonl"


def to_example(sample: Sample, key: str, row: int, columns: Mapping[str, np.ndarray] | None = None) -> Example:
    """Return a sample as an example whose labels are the sampled tokens; `columns` [L] are per label."""
    given = {name: Column(np.asarray(values, dtype=np.float32), "label") for name, values in (columns or {}).items()}
    ids = np.array([*sample.prompt, *sample.tokens], dtype=np.int32)
    positions = np.arange(len(sample.prompt) - 1, len(ids) - 1)
    return Example(
        {"input_ids": ids}, positions, ids[positions + 1], np.ones(len(positions), dtype=np.float32), key=key, row=row,
        columns=given,
    )  # fmt: skip


@dataclass
class SampleFile:
    """The file samples.jsonl of a run's folder; what a killed run wrote after its checkpoint is written again.

    Attributes:
        continued: whether the file was cut to the step at which this process began.
    """

    continued: bool = False

    def write(self, directory: Path, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Append the records of a set, after removing those of `step` and later ones if this is the first call."""
        path = directory / SAMPLES
        if not self.continued:
            kept = [line for line in _lines(path) if json.loads(line)["step"] < step]
            complete_file(path, "".join(f"{line}\n" for line in kept).encode())
            self.continued = True
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with path.open("ab") as file:
            file.write(text.encode())


def _lines(path: Path) -> list[str]:
    """Return the complete lines of the file."""
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return lines
