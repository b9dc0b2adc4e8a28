"""Optimizer steps in float64 and their independent reference: autograd on the full logits of a stock model.

The reference is transformers' own model on one example at a time, with weights W + s B A and heads computed here.
It uses none of Budwood's forward, chunked head or loss terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from budwood import (
    Batch,
    Column,
    Example,
    LossTerm,
    Options,
    Outputs,
    Run,
    Step,
    Strategy,
    hookimpl,
)
from budwood.model.evaluation import collate_for
from budwood.testing.bench import register
from budwood.training.batches import StepBatches, count_units
from budwood.training.memory import accumulate
from budwood.training.report import Report
from budwood.training.setup import prepare
from budwood.training.step import Engine

BETA, CLIP, TEMPERATURE = 0.3, 0.2, 0.2


class Exact(Strategy):
    """Converts the model to float64, and gives the examples weights, pairs, advantages and old log-probabilities."""

    api = 2
    after = ("adapter",)

    class Options(Options):
        pairs: bool = True

    @hookimpl
    def prepare_examples(self, examples: Sequence[Example]) -> list[Example]:
        draw = np.random.default_rng(0)
        prepared = []
        for number, example in enumerate(examples):
            count = len(example.labels)
            columns = {
                "old": Column(-draw.uniform(2, 7, count), "label"),
                "advantage": Column(np.array(draw.normal())),
            }
            weights = draw.choice([0.25, 0.7, 1.0, 1.9], count).astype(np.float32)
            group = number // 2 if self.options.pairs else None
            prepared.append(replace(example, weights=weights, group=group, columns=columns))
        return prepared

    @hookimpl
    def prepare_model(self, model: nn.Module) -> nn.Module:
        return wide(model)


class Preference(Strategy):
    """DPO (Rafailov et al., 2023, equation 7), each label's log-probability times its weight."""

    api = 2
    requires = ("adapter",)
    uses_reference = "base"

    @hookimpl
    def sequence_terms(self, step: Step, log_probs: Tensor) -> LossTerm:
        batch, reference = step.batch, step.reference().log_probs
        gain = (log_probs - reference) * batch.weights.to(log_probs.dtype)
        sums = gain.new_zeros(len(batch.keys)).index_add(0, batch.example_of_label, gain)
        first = torch.tensor([start for start, _ in batch.groups])
        return LossTerm("preference", -F.logsigmoid(BETA * (sums[first] - sums[first + 1])), "group", 2.0)


class Ratio(Strategy):
    """PPO's clipped ratio (Schulman et al., 2017, equation 7), over weighted labels and over a custom unit."""

    api = 2

    @hookimpl
    def batch_counts(self, batch: Batch) -> dict[str, float]:
        return {"answer": float(len(batch.labels)) ** 0.5}

    @hookimpl
    def sequence_terms(self, step: Step, log_probs: Tensor) -> list[LossTerm]:
        batch = step.batch
        values = clipped(log_probs, batch.columns["old"], batch.columns["advantage"][batch.example_of_label])
        return [LossTerm("ratio", values, "label", 0.7), LossTerm("answer_ratio", values, "answer", 1.3)]


class Contrast(Strategy):
    """InfoNCE (van den Oord et al., 2018, equation 4) between neighbours, and a baseline over the optimizer step."""

    api = 2

    @hookimpl
    def step_values(self, step: Step, outputs: Outputs, log_probs: Tensor) -> dict[str, Tensor]:
        batch = step.batch
        rows = outputs.hidden.flatten(0, 1)[batch.label_positions]
        sums = rows.new_zeros(len(batch.keys), rows.shape[-1]).index_add(0, batch.example_of_label, rows)
        return {
            "embedding": sums / torch.bincount(batch.example_of_label)[:, None],
            "score": log_probs.new_zeros(len(batch.keys)).index_add(0, batch.example_of_label, log_probs),
            "number": torch.arange(len(batch.keys)),
        }

    @hookimpl
    def step_terms(self, values: dict[str, Tensor]) -> list[LossTerm]:
        assert values["number"].dtype == torch.int64
        return [
            LossTerm("contrast", contrast(values["embedding"]), "step", 0.8),
            LossTerm("spread", spread(values["score"]), "step", 0.02),
        ]


