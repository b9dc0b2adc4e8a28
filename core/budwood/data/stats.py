"""Counts of a data file's rows, and of the examples made from them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DataStats:
    """Counts of a file's rows and of the examples made from them.

    Attributes:
        rows: number of rows in the file.
        examples: number of examples.
        dropped: number of dropped rows by reason; `first_dropped` has the location of the first row for each reason.
        skipped: number of bad rows that were skipped, by reason; `first_skipped` as `first_dropped`.
        truncated: number of examples truncated to `max_length`, which lost `tokens_cut` tokens in total.
        tokens: sum of the examples' lengths, as the task counts them.
        supervised: number of labels that have a loss (0 if the labels are classes, one per example).
        shortest, mean, longest, percentiles: lengths of examples; percentiles have the keys "50", "90", "99".
        weights: smallest and largest weight of a label.
        classes: number of examples in each class, in the order of the labels.
        remarks: number of occurrences of each further remark to the user.
    """

    rows: int = 0
    examples: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    first_skipped: dict[str, str] = field(default_factory=dict)
    truncated: int = 0
    tokens_cut: int = 0
    tokens: int = 0
    supervised: int = 0
    shortest: int = 0
    mean: float = 0.0
    longest: int = 0
    percentiles: dict[str, float] = field(default_factory=dict)
    classes: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=lambda: [1.0, 1.0])
    remarks: dict[str, int] = field(default_factory=dict)

    @property
    def supervised_share(self) -> float:
        """Fraction of the tokens that have a loss."""
        return self.supervised / self.tokens if self.tokens else 0.0
