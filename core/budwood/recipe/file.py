"""Parses a recipe, YAML or JSON, into plain values with source lines, and applies `-o key=value` overrides.

Values are built node by node, which preserves their lines and refuses what no recipe needs (tags, anchors, duplicate
keys) before it takes effect.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from shlex import quote
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from budwood.contract.renames import renamed
from budwood.contract.validation import Location, dotted
from budwood.errors import InputError, did_you_mean, unreadable
from budwood.untrusted.redaction import MASK, shorten

MAX_BYTES = 100_000
"""A recipe is about a page long. A larger file is something else, and would take seconds to parse."""
MAX_DEPTH = 100
UNKNOWN = "?"
"""Placeholder for a missing base, data file or strategy, so that the rest of the recipe can be checked."""
_TAGS = ("null", "bool", "int", "float", "str", "timestamp", "merge", "map", "seq")
_EXCLUSIVE: dict[Location, str] = {
    ("train", "epochs"): "steps",
    ("train", "steps"): "epochs",
    ("train", "batch_tokens"): "batch_examples",
    ("train", "batch_examples"): "batch_tokens",
}
"""Mutually exclusive fields: overriding one removes the other from the file's values."""


class SourceMap(dict[Location, str]):
    """Maps each value of a recipe to its source: "recipe.yaml:7", or the override that set it."""

    def __init__(self, name: str) -> None:
        """Start empty; `name` is the source of values that are not in the map."""
        super().__init__()
        self.name = name

    def nearest(self, place: Location) -> str:
        """Return the source of a value, or of the nearest mapping or list around it."""
        for end in range(len(place), 0, -1):
            if place[:end] in self:
                return self[place[:end]]
        return self.name

    def forget(self, place: Location) -> None:
        """Remove a value and everything below it."""
        for known in [known for known in self if known[: len(place)] == place]:
            del self[known]


def read_recipe_file(path: Path) -> tuple[dict[str, Any], SourceMap]:
    """Read a recipe file; return its values and their sources.

    Raises:
        InputError: the file is missing, unreadable, empty, not UTF-8, not YAML (or JSON), or not a mapping.
    """
    refuse_run(path)
    text = _read_text(path)
    source_map = SourceMap(str(path))
    data = _parse(text, str(path), source_map, is_json=path.suffix.lower() == ".json")
    if data is None:
        raise InputError(f"{path}: is empty. The smallest recipe names a base, a data file and a strategy.")
    if not isinstance(data, dict):
        raise InputError(f"{path}:1: is not a recipe: the top level must be a mapping (base, data, strategies).")
    return data, source_map


def refuse_run(path: Path) -> None:
    """Refuse the folder of a run where a recipe or data is due.

    Raises:
        InputError: it names the run's recipe.
    """
    recipe = path / "recipe.yaml"
    if recipe.is_file() and (path / "manifest.json").is_file():
        raise InputError(
            f"{path}: is the folder of a run. Its recipe is {recipe}, and `budwood tune {quote(str(recipe))} --resume` "
            "resumes it."
        )


def normalise_strategies(data: dict[str, Any], source_map: SourceMap) -> list[str]:
    """Turn `lora` and `lora: {rank: 8}` in `data["strategies"]` into `{"name": …, "options": …}`.

    Returns:
        The problems of items that have neither form; each is replaced by an `UNKNOWN` strategy.
    """
    items = data.get("strategies")
    if items is None:
        return []
    if not isinstance(items, list):
        del data["strategies"]
        return [f"{source_map.nearest(('strategies',))}: strategies: must be a list, such as [lora]."]
    result: list[dict[str, Any]] = []
    problems = []
    for index, item in enumerate(items):
        place = ("strategies", index)
        if isinstance(item, dict) and set(item) == {"name", "options"}:
            result.append(item)
            continue
        named = {item: None} if isinstance(item, str) else item
        if not isinstance(named, dict) or len(named) != 1:
            problem = "must be NAME or NAME: {OPTION: VALUE}"
            if isinstance(named, dict) and len(named) > 1:
                problem = f"has {len(named)} keys ({', '.join(named)}); indent the options below the name"
            problems.append(f"{source_map.nearest(place)}: {dotted(place)}: {problem}.")
            result.append({"name": UNKNOWN, "options": {}})
            continue
        ((name, options),) = named.items()
        if options is not None and not isinstance(options, dict):
            source = source_map.nearest((*place, name))
            problems.append(f"{source}: {dotted((*place, name))}: must be a mapping of options.")
            options = None
        for known in [known for known in source_map if known[:3] == (*place, name)]:
            source_map[(*place, "options", *known[3:])] = source_map.pop(known)
        result.append({"name": name, "options": options or {}})
    data["strategies"] = result
    return problems


def apply_overrides(
    data: dict[str, Any], source_map: SourceMap, overrides: Sequence[str], model: type[BaseModel]
) -> list[str]:
    """Apply each KEY=VALUE to `data`, whose strategies are already normalised; later ones win.

    KEY is dotted: `train.steps`, `strategies.lora.rank`, or `lora.rank` for short. VALUE is YAML. `model` is the
    recipe's.

    Returns:
        The problems of overrides that were skipped: no "=", VALUE is not YAML, or KEY does not exist (the closest
        match is suggested).
    """
    chosen: set[Location] = set()
    problems = []
    for override in overrides:
        source = f"-o {shorten(override)}"
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            problems.append(f"{source}: write KEY=VALUE, as in -o train.steps=100.")
            continue
        try:
            value = parse_value(text, source)
            place, holder, last = _resolve_key(data, parts, model, source)
        except InputError as error:
            problems.append(str(error))
            continue
        holder[last] = value
        excluded = _EXCLUSIVE.get(place)
        if excluded and (*place[:-1], excluded) not in chosen:
            holder.pop(excluded, None)
        chosen.add(place)
        source_map.forget(place)
        source_map[place] = source
        if place == ("strategies",):
            problems += normalise_strategies(data, source_map)
    return problems


