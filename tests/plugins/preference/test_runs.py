"""Runs on pairs and judged answers: what is logged and evaluated, the cached reference, and refused input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.plugins.preference.conftest import judge, make_pairs, stock
from torch import Tensor

from budwood import LossTerm, Run, Step, Strategy, hookimpl
from budwood.cli import app
from budwood.errors import InputError
from budwood.testing.bench import register
from budwood.training import setup
from budwood.training.evaluate import evaluate_adapter
from budwood.training.loop import tune
from budwood.training.outcome import advice
from budwood.training.report import Report, draw_loss

LORA = {"lora": {"rank": 3}}


def answers(run: Run, model: torch.nn.Module) -> tuple[list[float], list[Tensor]]:
    """Return the log-probability of each evaluation answer, and the next token's distribution at its labels."""
    sums, distributions = [], []
    for example in run.eval_examples or ():
        ids = torch.tensor(example.inputs["input_ids"].astype("int64"))
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].log_softmax(-1)[torch.tensor(example.label_positions)]
        sums.append(float(log_p.gather(-1, torch.tensor(example.labels.astype("int64"))[:, None]).sum()))
        distributions.append(log_p)
    return sums, distributions


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that commands show."""
    lines: list[str] = []
    monkeypatch.setattr(Report, "say", lambda self, text: lines.append(text))
    return lines


def steps(run: Run, kind: str = "step") -> list[dict[str, float]]:
    lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


@pytest.fixture
def evaluated(make_recipe: Callable[..., Any]) -> Run:
    held_out = [{**row, "weight": weight} for row, weight in zip(make_pairs(5, 1), (1, 1, 0.5, 2, 1), strict=True)]
    return tune(make_recipe([LORA, {"dpo": {"beta": 0.3}}], evaluate=held_out, eval_every=1), quiet=True)


def test_held_out_pairs_are_measured_as_by_the_stock_model(evaluated: Run) -> None:
    """Rewards, margin, accuracy, log-probabilities and the KL; the loss is that of the chosen answers alone."""
    run = evaluated
    (policy, p), (base, q) = (answers(run, stock(run, adapted)) for adapted in (True, False))
    weights = torch.tensor([1, 1, 0.5, 2, 1])
    gain = 0.3 * (torch.tensor(policy) - torch.tensor(base))
    chosen, rejected = gain[0::2], gain[1::2]

    def mean(values: Tensor) -> float:
        return float((values * weights).sum() / weights.sum())

    expected = {
        "eval_reward_chosen": mean(chosen), "eval_reward_rejected": mean(rejected),
        "eval_margin": mean(chosen - rejected),
        "eval_accuracy": mean((chosen > rejected).float()), "eval_log_prob_chosen": mean(torch.tensor(policy[0::2])),
        "eval_log_prob_rejected": mean(torch.tensor(policy[1::2])),
        "eval_dpo": mean(-torch.nn.functional.logsigmoid(chosen - rejected)),
        "eval_kl": float(torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)]).mean()),
    }  # fmt: skip
    labels = torch.tensor([float(len(d)) for d in p[0::2]])
    expected["eval_loss"] = -float((torch.tensor(policy[0::2]) * weights).sum() / (labels * weights).sum())
    for name, value in expected.items():
        assert run.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert run.best_metric is not None and (run.best_metric.name, run.best_metric.higher) == ("eval_accuracy", True)


def test_before_the_first_step_policy_and_reference_are_equal(evaluated: Run) -> None:
    """Equal rewards count one half; nothing has moved."""
    start = steps(evaluated, "evaluation")[0]
    assert (start["eval_accuracy"], start["eval_margin"], start["eval_kl"]) == (0.5, 0, 0)
    first, last = steps(evaluated)[0], steps(evaluated)[-1]
    assert first["dpo"] == pytest.approx(0.6931472, rel=1e-6)
    assert first["dpo_accuracy"] == 0.5 and first["dpo_reward_chosen"] == 0
    assert last["dpo"] < first["dpo"] and last["dpo_margin"] > 0
    assert last["loss"] == pytest.approx(last["dpo"], rel=1e-6), "only the objective is in the loss"


def test_the_metric_of_the_objective_is_drawn_and_judged(evaluated: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task's loss, which may rise, is neither beside the objective's in the plot nor a reason for advice."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    log = evaluated.directory / "metrics.jsonl"
    draw_loss(log, evaluated.directory / "loss.png", "eval_accuracy")
    losses, metric = figures[0].axes
    assert list(losses.lines[0].get_ydata()) == [step["loss"] for step in steps(evaluated)]
    assert losses.get_ylim()[0] == 0
    accuracies = [step["eval_accuracy"] for step in steps(evaluated, "evaluation")]
    assert [list(line.get_ydata()) for line in metric.lines] == [accuracies]
    log.write_text(log.read_text().replace('"loss": ', '"loss": -'))
    draw_loss(log, evaluated.directory / "loss.png", "eval_accuracy")
    assert figures[1].axes[0].get_ylim()[0] < min(step["loss"] for step in steps(evaluated)) < 0

    evaluated.metrics |= {"eval_loss": 2 * evaluated.before["eval_loss"], "eval_accuracy": 0.75}
    assert advice(evaluated, log) == ""
    evaluated.metrics["eval_accuracy"] = 0.25
    assert "accuracy did not improve (0.5000 before, 0.2500 after): raise train.steps" in advice(evaluated, log)


def test_held_out_judged_answers(make_recipe: Callable[..., Any]) -> None:
    """The accuracy is the share of good and bad answers whose rewards are in the right order."""
    recipe = make_recipe([LORA, "kto"], judge(make_pairs(12)), evaluate=judge(make_pairs(7, 1)))
    run = tune(recipe, quiet=True)
    (policy, p), (base, q) = (answers(run, stock(run, adapted)) for adapted in (True, False))
    gain = 0.1 * (torch.tensor(policy) - torch.tensor(base))
    good, bad = gain[0::2], gain[1::2]
    assert run.metrics["eval_accuracy"] == pytest.approx(float((good[:, None] > bad[None]).float().mean()), abs=1e-6)
    assert run.metrics["eval_margin"] == pytest.approx(float(good.mean() - bad.mean()), rel=1e-3, abs=1e-4)
    kl = float(torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)]).mean())
    assert run.metrics["eval_kl"] == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert {"kto_kl", "kto_reward_desirable", "kto_reward_undesirable"} <= steps(run)[0].keys()


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_cached_reference_trains_the_same_adapter(
    name: str, make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_pairs(12) if name == "dpo" else judge(make_pairs(12))
    runs = []
    for reference in ("live", "cached"):
        options = {"reference": reference, "beta": 0.3}
        with monkeypatch.context() as patch:
            if reference == "cached":  # after the cache is filled, no step asks the reference
                patch.setattr("budwood.training.step.read_reference", lambda *_: pytest.fail("the reference runs"))
            runs.append(tune(make_recipe([LORA, {name: options}], rows, output=reference), quiet=True))
    for live, cached in zip(*(run.trainable for run in runs), strict=True):
        torch.testing.assert_close(cached, live, rtol=1e-3, atol=1e-5)


def test_a_reference_is_computed_once_for_an_objective_and_a_distillation(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from budwood.training import step

    calls = []
    read = step.read_reference
    monkeypatch.setattr(step, "read_reference", lambda *given: calls.append(1) or read(*given))
    tune(make_recipe([LORA, "dpo", {"distillation": {"teacher": "base", "weight": 0.3}}]), quiet=True)
    assert len(calls) == 3


def test_the_reference_of_kto_runs_once_a_micro_batch(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from budwood.training import step

    read, seen = step.read_reference, []
    monkeypatch.setattr(
        step,
        "read_reference",
        lambda run, batch, which: seen.append((run.step, *batch.keys)) or read(run, batch, which),
    )
    tune(make_recipe([LORA, "kto"], judge(make_pairs(12)), micro_tokens=32, data={"max_length": 32}), quiet=True)
    assert {step for step, *_ in seen} == {0, 1, 2}
    assert len(seen) == len(set(seen)) > 3, "several micro-batches in a step, each of which runs the reference once"


TEXTS = [{"prompt": "games:", "completion": " section"}] * 4
REFUSED = {
    "pairs without an objective": (
        [LORA], make_pairs(4),
        ("prompt + chosen + rejected are preference pairs, which need an objective: add a strategy such as cpo, dpo, "
         "kto, orpo, ", "simpo. To train on the chosen answers alone, remove 'rejected'"),  # other tests add strategies
    ),
    "judged answers without an objective": (
        [LORA], judge(make_pairs(4)), "are judged answers, which need an objective: add a strategy such as kto. To ",
    ),
    "an objective without pairs": (
        [LORA, "dpo"], TEXTS,
        "was read as prompt + completion, but strategy 'dpo' (budwood 0.1.0) trains on preference pairs: give prompt + "
        "chosen + rejected; input + preferred_output + non_preferred_output; chosen + rejected, or remove dpo",
    ),
    "an objective on judged answers": (
        [LORA, "orpo"], judge(make_pairs(4)), "holds judged answers, but strategy 'orpo' (budwood 0.1.0) trains on ",
    ),
    "only good answers": (
        [LORA, "kto"], [row for row in judge(make_pairs(8)) if row["label"]],
        "train.jsonl:1: like all 4 answers it is judged good: strategy 'kto' (budwood 0.1.0) compares both",
    ),
    "two objectives": ([LORA, "dpo", "orpo"], make_pairs(4), "both own the slot 'objective': leave one out"),
    "a reference without an adapter": (["dpo"], make_pairs(4), "requires 'adapter'"),
    "robust without a share": (
        [LORA, {"dpo": {"loss": "robust"}}], make_pairs(4), "robust needs the share of wrong pairs, such as 0.1",
    ),
    "an option that is not used": (
        [LORA, {"dpo": {"loss": "ipo", "label_smoothing": 0.1}}], make_pairs(4), "label_smoothing: not used by ipo",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_before_the_base_loads(
    name: str, make_recipe: Callable[..., Any], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    strategies, rows, message = REFUSED[name]
    monkeypatch.setattr(setup, "load_base", lambda *_: pytest.fail("the base loads"))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "base": {"model": str(tiny_base), "quantization": "none"}, "data": {"train": str(tmp_path / "train.jsonl")},
        "strategies": strategies, "train": {"steps": 2}, "output": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    assert app.run(["tune", str(tmp_path / "recipe.json")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert all(part in line for part in ((message,) if isinstance(message, str) else message))
    assert not (tmp_path / "run").exists()


def test_an_objective_on_a_classification_is_refused(make_recipe: Callable[..., Any]) -> None:
    rows = [{"text": text, "label": label} for text, label in (("games", "a"), ("section", "b"), ("files", "a"))]
    recipe = make_recipe([LORA, "dpo"], rows, base={"task": "sequence-classification"})
    with pytest.raises(InputError, match="was read as text . label, but strategy 'dpo' .* trains on preference pairs"):
        setup.prepare(recipe, setup.Report(quiet=True), True)


class Unlikelihood(Strategy):
    """Lowers the probability of rejected answers, label by label (Welleck et al., 2020, equation 4)."""

    api = 2
    trains_on = ("preference pairs",)

    @hookimpl
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> LossTerm:
        batch = step.batch
        log_p = logits.log_softmax(-1).gather(-1, batch.labels[positions][:, None])[:, 0]
        rejected = 1 - batch.columns["desirable"][batch.example_of_label[positions]]
        return LossTerm("unlikelihood", -torch.log1p(-log_p.exp()) * rejected)


def test_without_log_probabilities_too_the_tasks_loss_is_that_of_the_chosen_answers(
    make_recipe: Callable[..., Any],
) -> None:
    name = register(Unlikelihood, "unlikelihood")
    rows = make_pairs(4)
    held_out = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    run = tune(make_recipe([LORA, name], rows, evaluate=rows, steps=1), quiet=True)
    alone = tune(make_recipe([LORA], held_out, "alone", evaluate=held_out, steps=1), quiet=True)
    assert steps(run)[0]["causal_lm"] == pytest.approx(steps(alone)[0]["causal_lm"], rel=1e-5)
    assert run.before["eval_loss"] == pytest.approx(alone.before["eval_loss"], rel=1e-5)
    assert steps(run)[0]["loss"] > steps(run)[0]["causal_lm"]


def test_the_command_eval_measures_the_objective_of_the_run(
    evaluated: Run, make_recipe: Callable[..., Any], tmp_path: Path, said: list[str]
) -> None:
    result = evaluate_adapter(evaluated.directory / "adapter", tmp_path / "eval.jsonl", quiet=True)
    for name in ("eval_accuracy", "eval_margin", "eval_kl", "eval_dpo", "eval_loss"):
        assert result.adapter[name] == pytest.approx(evaluated.metrics[name], rel=1e-5, abs=1e-6), name
    assert "eval_accuracy" not in result.base
    plain = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in make_pairs(4)]
    sft = tune(make_recipe([LORA], plain, "sft"), quiet=True)
    result = evaluate_adapter(sft.directory / "adapter", tmp_path / "eval.jsonl", quiet=True)
    assert "eval_accuracy" not in result.adapter
    assert any("of preference pairs only the task's loss is measured" in line for line in said)
