"""Encoding in several processes and memory-mapping arrays give the same examples, errors and counts."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from budwood.data import cache, spool
from budwood.data.build import build_examples
from budwood.data.examples import Examples
from budwood.data.spool import Spool
from budwood.data.workers import _portable
from budwood.errors import InputError, ResourceError
from budwood.model.text_tasks import CausalLM

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.reasoning_content is defined and loop.last %}({{ m.reasoning_content }}){% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Renders the reasoning of the last answer only, so conversations with earlier reasoning are split."""


def chats() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(2500):
        turns = [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i % 900}"}]
        rows.append({"messages": turns * (1 + i % 2), "id": i})
    rows[1300]["messages"] = [{"role": "user", "content": "no answer"}]
    return rows


def same(one: Examples, two: Examples) -> None:
    assert one.describe() == two.describe()
    assert one.stats == two.stats
    assert (one.labels, one.skipped, one.stop_ids) == (two.labels, two.skipped, two.stop_ids)
    assert list(one.keys) == list(two.keys)
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert (a.key, a.row, a.group) == (b.key, b.row, b.group)
        for name in ("label_positions", "labels", "weights"):
            assert getattr(a, name).dtype == getattr(b, name).dtype
            assert np.array_equal(getattr(a, name), getattr(b, name))
        assert np.array_equal(a.inputs["input_ids"], b.inputs["input_ids"])


@pytest.fixture
def build(tmp_path: Path, write: Any, byte_level: Any, forked: None) -> Any:
    tokenizer = byte_level(template=TEMPLATE)

    def make(rows: Any, processes: int, task: Any = "causal-lm", length: int = 64, **options: Any) -> Examples:
        folder = tmp_path / f"cache-{processes}"
        return build_examples(write(rows), tokenizer, task, length, cache_dir=folder, processes=processes, **options)

    return make


def test_conversations_and_the_progress(build: Any) -> None:
    rows = chats()
    seen: list[tuple[int, int]] = []
    same(build(rows, 1), build(rows, 2, progress=lambda done, total: seen.append((done, total))))
    assert seen == [(1024, 2500), (2048, 2500), (2500, 2500)]


def test_learned_classes_weights_and_skipped_rows(build: Any) -> None:
    rows = [{"text": f"text {i}", "label": f"class {(i * 7) % 23}", "weight": 1 + i % 2} for i in range(2300)]
    rows[2000]["label"] = None  # type: ignore[assignment]
    rows[11]["weight"] = -1
    options = {"task": "sequence-classification", "skip_bad_rows": True}
    one, two = build(rows, 1, **options), build(rows, 2, **options)
    assert len(one.labels) == 23
    assert one.stats.weights == [1.0, 2.0]
    assert len(one.skipped or ()) == 2
    same(one, two)


def test_the_first_bad_row_is_named(build: Any) -> None:
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(3000)]
    rows[1500]["completion"] = rows[2900]["completion"] = 5  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"train.jsonl:1501: "):
        build(rows, 2)


class Killed(CausalLM):
    def encode(self, items: Any, where: Any, encoder: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class OddError(InputError):
    def __init__(self, message: str, number: int) -> None:
        super().__init__(f"{message} {number}")


def test_a_killed_process(build: Any) -> None:
    with pytest.raises(ResourceError, match="a process that encodes data was killed by the system"):
        build([{"text": "t"}], 2, task=Killed())


def test_errors_that_reach_another_process() -> None:
    odd, bug = _portable(OddError("odd", 1)), _portable(KeyError("x"))
    assert (type(odd), str(odd)) == (InputError, "odd 1")
    assert (type(bug), str(bug)) == (RuntimeError, "KeyError: 'x'")


def test_a_task_of_the_main_program_encodes_there(build: Any) -> None:
    class Local(CausalLM):
        pids: list[int] = []

        def encode(self, items: Any, where: Any, encoder: Any) -> Any:
            self.pids.append(os.getpid())
            return super().encode(items, where, encoder)

    assert len(build([{"text": f"t{i}"} for i in range(1100)], 2, task=Local())) == 1100
    assert Local.pids == [os.getpid()] * 2


def test_arrays_that_are_mapped_from_files(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = chats()
    small = build(rows, 1)
    for module in (spool, cache):
        monkeypatch.setattr(module, "LARGE", 10_000)
    encoded, cached = build(rows, 1, length=65), build(rows, 1, length=65)
    assert (encoded.from_cache, cached.from_cache) == (False, True)
    for large in (encoded, cached):
        assert isinstance(large.lengths, np.memmap)
        same(small, large)


def test_a_mapped_file_does_not_stay_in_memory(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "LARGE", 1000)
    examples = build([{"text": json.dumps(list(range(n, n + 500)))} for n in range(1500)], 1, length=2048)

    def mapped() -> int:
        text = Path("/proc/self/smaps").read_text()
        parts = text.split("input_ids.values.npy")[1:]
        return sum(int(part.split("Rss:")[1].split()[0]) for part in parts) * 1024

    examples._parts["inputs/input_ids"].release()
    monkeypatch.setattr("budwood.data.ragged.RESIDENT", 4_000_000)
    most = 0
    for count, index in enumerate(np.random.default_rng(0).permutation(len(examples))):
        assert examples[int(index)].inputs["input_ids"].sum() > 0
        if count % 50 == 0:
            most = max(most, mapped())
    assert 0 < most < 7_000_000
    assert examples._parts["inputs/input_ids"].values.nbytes > 10_000_000


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "LARGE", 1000)
    large = Spool(tmp_path)
    large.append({"a": np.zeros(1000)})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool.np, "ascontiguousarray", full)
    with pytest.raises(ResourceError, match="No space left on device: .* bytes are needed, and .* are free"):
        large.append({"a": np.zeros(1000)})
    del large
    assert list(tmp_path.iterdir()) == []
