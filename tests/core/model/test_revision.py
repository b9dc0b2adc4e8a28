"""A hub base at a revision, in a cache with a branch that moves and a tag that does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from budwood import InputError, ResourceError, plan, tune
from budwood.adapters.store import read_adapter
from budwood.cli import app as cli
from budwood.model.checkpoint import commit_of, one_revision, resolve
from budwood.serving.verify import open_pool

NAME = "someone/tiny"
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cached repository: two commits with different weights, `main` at the new one, the tag `v1` at the old one."""
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny"
    for commit, factor in ((OLD, 1.0), (NEW, 1.5)):
        snapshot = repository / "snapshots" / commit
        shutil.copytree(tiny_base, snapshot)
        tensors = load_file(snapshot / "model.safetensors")
        save_file({name: factor * t for name, t in tensors.items()}, snapshot / "model.safetensors", {"format": "pt"})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(NEW)
    (repository / "refs" / "v1").write_text(OLD)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return repository


def test_a_branch_a_tag_and_a_commit_are_resolved(hub: Path) -> None:
    assert commit_of(resolve(NAME)) == NEW
    for revision in ("v1", OLD):
        assert commit_of(resolve(NAME, revision=revision)) == OLD
    with one_revision(NAME, "v1"):
        assert commit_of(resolve(NAME)) == OLD
    assert commit_of(resolve(NAME)) == NEW
    with pytest.raises(ResourceError, match="'someone/tiny' at revision 'v2' is neither a local folder nor in the hub"):
        resolve(NAME, revision="v2")


def test_a_revision_is_resolved_once(hub: Path) -> None:
    with one_revision(NAME, "v1"):
        assert commit_of(resolve(NAME, weights=False)) == OLD
        (hub / "refs" / "v1").write_text(NEW)
        assert commit_of(resolve(NAME)) == OLD, "the tag moved during the run"
    with one_revision(NAME, "v1"):
        assert commit_of(resolve(NAME)) == NEW


def test_a_run_uses_the_revision_and_records_the_commit(hub: Path, make_recipe: Callable[..., Any]) -> None:
    recipe = make_recipe(base={"model": NAME, "revision": "v1"})
    assert not plan(recipe).problems
    run = tune(recipe, quiet=True)
    assert commit_of(run.base.path) == OLD
    manifest = json.loads((run.directory / "manifest.json").read_text())
    assert (manifest["base"]["name"], manifest["base"]["revision"]) == (NAME, OLD)
    assert "revision: v1" in (run.directory / "recipe.yaml").read_text()
    saved = read_adapter(run.directory / "adapter")
    assert saved.manifest is not None and saved.manifest.base.revision == OLD
    assert commit_of(open_pool(saved).base.path) == OLD, "reopened at its own commit"
    with pytest.raises(InputError, match="was trained on the base"):
        open_pool(saved, NAME)
    main = tune(make_recipe("main", base={"model": NAME}), quiet=True)
    assert json.loads((main.directory / "manifest.json").read_text())["base"]["revision"] == NEW


def test_a_revision_of_a_folder_is_refused(
    tiny_base: Path, tmp_path: Path, make_recipe: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(base={"revision": "v1"})
    with pytest.raises(
        InputError, match=f"base.revision: 'v1' needs a model from the hub, but '{tiny_base}' is a local folder"
    ):
        tune(recipe, quiet=True)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    line = path.read_text().splitlines().index("  revision: v1") + 1
    for command in ("tune", "plan", "data"):
        assert cli.run([command, str(path)]) == 2
        out, err = capsys.readouterr()
        assert f"recipe.yaml:{line}: base.revision: 'v1' needs a model from the hub" in (out + err).replace("\n", " ")
        assert "Traceback" not in err
