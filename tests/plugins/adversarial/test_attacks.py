"""The attacks of the plugin: PGD against a loop over examples, and typos."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from budwood import InputError
from budwood.contract.types import Step
from budwood.training.batches import optimizer_steps
from budwood_adversarial.attacks import PGD, PGDOptions
from budwood_adversarial.typos import NEIGHBOURS, Typos, TyposOptions, mistype

from .conftest import Ready
from .reference import Reference, ball, normed

PROSE = "The quick brown fox jumps over the lazy dog, 17 times a day. " * 20


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_pgd_matches_the_papers_ascent_for_each_example(make_recipe: Callable, norm: str) -> None:
    ready = Ready(make_recipe(None, train={"micro_tokens": 200}))
    todo, _ = next(optimizer_steps(ready.run, ready.hooks))
    epsilon = 0.6 if norm == "l2" else 0.01
    attack = PGD(PGDOptions(epsilon=epsilon, steps=3, norm=norm))
    reference = Reference(ready.run, 2.0)
    ready.run.counts = todo.batches[0].counts
    noise = attack.noise(Step(ready.run, todo.batches[0], ready.engine)).flatten(0, 1)
    for index, example in enumerate(ready.run.examples[i] for i in todo.batches[0].keys):
        delta = reference.zeros(example)
        for _ in range(3):
            gradient = reference.slope(reference.loss, example, delta)
            up = normed(gradient, "l2") if norm == "l2" else gradient.sign()
            delta = ball(delta + 2.5 * epsilon / 3 * up, epsilon, norm)
        actual = noise[todo.batches[0].example_of_position == index].double()
        wrong = (actual - delta).abs() > 1e-4 * epsilon + 1e-3 * delta.abs()
        assert wrong.float().mean() < 0.002, "except for the signs of gradients that are zero up to rounding"


def test_pgd_refuses_what_it_cannot_attack() -> None:
    with pytest.raises(InputError, match="--attack pgd: Linear has no input embeddings"):
        PGD(name="pgd").check("text", "causal-lm", torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="skip_masked: in a classification no token is a label"):
        PGD(PGDOptions(skip_masked=True), "pgd").check("text-label", "sequence-classification", None)


def test_typos_occur_at_their_rate_and_change_only_letters() -> None:
    for rate in (0.05, 0.3, 1.0):
        wrong = mistype(PROSE, rate, random.Random(0))
        assert wrong != PROSE
        assert abs(len(wrong) - len(PROSE)) < rate * len(PROSE) * 0.5
        assert [c for c in wrong if not c.isalpha()] == [c for c in PROSE if not c.isalpha()], "only letters change"
    letters = sum(c.isalpha() for c in PROSE)
    same = sum(mistype(c, 0.3, random.Random(i)) == c for i, c in enumerate(PROSE) if c.isalpha())
    assert 0.6 < same / letters < 0.85
    assert set(NEIGHBOURS["g"]) == set("fhtyvb")
    assert all(key in NEIGHBOURS[near] for key, nears in NEIGHBOURS.items() for near in nears)


def test_a_text_is_never_emptied() -> None:
    assert all(mistype("a", 1.0, random.Random(seed)).strip() for seed in range(50))
    assert mistype("", 1.0, random.Random(0)) == ""


def test_typos_depend_only_on_seed_and_row_and_keep_the_answer() -> None:
    row = {"prompt": PROSE, "completion": PROSE}
    attack, other = (Typos(TyposOptions(rate=0.2, seed=seed), "typos") for seed in (0, 1))
    changed = attack.change(row, 3, "prompt-completion")
    assert changed == attack.change(row, 3, "prompt-completion")
    assert changed["completion"] == PROSE != changed["prompt"]
    assert changed["prompt"] != attack.change(row, 4, "prompt-completion")["prompt"]
    assert changed["prompt"] != other.change(row, 3, "prompt-completion")["prompt"]
    assert attack.change({"text": PROSE, "label": "fox"}, 0, "text-label")["label"] == "fox"
    talk: Any = [
        {"role": "system", "content": PROSE}, {"role": "user", "content": PROSE},
        {"role": "assistant", "content": PROSE}, {"role": "user", "content": PROSE},
    ]  # fmt: skip
    after = attack.change({"messages": talk}, 0, "messages")["messages"]
    assert [m["content"] == PROSE for m in after] == [True, False, True, False]


@pytest.mark.parametrize("form", ["text", "pairs"])
def test_data_formats_without_a_prompt_are_refused(form: str) -> None:
    with pytest.raises(
        InputError, match=f"--attack typos: no typos for the data format '{form}'.*text-label, .*, messages"
    ):
        Typos(name="typos").check(form, "causal-lm", SimpleNamespace())
