"""Examples and batches: the inputs of the model, and the labels that its outputs are scored on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn, Self

import numpy as np
import torch
from torch import Tensor

Key = int | str
Axis = Literal["example", "input", "label"]
DESIRABLE = "desirable"
"""Column of preference data, per example: 1 for an answer to imitate, 0 for one that the task's own loss leaves out."""


class RemovedError(AttributeError):
    """A plugin uses a name that the contract no longer has; the message names the line and the replacement."""


class _Removed:
    """An attribute of version 1 of the contract: using it raises an error that names the replacement."""

    def __init__(self, name: str, use: str) -> None:
        self.name, self.use = name, use

    def __get__(self, instance: object, owner: type) -> NoReturn:
        self.refuse(owner)

    def __set__(self, instance: object, value: object) -> NoReturn:
        self.refuse(type(instance))

    def refuse(self, owner: type) -> NoReturn:
        frame: Any = sys._getframe(2)
        while frame.f_back is not None and frame.f_globals.get("__name__") == "dataclasses":  # skips `replace`
            frame = frame.f_back
        line = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        attribute = f"{owner.__name__}.{self.name}"
        raise RemovedError(f"{line}: {attribute} was removed in version 2 of the contract; use {self.use}")


class _RefusesRemoved:
    """Base of a class that refuses its attributes of version 1 by name, in its constructor too."""

    def __new__(cls, *_: Any, **named: Any) -> Self:
        for name in named:
            attribute = vars(cls).get(name)
            if isinstance(attribute, _Removed):
                attribute.refuse(cls)
        return super().__new__(cls)


@dataclass(frozen=True)
class Column:
    """Values that a strategy adds to an example.

    Attributes:
        values: [] for the axis "example", [T, …] for "input", [L, …] for "label".
        axis: whether the values are per example, per input position or per label.
    """

    values: np.ndarray
    axis: Axis = "example"

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", np.asarray(self.values))


@dataclass
class Example(_RefusesRemoved):
    """One training example.

    Attributes:
        inputs: model inputs by name: `input_ids` [T] int32, `pixel_values` [C, H, W], …
        label_positions: [L] int64, the output positions to score; empty for a prompt.
        labels: [L, …]: token ids, classes, or real values.
        weights: [L] float32, above 0: the weight of each label in loss, counts and metrics.
        group: adjacent examples with the same number form an ordered group, such as a pair; None: a group of one.
        key: stable identity, used for random numbers and caches; the row number if each row is one example.
        row: index of its row in the data file, for messages.
        columns: values that strategies add in `prepare_examples`.
    """

    inputs: dict[str, np.ndarray]
    label_positions: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    group: int | None = None
    key: Key = 0
    row: int = 0
    columns: dict[str, Column] = field(default_factory=dict)

    def without_labels(self) -> Self:
        """Return the example with nothing to score: a pass of it has no loss."""
        columns = {
            name: replace(column, values=column.values[:0]) if column.axis == "label" else column
            for name, column in self.columns.items()
        }
        return replace(
            self, label_positions=self.label_positions[:0], labels=self.labels[:0], weights=self.weights[:0],
            columns=columns,
        )  # fmt: skip

    def __len__(self) -> NoReturn:
        _Removed("__len__", "run.task.length(example)").refuse(type(self))

    def __bool__(self) -> bool:
        return True


_REMOVED_FROM_EXAMPLE = {
    "id": "example.key (identity) or example.row (messages)",
    "input_ids": 'example.inputs["input_ids"]',
    "supervised": "example.label_positions",
    "label": "example.labels",
    "prompt_length": "run.task.probe(example)",
}


@dataclass
class Batch(_RefusesRemoved):
    """One micro-batch: several examples packed into one row (rows = 1), or one example per row, padded on the right.

    A packed row, too, may have padding at its end, which belongs to no segment.

    Attributes:
        inputs: model inputs by name; for text `input_ids` [rows, width] int64, `position_ids`, which restart at 0 for
            each example, and `attention_mask` (bool) if rows are padded.
        label_positions: [L] int64 index into the outputs, flattened to [rows · width].
        labels: [L, …]: token ids, classes, or real values.
        weights: [L] float32, the weight of each label.
        example_of_label: [L] int64 index into `keys`.
        example_of_position: [rows · width] int64 index into `keys`; -1 on padding.
        keys: identity of each example, in order.
        lengths: size of each example as counted by the task (tokens for text), on the host.
        groups: (start, stop) range of each group's examples, on the host.
        rows, width: layout of the outputs.
        segments: boundaries of the examples in a packed row, (0, …, number of tokens), on the host; () if each example
            is a row.
        source_rows: row of each example in the data file, for messages.
        columns: tensors that strategies add, shaped according to their axis: [examples], [rows, width, …] or [L, …].
        total_weight: sum of `weights` in float64, on the host.
    """

    inputs: dict[str, Tensor]
    label_positions: Tensor
    labels: Tensor
    weights: Tensor
    example_of_label: Tensor
    example_of_position: Tensor
    keys: tuple[Key, ...]
    lengths: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    rows: int
    width: int
    segments: tuple[int, ...] = ()
    source_rows: tuple[int, ...] = ()
    columns: dict[str, Tensor] = field(default_factory=dict)
    total_weight: float = -1.0

    def __post_init__(self) -> None:
        if self.total_weight < 0:
            self.total_weight = float(self.weights.sum(dtype=torch.float64))

    @property
    def counts(self) -> dict[str, float]:
        """The batch's amount of each unit: "label" (the sum of weights), "example", "group", "token"."""
        return {
            "label": self.total_weight,
            "example": float(len(self.keys)),
            "group": float(len(self.groups)),
            "token": float(sum(self.lengths)),
        }

    @property
    def task_weights(self) -> Tensor:
        """[L] float32, the weights of the labels in the task's own loss: 0 in answers that are not desirable."""
        desirable = self.columns.get(DESIRABLE)
        return self.weights if desirable is None else self.weights * desirable[self.example_of_label]

    @property
    def group_of_example(self) -> Tensor:
        """[examples] int64 index into `groups`, on the CPU."""
        return torch.repeat_interleave(torch.tensor([stop - start for start, stop in self.groups]))

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every tensor on `device`."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Return the batch in pinned memory, from which a GPU copies it while the host goes on."""
        return self._with_each(lambda tensor: tensor.pin_memory())

    def _with_each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with `function` of each tensor."""

        def change(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: function(item) for name, item in value.items()}
            return function(value) if isinstance(value, Tensor) else value

        return replace(self, **{name: change(value) for name, value in vars(self).items()})


_REMOVED_FROM_BATCH = {
    "input_ids": 'batch.inputs["input_ids"], or batch.rows and batch.width for its shape',
    "position_ids": 'batch.inputs["position_ids"]',
    "attention_mask": 'batch.inputs.get("attention_mask")',
    "example_of_token": "batch.example_of_position",
    "example_ids": "batch.keys",
    "num_tokens": "sum(batch.lengths)",
}
for _class, _names in ((Example, _REMOVED_FROM_EXAMPLE), (Batch, _REMOVED_FROM_BATCH)):
    for _name, _use in _names.items():
        setattr(_class, _name, _Removed(_name, _use))
