"""The arms of `benchmarks.real` train on the same rows in the same order, and its tables show what was measured."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import real, real_arms, real_page
from benchmarks import real_tasks as t
from benchmarks import workload as w

SMALL = w.Size(1, 32, 48, 4, 2, 300)


@pytest.fixture
def task(tmp_path: Path) -> t.Task:
    """A task on a tiny base: eight rows of different lengths, two epochs of two steps."""
    base = w.build(tmp_path / "workload", 1, SMALL).base
    rows = [
        {"prompt": " ".join(f"w{4 + (7 * i + j) % 90}" for j in range(3 + i)), "completion": f" w{100 + i} w{110 + i}"}
        for i in range(8)
    ]
    return replace(
        t.TASKS["completion"], base=lambda: base, rows=lambda: (rows, rows[:4]), train=8, score=4, epochs=2, batch=4
    )


def _job(task: t.Task, arm: str, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    data = folder / "train.jsonl"
    t.write_rows(task.draw(3)[0], t.columns(task.kind), data)
    return {
        "arm": arm, "kind": task.kind, "base": str(task.base()), "data": str(data), "folder": str(folder),
        "max_length": real_arms.MAX_LENGTH, "rank": t.RANK, "alpha": t.ALPHA, "targets": task.targets, "clip": t.CLIP,
        "epochs": task.epochs, "batch": task.batch, "rate": 1e-2, "warmup": 0, "seed": 3,
        "order": task.order(3), "rows": 2, "profile": False, "precision": "fp32", "quantization": "none",
    }  # fmt: skip


@pytest.mark.parametrize("peer", ["trainer", "trl", "trl-packed"])
def test_arms_see_the_same_steps(task: t.Task, tmp_path: Path, peer: str) -> None:
    if peer != "trainer":
        pytest.importorskip("trl")
    clocks, scores = {}, {}
    for arm in ("budwood", peer):
        clocks[arm] = real_arms.Clock(profile=False)
        output = real_arms.ARMS[arm](_job(task, arm, tmp_path / arm), clocks[arm])
        scores[arm] = t.score(task, Path(output["adapter"]), task.draw(3)[1], [])
    ours, theirs = (clocks[arm].losses for arm in ("budwood", peer))
    assert len(ours) == len(theirs) == 4 and len(clocks["budwood"].times) == len(clocks[peer].times) == 5
    # Other rows in a step, or one label more or fewer, would change the loss in its second digit.
    assert theirs[:2] == pytest.approx(ours[:2], rel=2e-3)
    assert scores["budwood"]["loss"] == pytest.approx(scores[peer]["loss"], rel=0.1)


def test_steps_are_whole() -> None:
    for task in t.TASKS.values():
        for whole in (task, replace(task, **(task.quick or {}))):
            assert whole.train % whole.batch == 0 and whole.seeds > 0, task.name


def test_answers_are_counted() -> None:
    at = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0]]).bool()  # answers of two, one and one tokens
    assert t._answers(at, torch.tensor([True, False, True, True])) == (2, 3)


def test_marked_template_finds_the_answers() -> None:
    import jinja2

    source = real_arms.MARKED_TEMPLATE.replace("{% generation %}", "<<").replace("{% endgeneration %}", ">>")
    asked, answer = {"role": "user", "content": "poor"}, {"role": "assistant", "content": "negative"}
    text = jinja2.Template(source).render(messages=[asked, answer], add_generation_prompt=False)
    assert text.endswith("<|im_start|>user\npoor<|im_end|>\n<|im_start|>assistant\n<<negative<|im_end|>>>\n")


def test_operations(task: t.Task) -> None:
    work = t.Work(task, task.base())
    linears = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    frozen, first = sum(a * b for a, b in linears), 32 * 32 + 2 * 32 * 16
    adapter = t.RANK * sum(a + b for a, b in linears)
    expected = 5 * (4 * frozen - 2 * first + 6 * adapter + 6 * 5 * 32) + 2 * 4 * 32 * 300
    assert work.flops(5, 2) == expected


def _run(score: float, processor: float, peak: float) -> dict[str, Any]:
    parts = {f"{part}_{clock}": processor / 4 for part in ("start", "steps", "end") for clock in ("wall", "processor")}
    whole = {"process_wall": processor, "process_processor": processor, "peak_bytes": peak, "loaded_bytes": peak / 2}
    counts = {"parameters": 10, "tokens": 80, "labels": 8, "flops": 1e9 * processor}
    return {**parts, **whole, **counts, "score": score, "rates": {"wall": 8e9, "processor": 5e9}}


def test_page_begins_with_what_is_missed() -> None:
    ours = {str(seed): _run(0.50 + 0.01 * seed, 10, 7e8) for seed in range(3)}
    theirs = {str(seed): _run(0.55 + 0.011 * seed, 9, 1e9) | {"process_wall": 8} for seed in range(3)}
    result = {
        "machine": {"processor": "P", "cores": "2", "torch": "1"}, "threads": 1, "precision": "fp32", "quick": True,
        "minutes": 3.0, "left_out": ["chat, seed 0: it may take 9.0 minutes, and 1.0 are left"],
        "tasks": {
            name: {"title": title, "rows": 8, "epochs": 1, "batch": 4, "rate": 1e-3, "warmup": 0.25, "scored": 4}
            for name, title in (("completion", "a task"), ("chat", "not run"))
        },
        "runs": {"completion": {"budwood": ours, "trainer": theirs, "trl": {}}, "chat": {"budwood": {}, "trainer": {}}},
        "profiles": {
            "completion": {
                "operators": [["aten::mm", 60.0, 2.4e5], ["aten::copy_", 40.0, 0]],
                "parts": ["core   backward  6  1.9 s  25%  4.0 s", "lora   check_plan  2  1.0 s  13%  1.0 s  +5.7 MiB"],
            }
        },
    }  # fmt: skip
    text = real_page.page(json.loads(json.dumps(result)))
    missed, met = text.index("Missed"), text.find("Met,")
    score, process = text.index("score against PEFT + Trainer: -5.1"), text.index("0.90 times as fast")
    assert missed < min(score, process)
    assert "0.70 of the memory of PEFT + Trainer; target 0.6; 50% of ours is there before the first step" in text
    assert met == -1 or met > process
    assert "0.90 times as fast in processor time" in text and "0.80 times as fast by the clock" in text
    undecided = text.index("Not decided")
    assert missed < undecided < text.index("left out: chat, seed 0")
    assert "| 0.90× |" in text and "80% |" in text  # 10e9 / 2.5 s / 5e9
    assert (
        "60% of the time in matrix products, which reach 50% of the matmul rate" in text and "check_plan 1.0 s" in text
    )
    assert "rate 0.001 after a warm-up of 25% of the steps, 4 rows scored" in text
    assert "not run" not in text and not math.isnan(
        real_page.ratio(result["runs"]["completion"], "trainer", real_page._peak)
    )


def test_interrupted_before_anything() -> None:
    assert real_page.page({"tasks": {"chat": {}}, "runs": {"chat": {"budwood": {}}}}) == "Nothing was measured.\n"


def test_evidence_page_ends_with_real_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import evidence

    results = tmp_path / "real.json"
    monkeypatch.setattr(evidence, "SECTIONS", {results: real_page.section})
    saved = json.loads(evidence.JSON.read_text(encoding="utf-8"))
    evidence.render(saved, tmp_path / "without.md")
    nothing = {"quick": True, "tasks": {"chat": {}}, "runs": {"chat": {"budwood": {}}}}
    results.write_text(json.dumps(nothing), encoding="utf-8")
    evidence.render(saved, tmp_path / "with.md")
    without, with_real = ((tmp_path / f"{name}.md").read_text(encoding="utf-8") for name in ("without", "with"))
    assert with_real.startswith(without) and "benchmarks.real --quick" in with_real[len(without) :]


def test_resume_keeps_whole_rounds_and_repeats_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of which an arm is missing is measured again; another machine's results are refused."""
    out = tmp_path / "real.json"
    options = argparse.Namespace(
        precision="fp32", threads=1, quick=False, note="", minutes=240.0, out=out, resume=False
    )  # fmt: skip
    task = replace(t.TASKS["completion"], seeds=3)
    first = real.Benchmark([task], options, tmp_path)
    for arm, seeds in {"budwood": "01", "trainer": "01", "trl": "0", "trl-packed": "0"}.items():
        first.result["runs"][task.name][arm] = {seed: _run(0.5, 10, 7e8) for seed in seeds}
    first.save()
    options.resume = True
    second = real.Benchmark([task], options, tmp_path)
    assert all(list(runs) == ["0"] for runs in second.result["runs"][task.name].values())
    rounds: list[int] = []
    monkeypatch.setattr(second, "_round", lambda task, seed: rounds.append(seed))
    monkeypatch.setattr(second, "_profile", lambda task: None)
    second.run()
    assert rounds == [1, 2]
    earlier = json.loads(out.read_text(encoding="utf-8"))
    out.write_text(json.dumps({**earlier, "left_out": ["completion, seed 2: late", "nf4, seed 1: late"]}))
    both = real.Benchmark([t.TASKS["nf4"], task], options, tmp_path)
    assert list(both.result["runs"]) == ["completion", "nf4"] == list(both.result["tasks"])  # in the earlier order
    third = real.Benchmark([task], options, tmp_path)
    assert third.result["left_out"] == ["nf4, seed 1: late"]  # what it does not try is not forgotten
    options.threads = 2
    with pytest.raises(SystemExit, match="threads was 1, now 2; use another --out"):
        real.Benchmark([task], options, tmp_path)
