"""Distributions made on the spot: what a third party's package looks like to the registry."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

HEAD = "from budwood import Options, Strategy, hookimpl\nfrom pydantic import Field\n"


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Function `distribution(name, source, strategies={"name": "Class"}, …)` -> the folder put on sys.path.

    It makes the module NAME (dashes to underscores) and NAME-1.0.dist-info, as an installer would.
    """
    before = set(sys.modules)

    def make(
        name: str,
        source: str = "",
        strategies: dict[str, str] | None = None,
        group: str = "budwood",
        version: str = "1.0",
    ) -> Path:
        folder = tmp_path / "site" / name
        module = name.replace("-", "_")
        info = folder / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(HEAD + dedent(source), encoding="utf-8")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [f"{key} = {module}:{value}" for key, value in (strategies or {}).items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
        monkeypatch.syspath_prepend(folder)
        return folder

    yield make
    for name in set(sys.modules) - before:
        if "site" in (getattr(sys.modules[name], "__file__", None) or ""):
            module_file = Path(sys.modules[name].__file__ or "")
            if tmp_path in module_file.parents:
                del sys.modules[name]
