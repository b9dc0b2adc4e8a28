"""The recipe: everything that determines a run. Each default is what a practitioner would choose."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from budwood.contract.discovery import STRATEGIES, find
from budwood.contract.loading import build_strategy
from budwood.contract.registry import Composition
from budwood.contract.strategy import Strategy
from budwood.contract.validation import Location, dotted, find_problems, sentence
from budwood.data.files import exists
from budwood.errors import InputError
from budwood.model.checkpoint import folder_with_revision
from budwood.model.checks import stored_quantization
from budwood.recipe.continued import continued_options
from budwood.recipe.file import (
    UNKNOWN,
    SourceMap,
    apply_overrides,
    dump,
    find_masked,
    normalise_strategies,
    read_recipe_file,
)
from budwood.recipe.sections import BaseSection, Choice, DataSection, File, Section, TrainSection
from budwood.untrusted.redaction import redact_url, redact_values, remember

QUANTIZERS = "budwood.quantizers"
TASKS = "budwood.tasks"
MICRO_TOKENS = 2048
"""Tokens per micro-batch if nothing is known of the device; a CPU is hardly faster with more."""


class Recipe(Section):
    """A recipe; create one with `load_recipe`, `Recipe.from_dict` or `default_recipe`."""

    base: BaseSection = Field(description="the frozen base model")
    adapter: File | None = Field(
        None,
        description="folder of an adapter that the run continues, such as one trained with another objective: training "
        "starts from its tensors, and objectives compare with it. Options that determine its shape, such as rank and "
        "targets, default to the adapter's; it must have been trained on this base. Of that of another task, such as "
        "masked-lm, what lies below the head goes on",
    )
    data: DataSection = Field(description="training and evaluation data")
    strategies: Annotated[list[Choice], Field(min_length=1)] = Field(
        description="the strategies to compose, such as `- lora: {rank: 8}`; names or one-key mappings"
    )
    train: TrainSection = Field(TrainSection(), description="length of the run, batch sizes, optimizer")
    output: File = Field(description="folder of the run; by default runs/ plus the recipe's name")

    _source_map: SourceMap = PrivateAttr(default_factory=lambda: SourceMap("recipe"))
    _source: Path | None = PrivateAttr(None)
    _allows_code: bool = PrivateAttr(False)

    @model_validator(mode="after")
    def _check_consistency(self) -> Recipe:
        train, data = self.train, self.data
        for name in ("eval_every", "patience"):
            if getattr(train, name) is not None and data.eval == "none":
                raise ValueError(f"train.{name}: needs data.eval; set it to a held-out file, or leave it out")
        if data.group_by is not None and not data.holds_out:
            raise ValueError("data.group_by: decides what is held out, so it needs a recipe without data.eval")
        return self

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
        """Build a recipe from plain values with the structure of a recipe file.

        Raises:
            InputError: see `load_recipe`; the existence of files is not checked.
        """
        recipe, problems = _validate(copy.deepcopy(dict(data)), SourceMap("recipe"), None, overrides)
        return _checked(recipe, problems)

    @property
    def source(self) -> Path | None:
        """The file that the recipe was loaded from, if any."""
        return self._source

    @property
    def micro_tokens(self) -> int:
        """The maximum tokens per micro-batch: the recipe's, or a usual size if it leaves the choice to the plan."""
        return self.train.micro_tokens or max(MICRO_TOKENS, self.data.max_length or 0)

    @property
    def allows_code(self) -> bool:
        """Whether the user allows Python files that the recipe names; a recipe itself cannot."""
        return self._allows_code

    def allowing_code(self, allowed: bool = True) -> Recipe:
        """Return the recipe with `allows_code` set, if `allowed`."""
        recipe = self.model_copy()
        recipe._allows_code = self._allows_code or allowed
        return recipe

    def where(self, *place: str | int) -> str:
        """Return the source of a field ("recipe.yaml:7", or the override that set it), or of the nearest one around it.

        Strategies are addressed by name: `where("strategies", "lora", "rank")`.
        """
        if len(place) > 1 and place[0] == "strategies" and isinstance(place[1], str):
            index = next((i for i, choice in enumerate(self.strategies) if choice.name == place[1]), None)
            place = ("strategies",) if index is None else ("strategies", index, "options", *place[2:])
        return self._source_map.nearest(place)

    def to_dict(self, strategies: Sequence[Strategy] = ()) -> dict[str, Any]:
        """Return plain values for `from_dict`; with built `strategies`, all of their options are included.

        A mask replaces each secret, and `from_dict` refuses it. Paths and the model's name are unchanged, except for
        credentials in a URL.
        """
        built = {strategy.name: strategy.options.model_dump(mode="json") for strategy in strategies}
        data = self.model_dump(mode="json", exclude_none=True)
        data["strategies"] = [{c.name: built.get(c.name, c.options)} for c in self.strategies]
        masked: dict[str, Any] = redact_values(data)
        for holder, original, field in (
            (masked["base"], data["base"], "model"), (masked["data"], data["data"], "train"),
            (masked["data"], data["data"], "eval"), (masked, data, "output"), (masked, data, "adapter"),
            (masked["data"], data["data"], "chat_template"),
        ):  # fmt: skip
            if isinstance(original.get(field), str):
                holder[field] = redact_url(original[field])
        return masked

    def with_length(self, length: int) -> Recipe:
        """Return the recipe with `data.max_length`: its own if it gives one, otherwise `length`."""
        data = self.data.model_copy(update={"max_length": self.data.max_length or length})
        return self.model_copy(update={"data": data})

    def with_train(self, train: TrainSection) -> Recipe:
        """Return the recipe with another `train` section."""
        return self.model_copy(update={"train": train})

    def to_yaml(self, strategies: Sequence[Strategy] = ()) -> str:
        """Return the recipe as YAML with every default written out; see `to_dict`."""
        return dump(self.to_dict(strategies))


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, YAML or JSON (`.json`), with `overrides` (KEY=VALUE) on top. Imports no plugin.

    Raises:
        InputError: with file and line, or the override: not UTF-8, not YAML, an unknown key, a value out of range, a
            strategy, task or quantiser that is not installed, a missing data file.
    """
    recipe, problems = read_recipe(path, overrides)
    return _checked(recipe, problems)


def read_recipe(
    path: Path | str, overrides: Sequence[str] = (), without_data: bool = False
) -> tuple[Recipe | None, list[str]]:
    """Read as much of a recipe as possible: invalid values become defaults, missing ones `UNKNOWN`.

    Args:
        without_data: the data's files need not exist.

    Returns:
        The recipe, or None if it names no strategy; and all problems, each as `load_recipe` would report it.

    Raises:
        InputError: the file is not a YAML or JSON mapping.
    """
    path = Path(path)
    data, source_map = read_recipe_file(path)
    recipe, problems = _validate(data, source_map, path, overrides)
    for field in ("chat_template",) if without_data else ("train", "eval", "chat_template"):
        file = getattr(recipe.data, "evaluated" if field == "eval" else field) if recipe is not None else None
        names = [file] if isinstance(file, Path) else [source.path for source in file or ()]
        problems += [
            f"{recipe.where('data', field)}: data.{field}: no such file: {name} (from {Path.cwd()})."
            for name in names
            if recipe is not None and name != Path(UNKNOWN) and not exists(str(name))
        ]
    if recipe is not None and recipe.base.revision and Path(os.path.expanduser(recipe.base.model)).is_dir():
        text = folder_with_revision(recipe.base.model, recipe.base.revision)
        problems.append(f"{recipe.where('base', 'revision')}: {text}")
    return recipe, problems


def default_recipe(
    train: Path | str | Sequence[Mapping[str, Any]],
    base: str,
    *,
    eval: Path | str | None = None,
    task: str = "causal-lm",
    output: Path | str | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """Return the recipe behind `budwood tune FILE --base DIR`: LoRA, with defaults for everything else.

    `train` is a path, or sources as a recipe lists them. A base that is already quantised is taken as it is.

    Raises:
        InputError: see `load_recipe`.
    """
    is_sources = not isinstance(train, str | Path)
    data: dict[str, Any] = {
        "base": {"model": base, "task": task},
        "data": {"train": train if is_sources else str(train)},
    }
    data["strategies"] = ["lora"]
    if eval is not None:
        data["data"]["eval"] = str(eval)
    if output is not None:
        data["output"] = str(output)
    if not is_sources and not exists(str(train)):
        raise InputError(f"{train}: no such file (from {Path.cwd()}).")
    if (stored := stored_quantization(base)) is not None:
        data["base"]["quantization"] = stored
    return Recipe.from_dict(data, overrides)


def build_composition(recipe: Recipe) -> Composition:
    """Import and build the recipe's strategies, in resolved order.

    Raises:
        InputError: an option is wrong (with its line), or the strategies cannot be combined.
        PluginError: a plugin is broken.
    """
    strategies = []
    for choice in recipe.strategies:

        def where(*place: str | int, name: str = choice.name) -> str:
            return recipe.where("strategies", name, *place)

        strategies.append(build_strategy(choice.name, continued_options(recipe, choice), where))
    return Composition(strategies)


def find_code(recipe: Recipe, strategies: Sequence[Strategy]) -> list[str]:
    """Return a message for each strategy that would run Python files, unless the user allows it."""
    if recipe.allows_code:
        return []
    return [
        f"{recipe.where('strategies', s.name)}: {s} would run the Python code in {', '.join(s.code_files)}: read it, "
        "and pass --allow-code if you trust it."
        for s in strategies
        if s.code_files
    ]


def check_code(recipe: Recipe, strategies: Sequence[Strategy]) -> None:
    """Refuse strategies that would run Python files unless the user allows it.

    Raises:
        InputError: see `find_code`.
    """
    if problems := find_code(recipe, strategies):
        raise InputError(problems[0], problems)


def _checked(recipe: Recipe | None, problems: Sequence[str]) -> Recipe:
    """Return the recipe if it has no problems; otherwise raise the first one, with the others attached."""
    if recipe is None or problems:
        more = f" ({len(problems) - 1} more: `budwood plan` lists them)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more, problems)
    return recipe


def _validate(
    data: dict[str, Any], source_map: SourceMap, source: Path | None, overrides: Sequence[str]
) -> tuple[Recipe | None, list[str]]:
    """See `read_recipe`; modifies `data`."""
    remember(data)
    problems = normalise_strategies(data, source_map)
    has_invalid_items = bool(problems)
    problems += apply_overrides(data, source_map, overrides, Recipe)
    remember(data)
    problems += find_masked(data, source_map)
    if data.get("output") is None:
        section = data.get("data")
        train = section.get("train") if isinstance(section, dict) else None
        data["output"] = f"runs/{source.stem if source else _stem(train)}"
    recipe: Recipe | None = None
    reset: set[Location] = set()
    suggested: set[Location] = set()
    while recipe is None:
        try:
            recipe = Recipe.model_validate(data)
        except ValidationError as error:
            for place, text in find_problems(error, Recipe):
                cross_field = place in ((), ("train",)) and text.startswith(
                    ("train.", "data.")
                )  # the message names the field
                at = tuple(text.partition(":")[0].split(".")) if cross_field else place
                reported = at == ("strategies",) and has_invalid_items
                reported = reported or at in suggested  # present, but misspelt
                caused_by_reset = cross_field and any(dotted(other) in text for other in reset | suggested)
                if not (reported or caused_by_reset):
                    problems.append(
                        f"{source_map.nearest(at)}: {'' if cross_field else dotted(at) + ': '}{sentence(text)}"
                    )
                at = tuple(takewhile(lambda part: isinstance(part, str), at))
                if at in reset or not _reset_to_default(data, at):
                    return None, problems
                reset.add(at)
                suggested.update((*at[:-1], match[1]) for match in re.finditer(r"Did you mean '(\w+)'", text))
                for match in re.finditer(r"In a recipe, this is ([\w.]+\w)\.$", text):
                    target = tuple(match[1].split("."))
                    suggested.update(target[:end] for end in range(1, len(target) + 1))
    recipe._source_map, recipe._source = source_map, source
    named: list[tuple[Location, str, str]] = [
        (("base", "quantization"), recipe.base.quantization, QUANTIZERS),
        (("base", "task"), recipe.base.task, TASKS),
        *((("strategies", i), c.name, STRATEGIES) for i, c in enumerate(recipe.strategies)),
    ]
    for place, name, group in (item for item in named if item[1] != UNKNOWN):
        try:
            find(name, group)
        except InputError as error:
            problems.append(f"{source_map.nearest(place)}: {error}")
    return recipe, problems


def _stem(train: Any) -> str:
    """Return a name for the run from its first data source."""
    first = train[0] if isinstance(train, list) and train else train
    path = first.get("path") if isinstance(first, dict) else first
    return re.sub(r"[^\w. -]+", "-", Path(str(path)).stem).strip("- ") or "data"


def _reset_to_default(data: dict[str, Any], place: Location) -> bool:
    """Reset an invalid value in `data` to its default; return whether that is possible."""
    required: dict[Location, Any] = {
        ("base",): {"model": UNKNOWN}, ("base", "model"): UNKNOWN,
        ("data",): {"train": UNKNOWN}, ("data", "train"): UNKNOWN,
    }  # fmt: skip
    if not place or place[0] == "strategies":
        return False
    holder: Any = data
    for key in place[:-1]:
        holder[key] = {} if holder.get(key) is None else holder[key]
        holder = holder[key]
    holder.pop(place[-1], None)
    if place in required:
        holder[place[-1]] = required[place]
    return True
