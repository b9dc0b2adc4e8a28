"""Any content of a recipe, a row or an adapter gives a documented exit code, one line, and no partial output."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.core.adapters.conftest import save_small
from tests.hostile.mutations import broken_file, damaged, dump, edited, rehash, scalars, values

from budwood.cli import app as cli
from budwood.data.build import build_examples
from budwood.errors import BudwoodError
from budwood.model.base import load_tokenizer

MORE = int(os.environ.get("BUDWOOD_EXAMPLES", "1"))
"""Multiplier of the number of examples, which are the same in each run of the tests."""
bounded = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
RECIPE = {
    "base": {"model": "no/such/base", "quantization": "nf4", "task": "causal-lm"},
    "data": {"train": "rows.jsonl", "eval": "rows.jsonl", "max_length": 128},
    "strategies": [{"lora": {"rank": 4, "targets": "all-linear"}}, {"adversarial": {"method": "fgm"}}],
    "train": {"steps": 2, "batch_tokens": 64, "micro_tokens": 128, "learning_rate": 1e-3, "trackers": []},
    "output": "run",
}
ROWS = [
    {"prompt": "a question", "completion": " an answer"},
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]},
    {"text": "some text", "label": "one"},
    {"text": "some text"},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a data file; signal handlers and warnings of the process are preserved."""
    monkeypatch.setattr(cli, "silence_libraries", lambda debug: None)
    monkeypatch.delenv("BUDWOOD_DEBUG", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    yield Path()
    signal.signal(signal.SIGTERM, before)


def listing() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


def copy(adapter: Path) -> None:
    for path in Path().iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(adapter, "adapter")


def run(capsys, *arguments: str, lines: bool = False) -> int:
    """Run a command; check its exit code, and that an error is one line (or, with `lines`, several)."""
    capsys.readouterr()
    code = cli.run(list(arguments))
    _, err = capsys.readouterr()
    assert code in (0, 2, 3, 4), err
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if code:
        assert errors, err
        assert lines or len(err.splitlines()) == 1, err
        assert all(line.isprintable() for line in errors)
    else:
        assert not errors
    return code


@settings(bounded, max_examples=60 * MORE)
@given(recipe=edited(RECIPE), suffix=st.sampled_from([".json", ".yaml"]))
def test_any_recipe(folder, capsys, recipe, suffix):
    path = Path(f"recipe{suffix}")
    path.write_bytes(dump(recipe))
    before = listing()
    assert run(capsys, "tune", str(path)) != 0  # there is no such base
    assert listing() == before
    path.unlink()


@settings(bounded, max_examples=25 * MORE)
@given(data=damaged(b"base: {model: no/such/base}\ndata: {train: rows.jsonl}\nstrategies:\n  - lora: {rank: 4}\n"))
def test_any_file_as_a_recipe(folder, capsys, data):
    for name in ("recipe.yaml", "recipe.json"):
        Path(name).write_bytes(data)
        before = listing()
        assert run(capsys, "tune", name) != 0
        run(capsys, "plan", name, lines=True)
        assert listing() == before
        Path(name).unlink()


@settings(bounded, max_examples=25 * MORE)
@given(
    key=st.sampled_from(
        ["train.steps", "lora.rank", "output", "data", "strategies", "x", "", "train..steps", "base.model"]
    )
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
    value=scalars.map(lambda value: value if isinstance(value, str) else json.dumps(value)),
)
def test_any_override(folder, capsys, key, value):
    Path("recipe.json").write_bytes(dump(RECIPE))
    before = listing()
    text = f"{key}={value}".replace("\0", "").encode("utf-8", "replace").decode()
    assert run(capsys, "tune", "recipe.json", "-o", text) != 0
    assert listing() == before


@settings(bounded, max_examples=40 * MORE)
@given(rows=st.lists(st.sampled_from(ROWS).flatmap(edited) | values | st.sampled_from(ROWS), min_size=1, max_size=4))
def test_any_rows(folder, capsys, tokenizer, rows):
    """Both up to the search for the base, and through the tokenizer."""
    path = Path("other.jsonl")
    path.write_bytes(b"\n".join(map(dump, rows)))
    before = listing()
    assert run(capsys, "tune", str(path), "--base", "no/such/base") != 0
    assert listing() == before
    for task in ("causal-lm", "sequence-classification"):
        try:
            build_examples(path, tokenizer, task, 64, cache_dir=Path("cache"))
        except BudwoodError as error:
            assert error.exit_code == 2, error
    shutil.rmtree("cache", ignore_errors=True)


@settings(bounded, max_examples=25 * MORE)
@given(
    data=damaged(b"".join(dump(ROWS[0]) + b"\n" for _ in range(3))), suffix=st.sampled_from([".jsonl", ".csv", ".json"])
)
def test_any_file_as_data(folder, capsys, data, suffix):
    path = Path(f"other{suffix}")
    path.write_bytes(data)
    before = listing()
    assert run(capsys, "tune", str(path), "--base", "no/such/base") != 0
    assert listing() == before
    path.unlink()


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return load_tokenizer(tiny_base)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A valid adapter, to be copied and corrupted."""
    return save_small(tmp_path_factory.mktemp("sound") / "adapter").directory


@settings(bounded, max_examples=80 * MORE)
@given(data=st.data())
def test_any_adapter(folder, capsys, sound, data):
    copy(sound)
    for name in data.draw(st.lists(st.sampled_from(sorted(p.name for p in sound.iterdir())), min_size=1, max_size=2)):
        content = data.draw(broken_file(sound / name))
        Path("adapter", name).write_bytes(content) if content is not None else Path("adapter", name).unlink(True)
    if data.draw(st.booleans()):
        rehash(Path("adapter"))
    before = listing()
    run(capsys, "adapter", "info", "adapter", *data.draw(st.sampled_from([[], ["--json"]])))
    assert listing() == before
    code = run(capsys, "adapter", "export", "adapter", "out")
    assert code == 0 or listing() == before


@settings(bounded, max_examples=25 * MORE)
@given(data=st.data())
def test_any_adapter_on_a_model(folder, pool, sound_on_model, data):
    """A refused adapter does not change the model."""
    copy(sound_on_model)
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_config.json", "adapter_model.safetensors"]))
    content = data.draw(broken_file(sound_on_model / name))
    Path("adapter", name).write_bytes(content) if content is not None else Path("adapter", name).unlink()
    modules = [name for name, _ in pool.model.named_modules()]
    try:
        pool.load("a", "adapter")
        pool.unload("a")
    except BudwoodError as error:
        assert error.exit_code in (2, 4), error
    assert [name for name, _ in pool.model.named_modules()] == modules


@pytest.fixture(scope="module")
def pool(tiny_base):
    from budwood import AdapterPool

    return AdapterPool(tiny_base, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def sound_on_model(tiny_base, tmp_path_factory) -> Path:
    from tests.core.adapters.conftest import make_stock

    return make_stock(tiny_base, tmp_path_factory.mktemp("stock") / "adapter", r=2, target_modules=["q_proj", "v_proj"])
