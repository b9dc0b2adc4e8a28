"""The space of a sweep: which fields of the recipe vary, and over which values. Imports no torch and no Optuna."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from budwood.errors import InputError
from budwood.recipe.file import parse_value, read_recipe_file
from budwood.untrusted.redaction import shorten

KEYS = ("low", "high", "log", "step", "choices")
EXAMPLE = "-s lora.rank=4,8,16 or -s train.learning_rate=1e-4..1e-2@log"


@dataclass(frozen=True)
class Field:
    """One field of the recipe and its values: `choices`, or the range from `low` to `high`, both included.

    Attributes:
        key: dotted, as for `-o`: "lora.rank".
        source: where it was given, for messages.
        log: sample the logarithm uniformly.
        step: distance between values of a range; None: 1 if `low` and `high` are integers, else any value.
    """

    key: str
    source: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether the range is one of integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def count(self) -> float:
        """Number of values; infinite for a range of real numbers."""
        if self.choices:
            return len(self.choices)
        step = self.step or (1 if self.whole else 0)
        return math.floor((self.high - self.low) / step + 1e-9) + 1 if step else math.inf

    @property
    def bounds(self) -> tuple[Any, ...]:
        """The values that a check tries: all choices, or both ends of the range."""
        return self.choices or (self.low, self.high)

    def values(self) -> list[Any]:
        """Return all values of a finite field, in order."""
        return list(self.choices) or [self.low + i * (self.step or 1) for i in range(int(self.count))]

    def override(self, value: Any) -> str:
        """Return the recipe's override that sets a value."""
        return f"{self.key}={json.dumps(value, ensure_ascii=False)}"

    def record(self) -> dict[str, Any]:
        """Return the field as plain values, with which a sweep is compared when it is resumed."""
        if self.choices:
            return {"choices": list(self.choices)}
        return {"low": self.low, "high": self.high, "log": self.log, "step": self.step}


def read_space(options: Sequence[str], file: Path | None) -> list[Field]:
    """Read the fields of `-s KEY=VALUES` and of a YAML file of `KEY: VALUES`.

    VALUES is a list, LOW..HIGH, LOW..HIGH@log or LOW..HIGH@step=STEP; in a file also {low, high, log, step}.

    Raises:
        InputError: no field, one given twice, or values that are none; the message has the option or the file's line.
    """
    fields = []
    if file is not None and not file.is_file():
        raise InputError(f"--space {file}: no such file.")
    if file is not None:
        values, source_map = read_recipe_file(file)
        fields += [_field(str(key), value, source_map.nearest((key,))) for key, value in values.items()]
    for option in options:
        source = f"-s {shorten(option)}"
        key, equals, text = option.partition("=")
        if not equals or not key.strip() or not text.strip():
            raise InputError(f"{source}: write KEY=VALUES, as in {EXAMPLE}.")
        is_range = ".." in text and not any(mark in text for mark in ",/[")
        value = text.strip() if is_range else _choices(text, source)
        fields.append(_field(key.strip(), value, source))
    if not fields:
        raise InputError(f"the space is empty: give the fields to vary, as in {EXAMPLE}, or --space FILE.")
    seen: dict[str, Field] = {}
    for field in fields:
        if field.key in seen:
            raise InputError(f"{field.source}: {field.key} is already in the space ({seen[field.key].source}).")
        seen[field.key] = field
    return fields


def _choices(text: str, source: str) -> Any:
    return parse_value(text if text.lstrip().startswith("[") else f"[{text}]", source)


