"""Rewards that check an answer with another library, from the extra `rl`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from budwood import InputError, Options, ResourceError, Reward

if TYPE_CHECKING:
    from budwood import Plan

Rows = Sequence[Mapping[str, Any]]


class JSONSchema(Reward):
    """1 if the answer is JSON that a schema accepts, otherwise 0."""

    api = 2

    class Options(Options):
        path: str | None = Field(None, min_length=1, description="file with the JSON schema")
        column: str | None = Field(None, min_length=1, description="column with each row's schema, an object or text")

        @model_validator(mode="after")
        def _one_source(self) -> JSONSchema.Options:
            if (self.path is None) == (self.column is None):
                raise ValueError("set either path or column")
            return self

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.columns = (self.options.column,) if self.options.column else ()

    def check(self, plan: Plan) -> None:
        """Check that jsonschema is installed, and the schema in the file is one."""
        _needs("jsonschema", "json-schema")
        if self.options.path is not None:
            _ = self._validator

    def score(self, prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
        """Parse each answer, without surrounding white space, and validate it."""
        return [float(self._accepts(text, row)) for text, row in zip(completions, rows, strict=True)]

    def _accepts(self, text: str, row: Mapping[str, Any]) -> bool:
        try:
            value = json.loads(text.strip(), parse_constant=_refuse)
        except (ValueError, RecursionError):
            return False
        validator = self._validator if self.options.column is None else _validator(row[self.options.column])
        return bool(validator.is_valid(value))

    @cached_property
    def _validator(self) -> Any:
        path = Path(self.options.path).expanduser()
        try:
            return _validator(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}: name a file with a JSON schema.") from error
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error


class MathVerify(Reward):
    """1 if the answer equals the row's mathematically, by math-verify, otherwise 0."""

    api = 2

    class Options(Options):
        column: str = Field("answer", min_length=1, description="the column with the correct answer, in LaTeX or plain")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.columns = (self.options.column,)

    def check(self, plan: Plan) -> None:
        """Check that math-verify is installed."""
        _needs("math_verify", "math-verify")

    def score(self, prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
        """Compare what math-verify finds in each answer with the row's."""
        from math_verify import parse, verify

        results = []
        for text, row in zip(completions, rows, strict=True):
            gold = str(row[self.options.column])
            expected = parse(gold) or parse(f"${gold}$")
            if not expected:
                raise ValueError(f"'{gold}' in column '{self.options.column}' is not an expression")
            results.append(float(verify(expected, parse(text))))
        return results


def _needs(module: str, reward: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ResourceError(f"reward '{reward}' needs {module.replace('_', '-')}: pip install 'budwood[rl]'.")


def _validator(schema: Any) -> Any:
    """Return a validator of a schema, given as JSON text or as an object.

    Raises:
        ValueError: it is not a JSON schema.
    """
    import jsonschema

    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise ValueError(f"the schema is not JSON: {error}") from error
    cls = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        cls.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"not a JSON schema: {error.message}") from error
    return cls(schema)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
