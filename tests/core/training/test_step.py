"""A micro-step against plain autograd: loss terms, their units, and what a step offers to who perturbs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from budwood.training.loop import tune


def gradients(module: Any) -> list[torch.Tensor]:
    return next(entry[1] for entry in module.SEEN if entry[0] == "gradients")


@pytest.mark.parametrize("extra", ["penalty", "per-example"])
def test_terms_do_not_depend_on_how_a_batch_is_split(make_recipe: Callable, test_strategies: Any, extra: str) -> None:
    found = []
    for name, size in (("a", 1024), ("b", 128)):
        test_strategies.SEEN.clear()
        strategies = [{"lora": {"rank": 4}}, extra, "recorder"]
        run = tune(make_recipe(name, strategies=strategies, train={"micro_tokens": size}), quiet=True)
        found.append((gradients(test_strategies), dict(run.metrics)))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    term = "penalty" if extra == "penalty" else "size"
    assert found[0][1][term] == pytest.approx(found[1][1][term], rel=1e-5)
    weight = 0.01 if extra == "penalty" else 0.1
    metrics = found[0][1]
    assert metrics["loss"] == pytest.approx(metrics["causal_lm"] + weight * metrics[term], rel=1e-5)


def test_noise_gradient_and_replay_equal_plain_autograd(
    make_recipe: Callable, test_strategies: Any, tiny_base: Path
) -> None:
    """FGM on packed rows against a loop over examples in float64, with the embeddings as the leaf."""
    strategies = [{"lora": {"rank": 4}}, {"fgm": {"epsilon": 0.5}}, "recorder"]
    recipe = make_recipe(strategies=strategies, train={"steps": 1, "micro_tokens": 200, "clip": 0})
    run = tune(recipe, quiet=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_base).double()
    passes = [entry for entry in test_strategies.SEEN if entry[0] == "noise"]
    assert len(passes) > 1, "the step must have several micro-steps"
    labels = sum(int(run.examples[i].supervised.sum()) for _, ids, *_ in passes for i in ids)
    for _, ids, noise, asked, clean in passes:
        torch.testing.assert_close(asked, clean, atol=1e-7, rtol=1e-4)
        position = 0
        for example in (run.examples[i] for i in ids):
            tokens = torch.tensor(example.input_ids[None].astype("int64"))
            leaf = model.get_input_embeddings()(tokens).detach().requires_grad_()
            logits = model(inputs_embeds=leaf).logits[0, :-1]
            where = torch.tensor(example.supervised[1:])
            loss = torch.nn.functional.cross_entropy(logits[where], tokens[0, 1:][where], reduction="sum") / labels
            (gradient,) = torch.autograd.grad(loss, leaf)
            span = slice(position, position + len(example))
            torch.testing.assert_close(clean[0, span].double(), gradient[0], atol=1e-6, rtol=1e-3)
            expected = 0.5 * gradient[0] / gradient[0].norm()
            torch.testing.assert_close(noise[0, span].double(), expected, atol=1e-4, rtol=1e-3)
            position += len(example)


def test_replay_adds_the_noisy_pass_to_the_clean_one(make_recipe: Callable, test_strategies: Any) -> None:
    found = {}
    for name, strategies in (("plain", []), ("zero", [{"fgm": {"epsilon": 0.0}}])):
        test_strategies.SEEN.clear()
        recipe = make_recipe(name, strategies=[{"lora": {"rank": 4}}, *strategies, "recorder"], train={"clip": 0})
        run = tune(recipe, quiet=True)
        found[name] = (gradients(test_strategies), dict(run.metrics))
    for plain, doubled in zip(found["plain"][0], found["zero"][0], strict=True):
        torch.testing.assert_close(doubled, 2 * plain, atol=1e-6, rtol=1e-4)


def test_a_term_of_the_wrong_shape_names_its_term(make_recipe: Callable, test_strategies: Any) -> None:
    from budwood import LossTerm, PluginError, hookimpl

    class Wrong(test_strategies.Penalty):
        @hookimpl
        def token_terms(self, step: Any, logits: torch.Tensor, positions: torch.Tensor) -> LossTerm:
            return LossTerm("wrong", logits.sum(), "label")

    test_strategies.Penalty = Wrong
    with pytest.raises(PluginError, match="loss term 'wrong' of token_terms"):
        tune(make_recipe(strategies=["lora", "penalty"]), quiet=True)
