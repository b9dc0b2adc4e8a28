"""On-policy data: samples from the live model, sets of examples, and sets across resumes and processes."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.processes import run_in_two_processes

from budwood.contract.discovery import PluginError
from budwood.contract.types import Run
from budwood.errors import InputError
from budwood.model.generate import generate
from budwood.recipe.schema import Recipe
from budwood.testing.fake import run_on_fake_tensors
from budwood.training import batches, loop, memory
from budwood.training.durability.reading import read_checkpoint, steps_in
from budwood.training.loop import tune
from budwood.training.on_policy import ActiveSet
from budwood.training.report import Report
from budwood.training.setup import prepare

Make = Callable[..., Recipe]
STRATEGIES = Path(__file__).parents[2] / "strategies"


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the test strategy `word-policy`, registered as if installed."""
    monkeypatch.syspath_prepend(str(STRATEGIES))
    module = importlib.import_module("budwood_test_policy")
    module.SETS.clear()
    module.GAPS.clear()
    yield module
    sys.modules.pop("budwood_test_policy", None)


@pytest.fixture
def make(make_recipe: Make, policy: Any) -> Make:
    """`make_recipe` with the policy and its `options`."""

    def recipe(output: str = "run", options: dict[str, Any] | None = None, **sections: Any) -> Recipe:
        strategies = [{"lora": {"rank": 4}}, {"word-policy": options or {}}]
        return make_recipe(output, strategies=strategies, **sections)

    return recipe


@pytest.fixture
def ready(make_recipe: Make) -> Run:
    """A prepared run, with an adapter that changes the base's output."""
    run, _, _ = prepare(make_recipe(train={"micro_tokens": 128}), Report(quiet=True), overwrite=False)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.trainable:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return run


# --- run.generate


def test_samples_depend_on_seed_step_prompt_and_number(ready: Run) -> None:
    prompts = [ready.examples[i] for i in (5, 0, 9)]
    first = ready.generate(prompts, samples=4, max_new_tokens=8)
    assert [len(samples) for samples in first] == [4, 4, 4]
    assert ready.generate(prompts, samples=4, max_new_tokens=8) == first
    assert len({tuple(sample.tokens) for samples in first for sample in samples}) == 12
    again = ready.generate(
        prompts[::-1], samples=2, max_new_tokens=8
    )  # a prompt's samples do not depend on the other prompts
    assert [[s.tokens for s in samples] for samples in again] == [[s.tokens for s in r[:2]] for r in first[::-1]]
    ready.step += 1
    assert ready.generate(prompts, samples=4, max_new_tokens=8) != first
    ready.step, ready.seed = 0, 1
    assert ready.generate(prompts, samples=4, max_new_tokens=8) != first


def test_prompts_are_examples_texts_or_tokens(ready: Run) -> None:
    example = ready.examples[0]
    ids = ready.task.probe(example).inputs["input_ids"].tolist()
    text = ready.tokenizer.decode(ids, skip_special_tokens=True)
    result = [ready.generate([prompt], temperature=0)[0][0] for prompt in (example, text, ids)]
    assert result[0] == result[1] == result[2]
    assert result[0].prompt == ids
    twice = ready.generate([text, text], max_new_tokens=8)
    assert twice[0][0].tokens != twice[1][0].tokens


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_a_forward_at_the_temperature(ready: Run, temperature: float) -> None:
    prompts = [ready.examples[i] for i in range(6)]
    result = ready.generate(prompts, samples=3, max_new_tokens=12, temperature=temperature, top_p=0.9)
    reasons = set()
    for sample in (sample for samples in result for sample in samples):
        full = torch.tensor([sample.prompt + sample.tokens])
        with torch.no_grad():
            logits = ready.model.eval()(full).logits[0, len(sample.prompt) - 1 : -1]
        expected = (logits.double() / (temperature or 1.0)).log_softmax(-1)
        expected = expected.gather(-1, torch.tensor(sample.tokens)[:, None])[:, 0]
        assert len(sample.log_probs) == len(sample.tokens)
        rounding = 2**-24 * float(logits.abs().max()) * 32  # two forward passes sum in different orders
        assert (torch.tensor(sample.log_probs) - expected).abs().max() < rounding
        reasons.add(sample.finish_reason)
        ends = sample.tokens[-1] in (ready.tokenizer.eos_token_id, *ready.examples.stop_ids)
        assert ends == (sample.finish_reason == "eos")
        assert all(t not in (ready.tokenizer.eos_token_id, *ready.examples.stop_ids) for t in sample.tokens[:-1])
    assert "length" in reasons


def test_the_end_token_is_part_of_the_sample(ready: Run) -> None:
    prompt = ready.examples[0]
    plain = ready.generate([prompt], temperature=0, max_new_tokens=4)[0][0]
    ready.examples.stop_ids = [plain.tokens[2]]
    ended = ready.generate([prompt], temperature=0, max_new_tokens=4)[0][0]
    at = plain.tokens.index(plain.tokens[2])
    assert ended.tokens == plain.tokens[: at + 1]
    assert ended.log_probs == pytest.approx(plain.log_probs[: at + 1], abs=1e-6)
    assert ended.finish_reason == "eos"


