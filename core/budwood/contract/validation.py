"""Turns pydantic errors into one plain line each, with the location and the closest known name."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from budwood.contract.renames import renamed
from budwood.errors import did_you_mean
from budwood.untrusted.redaction import shorten

Location = tuple[str | int, ...]

_MESSAGES = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "model_type": "must be a mapping",
    "dict_type": "must be a mapping",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "sequence_str": "must be a list",
}


def first_problem(error: ValidationError, model: type[BaseModel]) -> tuple[Location, str]:
    """Return location (keys and indices) and text of the most relevant problem; unknown keys come first."""
    return find_problems(error, model)[0]


def find_problems(error: ValidationError, model: type[BaseModel]) -> list[tuple[Location, str]]:
    """Return location (keys and indices) and text of every problem, unknown keys first; one per location."""
    problems = error.errors(include_url=False)
    problems.sort(key=lambda p: p["type"] != "extra_forbidden")  # stable
    texts: dict[Location, str] = {}
    for problem in problems:
        place, text = _explain(problem, problems, model)
        known = any(other[: len(place)] == place for other in texts)  # of a union, report the member that got furthest
        misspelt = problem["type"] == "missing" and any(f"'{place[-1]}'?" in t for t in texts.values())
        if not known and not misspelt:
            texts[place] = text
    return list(texts.items())


def _explain(problem: Any, problems: list[Any], model: type[BaseModel]) -> tuple[Location, str]:
    place, owner = _place(model, problem["loc"])
    if problem["type"] != "extra_forbidden":  # of a union, report the member that got furthest
        within = [p for p in problems if _place(model, p["loc"])[0][: len(place)] == place]
        problem = max(within, key=lambda p: len(_place(model, p["loc"])[0]))
        place, owner = _place(model, problem["loc"])
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        known = list(owner.model_fields) if owner else []
        near = renamed(key, known, model, place) or did_you_mean(key, known)
        return (*place, key), f"unknown key.{near or ' Known keys: ' + (', '.join(known) or 'none')}"
    if problem["type"] == "missing":
        field = _field(model, place)
        about = f" ({field.description})" if field is not None and field.description else ""
        return place, f"missing{about}"
    same = [p for p in problems if _place(model, p["loc"])[0] == place]  # one per member of a union
    text = " or ".join(dict.fromkeys(_text(p) for p in same))
    if problem["type"] in ("value_error", "assertion_error") and isinstance(problem["input"], dict | BaseModel):
        return place, text
    return place, f"{text} (got {shorten(repr(problem['input']))})"


def sentence(text: str) -> str:
    """End `text` with a full stop, unless it already ends with punctuation."""
    return text if text.endswith((".", "?", "!", "…")) else f"{text}."


def dotted(place: Location) -> str:
    """Format a location for messages: `train.learning_rate`, `targets[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def _text(problem: Any) -> str:
    text = _MESSAGES.get(problem["type"]) or re.sub(r"^\w+ should ", "must ", problem["msg"])
    return " ".join(text.removeprefix("Value error, ").removeprefix("Assertion failed, ").split())


def _place(model: type[BaseModel], location: Location) -> tuple[Location, type[BaseModel] | None]:
    """Return a pydantic location without union members, as the user wrote it, and the model at its end."""
    place: list[str | int] = []
    owner: type[BaseModel] | None = model
    for part in location:
        if isinstance(part, int):
            place.append(part)
        elif owner is not None and part in owner.model_fields:
            place.append(part)
            owner = _model_in(owner.model_fields[part].annotation)
    return tuple(place), owner


def _field(model: type[BaseModel], place: Location) -> Any:
    names = [part for part in place if isinstance(part, str)]
    owner: type[BaseModel] | None = model
    for name in names[:-1]:
        owner = _model_in(owner.model_fields[name].annotation) if owner else None
    return owner.model_fields.get(names[-1]) if owner and names else None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
