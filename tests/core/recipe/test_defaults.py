"""Settings that a recipe omits are chosen from the data and the base; those that it gives are kept."""

from __future__ import annotations

from typing import Any

import pytest

from budwood.recipe.defaults import Facts, choose
from budwood.recipe.sections import TrainSection


def facts(examples: int, **given: Any) -> Facts:
    return Facts(**{"examples": examples, "tokens": 50 * examples, "labels": 3.0, "width": 576, **given})


def chosen(examples: int, train: TrainSection | None = None, **given: Any) -> TrainSection:
    return choose(train or TrainSection(), facts(examples, **given))[0]


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "warmup"),
    [
        (1, 4, 10, 1), (50, 4, 10, 13), (400, 16, 6, 15), (500, 16, 4, 13), (5000, 32, 3, 30), (50_000, 32, 2, 30),
        (10**6, 32, 1, 30),
    ],
)  # fmt: skip
def test_by_the_number_of_examples(examples: int, batch: int, epochs: int, warmup: int) -> None:
    train = chosen(examples)
    assert (train.batch_examples, train.epochs, train.warmup) == (batch, epochs, warmup)
    assert train.batch_tokens is train.steps is None


def test_an_encoder_that_learns_classes_trains_twice_as_long() -> None:
    assert [chosen(count, labels=1.0, encoder=True).epochs for count in (50, 500, 5000)] == [20, 8, 3]
    assert [chosen(count, labels=40.0, encoder=True).epochs for count in (50, 500, 5000)] == [4, 4, 3]


def test_the_rate_of_an_encoder_that_learns_classes_is_lower() -> None:
    assert chosen(500, width=384, labels=1.0).learning_rate == 1.8e-3
    assert chosen(500, width=384, labels=1.0, encoder=True).learning_rate == 1.2e-3
    assert chosen(500, width=384, labels=40.0, encoder=True).learning_rate == 1.8e-3


def test_free_text_is_seen_less_often() -> None:
    assert [chosen(count, labels=40.0).epochs for count in (50, 500, 5000)] == [4, 4, 3]


@pytest.mark.parametrize(
    ("width", "rate"), [(320, 2.1e-3), (576, 1.3e-3), (2048, 4.9e-4), (4096, 2.9e-4), (None, 5e-4)]
)
def test_the_rate_falls_with_the_width_of_the_base(width: int | None, rate: float) -> None:
    assert chosen(500, width=width).learning_rate == rate
    assert chosen(500, width=width, scale=4.0).learning_rate == pytest.approx(4 * rate, rel=0.06)


def test_the_rate_of_longer_answers_falls_with_small_batches() -> None:
    rates = [chosen(count, labels=40.0).learning_rate for count in (50, 250, 500, 5000)]
    assert rates == [6.6e-4, 9.3e-4, 1.3e-3, 1.3e-3]  # batches of 4, 8, 16 and 32
    assert chosen(50, labels=8.0).learning_rate == 1.3e-3
    assert chosen(400, TrainSection(batch_tokens=200), labels=40.0).learning_rate == 6.6e-4  # 4 examples of 50 tokens


def test_an_evaluation_after_each_epoch_if_the_epochs_are_chosen() -> None:
    assert chosen(500, evaluated=True).eval_every == 32
    assert chosen(500, TrainSection(epochs=3), evaluated=True).eval_every is None
    assert chosen(500, TrainSection(eval_every=7), evaluated=True).eval_every == 7
    assert chosen(500).eval_every is None


def test_patience_needs_no_interval_if_the_run_counts_epochs() -> None:
    train, line = choose(TrainSection(epochs=3, patience=2), facts(500, evaluated=True))
    assert train.eval_every == 32 and "batches of 16 examples, an evaluation after each epoch (the best" in line
    assert chosen(500, TrainSection(patience=2), evaluated=True).eval_every == 32
    assert chosen(500, TrainSection(patience=2, eval_every=7), evaluated=True).eval_every == 7


def test_steps_are_those_of_the_optimizer_if_there_are_several_on_a_batch() -> None:
    train = chosen(50, updates=2, evaluated=True, labels=40.0)
    assert (train.batch_examples, train.epochs, train.eval_every, train.warmup) == (4, 4, 26, 10)  # 13 batches
    assert chosen(500, updates=4).epochs == 3
    assert chosen(500, TrainSection(epochs=1), updates=2).warmup == 6


def test_answers_that_the_run_generates_count_as_long() -> None:
    train = chosen(50, labels=0.0)
    assert (train.epochs, train.learning_rate) == (4, 6.6e-4)


def test_what_is_given_is_kept_and_counts() -> None:
    given = TrainSection(epochs=2, batch_tokens=1000, learning_rate=1e-5, warmup=0.5)
    assert choose(given, facts(500)) == (given, "")
    train = chosen(500, TrainSection(batch_tokens=1000))
    assert (train.batch_tokens, train.batch_examples, train.epochs) == (1000, None, 6)  # 25 steps per epoch
    assert chosen(500, TrainSection(steps=20)).warmup == 2
    assert chosen(500, TrainSection(steps=20)).epochs is None


def test_the_line_says_what_was_chosen_and_from_what() -> None:
    assert choose(TrainSection(), facts(475, evaluated=True))[1] == (
        "chosen for 475 examples with 3 labels each and a base of width 576: batches of 16 examples, 5 epochs, an "
        "evaluation after each (the best adapter is kept), a learning rate of 0.0013, 15 warm-up steps; to change "
        "this, set train.batch_examples, train.epochs, train.eval_every, train.learning_rate, train.warmup"
    )
    assert choose(TrainSection(steps=5, warmup=0.0), facts(475, width=None))[1] == (
        "chosen for 475 examples with 3 labels each: batches of 16 examples, a learning rate of 0.0005; to change "
        "this, set train.batch_examples, train.learning_rate"
    )
    given = facts(60, labels=1.0, scale=1.5, encoder=True)
    line = choose(TrainSection(epochs=1, warmup=0.0, batch_examples=4), given)[1]
    assert line.startswith("chosen for 60 examples with 1 label each and an encoder of width 576: a learning rate of ")
    assert "0.0013 (1.5 times LoRA's); to change" in line
    assert "with 1,235 labels each" in choose(TrainSection(), facts(60, labels=1234.6))[1]