def _resolve_key(
    data: dict[str, Any], parts: list[str], model: type[BaseModel], source: str
) -> tuple[Location, dict[str, Any], str]:
    """Return the location that an override sets, the mapping that contains it, and its key there."""
    start: Location = ()
    holder: Any = data
    sections = list(model.model_fields)
    if parts[0] not in sections or (parts[0] == "strategies" and len(parts) > 1):
        named = {item["name"]: index for index, item in enumerate(data.get("strategies") or [])}
        known = list(named) if parts[0] == "strategies" else [*sections, *named]
        name, *options = parts[1:] if parts[0] == "strategies" else parts
        if name not in named:
            near = renamed(name, known, model) or did_you_mean(name, known)
            raise InputError(f"{source}: the recipe has no '{name}'.{near}")
        start = ("strategies", named[name])
        holder = data["strategies"][named[name]]
        parts = ["options", *options]
    for part in parts[:-1]:
        if holder.get(part) is None:
            holder[part] = {}
        holder = holder[part]
        if not isinstance(holder, dict):
            raise InputError(f"{source}: '{part}' has no keys below it.")
    return (*start, *parts), holder, parts[-1]


def find_masked(data: Any, source_map: SourceMap, place: Location = ()) -> list[str]:
    """Return a problem for each value in which a secret was masked, as in a run's recipe.yaml."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    problems = [problem for key, value in items for problem in find_masked(value, source_map, (*place, key))]
    if isinstance(data, str) and MASK in data:
        problems.append(
            f"{source_map.nearest(place)}: {dotted(place)}: {MASK} replaces a secret that was not saved; re-enter it."
        )
    return problems


def dump(data: dict[str, Any]) -> str:
    """Return plain values as YAML, keeping their order."""
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 4096
    out = io.StringIO()
    yaml.dump(data, out)
    return out.getvalue()


def parse_value(text: str, source: str) -> Any:
    """Parse the YAML of one value, such as that of an override.

    Raises:
        InputError: it is not YAML; the message begins with `source`.
    """
    return _parse(text, source, SourceMap(source))


def _read_text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe.") from None
    except OSError as error:
        raise unreadable(path, error) from error
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path}: is longer than {MAX_BYTES:,} bytes, so it is not a recipe.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: is not UTF-8 (byte 0x{raw[error.start]:02x}); save it as UTF-8.") from None


def _parse(text: str, label: str, source_map: SourceMap, is_json: bool = False) -> Any:
    """Parse YAML or JSON into plain values and fill `source_map`; `label` (and a file's line) prefixes messages."""

    def at(line: int) -> str:
        return label if label.startswith(("-o ", "-s ")) else f"{label}:{line + 1}"

    yaml = YAML(typ="safe", pure=True)
    data: Any = None
    try:
        if max(accumulate((c in "[{") - (c in "]}") for c in text), default=0) > MAX_DEPTH:
            raise RecursionError  # the scanner's time is quadratic in the depth
        if is_json and text.strip():
            data = json.loads(text)
        node = yaml.compose(io.StringIO(text))
        values = None if node is None else _build(node, (), yaml, source_map, at)
    except json.JSONDecodeError as error:
        raise InputError(f"{at(error.lineno - 1)}: is not JSON: {error.msg} (column {error.colno}).") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        line = mark.line if mark is not None else text[: getattr(error, "position", 0)].count("\n")
        if "'\\t'" in problem:
            problem = "a tab cannot indent or start a value; use spaces"
        raise InputError(f"{at(line)}: is not YAML: {shorten(problem, 120)}.") from None
    except (RecursionError, ValueError) as error:  # excessive nesting; a number with thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
        raise InputError(f"{at(0)}: is not a recipe: {reason}.") from None
    return data if is_json else values


def _build(node: Node, place: Location, yaml: YAML, source_map: SourceMap, at: Any) -> Any:
    source = at(node.start_mark.line)
    source_map.setdefault(place, source)
    if node.anchor:
        raise InputError(f"{source}: '&{node.anchor}': anchors and aliases are not allowed; write the value out.")
    tag = str(node.tag).removeprefix("tag:yaml.org,2002:")
    if tag not in _TAGS:
        raise InputError(f"{source}: '{shorten(str(node.tag))}': tags are not allowed; write a plain value.")
    if isinstance(node, SequenceNode):
        return [_build(item, (*place, i), yaml, source_map, at) for i, item in enumerate(node.value)]
    if isinstance(node, MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = at(key_node.start_mark.line)
            if not isinstance(key_node, ScalarNode):
                raise InputError(f"{line}: a key must be a plain string.")
            key = str(key_node.value)
            if key in result:
                first = source_map[(*place, key)].rpartition(":")[2]
                raise InputError(f"{line}: duplicate key '{shorten(key)}' (first on line {first}).")
            source_map[(*place, key)] = line
            result[key] = _build(value_node, (*place, key), yaml, source_map, at)
        return result
    if tag in ("null", "bool", "int", "float"):
        return yaml.constructor.construct_object(node)
    return node.value
