"""report.html and `budwood compare`, on run folders that are written by hand."""

import json
import re
from pathlib import Path

import pytest

from budwood.cli.app import run as command
from budwood.recipe.file import dump
from budwood.training.charts import chart, ticks
from budwood.training.page import page, write_page
from budwood.training.runs import read_run, running_mean


def write_run(folder: Path, rate: float = 1e-3, loss: float = 1.0, evil: str = "", **changes) -> Path:
    folder.mkdir(parents=True)
    strategy = {"name": "adalora", "distribution": "budwood 1", "options": {"target_rank": 8}}
    data = {
        "path": f"{evil}train.jsonl", "format": "text", "examples": 9, "tokens": 90, "labels": 30, "truncated": 1,
        "dropped": {"empty": 2}, "skipped": {}, "notes": [f"mixed: a 6 rows (66.7%), {evil}b 3 rows (33.3%)"],
    }  # fmt: skip
    manifest = {
        "budwood": "1", "python": "3.11", "versions": {"torch": "2"}, "strategies": [strategy], "task": "causal-lm",
        "base": {"name": f"{evil}base", "quantization": "nf4", "fingerprint": "f"}, "device": "cpu",
        "data": {"train": "t", "eval": "e"}, "examples": {"train": data}, "steps": 3, "step": 3, "finished": True,
        "best_metric": {"name": "eval_accuracy", "higher": True}, "before": {"eval_accuracy": 0.1},
        "metrics": {"eval_accuracy": 1 - loss / 4, "best_step": 3.0}, "peak_memory_bytes": 2**30, "seconds": 2.0,
        "planned": {"memory": {"peak_bytes": 1}, "host": {"peak_bytes": 2**31}, "time": {"seconds": [7, 9]}},
        "experts": {f"{evil}layers.0.experts": [0.5, 0.3, 0.2, 0.0]},
        "hooks": [{"owner": "core", "hook": "steps", "calls": 1, "own_seconds": 1.0, "seconds": 8.0}], **changes,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    recipe = {"strategies": [{"adalora": {"target_rank": 8}}], "train": {"learning_rate": rate}, "output": str(folder)}
    (folder / "recipe.yaml").write_text(dump(recipe))
    answers = [{"prompt": f"{evil}p", "answer": "a", "reference": "b"}]
    records = [
        *({"kind": "step", "step": step, "loss": loss * step, "rank_budget": 9.0 - step} for step in (1, 2, 3)),
        {"kind": "evaluation", "step": 3, "eval_accuracy": 0.5},
        {"kind": "answers", "step": 3, "answers": answers},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "st')
    samples = [
        {"step": 2, "reward": reward, "prompt": evil, "completion": f"answer {reward}"} for reward in (0.5, 0.1, 0.9)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (folder / "adapter").mkdir()
    config = {"rank_pattern": {f"{evil}q_proj.lora_E": [True] * 3 + [False], "v_proj": 5}}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_page_shows_what_the_run_recorded_and_escapes_it(tmp_path: Path) -> None:
    evil = "<script>x</script>"
    folder = write_run(tmp_path / "run", evil=evil)
    write_page(folder)
    html = (folder / "report.html").read_text()
    assert evil not in html and "&lt;script&gt;" in html
    assert not re.search(r"(src|href)=|url\(|@import|<script|<link", html)  # no outside assets
    for text in (
        "selects the best, higher is better", "The adapter is that of step 3", "rank budget", "1. adalora",
        "reward 0.9", "reward 0.1", "differs from the data", "8 ranks in 2 modules", "66.7%", "2.00 GiB", "1.00 GiB",
        "7 to 9 s", "8 s", "33.3%", "learning_rate: 0.001", "expert 0: 50.00%", "2.00", "expert 3: 0.00%",
    ):  # fmt: skip
        assert text in html, text
    assert html.count("<figure>") == 3  # loss, accuracy, rank_budget
    (folder / "metrics.jsonl").unlink()
    for name in ("adapter/adapter_config.json", "samples.jsonl", "recipe.yaml"):
        (folder / name).unlink()
    assert "<figure>" not in page(read_run(folder))  # an incomplete folder is shown as far as it goes


def test_charts() -> None:
    assert chart("x", [("a", [])]) == chart("x", [("a", [(1, float("nan"))])]) == ""
    assert "nan" not in chart("x", [("a", [(1, 2.0), (2, float("inf")), (3, 2.0)])])
    long = chart("x", [("a", [(step, 1.0) for step in range(10_000)])])
    assert len(re.search('points="([^"]*)"', long)[1].split()) <= 300
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]) and ticks(1, 7, whole=True) == [2, 4, 6]
    for low, high in ((3.0, 3.0), (0.0, 1e-30), (-1e20, 1e20), (1e300, 1e300), (0, 0)):
        found = ticks(low, high)
        assert found[0] <= low and found[-1] >= high and len(found) < 15
    assert running_mean([(1, 1.0), (2, 2.0)]) == [(1, 1.0), (2, pytest.approx(1.1))]


def test_compare_tells_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/a"), 1e-3, 1.0)
    write_run(Path("runs/b"), 2e-3, 2.0, versions={"torch": "3"})
    write_run(Path("runs/c"), 1e-3, 1.0, data={"train": "t", "eval": "other"})
    assert command(["compare", "runs/a", "runs/b"]) == 0
    out = capsys.readouterr().out
    assert "best by eval_accuracy (higher is better): a" in out
    assert re.search(r"train.learning_rate +0.001 +0.002\n", out) and re.search(r"torch +2 +3\n", out)
    assert "adalora" not in out and "output" not in out  # the same, or always different
    assert Path("compare.png").read_bytes().startswith(b"\x89PNG")
    assert command(["compare", "runs/a", "runs/c", "--json", "--plot", "x.png", "--metric", "rank_budget"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["best"]["run"] is None and result["versions"] == {"data.eval": ["e", "other"]}
    assert result["recipe"] == {} and [run["metrics"]["eval_accuracy"] for run in result["runs"]] == [0.75, 0.75]


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["a"], "two or more runs", 2),
        (["a", "a"], "given twice", 2),
        (["a", "none"], "none: no such folder", 2),
        (["a", "empty"], "empty is not a run's folder", 2),
        (["a", "b", "--metric", "rank_budge"], "Did you mean 'rank_budget'", 2),
        (["a", "b", "--plot", "x.pdf"], "ends with .png", 2),
        (["a", "b", "--plot", "none/x.png"], "does not exist", 2),
    ],
)
def test_bad_input(arguments: list[str], message: str, code: int, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"))
    write_run(Path("b"))
    Path("empty").mkdir()
    assert command(["compare", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not Path("x.pdf").exists()
