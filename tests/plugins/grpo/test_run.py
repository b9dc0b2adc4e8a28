"""Runs of grpo: learning, samples, evaluation, resuming, several processes, other strategies, planning."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from budwood import Run
from budwood.recipe.schema import Recipe
from budwood.testing.fake import run_on_fake_tensors
from budwood.training import loop
from budwood.training.loop import tune
from budwood.training.report import Report
from budwood.training.setup import prepare

Make = Callable[..., Recipe]


def logged(run: Run, name: str) -> list[float]:
    """Return the values of `name` in metrics.jsonl."""
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def samples(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / "samples.jsonl").read_text().splitlines()]


def test_a_reward_rises_and_its_samples_are_recorded(make_recipe: Make, said: list[str], tmp_path: Path) -> None:
    evaluated = tmp_path / "eval.jsonl"
    evaluated.write_text('{"prompt": "games files:", "answer": "games"}\n{"prompt": "data:", "answer": "data"}\n')
    rewards = [{"regex": {"pattern": "e"}}, {"exact-match": {"weight": 0.5}}]
    run = tune(make_recipe({"rewards": rewards, "samples": 8}, train={"steps": 16}, data={"eval": str(evaluated)}))
    found = logged(run, "reward")
    assert any(re.match(rf"step 16/16 · loss \S+ · reward {found[-1]:.4f} · ", line) for line in said)
    assert len(found) == 16 and np.mean(found[-3:]) > np.mean(found[:3]) + 0.2
    assert max(logged(run, "grpo_mismatch")) < 1e-5
    records = samples(run)
    assert len(records) == 16 * 4 * 8 and len({(r["step"], r["row"], r["sample"]) for r in records}) == len(records)
    for step in range(16):
        mine = [r for r in records if r["step"] == step]
        assert np.mean([r["reward"] for r in mine]) == pytest.approx(found[step])
    for r in records[:64]:
        assert r["rewards"] == {"regex": float("e" in r["completion"]), "exact_match": 0.0}
        assert r["reward"] == r["rewards"]["regex"] and r["prompt"].endswith(":")
    groups = np.array([r["advantage"] for r in records]).reshape(-1, 8)
    assert np.abs(groups.mean(axis=1)).max() < 1e-9
    assert run.best_metric is not None and run.best_metric.name == "eval_reward"
    assert run.before["eval_reward"] == run.before["eval_reward_regex"] + 0.5 * run.before["eval_reward_exact_match"]
    assert run.metrics["eval_reward"] >= run.before["eval_reward"] and "eval_loss" not in run.metrics
    assert any("train.jsonl: prompt; 16 examples" in line and "columns ignored: id" in line for line in said)
    assert any(line.startswith("best answer of the last 32 in samples.jsonl: reward 1: ") for line in said)
    assert any(line.startswith("worst answer of the last 32 in samples.jsonl: ") for line in said)
    assert any("reward 'exact_match' was always 0, so it teaches nothing" in line for line in said)
    manifest = json.loads((run.directory / "manifest.json").read_text())
    assert "samples.jsonl" in manifest["files"]


def test_the_chosen_length_counts_every_update_and_no_answer_as_short(make_recipe: Make, tmp_path: Path) -> None:
    evaluated = tmp_path / "eval.jsonl"
    evaluated.write_text('{"prompt": "games files:"}\n{"prompt": "data:"}\n')
    train = dict.fromkeys(("steps", "batch_examples", "learning_rate", "warmup"))
    for number, completions in enumerate((False, True)):
        recipe = make_recipe(
            {"iterations": 2}, f"run-{number}", train=train, data={"eval": str(evaluated)}, completions=completions
        )
        run, _, _ = prepare(recipe, Report(quiet=True), False)
        chosen = run.recipe.train
        assert (chosen.batch_examples, chosen.epochs, chosen.eval_every, chosen.warmup) == (4, 4, 8, 3)
        assert run.steps == 4 * 8, "16 prompts are 4 batches, of 2 updates each"


def test_a_killed_run_resumes_to_the_same_bytes(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of a set, and between two."""

    class Killed(BaseException):
        pass

    options = {"method": "dapo", "kl": 0.1, "iterations": 2, "minibatches": 2}
    train = {"steps": 9, "save_every": 1}
    whole = tune(make_recipe(options, "whole", train=train), quiet=True)
    clipped = logged(whole, "grpo_clipped")
    assert len(logged(whole, "grpo_mismatch")) == 3 and len(clipped) == 9 and max(clipped) > 0
    summed, at = loop.sum_gradients, [-1]

    def sum_gradients(run: Run) -> None:
        if run.step == at[0]:
            raise Killed
        summed(run)

    monkeypatch.setattr(loop, "sum_gradients", sum_gradients)
    for step in (2, 4):
        at[0] = step
        with pytest.raises(Killed):
            tune(make_recipe(options, f"cut-{step}", train=train), quiet=True)
        at[0] = -1
        run = tune(make_recipe(options, f"cut-{step}", train=train), quiet=True, resume=True)
        steps = [r["step"] for r in samples(run)]
        assert sorted(set(steps)) == [0, 4, 8] and len(steps) > 3 * 16, "prompts without variance were replaced"
        for name in ("samples.jsonl", *(f"adapter/{path.name}" for path in (whole.directory / "adapter").iterdir())):
            assert (run.directory / name).read_bytes() == (whole.directory / name).read_bytes(), name


