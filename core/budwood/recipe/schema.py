"""The recipe: everything that decides a run, each field with a default that a practitioner would choose."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from budwood.contract.discovery import STRATEGIES, find
from budwood.contract.loading import build_strategy
from budwood.contract.registry import Composition
from budwood.contract.strategy import Strategy
from budwood.contract.validation import Location, dotted, find_problems, sentence
from budwood.errors import InputError
from budwood.model.checkpoint import folder_with_revision
from budwood.recipe.file import (
    UNKNOWN,
    Places,
    apply_overrides,
    dump,
    find_masked,
    normalise_strategies,
    read_recipe_file,
)
from budwood.untrusted.redaction import redact_url, redact_values, remember

QUANTIZERS = "budwood.quantizers"
TASKS = "budwood.tasks"


def _path(value: Any) -> Any:
    if not isinstance(value, str) or not value:
        return value
    if "\0" in value or len(value) > 4096:
        raise ValueError("no path is called so")
    return Path(os.path.expanduser(value))


Count = Annotated[int, Field(strict=True, gt=0)]
Number = Annotated[float, Field(strict=True)]
File = Annotated[Path, BeforeValidator(_path, json_schema_input_type=str)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, data: Any) -> Any:
        return {} if data is None else data


class BaseSection(_Section):
    """The model that stays frozen."""

    model: str = Field(min_length=1, description="a folder with safetensors, or a hub name")
    revision: str | None = Field(
        None, min_length=1, max_length=255, description="branch, tag or commit of a hub name; main if absent"
    )
    quantization: str = Field("nf4", description="none, int8, nf4, fp4, or another installed quantiser")
    double_quantization: bool = Field(True, description="quantise the constants of nf4 and fp4 too")
    task: str = Field("causal-lm", description="causal-lm, sequence-classification, or another installed task")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda, or one GPU such as cuda:1"
    )


class DataSection(_Section):
    """What it learns from; the form is recognised by the columns."""

    train: File = Field(description="JSONL, CSV, Parquet, or a folder of `datasets`")
    eval: File | None = Field(None, description="the same, held out; without it nothing is measured")
    max_length: Count = Field(1024, description="tokens of an example; what is cut is counted and reported")


class TrainSection(_Section):
    """How long, how much at once, how fast."""

    epochs: Count | None = Field(3, description="passes over the data; or give steps")
    steps: Count | None = Field(None, description="optimizer steps, in place of epochs")
    batch_tokens: Count | None = Field(4096, description="real tokens an optimizer step; packing decides the rows")
    batch_examples: Count | None = Field(None, description="examples an optimizer step, in place of batch_tokens")
    micro_tokens: Count = Field(
        2048, description="at most so many tokens at once: memory depends on it, the result does not"
    )
    learning_rate: Number = Field(2e-4, gt=0, description="peak learning rate")
    weight_decay: Number = Field(0.0, ge=0, description="AdamW's decoupled decay")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning rate after the warm-up")
    warmup: Number = Field(0.03, ge=0, description="below 1 a share of the run, else steps")
    clip: Number = Field(1.0, ge=0, description="largest norm of the gradient; 0: no clipping")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="compute dtype; auto: bf16 where the device is fast at it"
    )
    eval_every: Count | None = Field(None, description="steps between evaluations; without it one at the end")
    eval_generate: Annotated[int, Field(strict=True, ge=0)] = Field(
        100, description="prompts that an evaluation answers for exact match; 0: none"
    )
    patience: Count | None = Field(None, description="stop after so many evaluations without a gain")
    save_every: Count | None = Field(
        None, description="steps between checkpoints; without it one about every ten minutes"
    )
    keep_checkpoints: Count = Field(2, description="so many of the last checkpoints are kept, and the best")
    non_finite: Literal["stop", "skip"] = Field(
        "stop", description="a step whose loss or gradient is not finite ends the run, or is left out and counted"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, slower")
    deterministic: bool = Field(
        False, description="only kernels that give the same bits each time; on CUDA slower, elsewhere they are anyway"
    )
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = Field(0, description="of all randomness of the run")
    trackers: Sequence[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="also log there (budwood[track])"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_of_each_pair(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        for default, other in (("epochs", "steps"), ("batch_tokens", "batch_examples")):
            if data.get(other) is not None:
                if data.get(default) is not None:
                    raise ValueError(f"train.{other}: excludes train.{default}; give one of them")
                data = {**data, default: None}
            elif data.get(default, True) is None:
                data = {key: value for key, value in data.items() if key != default}
        return data

    @model_validator(mode="after")
    def _fits(self) -> TrainSection:
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"train.warmup: from 1 on it counts steps and must be whole (got {self.warmup})")
        if self.patience and not self.eval_every:
            raise ValueError("train.patience: counts evaluations during the run; give train.eval_every too")
        return self


class Choice(_Section):
    """A strategy that the recipe names, with its options as they were written."""

    name: str = Field(min_length=1, description="under which it is installed")
    options: dict[str, Any] = Field({}, description="its options; see `budwood plugins NAME`")


class Recipe(_Section):
    """A recipe; get one from `load_recipe`, `Recipe.from_dict` or `default_recipe`."""

    base: BaseSection = Field(description="the model that stays frozen")
    data: DataSection = Field(description="what it learns from")
    strategies: Annotated[list[Choice], Field(min_length=1)] = Field(
        description="what trains it, for instance `- lora: {rank: 8}`; names and one-key mappings"
    )
    train: TrainSection = Field(TrainSection(), description="how long, how much at once, how fast")
    output: File = Field(description="folder of the run; by default runs/ and the name of the recipe")

    _places: Places = PrivateAttr(default_factory=lambda: Places("recipe"))
    _source: Path | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _micro_batch_holds_an_example(cls, data: Any) -> Any:
        length = (data.get("data") or {}).get("max_length") if isinstance(data.get("data"), dict) else None
        train = data.get("train") or {}
        if isinstance(length, int) and isinstance(train, dict) and train.get("micro_tokens") is None:
            return {**data, "train": {**train, "micro_tokens": max(length, 2048)}}
        return data

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        train, data = self.train, self.data
        if train.micro_tokens < data.max_length:
            raise ValueError(
                f"train.micro_tokens: {train.micro_tokens} is less than data.max_length ({data.max_length}), "
                "and an example must fit; raise the one or lower the other"
            )
        for name in ("eval_every", "patience"):
            if getattr(train, name) is not None and data.eval is None:
                raise ValueError(f"train.{name}: needs data.eval; name a held-out file")
        return self

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
        """Make a recipe from plain values, as they stand in a recipe file.

        Raises:
            InputError: see `load_recipe`; files are not looked for.
        """
        recipe, problems = _examine(copy.deepcopy(dict(data)), Places("recipe"), None, overrides)
        return _sound(recipe, problems)

    @property
    def source(self) -> Path | None:
        """The file that it came from."""
        return self._source

    def where(self, *place: str | int) -> str:
        """Return the line of a field ("recipe.yaml:7") or the override that set it; the nearest one around it.

        A strategy stands under its name: `where("strategies", "lora", "rank")`.
        """
        if len(place) > 1 and place[0] == "strategies" and isinstance(place[1], str):
            index = next((i for i, choice in enumerate(self.strategies) if choice.name == place[1]), None)
            place = ("strategies",) if index is None else ("strategies", index, "options", *place[2:])
        return self._places.nearest(place)

    def to_dict(self, strategies: Sequence[Strategy] = ()) -> dict[str, Any]:
        """Return plain values that `from_dict` reads; with built `strategies` every one of their options.

        In the place of a secret stands a mask, which `from_dict` refuses. Paths and the model's name stay as they are,
        but for the credentials of a URL.
        """
        built = {strategy.name: strategy.options.model_dump(mode="json") for strategy in strategies}
        data = self.model_dump(mode="json", exclude_none=True)
        data["strategies"] = [{c.name: built.get(c.name, c.options)} for c in self.strategies]
        masked: dict[str, Any] = redact_values(data)
        for holder, original, field in (
            (masked["base"], data["base"], "model"), (masked["data"], data["data"], "train"),
            (masked["data"], data["data"], "eval"), (masked, data, "output"),
        ):  # fmt: skip
            if field in original:
                holder[field] = redact_url(original[field])
        return masked

    def to_yaml(self, strategies: Sequence[Strategy] = ()) -> str:
        """Return the recipe with every default written out; see `to_dict`."""
        return dump(self.to_dict(strategies))


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, YAML or JSON (`.json`), with `overrides` (KEY=VALUE) on top. Imports no plugin.

    Raises:
        InputError: what is wrong, led by file and line or by the override: not UTF-8, not YAML, an unknown key, a
            value out of range, a strategy, task or quantiser that is not installed, a data file that is not there.
    """
    recipe, problems = read_recipe(path, overrides)
    return _sound(recipe, problems)


