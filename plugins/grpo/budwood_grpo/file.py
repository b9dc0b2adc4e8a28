"""A reward in a Python file that the recipe names."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from budwood import InputError, Options, Reward, did_you_mean

if TYPE_CHECKING:
    from budwood import Plan


class PythonFile(Reward):
    """What a function in a Python file returns; needs --allow-code."""

    api = 2

    class Options(Options):
        path: str = Field(min_length=1, description="the Python file")
        function: str = Field(
            "reward", min_length=1, description="its function of (prompts, completions, rows) that returns the rewards"
        )
        columns: list[str] = Field([], description="columns of a row that the function reads")
        sha256: str | None = Field(None, description="hash of the file; filled in, and compared when a run resumes")

        @model_validator(mode="before")
        @classmethod
        def _same_file(cls, data: Any) -> Any:
            if not isinstance(data, dict) or not isinstance(data.get("path"), str):
                return data
            path = Path(data["path"]).expanduser()
            try:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise ValueError(f"path: {path}: {error.strerror}") from error
            if data.get("sha256") not in (None, digest):
                raise ValueError(f"sha256: {path} is another file than the recipe was written for; remove sha256")
            return {**data, "sha256": digest}

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.columns = tuple(self.options.columns)
        self.code_files = (self.options.path,)
        self._function: Callable[..., Sequence[float]] | None = None

    def check(self, plan: Plan) -> None:
        """Import the file, and find the function."""
        path = Path(self.options.path).expanduser()
        spec = importlib.util.spec_from_file_location(f"budwood_reward_{self.options.sha256[:16]}", path)
        if spec is None or spec.loader is None:
            raise InputError(f"{path} is not a Python file: name one that ends in .py.")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise InputError(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error
        functions = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        if self.options.function not in functions:
            near = did_you_mean(self.options.function, functions) or f" It has {', '.join(functions) or 'none'}."
            raise InputError(f"{path} has no function '{self.options.function}'.{near}")
        self._function = getattr(module, self.options.function)

    def score(
        self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Sequence[float]:
        """Call the function."""
        assert self._function is not None
        return self._function(prompts, completions, rows)