def test_an_unfinished_run_can_be_replaced(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(run: Run) -> None:
        raise KeyError

    with monkeypatch.context() as patch:
        patch.setattr(loop, "sum_gradients", stop)
        with pytest.raises(KeyError):
            tune(make_recipe(), quiet=True)
    run = tune(make_recipe(train={"steps": 1}), quiet=True, overwrite=True)
    assert len(samples(run)) == 16


def test_the_importance_of_tokens_that_the_trainer_finds_less_likely(make_recipe: Make, said: list[str]) -> None:
    """A sampler whose log-probabilities are 0.5 too high: all weights are exp(-0.5), and the mismatch is reported."""
    from budwood.training import setup

    sample = setup.sample

    def skewed(*given: Any, **options: Any) -> Any:
        groups = sample(*given, **options)
        for answer in (answer for group in groups for answer in group):
            answer.log_probs[:] = [value + 0.5 for value in answer.log_probs]
        return groups

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "sample", skewed)
        runs = [
            tune(make_recipe({"importance_cap": cap}, f"cap-{cap}", train={"steps": 1}), quiet=True)
            for cap in (None, 2.0)
        ]
    plain = tune(make_recipe({}, "plain", train={"steps": 1}), quiet=True)
    for run in runs:
        assert logged(run, "grpo_mismatch") == [pytest.approx(0.5, abs=1e-4)]
    assert sum("differ by 0.50 nats per token" in line for line in said) == 2
    # Without clipping the gradient is that of the plain run times exp(-0.5).
    ratio = runs[1].metrics["gradient_norm"] / plain.metrics["gradient_norm"]
    assert ratio == pytest.approx(np.exp(-0.5), rel=1e-3)


@pytest.mark.parametrize("method", ["rloo", "reinforce++"])
def test_a_divergence_in_the_reward(make_recipe: Make, method: str) -> None:
    """A large KL weight holds the policy at the base although the reward pulls it away."""
    sizes = []
    for kl in (0.0, 50.0):
        options = {"method": method, "kl": kl, "rewards": [{"regex": {"pattern": "e"}}]}
        run = tune(make_recipe(options, f"kl-{kl:g}", train={"steps": 5}), quiet=True)
        prompts = [run.examples[i] for i in range(8)]
        answers = run.generate(prompts, max_new_tokens=6, samples=4)
        own = [sum(s.log_probs) for group in answers for s in group]
        from budwood import example_log_probs
        from budwood_grpo.examples import to_example

        examples = [to_example(s, str(i), 0) for i, s in enumerate(s for group in answers for s in group)]
        base = [float(values.sum()) for values in example_log_probs(run, examples, reference="base")]
        sizes.append(float(np.mean(np.array(own) - base)))
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize("resample", [0, 2])
def test_groups_without_variance_and_long_answers_are_dropped(make_recipe: Make, resample: int) -> None:
    options = {"zero_variance": "drop", "over_long": "drop", "resample": resample}
    run = tune(make_recipe(options, train={"steps": 4}), quiet=True)
    trained = dict.fromkeys(range(4), 0)
    dropped, rounds = {"variance": 0, "length": 0}, []
    for step in trained:
        groups: dict[str, list[dict[str, Any]]] = {}
        for r in samples(run):
            if r["step"] == step:
                groups.setdefault(r["row"], []).append(r)
        assert all(len(group) == 4 for group in groups.values()), "no prompt is answered twice in a set"
        varied = [len({r["reward"] for r in group}) > 1 for group in groups.values()]
        given = [(group, r) for group, v in zip(groups.values(), varied, strict=True) if v for r in group]
        kept = [r for _, r in given if r["finish_reason"] != "length"]
        for r in kept or [r for group in groups.values() for r in group]:
            trained[step] += r["tokens"] + len(run.tokenizer(r["prompt"])["input_ids"])
        dropped["variance"] += varied.count(False)
        dropped["length"] += len(given) - len(kept)
        answered = 4
        for _ in range(resample):  # each round has as many new prompts as are missing
            answered += 4 - sum(varied[:answered])
        assert len(groups) == answered <= 16
        rounds.append(answered)
    assert logged(run, "tokens") == list(trained.values())
    assert min(dropped.values()) > 0
    assert max(rounds) > 4 if resample else max(rounds) == 4


