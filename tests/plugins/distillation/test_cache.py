"""The teacher cache: the loss is the same whether it is written or read, and a mismatching cache is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save
from tests.processes import run_in_two_processes
from transformers import AutoModelForCausalLM

import budwood
import budwood_distillation.cache as cache_module
from budwood import CorruptError, InputError, ResourceError, Run

Runs = Callable[..., Run]


@pytest.fixture
def teacher(tiny_bases: Callable[..., Path]) -> Path:
    return tiny_bases("teacher", seed=3, vocab_size=320)


@pytest.fixture
def options(teacher: Path, tmp_path: Path) -> dict[str, Any]:
    return {"teacher": str(teacher), "cache": str(tmp_path / "cache"), "top_k": 8, "temperature": 2.0}


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Function after whose call loading a teacher fails the test."""

    def refuse(*args: Any) -> None:
        raise AssertionError("the teacher was loaded")

    return lambda: monkeypatch.setattr(budwood, "load_frozen", refuse)


def files(options: dict[str, Any]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(options["cache"]).iterdir())}


def test_the_loss_is_bitwise_identical_with_and_without_the_cache(
    run_it: Runs, losses: Callable, options: dict, no_teacher: Callable, lines: list[str]
) -> None:
    """The first run writes the cache; its second epoch and the second run read it."""
    train = {"steps": 4, "batch_examples": 16}
    first = run_it(options, "first", train=train)
    written = files(options)
    no_teacher()
    lines.clear()
    second = run_it(options, "second", train=train)
    assert any(f"teacher cache {options['cache']}" in line and "the teacher is not loaded" in line for line in lines)
    for name in ("loss", "distillation", "causal_lm"):
        assert losses(second, name) == losses(first, name)
    for ours, theirs in zip(first.trainable, second.trainable, strict=True):
        assert torch.equal(ours, theirs)
    assert files(options) == written


def test_it_stores_the_top_k_and_the_rest_at_the_temperature(
    run_it: Runs, losses: Callable, at_labels: Callable, options: dict, teacher: Path, tiny_base: Path
) -> None:
    run = run_it(options, train={"micro_tokens": 128})
    models = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64).requires_grad_(False) for f in (teacher, tiny_base)
    ]
    p, q = ((at_labels(run, model)[0][:, :300] / 2).softmax(-1) for model in models)
    arrays = load_file(Path(options["cache"]) / "shard-00000.safetensors")
    top = p.topk(8)
    np.testing.assert_array_equal(arrays["ids"], top.indices)
    np.testing.assert_allclose(arrays["log_probs"][:, :8], top.values.log(), atol=1e-5)
    np.testing.assert_allclose(arrays["log_probs"][:, 8], (1 - top.values.sum(-1)).log(), atol=1e-5)
    coarse = [
        torch.cat([x.gather(1, top.indices), 1 - x.gather(1, top.indices).sum(-1, keepdim=True)], 1) for x in (p, q)
    ]
    expected = (coarse[0] * (coarse[0] / coarse[1]).log()).sum(-1).mean() * 4
    assert losses(run)[0] == pytest.approx(float(expected), rel=1e-5)


def test_a_cache_of_all_classes_is_exact(run_it: Runs, losses: Callable, tiny_base: Path, tmp_path: Path) -> None:
    labels = ("yes", "no", "maybe")
    first = run_it(None, "first", labels=labels, train={"steps": 6})
    teacher = {"teacher": f"base+{first.directory / 'adapter'}"}
    live = run_it(teacher, "live", labels=labels, train={"seed": 1})
    cached = run_it({**teacher, "cache": str(tmp_path / "cache")}, "cached", labels=labels, train={"seed": 1})
    assert losses(cached) == pytest.approx(losses(live), rel=1e-4)
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["top_k"] == 2


@pytest.mark.parametrize("teacher_name", ["base", "base+"])
def test_the_base_as_teacher_can_be_cached(
    run_it: Runs, losses: Callable, options: dict, teacher_name: str, tiny_base: Path
) -> None:
    if teacher_name == "base+":
        teacher_name += str(run_it(None, "other").directory / "adapter")
    given = {**options, "teacher": teacher_name, "top_k": 299, "temperature": 1.0}
    live = run_it({"teacher": teacher_name}, "live")
    cached = run_it(given, "cached")
    assert losses(cached) == pytest.approx(losses(live), rel=1e-4, abs=1e-6)
    again = run_it(given, "again")
    assert losses(again) == losses(cached)


