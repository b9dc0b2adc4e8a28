"""The adapter_config.json of one of PEFT's methods, read strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_origin

from pydantic import ValidationError

from budwood import CorruptError, InputError
from budwood.lowrank import SavedLowRankConfig, parse_saved_config, saved_pattern

if TYPE_CHECKING:
    from budwood_peft_methods.strategies import PeftMethod

REMEDY = "merge it into its base with PEFT (merge_and_unload), and use the result as a base"
PREFIX = "base_model.model."
"""Of the keys of PEFT's files."""
SELECTION = (
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "trainable_token_indices",
)  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """What a file says: the method's options, the modules, and patterns with other values for some of these."""

    strategy: type[PeftMethod]
    options: Any
    selection: SavedLowRankConfig
    patterns: Mapping[str, dict[str, Any]]
    feedforward: Any = None

    @classmethod
    def read(cls, strategy: PeftMethod | type[PeftMethod], config: Mapping[str, Any]) -> Saved:
        """Read a config.

        Raises:
            CorruptError: a field has an invalid value.
            InputError: the adapter uses an unsupported variant, or a field that PEFT's method does not have.
        """
        kind = strategy if isinstance(strategy, type) else type(strategy)
        model, name = kind.Options, kind.type_name()
        if config.get("bias", "none") not in ("none", None):
            raise InputError(
                f"adapter_config.json: 'bias: {json.dumps(config['bias'])[:40]}' is not supported by {name}: {REMEDY}."
            )
        for field, (value, why) in model.ONLY.items():
            if config.get(field, value) != value:
                shown = json.dumps(config[field])[:40]
                raise InputError(f"adapter_config.json: '{field}: {shown}' is not supported, since {why}: {REMEDY}.")
        fields = model.FIELDS
        unused = {*fields.values(), *model.INIT, *model.ONLY, *model.PATTERNS, *kind.OTHER_FIELDS}
        selection = parse_saved_config(name, SavedLowRankConfig, _without_own(config, fields.values()), unused)
        given = {option: config[field] for option, field in fields.items() if field in config}
        if "variant" in given:  # of miss: true or false stand for its own variant
            given["variant"] = "balanced" if isinstance(given["variant"], bool) else given["variant"]
        texts = {option for option in given if _is_text(model.model_fields[option].annotation)}
        for option in given.keys() - texts:
            if isinstance(given[option], str):  # which pydantic would convert
                raise CorruptError(f"adapter_config.json: {fields[option]}: must not be a text.")
        try:
            options = model.model_validate(given)
        except ValidationError as error:
            problem = error.errors()[0]
            field = fields.get(str(problem["loc"][0]), "") if problem["loc"] else ""
            raise CorruptError(f"adapter_config.json: {field or name}: {problem['msg']}.") from error
        patterns = {field: _pattern(field, config.get(field)) for field in model.PATTERNS}
        return cls(kind, options, selection, patterns, config.get("feedforward_modules"))

    def fields(self, targets: Sequence[str]) -> dict[str, Any]:
        """Return the fields of PEFT's config, for targets by full name."""
        found: dict[str, Any] = self.options.fields()
        found |= {field: saved_pattern(pattern, targets) for field, pattern in self.patterns.items()}
        return found | self.strategy.saved_module_fields(targets, self.feedforward)


def _is_text(annotation: Any) -> bool:
    return annotation is str or get_origin(annotation) is Literal


def _without_own(config: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Return a config without the fields that are checked elsewhere: some have names, but not values, of LoRA's."""
    return {key: value for key, value in config.items() if key != "bias" and key not in own}


def _pattern(field: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    good = isinstance(value, dict) and all(
        isinstance(k, str) and isinstance(v, int) and not isinstance(v, bool) and 0 < v <= 1 << 24
        for k, v in value.items()
    )
    if not good:
        raise CorruptError(f"adapter_config.json: {field}: must map names to positive integers.")
    return dict(value)


def chosen_modules(names: Sequence[str], saved: Any, field: str, whole_components: bool = False) -> list[str]:
    """Return which modules a field of PEFT's config names: by the ends of names, or by an expression.

    Args:
        names: full names of modules.
        saved: the field's value.
        field: its name, for messages.
        whole_components: the ends are components of names, as in `target_modules`.

    Raises:
        CorruptError: it is neither.
    """
    if saved is None:
        return []
    if isinstance(saved, str):
        escaped = saved_pattern({saved: 1}, names)  # resolves an expression with a limit of time
        return [name for name in names if re.escape(name) in escaped]
    if not isinstance(saved, list) or not all(isinstance(end, str) for end in saved):
        raise CorruptError(f"adapter_config.json: {field}: must be a list of names or an expression.")
    dot = "." if whole_components else ""
    return [name for name in names if any(name == end or name.endswith(dot + end) for end in saved)]