def test_what_cannot_be_learned_is_reported(make_recipe: Make, said: list[str]) -> None:
    never = {"rewards": [{"regex": {"pattern": "never written"}}], "samples": 2, "max_new_tokens": 2}
    with pytest.raises(Exception, match="no trained tensor moved"):
        tune(make_recipe(never, train={"steps": 11, "batch_examples": 2, "save_every": 3}), quiet=True)
    warnings = [line for line in said if line.startswith("warning: strategy 'grpo'")]
    assert len(warnings) == 2, warnings
    assert "in 10 sets (40 samples) all samples of a prompt had the same reward (regex 0)" in warnings[0]
    assert "no answer ended within max_new_tokens (2)" in warnings[1]


def test_prompts_of_messages_and_with_other_strategies(make_recipe: Make, said: list[str], tmp_path: Path) -> None:
    """Chat prompts, an adversary, a distillation from the base beside the KL, and an average of the parameters."""
    rows = [
        {"prompt": [{"role": "user", "content": f"{word} files"}], "answer": word}
        for word in ("games", "data", "files")
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    others = (
        {"adversarial": {"method": "fgm", "epsilon": 0.1}},
        {"distillation": {"teacher": "base", "weight": 0.1}},
        {"ema": {}},
    )
    run = tune(
        make_recipe({"kl": 0.1}, others=others, data={"train": str(path), "eval": str(path)}, train={"steps": 3}),
        quiet=True,
    )
    stop = run.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop in run.examples.stop_ids
    assert samples(run)[0]["prompt"].endswith("assistant\n")
    assert all(np.isfinite(value) for value in run.metrics.values())
    assert {"grpo", "grpo_kl", "distillation", "eval_reward"} <= run.metrics.keys()


def test_a_plan_needs_no_samples(make_recipe: Make) -> None:
    for options in ({"kl": 0.1, "temperature": 1.3}, {"method": "dr-grpo", "importance_cap": 2.0, "minibatches": 2}):
        run = run_on_fake_tensors(make_recipe(options, train={"steps": 1}))
        assert run.step == 1


def test_the_samples_of_prompts_with_completions_begin_after_the_prompt(make_recipe: Make) -> None:
    rewards = [{"exact-match": {"column": "completion"}}, {"length": {"target": 3}}, {"regex": {"pattern": "e"}}]
    run = tune(make_recipe({"rewards": rewards}, completions=True, train={"steps": 2}), quiet=True)
    records = samples(run)
    assert all(r["prompt"].endswith(":") for r in records)
    assert records[0]["rewards"]["length"] == -abs(records[0]["tokens"] - 3) / 3


def test_samples_do_not_depend_on_micro_batches(make_recipe: Make) -> None:
    adapters = []
    for micro_tokens in (128, 512):
        train = {"steps": 2, "micro_tokens": micro_tokens}
        run = tune(make_recipe({"method": "gspo", "kl": 0.1}, f"run-{micro_tokens}", train=train), quiet=True)
        adapters.append([p.detach().clone() for p in run.trainable])
    for one, other in zip(*adapters, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