def test_the_cache_of_a_killed_run_is_completed(
    run_it: Runs, losses: Callable, options: dict, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr(cache_module, "SHARD_LABELS", 20)
    run = run_it(options, "whole")
    whole, folder = files(options), Path(options["cache"])
    assert len(whole) > 5
    (folder / "shard-00001.safetensors").unlink()
    (folder / "shard-00003.safetensors").unlink()
    (folder / ".shard-00003.safetensors.1.partial").write_bytes(b"half")
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    lines.clear()
    again = run_it(options, "again")
    assert any("2 of " in line and "shards to compute" in line for line in lines)
    assert files(options) == whole
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept, "existing shards are not computed again"
    assert losses(again) == losses(run)


def test_the_folder_of_a_run_killed_before_its_first_shard_is_accepted(run_it: Runs, options: dict) -> None:
    folder = Path(options["cache"])
    folder.mkdir()
    (folder / ".cache.json.1.partial").write_text("{")
    run_it(options)
    assert sorted(files(options)) == ["cache.json", "shard-00000.safetensors"]


def test_a_corrupt_shard_is_refused(
    run_it: Runs, losses: Callable, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "SHARD_LABELS", 20)
    first = run_it(options, "first")
    path = Path(options["cache"]) / "shard-00001.safetensors"
    data = path.read_bytes()
    damaged = {
        "a bit": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        "cut": data[:-100],
        "another part": (path.parent / "shard-00000.safetensors").read_bytes(),
        "another shape": save({"ids": np.zeros((3, 8), np.int32), "log_probs": np.zeros((3, 9), np.float32)}),
        "empty": b"",
    }
    for number, content in enumerate(damaged.values()):
        path.write_bytes(content)
        with pytest.raises(CorruptError, match="shard-00001.safetensors: .*Delete it; the next run computes it again"):
            run_it(options, f"damaged{number}")
    path.unlink()
    assert losses(run_it(options, "third")) == losses(first)


def test_a_cache_with_a_different_key_is_refused_before_the_base_loads(
    run_it: Runs, options: dict, tiny_bases: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_it(options, "first")
    before = files(options)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("budwood.training.setup.load_base", refuse)
    other = tiny_bases("other-teacher", seed=9)
    changes: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("teacher", {"teacher": str(other)}, {}),
        ("teacher", {"teacher": "base"}, {}),
        ("quantization (none there, nf4 here)", {"quantization": "nf4"}, {}),
        ("temperature (2.0 there, 3.0 here)", {"temperature": 3.0}, {}),
        ("top_k (8 there, 9 here)", {"top_k": 9}, {}),
        ("precision (float32 there, bfloat16 here)", {}, {"train": {"precision": "bf16"}}),
        ("max_length (128 there, 12 here)", {}, {"data": {"max_length": 12}}),
    ]
    for number, (named, change, sections) in enumerate(changes):
        with pytest.raises(InputError) as error:
            run_it({**options, **change}, f"run{number}", **sections)
        message = str(error.value)
        assert f"cache: {options['cache']} is from a different run; it differs in " in message
        assert named in message and "Delete the folder, or choose another one." in message and "\n" not in message
    rows = tmp_path / "rows.jsonl"
    rows.write_text((tmp_path / "train.jsonl").read_text() + '{"prompt": "a", "completion": " b"}\n')
    with pytest.raises(InputError, match="it differs in data "):
        run_it(options, "more", data={"train": str(rows)})
    assert files(options) == before


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ({"notes.txt": "x"}, InputError, "is not empty and not a teacher cache: choose another folder"),
        ({"cache.json": "{"}, CorruptError, "cache.json: is not JSON"),
        ({"cache.json": "[1]"}, CorruptError, "cache.json: is not a JSON object"),
        ({"cache.json": "{}"}, InputError, "is from a different run"),
    ],
)
def test_other_folders_are_refused_and_not_changed(
    run_it: Runs, options: dict, content: dict[str, str], kind: type, message: str
) -> None:
    folder = Path(options["cache"])
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    with pytest.raises(kind, match=message):
        run_it(options)
    assert {path.name: path.read_text() for path in folder.iterdir()} == content


def test_a_folder_that_cannot_be_created_is_named(run_it: Runs, options: dict, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be"):
        run_it({**options, "cache": str(tmp_path / "file" / "cache")})


def test_two_processes_share_the_work(
    make_recipe: Callable, run_it: Runs, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "SHARD_LABELS", 20)
    train = {"micro_tokens": 128, "steps": 2}
    one = run_it({**options, "cache": str(tmp_path / "one-cache")}, "one", train=train)
    path = tmp_path / "two.yaml"
    path.write_text(make_recipe(options, "two", train=train).to_yaml(), encoding="utf-8")
    run_in_two_processes(
        "import torch\n"
        "import budwood_distillation.cache as cache\ncache.SHARD_LABELS = 20\n"
        "from budwood.training.loop import tune\n"
        f"assert tune({str(path)!r}, quiet=True).processes == 2\n",
        tmp_path,
    )
    parts = [sorted(Path(folder).glob("shard-*")) for folder in (tmp_path / "one-cache", options["cache"])]
    assert [p.name for p in parts[0]] == [p.name for p in parts[1]]
    for mine, theirs in zip(*parts, strict=True):
        a, b = load_file(mine), load_file(theirs)
        np.testing.assert_array_equal(a["ids"], b["ids"])
        np.testing.assert_allclose(a["log_probs"], b["log_probs"], atol=1e-5)
    from safetensors.torch import load_file as load_torch

    adapters = [load_torch(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")]
    assert max(float((adapters[0][key] - adapters[1][key]).abs().max()) for key in adapters[0]) < 1e-5
    assert one.processes == 1
