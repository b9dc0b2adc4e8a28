"""Adapters that must not be loaded: each is refused in one line, and the one that is there keeps answering."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import make_base
from tests.core.serving.conftest import make_adapter
from tests.serve.server import Server

from budwood.adapters.store import write_adapter
from budwood.model.base import load_base

WEIGHTS = "adapter_model.safetensors"


def recorded(source: Path, folder: Path, base: Path) -> Path:
    """Write an adapter with a manifest, as a run of this base does."""
    import torch

    loaded = load_base(base, "none", "AutoModelForCausalLM", torch.float32)

    def write(into: Path) -> None:
        for path in source.iterdir():
            shutil.copy(path, into)

    write_adapter(folder, write, adapter_type="lora", distribution="budwood 0.1.0", base=loaded, task="causal-lm")
    return folder


@pytest.fixture(scope="module")
def world(tiny_base, tmp_path_factory) -> Iterator[tuple[Server, Path, str]]:
    """A server of the adapter `live`, the folder beside its root, and what it answers."""
    folder = tmp_path_factory.mktemp("refused")
    make_adapter(folder / "plain", 21)
    (folder / "root").mkdir()
    recorded(folder / "plain", folder / "root" / "live", tiny_base)
    (folder / "server").mkdir()
    with Server(tiny_base, folder / "root", folder / "server") as server:
        yield server, folder, server.ask("live", "games")


def flipped(folder: Path, world: Path, base: Path) -> None:
    shutil.copytree(world / "root" / "live", folder)
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-7] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def cut(folder: Path, world: Path, base: Path) -> None:
    shutil.copytree(world / "plain", folder)
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def garbage(folder: Path, world: Path, base: Path) -> None:
    shutil.copytree(world / "plain", folder)
    (folder / WEIGHTS).write_bytes(b"\xff" * 4096)


def wrong_rank(folder: Path, world: Path, base: Path) -> None:
    make_adapter(folder, 22, r=10**9)


def other_base(folder: Path, world: Path, base: Path) -> None:
    make_base(world / "other", seed=5)
    recorded(world / "plain", folder, world / "other")


def pickled(folder: Path, world: Path, base: Path) -> None:
    shutil.copytree(world / "plain", folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def link_out(folder: Path, world: Path, base: Path) -> None:
    folder.symlink_to(world / "plain")


def linked_file(folder: Path, world: Path, base: Path) -> None:
    shutil.copytree(world / "plain", folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(world / "plain" / WEIGHTS)


def pipe(folder: Path, world: Path, base: Path) -> None:
    shutil.copytree(world / "plain", folder)
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def nothing(folder: Path, world: Path, base: Path) -> None:
    folder.mkdir()


@pytest.mark.parametrize(
    "spoil", [flipped, cut, garbage, wrong_rank, other_base, pickled, link_out, linked_file, pipe, nothing]
)
def test_what_is_not_this_bases_intact_adapter_is_refused_and_the_old_one_answers(world, tiny_base, spoil):
    server, folder, text = world
    bad = folder / "root" / spoil.__name__
    spoil(bad, folder, tiny_base)
    try:
        for name in ("live", "new"):
            answer = server.admin("POST", "adapters", {"name": name, "path": bad.name, "replace": True})
            assert answer.status_code in (409, 422), answer.text
            message = answer.json()["error"]["message"]
            assert "\n" not in message and len(message) > 20 and "Traceback" not in message
        assert server.ask("live", "games") == text
        assert [one["id"] for one in server.admin("GET", "adapters").json()["adapters"]] == ["live"]
        reloaded = server.admin("POST", "reload", {})
        assert reloaded.json()["adapters"]["live"]["result"] == "unchanged"
        assert server.ask("live", "games") == text
    finally:
        bad.unlink() if bad.is_symlink() else shutil.rmtree(bad)


@pytest.mark.parametrize(
    "path", ["../plain", "live/../../plain", "/etc", "~", ".", "", "live\x00", "a/" * 300, "live/adapter_config.json"]
)
def test_a_path_that_leads_out_of_the_root_is_refused(world, path):
    server, folder, text = world
    answer = server.admin("POST", "adapters", {"name": "new", "path": path})
    assert 400 <= answer.status_code < 500
    assert "plain" not in answer.json()["error"]["message"].replace(path, "")
    assert server.ask("live", "games") == text


def test_a_root_with_bad_adapters_is_served_without_them(world, tiny_base, tmp_path):
    _, folder, text = world
    shutil.copytree(folder / "root", tmp_path / "root")
    flipped(tmp_path / "root" / "flipped", folder, tiny_base)
    link_out(tmp_path / "root" / "link", folder, tiny_base)
    with Server(tiny_base, tmp_path / "root", tmp_path) as server:
        assert server.ask("live", "games") == text
        assert "adapter 'flipped' is left out" in server.log.read_text()
        with server.client() as client:
            assert {model.id for model in client.models.list()} == {"tiny", "live"}