def test_adapter_off_gives_the_samples_of_the_base_and_leaves_the_run_unchanged(ready: Run) -> None:
    prompts = [ready.examples[i] for i in range(4)]
    ready.model.train()
    before = [ready.generate(prompts, temperature=t, max_new_tokens=8) for t in (0, 1)]
    off = [ready.generate(prompts, temperature=t, max_new_tokens=8, adapter=False) for t in (0, 1)]
    assert ready.model.training
    assert [ready.generate(prompts, temperature=t, max_new_tokens=8) for t in (0, 1)] == before
    assert all(one != other for one, other in zip(off, before, strict=True))
    with torch.no_grad():
        for parameter in ready.trainable:
            parameter.zero_()
    base = [ready.generate(prompts, temperature=t, max_new_tokens=8) for t in (0, 1)]
    assert [[s[0].tokens for s in one] for one in base] == [[s[0].tokens for s in one] for one in off]


def test_invalid_generation_requests_are_rejected(ready: Run) -> None:
    with pytest.raises(InputError, match="samples: 0 is less than 1"):
        ready.generate(["a"], samples=0)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        ready.generate([[]])
    ready.sampler = None
    with pytest.raises(RuntimeError, match="not available in planning"):
        ready.generate(["a"])


def test_log_probs_of_a_batch_do_not_change_what_is_drawn(ready: Run) -> None:
    ids = [ready.task.probe(ready.examples[i]).inputs["input_ids"].tolist() for i in range(5)]
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    plain = generate(ready.model, ready.tokenizer, ids, **options)
    scored = generate(ready.model, ready.tokenizer, ids, **options, log_probs=ready.task.log_probs)
    assert [p.tokens for p in plain] == [s.tokens for s in scored]
    assert all(not p.log_probs for p in plain)
    assert all(len(s.log_probs) == len(s.tokens) + (s.end_token is not None) for s in scored)


# --- sets