class Spy(Strategy):
    """Records the noise of every pass with a gradient."""

    api = 2

    @hookimpl(wrapper=True)
    def forward(self, step: Step) -> Any:
        if torch.is_grad_enabled():
            noise = None if step.noise is None else step.noise.detach().clone()
            SPIED.append((step.batch, noise, step.replaying))
        return (yield)


SPIED: list[tuple[Batch, Tensor | None, bool]] = []
STRATEGIES: dict[str, type[Strategy]] = {
    "exact": Exact, "preference": Preference, "ratio": Ratio, "contrast": Contrast, "spy": Spy,
}  # fmt: skip


def install() -> None:
    """Register the strategies under their names."""
    for name, cls in STRATEGIES.items():
        register(cls, name)


def clipped(log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = (log_probs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)


def contrast(embeddings: Tensor) -> Tensor:
    unit = F.normalize(embeddings, dim=-1)
    scores = unit[0::2] @ unit[1::2].T / TEMPERATURE
    return F.cross_entropy(scores, torch.arange(len(scores)))


def spread(scores: Tensor) -> Tensor:
    return (scores - scores.mean()).square().mean()


def wide(model: nn.Module) -> nn.Module:
    """Convert the model to float64, including its norms, which transformers computes in fp32."""

    def norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)  # type: ignore

    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm(module)
    return model


def ready(recipe: Any) -> tuple[Run, Engine]:
    """Return a float64 run before its first step, with a non-zero adapter that differs from its initial value."""
    run, _, engine = prepare(recipe, Report(quiet=True), True)
    run.dtype = torch.float64
    run.model.train()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in run.trainable:
            assert parameter.dtype == torch.float64
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return run, engine


@dataclass
class Result:
    """Result of an optimizer step: its terms and their sum, each parameter's gradient, and the passes in order."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    passes: list[tuple[Batch, Tensor | None, bool]] = field(default_factory=list)


def named(run: Run) -> dict[str, nn.Parameter]:
    return {name: parameter for group in run.groups for name, parameter in group.parameters.items()}


def take(run: Run, engine: Engine, rows: Sequence[Sequence[int]]) -> Result:
    """Run core's optimizer step up to the gradients, with one micro-batch per row of example indices."""
    batches = [collate_for(run, [run.examples[i] for i in row], 0) for row in rows]
    run.counts = count_units(run, run.hooks, batches)
    SPIED.clear()
    for parameter in run.trainable:
        parameter.grad = None
    indices = np.array([i for row in rows for i in row])
    accumulate(run, run.hooks, engine, StepBatches(run.examples, indices, 0, run.micro_tokens, batches))
    values = engine.finish_step()
    return Result(values, {name: p.grad.clone() for name, p in named(run).items()}, list(SPIED))


@dataclass
class Scored:
    """An example in the reference, with full logits."""

    log_probs: Tensor
    base: Tensor
    """The base's log-probabilities."""
    logits: Tensor
    base_logits: Tensor
    embedding: Tensor
    weights: Tensor
    columns: dict[str, Tensor]
    labels: Tensor

    def at(self, temperature: float) -> Scored:
        """The example with log-probabilities at a temperature."""
        values = (self.logits / temperature).log_softmax(-1).gather(-1, self.labels[:, None])[:, 0]
        return replace(self, log_probs=values)


