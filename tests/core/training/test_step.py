"""A micro-step against plain autograd: loss terms, their units, and the passes of strategies that add noise."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from budwood import LossTerm, Outputs, Step, Strategy, hookimpl
from budwood.training.batches import optimizer_steps
from budwood.training.loop import tune
from budwood.training.report import Report
from budwood.training.setup import prepare


def gradients(module: Any) -> list[torch.Tensor]:
    return next(entry[1] for entry in module.SEEN if entry[0] == "gradients")


@pytest.mark.parametrize("extra", ["penalty", "per-example"])
def test_terms_do_not_depend_on_how_a_batch_is_split(make_recipe: Callable, test_strategies: Any, extra: str) -> None:
    result = []
    for name, size in (("a", 1024), ("b", 128)):
        test_strategies.SEEN.clear()
        strategies = [{"lora": {"rank": 4}}, extra, "recorder"]
        run = tune(make_recipe(name, strategies=strategies, train={"micro_tokens": size}), quiet=True)
        result.append((gradients(test_strategies), dict(run.metrics)))
    for one, other in zip(result[0][0], result[1][0], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    term = "penalty" if extra == "penalty" else "size"
    assert result[0][1][term] == pytest.approx(result[1][1][term], rel=1e-5)
    weight = 0.01 if extra == "penalty" else 0.1
    metrics = result[0][1]
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
    labels = sum(len(run.examples[i].labels) for _, ids, *_ in passes for i in ids)
    for _, ids, noise, computed, clean in passes:
        torch.testing.assert_close(computed, clean, atol=1e-7, rtol=1e-4)
        position = 0
        for example in (run.examples[i] for i in ids):
            tokens = torch.tensor(example.inputs["input_ids"][None].astype("int64"))
            leaf = model.get_input_embeddings()(tokens).detach().requires_grad_()
            logits = model(inputs_embeds=leaf).logits[0, :-1]
            where = torch.tensor(example.label_positions)
            loss = torch.nn.functional.cross_entropy(logits[where], tokens[0, 1:][where], reduction="sum") / labels
            (gradient,) = torch.autograd.grad(loss, leaf)
            span = slice(position, position + len(example.inputs["input_ids"]))
            torch.testing.assert_close(clean[0, span].double(), gradient[0], atol=1e-6, rtol=1e-3)
            expected = 0.5 * gradient[0] / gradient[0].norm()
            torch.testing.assert_close(noise[0, span].double(), expected, atol=1e-4, rtol=1e-3)
            position += len(example.inputs["input_ids"])


def test_replay_adds_the_noisy_pass_to_the_clean_one(make_recipe: Callable, test_strategies: Any) -> None:
    result = {}
    for name, strategies in (("plain", []), ("zero", [{"fgm": {"epsilon": 0.0}}])):
        test_strategies.SEEN.clear()
        recipe = make_recipe(name, strategies=[{"lora": {"rank": 4}}, *strategies, "recorder"], train={"clip": 0})
        run = tune(recipe, quiet=True)
        result[name] = (gradients(test_strategies), dict(run.metrics))
    for plain, doubled in zip(result["plain"][0], result["zero"][0], strict=True):
        torch.testing.assert_close(doubled, 2 * plain, atol=1e-6, rtol=1e-4)


class Compare(Strategy):
    """Squared difference between clean and noisy logits; the noise comes from the gradient of that difference."""

    noise: torch.Tensor | None = None
    computed: torch.Tensor | None = None

    @hookimpl(wrapper=True)
    def forward(self, step: Step) -> Any:
        outputs = yield
        if not step.replaying:
            start = step.zero_noise() + 0.01

            def terms(logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
                assert not step.run.trainable[0].requires_grad
                with torch.no_grad():
                    clean = step.logits(outputs, positions)
                return (logits - clean).square().mean(-1)

            type(self).computed = step.noise_gradient(start, terms)
            type(self).noise = 0.1 * self.computed / self.computed.norm()
            step.cache["compare"] = step.forward(self.noise)
        return outputs

    @hookimpl
    def token_terms(self, step: Step, logits: torch.Tensor, positions: torch.Tensor) -> LossTerm | None:
        if step.replaying:
            return None
        return LossTerm("compare", (logits - step.logits(step.cache["compare"], positions)).square().mean(-1), weight=3)

    @hookimpl
    def loss_terms(self, step: Step, outputs: Outputs) -> LossTerm | None:
        noisy = step.cache["compare"].hidden
        return None if step.replaying else LossTerm("hidden", (outputs.hidden - noisy).square().mean(), "step", 0.5)


def ready(recipe: Any, *extra: Strategy) -> tuple[Any, Any, Step]:
    """Return a run before its first step, with a random adapter and `extra` strategies, and its only micro-step."""
    run, hooks, engine = prepare(recipe, Report(quiet=True), True)
    for strategy in extra:
        hooks.register_core(strategy, strategy.name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in run.trainable:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    todo, run.counts = next(optimizer_steps(run, hooks))
    assert len(todo.batches) == 1
    return run, engine, Step(run, todo.batches[0], engine)


@pytest.mark.parametrize("chunk", [3, 256])
def test_compared_outputs_share_the_chunked_pass(make_recipe: Callable, monkeypatch: Any, chunk: int) -> None:
    """Against plain autograd on full logits: the same noise, and the same gradients of both sides."""
    from budwood.model import evaluation as module

    monkeypatch.setattr(module, "CHUNK", chunk)
    run, engine, step = ready(make_recipe(), Compare(name="compare"))
    run.hooks.call("backward", step=step)
    result = [p.grad.clone() for p in run.trainable]
    for parameter in run.trainable:
        parameter.grad = None
    task, batch = run.task, step.batch

    def outputs(noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        with run.task.noisy(run.model, noise):
            model_outputs = task.outputs(run.model, batch)
        return model_outputs.hidden, model_outputs.head(model_outputs.hidden.flatten(0, 1)[batch.label_positions])

    leaf = (step.zero_noise() + 0.01).requires_grad_()
    count = len(batch.labels)
    objective = (outputs(leaf)[1] - outputs(None)[1].detach()).square().mean(-1).sum() / count
    (gradient,) = torch.autograd.grad(objective, leaf)
    torch.testing.assert_close(Compare.computed, gradient, atol=1e-7, rtol=1e-4)
    hidden, logits = outputs(None)
    noisy_hidden, noisy_logits = outputs(Compare.noise)
    loss = torch.nn.functional.cross_entropy(logits, batch.labels)
    compared = (logits - noisy_logits).square().mean()
    total = loss + 3 * compared + 0.5 * (hidden - noisy_hidden).square().mean()
    total.backward()
    for ours, parameter in zip(result, run.trainable, strict=True):
        torch.testing.assert_close(ours, parameter.grad, atol=1e-6, rtol=1e-4)
    assert float(compared) > 1e-4
    values = engine.finish_step()
    assert float(values["loss"]) == pytest.approx(float(total), rel=1e-5)
    assert float(step.loss) == pytest.approx(float(loss + 3 * compared), rel=1e-5), "excludes the step's own terms"


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_noise_gradients_do_not_depend_on_the_loss_scale_and_parameters_do(make_recipe: Callable, scale: float) -> None:
    run, engine, step = ready(make_recipe())
    engine.loss_scale = torch.tensor(scale)
    noise = torch.randn(step.zero_noise().shape, generator=torch.Generator().manual_seed(0)) * 0.02
    step.track_noise, step.main_weight, step.noise = True, 0.5, noise
    run.hooks.call("backward", step=step)
    tracked, loss = step.noise_grad, step.loss
    main = [p.grad.clone() for p in run.trainable]
    computed = step.noise_gradient(noise)
    assert all(torch.equal(p.grad, before) for p, before in zip(run.trainable, main, strict=True))
    assert all(p.requires_grad for p in run.trainable)
    torch.testing.assert_close(tracked, 0.5 * computed, atol=1e-7, rtol=1e-4)
    returned = step.replay(noise, 0.5, gradient=True)
    torch.testing.assert_close(returned, tracked, atol=1e-7, rtol=1e-4)
    assert float(step.loss) == pytest.approx(float(loss), rel=1e-6), "a pass's loss excludes its weight"
    assert step.replay(noise, 1.0) is None
    leaf = noise.clone().requires_grad_()
    with run.task.noisy(run.model, leaf):
        outputs = run.task.outputs(run.model, step.batch)
    logits = outputs.head(outputs.hidden.flatten(0, 1)[step.batch.label_positions])
    exact = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, step.batch.labels), [leaf, *run.trainable])
    torch.testing.assert_close(computed, exact[0], atol=1e-7, rtol=1e-4)
    for parameter, gradient in zip(run.trainable, exact[1:], strict=True):  # 0.5 + 0.5 + 1
        torch.testing.assert_close(parameter.grad, 2 * scale * gradient, atol=1e-6 * scale, rtol=1e-4)


def test_the_output_of_the_decoder_is_free_while_the_gradient_passes_its_layers(make_recipe: Callable) -> None:
    """Both it and its gradient are as large as a layer's input, which recomputed layers keep alone."""
    run, _, step = ready(make_recipe())
    kept, seen = [], []
    run.model.model.norm.register_forward_hook(lambda *args: kept.append(weakref.ref(args[2].untyped_storage())))
    run.model.model.norm.register_full_backward_pre_hook(lambda _, given: kept.append(weakref.ref(given[0])))
    first = next(p for name, p in run.model.named_parameters() if "layers.0" in name and p.requires_grad)
    first.register_hook(lambda gradient: seen.append([one() is None for one in kept]))
    run.hooks.call("backward", step=step)
    assert seen == [[True, True]]


def test_a_term_of_the_wrong_shape_names_its_term(make_recipe: Callable, test_strategies: Any) -> None:
    from budwood import LossTerm, PluginError, hookimpl

    class Wrong(test_strategies.Penalty):
        @hookimpl
        def token_terms(self, step: Any, logits: torch.Tensor, positions: torch.Tensor) -> LossTerm:
            return LossTerm("wrong", logits.sum(), "label")

    test_strategies.Penalty = Wrong
    with pytest.raises(PluginError, match="loss term 'wrong' of token_terms"):
        tune(make_recipe(strategies=["lora", "penalty"]), quiet=True)