def rewards(directory: Path) -> list[float]:
    """Return the mean reward of each set."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["reward"] for line in lines if "reward" in line]


def test_the_reward_rises(make: Make, policy: Any) -> None:
    run = tune(make(train={"steps": 24, "learning_rate": 1e-2}), quiet=True)
    result = rewards(run.directory)
    assert len(result) == 12
    assert np.mean(result[-3:]) > np.mean(result[:3]) + 0.25
    assert [step for step, _ in policy.SETS] == list(range(0, 24, 2))
    assert all(len(indices) == 8 for _, indices in policy.SETS)


def test_the_samplers_log_probs_are_the_steps_before_the_first_update(make: Make, policy: Any) -> None:
    tune(make(train={"steps": 6, "learning_rate": 3e-2}), quiet=True)
    for step, gap in policy.GAPS.items():
        assert (gap < 1e-5) == (step % 2 == 0), (step, gap)


def test_epochs_count_sets_and_each_prompt_is_drawn_once_an_epoch(make: Make, policy: Any) -> None:
    run = tune(make(train={"epochs": 2, "batch_examples": 7}, options={"samples": 2}), quiet=True)
    assert run.steps == run.step == 2 * 4 * 2  # 24 examples in steps of at most 7: 4 steps per epoch
    for epoch in (policy.SETS[:4], policy.SETS[4:]):
        assert sorted(index for _, indices in epoch for index in indices) == list(range(24))


def test_an_odd_number_of_steps_leaves_the_last_set_half_used(make: Make, policy: Any) -> None:
    run = tune(make(train={"steps": 3, "save_every": 1}, options={"samples": 2}), quiet=True)
    assert run.step == 3 and len(policy.SETS) == 2


def test_a_killed_run_resumes_bitwise_identically(
    make: Make, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a set, and between sets."""

    class Killed(BaseException):
        pass

    options, train = {"samples": 4}, {"steps": 5, "save_every": 1, "learning_rate": 2e-2}
    uninterrupted = tune(make("whole", options, train=train), quiet=True)
    at, summed = [-1], loop.sum_gradients

    def sum_gradients(run: Run) -> None:
        if run.step == at[0]:
            raise Killed
        summed(run)

    monkeypatch.setattr(loop, "sum_gradients", sum_gradients)
    for step in (3, 4):
        name, at[0] = f"cut-{step}", step
        with pytest.raises(Killed):
            tune(make(name, options, train=train), quiet=True)
        newest = max(steps_in(tmp_path / name / "checkpoints").items())[1]
        saved = read_checkpoint(newest).load()
        assert saved["step"] == step
        assert (saved["active"] is None) == (step == 4)
        assert saved["examples"] == 8 * 2
        at[0] = -1
        policy.SETS.clear()
        run = tune(make(name, options, train=train), quiet=True, resume=True)
        assert [s for s, _ in policy.SETS] == [4]
        assert run.metrics == uninterrupted.metrics
        assert rewards(run.directory) == rewards(uninterrupted.directory)
        for path in (uninterrupted.directory / "adapter").iterdir():
            assert (run.directory / "adapter" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_repeated_step_gives_the_same_result(make: Make, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in the first micro-step of a set: the set and the values logged while generating it are kept."""
    options, train = {"samples": 2}, {"steps": 2, "micro_tokens": 512}
    uninterrupted = tune(make("whole", options, train=train), quiet=True)
    passes, done = memory._run_passes, []

    def run_out(run: Run, *arguments: Any) -> int:
        limit = passes(run, *arguments)
        done.append(limit)
        return 64 if len(done) == 1 else limit

    monkeypatch.setattr(memory, "_run_passes", run_out)
    policy.SETS.clear()
    run = tune(make("again", options, train=train), quiet=True)
    assert len(policy.SETS) == 1 and len(done) == 3
    assert rewards(run.directory) == rewards(uninterrupted.directory)
    assert run.metrics["loss"] == pytest.approx(uninterrupted.metrics["loss"], abs=1e-5)


@pytest.mark.scale
def test_two_processes_hold_one_set(make: Make, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets: list[ActiveSet] = []
    original = batches.generate_set

    def note(*arguments: Any) -> ActiveSet:
        sets.append(original(*arguments))
        return sets[-1]

    monkeypatch.setattr(batches, "generate_set", note)
    train = {"steps": 2, "batch_examples": 5, "micro_tokens": 128}
    tune(make("one", {"samples": 4}, train=train), quiet=True)
    path = tmp_path / "two.yaml"
    path.write_text(make("two", {"samples": 4}, train=train).to_yaml(), encoding="utf-8")
    run_in_two_processes(
        "import json, torch\n"
        "from budwood.training import batches\n"
        "from budwood.training.loop import tune\n"
        "original, sets = batches.generate_set, []\n"
        "def note(*arguments):\n"
        "    sets.append(original(*arguments))\n"
        "    return sets[-1]\n"
        "batches.generate_set = note\n"
        f"run = tune({str(path)!r}, quiet=True)\n"
        "assert run.processes == 2\n"
        "def shown(e): return [e.key, e.labels.tolist(), float(e.columns['advantage'].values)]\n"
        "steps = [[shown(e) for e in s] for s in sets[0].steps]\n"
        f"open({str(tmp_path)!r} + f'/set-{{run.process_index}}.json', 'w').write(json.dumps(steps))\n",
        tmp_path,
        (STRATEGIES,),
    )
    first, second = (json.loads((tmp_path / f"set-{i}.json").read_text()) for i in (0, 1))
    assert first == second
    one = [[e.key, e.labels.tolist(), float(e.columns["advantage"].values)] for s in sets[0].steps for e in s]
    assert sorted(e for step in first for e in step) == sorted(one)
    assert [len(step) for step in first] == [10, 10]


def test_planning_uses_planned_examples_and_never_samples(make: Make, policy: Any) -> None:
    run = run_on_fake_tensors(make(train={"steps": 2}))
    assert run.step == 2 and not policy.SETS
    with pytest.raises(PluginError, match=r"strategy 'word-policy'.*needs planned_examples too"):
        run_on_fake_tensors(make(options={"fault": "plan"}))


# --- bad input


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("number", "1 entries; return one for each of `updates` = 2"),
        ("empty", r"entry 2: there is no example"),
        ("labels", r"entry 1: example '\d+/0' has no labels"),
        ("keys", r"entry 1: .*another example has the same key '\d+/0'"),
        ("column", r"entry 1: column old is in only one of"),
        ("position", r"has a label at \d+ of \d+ positions"),
    ],
)
def test_an_invalid_set_names_the_strategy(make: Make, fault: str, text: str) -> None:
    with pytest.raises(PluginError, match=rf"strategy 'word-policy' .*hook next_examples.*{text}") as caught:
        tune(make(options={"samples": 2, "fault": fault}), quiet=True)
    assert "\n" not in str(caught.value)


def test_updates_must_be_a_whole_number(make: Make, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy.WordPolicy, "updates", 0)
    with pytest.raises(PluginError, match=r"strategy 'word-policy'.*updates must be a whole number from 1, not 0"):
        tune(make(), quiet=True)


def test_a_task_that_generates_no_text_names_the_strategy(make: Make, write: Callable[..., Path]) -> None:
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(8)]
    sections = {"base": {"task": "sequence-classification"}, "data": {"train": str(write(rows, "classes.jsonl"))}}
    with pytest.raises(InputError, match=r"strategy 'word-policy'.*'sequence-classification' generates no text"):
        tune(make(**sections), quiet=True)