class Stock:
    """transformers' model with the run's weights."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.classifies = run.task.name == "sequence-classification"
        options: dict[str, Any] = {"attn_implementation": "sdpa", "dtype": torch.float64}
        if self.classifies:
            options["num_labels"] = len(run.examples.labels)
        auto = AutoModelForSequenceClassification if self.classifies else AutoModelForCausalLM
        self.model = wide(auto.from_pretrained(run.recipe.base.model, **options)).eval()

    def weights(self, adapted: bool = True) -> dict[str, Tensor]:
        """Return W + s B A of every adapted linear, the trainable head, and all other weights unchanged."""
        result = {}
        for name, own in self.model.named_parameters():
            path, _, leaf = name.rpartition(".")
            module: Any = self.run.model.get_submodule(path)
            if hasattr(module, "lora_A"):
                base = module.get_base_layer().weight.detach()
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                result[name] = base + module.scaling["default"] * (b @ a) if adapted else base
            elif hasattr(module, "modules_to_save"):
                inside = module.modules_to_save["default"] if adapted else module.original_module
                result[name] = getattr(inside, leaf)
            else:
                result[name] = own.detach()
        return result

    def score(self, index: int, noise: Tensor | None = None) -> Scored:
        """Run a single example, with `noise` [T, d] on its embeddings."""
        example = self.run.examples[index]
        ids = torch.tensor(example.inputs["input_ids"].astype(np.int64))
        labels = torch.tensor(example.labels.astype(np.int64))
        at = torch.tensor(example.label_positions)
        logits, embedding = self._forward(self.weights(), ids, at, noise)
        with torch.no_grad():
            base_logits, _ = self._forward(self.weights(adapted=False), ids, at, None)
        log_probs, base = (x.log_softmax(-1).gather(-1, labels[:, None])[:, 0] for x in (logits, base_logits))
        columns = {name: torch.tensor(column.values) for name, column in example.columns.items()}
        weights = torch.tensor(example.weights).double()
        return Scored(log_probs, base, logits, base_logits, embedding, weights, columns, labels)

    def _forward(self, weights: dict[str, Tensor], ids: Tensor, at: Tensor, noise: Tensor | None) -> Any:
        embedded = F.embedding(ids, weights["model.embed_tokens.weight"])
        if noise is not None:
            embedded = embedded + noise.double()
        kwargs = {"inputs_embeds": embedded[None], "use_cache": False}
        if not self.classifies:
            kwargs["output_hidden_states"] = True
            out = torch.func.functional_call(self.model, weights, (), kwargs)
            return out.logits[0][at], out.hidden_states[-1][0][at].mean(0)
        head = weights["score.weight"]
        inner = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name != "score.weight"}
        hidden = torch.func.functional_call(self.model.model, inner, (), kwargs).last_hidden_state[0][at]
        return hidden @ head.T, hidden.mean(0)


Terms = Callable[[list[Scored]], dict[str, tuple[Tensor, float]]]


def preference(examples: list[Scored]) -> dict[str, tuple[Tensor, float]]:
    gains = [((e.log_probs - e.base) * e.weights).sum() for e in examples]
    pairs = [-torch.log(torch.sigmoid(BETA * (a - b))) for a, b in zip(gains[0::2], gains[1::2], strict=True)]
    return {"preference": (sum(pairs) / len(pairs), 2.0)}


def ratio(counts: dict[str, float]) -> Terms:
    def terms(examples: list[Scored]) -> dict[str, tuple[Tensor, float]]:
        values = [clipped(e.log_probs, e.columns["old"], e.columns["advantage"]) for e in examples]
        weighted = sum((v * e.weights).sum() for v, e in zip(values, examples, strict=True))
        total = sum(e.weights.sum() for e in examples)
        return {
            "ratio": (weighted / total, 0.7),
            "answer_ratio": (sum(v.sum() for v in values) / counts["answer"], 1.3),
        }

    return terms


def distilled(examples: list[Scored]) -> dict[str, tuple[Tensor, float]]:
    """Forward KL at temperature 2, weight 0.4."""
    total = 0.0
    for e in examples:
        p, q = (e.base_logits / 2).log_softmax(-1), (e.logits / 2).log_softmax(-1)
        total = total + (4 * (p.exp() * (p - q)).sum(-1) * e.weights).sum()
    return {"distillation": (total / sum(e.weights.sum() for e in examples), 0.4)}


def own(name: str, weight: float) -> Terms:
    """The task's own loss."""

    def terms(examples: list[Scored]) -> dict[str, tuple[Tensor, float]]:
        total = sum(-(e.log_probs * e.weights).sum() for e in examples)
        return {name: (total / sum(e.weights.sum() for e in examples), weight)}

    return terms


def across(examples: list[Scored]) -> dict[str, tuple[Tensor, float]]:
    """The terms of `Contrast`."""
    embeddings = torch.stack([e.embedding for e in examples])
    scores = torch.stack([e.log_probs.sum() for e in examples])
    return {"contrast": (contrast(embeddings), 0.8), "spread": (spread(scores), 0.02)}


