"""Finds what is wrong with a recipe from files alone, all of it together.

Imports no torch, so that `budwood plan` and `budwood check` answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from budwood.contract.discovery import find
from budwood.contract.loading import build_strategy, load_strategy
from budwood.contract.registry import Composition
from budwood.contract.strategy import Strategy
from budwood.errors import BudwoodError, InputError
from budwood.model.checks import check_base
from budwood.model.quiet import hide_hub_kernels
from budwood.recipe.continued import continued_options
from budwood.recipe.device import check_device, stated_kind
from budwood.recipe.file import UNKNOWN
from budwood.recipe.schema import Recipe, read_recipe
from budwood.recipe.sections import Choice
from budwood.training.preflight import NOTHING_TRAINS, check_data
from budwood.untrusted.redaction import redact_values

DECLARED = ("slots", "provides", "requires", "conflicts", "before", "after")


@dataclass(frozen=True)
class Part:
    """A strategy in the recipe: its distribution, declarations and options (as written, if they are invalid)."""

    name: str
    distribution: str
    version: str
    api: int
    declared: dict[str, list[str]]
    options: dict[str, Any]
    sound: bool


@dataclass
class Problems:
    """The problems of a plan, without duplicates, and their exit codes."""

    texts: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    def add(self, error: BudwoodError) -> None:
        for text in error.problems if isinstance(error, InputError) else (str(error),):
            if text not in self.texts and not any(known.endswith(f": {text}") for known in self.texts):
                self.texts.append(text)
                self.codes.append(error.exit_code)

    def attempt(self, function: Callable[[], Any]) -> Any:
        """Return the function's result; if it fails, record the error and return None."""
        try:
            return function()
        except BudwoodError as error:
            self.add(error)
            return None

    @property
    def exit_code(self) -> int:
        """0 without problems, that of an `InputError` if one is among them, else the highest."""
        return InputError.exit_code if InputError.exit_code in self.codes else max(self.codes, default=0)


@dataclass
class Early:
    """What is known of a recipe without torch."""

    recipe: Recipe | None
    parts: list[Part] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values with the keys of a plan's."""
        values = {
            "recipe": self.recipe.to_dict() if self.recipe else None,
            "steps": self.recipe.train.steps if self.recipe else None,
            "strategies": [vars(part) for part in self.parts], "hooks": [], "notes": [],
            "problems": self.problems.texts,
        }  # fmt: skip
        return redact_values(values)


def look(
    path: Path, overrides: Sequence[str] = (), without_data: bool = False, rows: bool = True, kind: str | None = None
) -> Early:  # fmt: skip
    """Read a recipe, build its strategies, and check its data's rows and its base, as far as files tell.

    Args:
        without_data: the data's files need not exist and are not read.
        rows: read rows of data.
        kind: cpu or cuda, if that is planned for; None: the recipe's device.

    Raises:
        InputError: the file is not a recipe.
    """
    hide_hub_kernels()  # before a plugin imports peft and thereby bitsandbytes, which would download them
    early = Early(None)
    problems = early.problems
    early.recipe = recipe = read(path, problems, overrides, without_data)
    if recipe is None:
        return early
    strategies, early.parts, _ = compose(recipe, problems)
    if recipe.base.model != UNKNOWN:
        problems.attempt(lambda: check_base(recipe.base.model, recipe.base.quantization, recipe.base.trust_remote_code))
    problems.attempt(lambda: check_device(recipe, kind or stated_kind(recipe.base.device)))
    if rows and not without_data and not problems.texts:
        problems.attempt(lambda: check_data(recipe, strategies))
    return early


def read(path: str | Path, problems: Problems, overrides: Sequence[str], without_data: bool) -> Recipe | None:
    """Read a recipe as far as possible; see `read_recipe`."""
    recipe, texts = read_recipe(path, overrides, without_data)
    problems.texts += texts
    problems.codes += [InputError.exit_code] * len(texts)
    return recipe


def compose(recipe: Recipe, problems: Problems) -> tuple[list[Strategy], list[Part], Composition]:
    """Build a recipe's strategies, in its order, and their composition."""
    strategies, parts = _build(recipe, problems)
    complete = UNKNOWN not in (part.version for part in parts)
    conflicts: list[str] = []
    hooks = Composition(strategies, conflicts, complete=complete)
    for text in conflicts:
        problems.add(InputError(text))
    if complete and not hooks.implements("trainable_parameters"):
        problems.add(InputError(NOTHING_TRAINS))
    return strategies, parts, hooks


def _build(recipe: Recipe, problems: Problems) -> tuple[list[Strategy], list[Part]]:
    """Build the strategies in the recipe's order; an invalid one still contributes its declarations and hooks."""
    strategies, parts = [], []
    for index, choice in enumerate(recipe.strategies):

        def where(*place: str | int, name: str = choice.name) -> str:
            return recipe.where("strategies", name, *place)

        sound = False
        try:
            strategy = build_strategy(choice.name, continued_options(recipe, choice), where)
            sound = True
        except BudwoodError as error:
            if choice.name != UNKNOWN:
                problems.add(error)
            strategy = _placeholder(choice, index)
        known = type(strategy) is not Strategy
        owner = find(choice.name) if known else None
        strategies.append(strategy)
        parts.append(
            Part(
                name=choice.name,
                distribution=owner.distribution if owner else UNKNOWN,
                version=owner.version if owner else UNKNOWN,
                api=strategy.api,
                declared={key: list(getattr(strategy, key)) for key in DECLARED},
                options=redact_values(strategy.options.model_dump(mode="json") if sound else choice.options),
                sound=sound,
            )
        )
    return strategies, parts


def _placeholder(choice: Choice, index: int) -> Strategy:
    """Return a strategy without calling `__init__`, or a bare one if its class cannot be loaded."""
    try:
        cls, entry = load_strategy(choice.name)
    except BudwoodError:
        return Strategy(name=choice.name if choice.name != UNKNOWN else f"{UNKNOWN}{index}")
    strategy = cls.__new__(cls)
    strategy.name, strategy.distribution, strategy.options = choice.name, entry.owner, None
    return strategy