def _field(key: str, value: Any, source: str) -> Field:
    where = f"{source}: {key}"
    if isinstance(value, str) and ".." in value:
        return _range(key, *_parts(value, where), source)
    if isinstance(value, dict):
        if "choices" in value and len(value) == 1:
            return _field(key, value["choices"], source)
        unknown = [name for name in value if name not in KEYS[:4]]
        if unknown or not {"low", "high"} <= set(value):
            raise InputError(
                f"{where}: write a list, LOW..HIGH, or {{low, high, log, step}}; write a field below a section "
                "with dots, as in lora.rank."
            )
        return _range(key, value["low"], value["high"], value.get("log", False), value.get("step"), source)
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: must be a list of values or a range, as in {EXAMPLE}.")
    texts = [json.dumps(item) for item in value]
    repeated = next((text for text in texts if texts.count(text) > 1), None)
    if repeated is not None:
        raise InputError(f"{where}: {repeated} is given twice.")
    return Field(key, source, choices=tuple(value))


def _parts(text: str, where: str) -> tuple[Any, Any, bool, Any]:
    limits, _, option = text.partition("@")
    low, _, high = limits.partition("..")
    option = option.strip()
    if option not in ("", "log") and not option.startswith("step="):
        raise InputError(f"{where}: '@{option}' is neither @log nor @step=NUMBER.")
    step = parse_value(option.removeprefix("step="), where) if option.startswith("step=") else None
    return parse_value(low, where), parse_value(high, where), option == "log", step


def _range(key: str, low: Any, high: Any, log: Any, step: Any, source: str) -> Field:
    where = f"{source}: {key}"
    for value in (low, high, *(() if step is None else (step,))):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{where}: {value!r} is not a number; a range is LOW..HIGH, as in 1e-4..1e-2.")
    if not isinstance(log, bool):
        raise InputError(f"{where}: log must be true or false.")
    if low >= high:
        raise InputError(f"{where}: the range is empty: {low:g} is not less than {high:g}; write LOW..HIGH.")
    if log and low <= 0:
        raise InputError(f"{where}: a logarithmic range must begin above 0, not at {low:g}.")
    if step is not None and (log or step <= 0 or step > high - low):
        raise InputError(f"{where}: a step must be above 0, at most {high - low:g}, and without log.")
    if isinstance(step, float) and not step.is_integer():
        low, high = float(low), float(high)
    if isinstance(low, float) or isinstance(high, float):
        low, high = float(low), float(high)
    return Field(key, source, low=low, high=high, log=log, step=step)


def check_space(
    fields: Sequence[Field], check: Callable[[Sequence[str]], Any], overrides: Sequence[str]
) -> list[Field]:
    """Check that the recipe takes every choice and both ends of every range, alone and together.

    Args:
        check: raises an InputError if the recipe with these overrides is wrong.
        overrides: those of the command line, which come first.

    Returns:
        The fields; a range of integers of a field that takes fractions, such as dropout=0..1, is one of real numbers.

    Raises:
        InputError: a field that does not exist (the nearest is suggested), a value out of range, or a field that the
            sweep or the command line sets.
    """
    given = {override.partition("=")[0].strip() for override in overrides}
    result = []
    for field in fields:
        if field.key == "output":
            raise InputError(f"{field.source}: output: the sweep gives every trial a folder of its own.")
        if field.key in given:
            raise InputError(f"{field.source}: {field.key} is also set with -o, which would have no effect.")

        def attempt(value: Any, field: Field = field) -> None:
            override = field.override(value)
            try:
                check([*overrides, override])
            except InputError as error:
                text = str(error).replace(f"-o {shorten(override)}", field.source)
                raise InputError(text if field.source in text else f"{field.source}: {text}") from None

        for value in field.bounds:
            attempt(value)
        if not field.choices and field.whole and field.step is None:
            try:
                attempt(field.low + 0.5)
                attempt(field.high - 0.5)
                field = replace(field, low=float(field.low), high=float(field.high))
            except InputError:
                pass
        result.append(field)
    together = [field.override(field.bounds[0]) for field in result]
    try:
        check([*overrides, *together])
    except InputError as error:
        text = str(error)
        for override, field in zip(together, result, strict=True):
            text = text.replace(f"-o {shorten(override)}", field.source)
        raise InputError(text) from None
    return result