def expect(
    run: Run, rows: Sequence[Sequence[int]], terms: Sequence[Terms], step_terms: Terms | None = None,
    passes: Sequence[tuple[float, dict[int, Tensor | None]]] = ((1.0, {}),), step_temperature: float = 1.0,
) -> Result:  # fmt: skip
    """Return the expected result of an optimizer step.

    Args:
        terms: terms of labels, examples, groups and strategies' units.
        step_terms: terms across the optimizer step, from log-probabilities at `step_temperature`.
        passes: weight of each pass, and the noise of each example in it; the first pass is the logged one.
    """
    stock, order = Stock(run), [i for row in rows for i in row]
    values: dict[str, Tensor] = {}
    total: Any = 0.0
    loss: Any = 0.0
    pulls: Any = None
    if step_terms is not None:
        clean = [stock.score(i).at(step_temperature) for i in order]
        result = step_terms(clean)
        combined = sum(value * weight for value, weight in result.values())
        leaves = [tensor for e in clean for tensor in (e.embedding, e.log_probs)]
        pulls = torch.autograd.grad(combined, leaves, allow_unused=True)
        values |= {name: value.detach() for name, (value, _) in result.items()}
        loss = loss + combined.detach()
    for number, (factor, noise) in enumerate(passes):
        examples = [stock.score(i, noise.get(i)) for i in order]
        for some in terms:
            for name, (value, weight) in some(examples).items():
                total = total + factor * weight * value
                if number == 0:
                    values[name] = value.detach()
                    loss = loss + weight * value.detach()
        if pulls is not None:
            hot = [e.at(step_temperature) for e in examples]
            leaves = [tensor for e in hot for tensor in (e.embedding, e.log_probs)]
            total = total + factor * sum((a * b).sum() for a, b in zip(leaves, pulls, strict=True) if b is not None)
    names = named(run)
    gradients = torch.autograd.grad(total, list(names.values()), allow_unused=True)
    return Result({"loss": loss, **values}, dict(zip(names, gradients, strict=True)))


def agree(result: Result, expected: Result, scale: float = 1.0, noisy: bool = False) -> None:
    """Compare values to 1e-12 and gradients to 1e-9, relative to the largest of each."""
    assert set(result.values) == set(expected.values)
    for name, value in expected.values.items():
        assert result.values[name].dtype == torch.float64, name
        torch.testing.assert_close(
            result.values[name], value, atol=1e-12, rtol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert set(result.gradients) == set(expected.gradients)
    for name, gradient in expected.gradients.items():
        size = float(gradient.abs().max())
        assert size > 0, name
        torch.testing.assert_close(
            result.gradients[name] / scale, gradient, atol=1e-9 * size, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def noise_of(run: Run, result: Result, main: float, replay: float) -> list[tuple[float, dict[int, Tensor | None]]]:
    """Return the passes that `Spy` recorded, as `expect` takes them: core's own first, then the replays."""
    keys = {run.examples[i].key: i for i in range(len(run.examples))}
    kinds: dict[int, dict[int, Tensor | None]] = {}
    seen: dict[Any, int] = {}
    for batch, noise, _ in result.passes:
        number = seen[batch.keys] = seen.get(batch.keys, -1) + 1
        parts = [None] * len(batch.keys) if noise is None else _parts(batch, noise)
        kinds.setdefault(number, {}).update({keys[k]: p for k, p in zip(batch.keys, parts, strict=True)})
    return [(main if number == 0 else replay, noise) for number, noise in sorted(kinds.items())]


def _parts(batch: Batch, noise: Tensor) -> Iterator[Tensor]:
    flat = noise.flatten(0, 1)
    for example in range(len(batch.keys)):
        yield flat[batch.example_of_position == example]


@contextmanager
def count_calls(target: Any, name: str) -> Iterator[list[tuple[Any, ...]]]:
    """Record the arguments of every call of a function."""
    original, calls = getattr(target, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    setattr(target, name, counted)
    try:
        yield calls
    finally:
        setattr(target, name, original)
