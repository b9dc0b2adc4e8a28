"""What `budwood eval` is asked for: checked from files alone, before torch is imported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from budwood.adapters.manifest import HeldOutRecord
from budwood.adapters.recorded_base import check_recorded_base
from budwood.adapters.store import SavedAdapter, read_adapter
from budwood.contract.attack import Attack
from budwood.contract.loading import load, start, validate_options
from budwood.contract.validation import Location, dotted, sentence
from budwood.errors import InputError
from budwood.model.checks import stored_quantization
from budwood.model.limits import LENGTH
from budwood.recipe.schema import Recipe, default_recipe
from budwood.training.preflight import check_data


@dataclass(frozen=True)
class EvaluationInputs:
    """An adapter, data and settings of an evaluation.

    Attributes:
        base: folder or hub name of the base.
        given_base: the same if the user named it; None: the adapter does.
        recipe: its data is what to evaluate on.
        attacks: by their text.
        held_out: what the adapter's run held out, if that is evaluated on; None: all rows of the data.
        max_length: in tokens; None: what the base allows.
        tokens: positions of a batch.
    """

    saved: SavedAdapter
    base: str
    given_base: str | None
    recipe: Recipe
    attacks: dict[str, Attack]
    held_out: HeldOutRecord | None
    max_length: int | None
    tokens: int


def read_inputs(
    directory: Path, data: Path | None, base: str | None, quantization: str | None, max_length: int | None,
    generate: int | None, attacks: Sequence[str], allow_other_base: bool = False,
) -> EvaluationInputs:  # fmt: skip
    """Read an adapter and check what it is evaluated on; for the arguments see `evaluate_adapter`.

    Raises:
        InputError, CorruptError, ResourceError: the adapter, the data, an attack or the base cannot be used.
    """
    chosen_attacks = build_attacks(attacks)
    saved = read_adapter(directory)
    manifest = saved.manifest
    as_run = manifest.evaluation if manifest else None
    held_out = None
    if data is None:
        held_out = as_run.held_out if as_run else None
        if held_out is None:
            raise InputError(f"{directory}: its run evaluated nothing: name data to evaluate on with --data FILE.")
    name = check_recorded_base(saved, base, quantization, allow_other_base)
    if not name:
        raise InputError(f"{directory} does not name its base: pass it with --base DIR.")
    max_length = max_length or (as_run.max_length if as_run else None)
    if generate is None:
        generate = as_run.generate if as_run else 1000
    tokens = as_run.tokens if as_run else max(max_length or LENGTH, 2048)
    chosen = quantization or (manifest.base.quantization if manifest else stored_quantization(name) or "none")
    overrides = [f"base.quantization={chosen}", f"train.eval_generate={generate}", f"train.micro_tokens={tokens}"]
    overrides += [f"data.max_length={max_length}"] if max_length else []
    source: Any = data if held_out is None else held_out.data
    task = manifest.task if manifest else "causal-lm"
    recipe = default_recipe(source, name, task=task, overrides=overrides)
    if held_out is None:  # else its run has read it
        check_data(recipe, ())
    return EvaluationInputs(saved, name, base, recipe, chosen_attacks, held_out, max_length, tokens)


def build_attacks(texts: Sequence[str]) -> dict[str, Attack]:
    """Build the attacks of the command line, keyed by their text.

    Raises:
        InputError: an attack is unknown or repeated, or an option is unknown or out of range.
        PluginError: a plugin is broken.
    """
    repeated = [text for text, count in Counter(texts).items() if count > 1]
    if repeated:
        raise InputError(f"--attack {repeated[0]}: given twice; remove one.")
    return {text: _build(text) for text in texts}


def _build(text: str) -> Attack:
    name, _, rest = text.partition(":")
    cls, entry = load(name.strip(), Attack.group)
    options: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise InputError(f"--attack {text}: write NAME:KEY=VALUE,…, for instance {name}:{_example(cls)}.")
        if key in options:
            raise InputError(f"--attack {text}: {key} is given twice.")
        try:
            options[key] = YAML(typ="safe", pure=True).load(value)
        except YAMLError:
            options[key] = value

    def message(location: Location, problem: str) -> str:
        return f"--attack {text}: " + (f"{dotted(location)}: " if location else "") + sentence(problem)

    attack: Attack = start(cls, entry, options=validate_options(cls, entry, options, message), name=text)
    return attack


def _example(cls: type[Attack]) -> str:
    """Return an example option with its value, for a message."""
    fields = cls.Options.model_fields
    return next((f"{name}={field.default}" for name, field in fields.items() if field.default), "KEY=VALUE")
