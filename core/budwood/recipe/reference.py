"""The recipe's JSON Schema, with the options of the installed strategies, for editors and the reference page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from budwood.contract.discovery import installed
from budwood.contract.loading import load_strategy
from budwood.errors import BudwoodError
from budwood.recipe.schema import QUANTIZERS, TASKS, Recipe

_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "length ≥ {}",
    "maxLength": "length ≤ {}",
    "minItems": "length ≥ {}",
    "maxItems": "length ≤ {}",
}


@dataclass(frozen=True)
class FieldDoc:
    """Documentation of one field or option."""

    name: str
    type: str
    default: Any
    required: bool
    constraint: str
    description: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def recipe_schema(names: Iterable[str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """Return the JSON Schema (draft 2020-12) of a recipe, and the problems of strategies that are left out.

    Args:
        names: the strategies to import; all installed ones by default.
    """
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    definitions.pop("Choice")
    properties: dict[str, Any] = {}
    problems = []
    for name in installed() if names is None else names:
        try:
            options, nested = strategy_schema(name)
        except BudwoodError as error:
            problems.append(str(error))
            continue
        definitions.update(nested)
        properties[name] = {"description": options.get("description", ""), "anyOf": [options, {"type": "null"}]}
    mapping = {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    schema["properties"]["strategies"] = {
        "description": schema["properties"]["strategies"]["description"],
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [{"type": "string", "enum": list(properties)}, mapping]},
    }
    base = definitions["BaseSection"]["properties"]
    base["quantization"]["enum"] = list(installed(QUANTIZERS))
    base["task"]["enum"] = list(installed(TASKS))
    schema["required"].remove("output")
    schema["title"] = "Budwood recipe"
    schema.pop("description", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, problems


def strategy_schema(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Import a strategy; return the schema of its options, and the definitions that it refers to.

    Raises:
        InputError, PluginError: see `load_strategy`.
    """
    cls, _ = load_strategy(name)
    options = cls.Options.model_json_schema(ref_template="#/$defs/" + name + ".{model}")
    nested = {f"{name}.{key}": value for key, value in options.pop("$defs", {}).items()}
    options["description"] = (cls.__doc__ or "").strip().partition("\n")[0]
    return options, nested


def describe_fields(schema: dict[str, Any]) -> list[FieldDoc]:
    """Describe the properties of an object's schema, in order."""
    required = schema.get("required", ())
    return [
        FieldDoc(
            name,
            _type(field),
            field.get("default"),
            name in required,
            ", ".join(text.format(value) for key, text in _BOUNDS.items() for value in _values(field, key)),
            field.get("description", ""),
        )
        for name, field in schema.get("properties", {}).items()
    ]


def _type(field: dict[str, Any]) -> str:
    if "enum" in field:
        return " · ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if "anyOf" in field:
        return " or ".join(_type(member) for member in field["anyOf"] if member.get("type") != "null")
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    words = {"integer": "int", "string": "text", "boolean": "true · false", "object": "mapping"}
    kind = field.get("type", "mapping" if "$ref" in field else "anything")
    return words.get(kind, kind)


def _values(field: dict[str, Any], key: str) -> list[Any]:
    return [member[key] for member in (field, *field.get("anyOf", ())) if key in member]