def read_recipe(path: Path | str, overrides: Sequence[str] = ()) -> tuple[Recipe | None, list[str]]:
    """Read a recipe as far as it can be read: what is wrong stands at its default, what is missing at `UNKNOWN`.

    Returns:
        The recipe, None where it names no strategy; and all that is wrong, each as `load_recipe` would say it.

    Raises:
        InputError: the file is no YAML or JSON that holds a mapping.
    """
    path = Path(path)
    data, places = read_recipe_file(path)
    recipe, problems = _examine(data, places, path, overrides)
    for field in ("train", "eval"):
        file = getattr(recipe.data, field) if recipe is not None else None
        if recipe is not None and file not in (None, Path(UNKNOWN)) and not file.exists():
            problems.append(f"{recipe.where('data', field)}: data.{field}: there is no {file} (from {Path.cwd()}).")
    if recipe is not None and recipe.base.revision and Path(os.path.expanduser(recipe.base.model)).is_dir():
        text = folder_with_revision(recipe.base.model, recipe.base.revision)
        problems.append(f"{recipe.where('base', 'revision')}: {text}")
    return recipe, problems


def default_recipe(
    train: Path | str,
    base: str,
    *,
    eval: Path | str | None = None,
    task: str = "causal-lm",
    output: Path | str | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """Return the recipe of `budwood tune FILE --base DIR`: LoRA, everything else by default.

    Raises:
        InputError: see `load_recipe`.
    """
    data: dict[str, Any] = {"base": {"model": base, "task": task}, "data": {"train": str(train)}}
    data["strategies"] = ["lora"]
    if eval is not None:
        data["data"]["eval"] = str(eval)
    if output is not None:
        data["output"] = str(output)
    if not Path(train).exists():
        raise InputError(f"{train}: there is no such file (from {Path.cwd()}).")
    return Recipe.from_dict(data, overrides)


def build_composition(recipe: Recipe) -> Composition:
    """Import and build the recipe's strategies, in their solved order.

    Raises:
        InputError: an option is wrong (with its line), or the strategies do not fit together.
        PluginError: a plugin is broken.
    """
    strategies = []
    for choice in recipe.strategies:

        def where(*place: str | int, name: str = choice.name) -> str:
            return recipe.where("strategies", name, *place)

        strategies.append(build_strategy(choice.name, choice.options, where))
    return Composition(strategies)


def _sound(recipe: Recipe | None, problems: Sequence[str]) -> Recipe:
    """The recipe, if nothing is wrong with it; else the first problem is raised, with the others."""
    if recipe is None or problems:
        more = f" ({len(problems) - 1} more: `budwood plan` lists all)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more, problems)
    return recipe


def _examine(
    data: dict[str, Any], places: Places, source: Path | None, overrides: Sequence[str]
) -> tuple[Recipe | None, list[str]]:
    """See `read_recipe`; `data` is used up."""
    remember(data)
    problems = normalise_strategies(data, places)
    items_are_wrong = bool(problems)
    problems += apply_overrides(data, places, overrides, Recipe.model_fields)
    remember(data)
    problems += find_masked(data, places)
    if data.get("output") is None:
        section = data.get("data")
        train = section.get("train") if isinstance(section, dict) else None
        data["output"] = f"runs/{source.stem if source else Path(str(train)).stem}"
    recipe: Recipe | None = None
    mended: set[Location] = set()
    meant: set[Location] = set()
    while recipe is None:
        try:
            recipe = Recipe.model_validate(data)
        except ValidationError as error:
            for place, text in find_problems(error, Recipe):
                across = place in ((), ("train",)) and text.startswith("train.")  # such a check names its own field
                at = tuple(text.partition(":")[0].split(".")) if across else place
                told = at == ("strategies",) and items_are_wrong
                told = told or at in meant  # and misspelt
                told = told or (across and any(dotted(other) in text for other in mended | meant))  # of the mending
                if not told:
                    problems.append(f"{places.nearest(at)}: {'' if across else dotted(at) + ': '}{sentence(text)}")
                at = tuple(takewhile(lambda part: isinstance(part, str), at))
                if at in mended or not _mend(data, at):
                    return None, problems
                mended.add(at)
                meant.update((*at[:-1], near[1]) for near in re.finditer(r"Did you mean '(\w+)'", text))
    recipe._places, recipe._source = places, source
    named: list[tuple[Location, str, str]] = [
        (("base", "quantization"), recipe.base.quantization, QUANTIZERS),
        (("base", "task"), recipe.base.task, TASKS),
        *((("strategies", i), c.name, STRATEGIES) for i, c in enumerate(recipe.strategies)),
    ]
    for place, name, group in (item for item in named if item[1] != UNKNOWN):
        try:
            find(name, group)
        except InputError as error:
            problems.append(f"{places.nearest(place)}: {error}")
    return recipe, problems


def _mend(data: dict[str, Any], place: Location) -> bool:
    """Take what is wrong out of `data`, so that its default takes its place; whether that can be done."""
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
