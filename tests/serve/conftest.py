"""Configuration of the tests of a real `budwood serve` process: for `make serve-test`, not for `make test`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.core.serving.conftest import make_adalora, make_adapter
from tests.serve.reference import Reference
from tests.serve.server import Server

ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave these tests out, unless they are selected by `serve`."""
    return None if "serve" in config.option.markexpr else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark these tests."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.serve)


def make_root(root: Path) -> dict[str, Path]:
    """Write eight adapters of all methods, and of LoRA several ranks."""
    return {
        "lora-4": make_adapter(root / "lora-4", 1),
        "lora-8": make_adapter(root / "lora-8", 2, rank=8),
        "lora-32": make_adapter(root / "lora-32", 3, rank=32),
        "rslora-16": make_adapter(root / "rslora-16", 4, rank=16, use_rslora=True, names=ATTENTION),
        "dora-4": make_adapter(root / "dora-4", 5, use_dora=True),
        "dora-8": make_adapter(root / "dora-8", 6, rank=8, use_dora=True),
        "adalora": make_adalora(root / "adalora", 7),
        "head": make_adapter(root / "head", 8, modules_to_save=["lm_head"]),
    }


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight adapters, which no test changes."""
    folder = tmp_path_factory.mktemp("serve") / "adapters"
    make_root(folder)
    return folder


@pytest.fixture(scope="session")
def reference(tiny_base: Path, root: Path) -> Reference:
    """What the base and each adapter of the root answer alone, in this process."""
    return Reference(tiny_base, root)


@pytest.fixture(scope="module")
def server(tiny_base: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the root without tokens for clients."""
    with Server(tiny_base, root, tmp_path_factory.mktemp("server")) as running:
        yield running
        assert running.process.poll() is None, "it still runs, whatever the tests sent"
