"""A naive implementation of the papers' equations: one example at a time, full logits, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from budwood.contract.examples import Example
from budwood.contract.types import Generator, Run


class Reference:
    """The run's model as W + s B A in stock transformers classes, float64, with the run's adapter as leaves."""

    def __init__(self, run: Run, scaling: float) -> None:
        self.run = run
        classify = run.task.name == "sequence-classification"
        auto = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
        options = {"num_labels": len(run.examples.labels)} if classify else {}
        self.model = auto.from_pretrained(run.recipe.base.model, attn_implementation="eager", **options).double().eval()
        self.leaves = {
            name: p.detach().double().requires_grad_() for g in run.groups for name, p in g.parameters.items()
        }
        weights = dict(self.model.named_parameters())
        self.weights: dict[str, Tensor] = {}
        for name, leaf in self.leaves.items():
            if name.endswith(".lora_A"):
                path = name.removesuffix(".lora_A")
                self.weights[f"{path}.weight"] = (
                    weights[f"{path}.weight"].detach() + scaling * self.leaves[f"{path}.lora_B"] @ leaf
                )
            elif not name.endswith(".lora_B"):
                self.weights[name] = leaf

    def logits(self, example: Example, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [labels, V] at the example's labels with noise [T, d] on its embeddings, and the labels."""
        ids = torch.tensor(example.inputs["input_ids"][None].astype("int64"))
        embedded = self.model.get_input_embeddings()(ids).detach() + noise
        inputs = {"inputs_embeds": embedded}
        labels = torch.tensor(example.labels.astype("int64"))
        if self.run.task.name == "causal-lm":
            logits = functional_call(self.model, self.weights, (), {**inputs, "use_cache": False}).logits[0]
            return logits[torch.tensor(example.label_positions)], labels
        if hasattr(self.model, "score"):
            self.model.config.pad_token_id = None  # so that a single row is pooled at its end
        return functional_call(self.model, self.weights, (), inputs).logits, labels

    def loss(self, example: Example, noise: Tensor) -> Tensor:
        """Return the sum over the labels of -log p(y | x + noise)."""
        return F.cross_entropy(*self.logits(example, noise), reduction="sum")

    def zeros(self, example: Example) -> Tensor:
        return torch.zeros(
            len(example.inputs["input_ids"]), self.model.get_input_embeddings().weight.shape[1], dtype=torch.float64
        )

    def slope(self, loss: Callable[[Example, Tensor], Tensor], example: Example, noise: Tensor) -> Tensor:
        leaf = noise.detach().requires_grad_()
        return torch.autograd.grad(loss(example, leaf), leaf)[0]

    def draws(self, example: Example) -> Generator:
        return Generator(self.run.seed, "adversarial", self.run.step, example.key)

    def gradients(self, total: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.leaves, torch.autograd.grad(total, list(self.leaves.values())), strict=True))


def ball(noise: Tensor, epsilon: float, norm: str) -> Tensor:
    """Project onto the ball of radius epsilon."""
    if norm == "linf":
        return noise.clamp(-epsilon, epsilon)
    return noise * min(1.0, epsilon / max(float(noise.norm()), 1e-300))


def normed(gradient: Tensor, norm: str) -> Tensor:
    size = gradient.norm() if norm == "l2" else gradient.abs().max()
    return gradient / size if size > 0 else gradient


def median_norm(reference: Reference) -> float:
    """Return the median norm of an embedding, in float64."""
    return float(reference.model.get_input_embeddings().weight.detach().norm(dim=1).median())


def naive(reference: Reference, strategy: Any, mask: Callable[[Example], Tensor]) -> tuple[dict[int, Tensor], Tensor]:
    """Return the final noise by example id, and the loss whose gradient the method accumulates, summed over labels.

    `mask(example)` [T, 1] is 1 at positions that may carry noise.
    """
    r, value, method = reference, strategy.value, strategy.options.method
    noises: dict[int, Tensor] = {}
    total = torch.zeros((), dtype=torch.float64)
    for example in r.run.examples:
        zero, where = r.zeros(example), mask(example)
        elements = float(where.sum()) * zero.shape[1]
        if method == "fgm":  # Miyato et al. 2017, eq. 5-7: r = ε g / |g|₂
            g = r.slope(r.loss, example, zero) * where
            delta = value("epsilon") * (normed(g, "l2") if value("norm") == "l2" else g.sign())
            total = total + value("clean_weight") * r.loss(example, zero) + value("weight") * r.loss(example, delta)
        elif method == "pgd":  # Madry et al. 2018, section 2.1: x ← Π(x + α · steepest)
            delta = zero
            for _ in range(value("steps")):
                g = r.slope(r.loss, example, delta) * where
                up = normed(g, "l2") if value("norm") == "l2" else g.sign()
                delta = ball(delta + value("step_size") * up, value("epsilon"), value("norm"))
            total = total + value("clean_weight") * r.loss(example, zero) + value("weight") * r.loss(example, delta)
        elif method == "freelb":  # Zhu et al. 2020, algorithm 1
            like = torch.empty(len(zero), zero.shape[1])
            start = r.draws(example).uniform_like(like, -value("epsilon"), value("epsilon")).double() * where
            delta = start / elements**0.5 if value("norm") == "l2" else start
            for number in range(value("steps")):
                total = total + r.loss(example, delta) / value("steps")
                if number < value("steps") - 1:
                    g = r.slope(r.loss, example, delta) * where
                    up = value("step_size") * normed(g, value("norm"))
                    delta = ball(delta + up, value("epsilon"), value("norm"))
        elif method == "smart":  # Jiang et al. 2020, algorithm 1 and eq. 2

            def symmetric(example: Example, noise: Tensor) -> Tensor:
                p = r.logits(example, r.zeros(example))[0].log_softmax(-1)
                q = r.logits(example, noise)[0].log_softmax(-1)
                forward = F.kl_div(q, p, reduction="sum", log_target=True)
                return forward + F.kl_div(p, q, reduction="sum", log_target=True)

            like = torch.empty(len(zero), zero.shape[1])
            delta = value("sigma") * r.draws(example).normal_like(like).double() * where
            for _ in range(value("steps")):
                g = normed(r.slope(symmetric, example, delta) * where, value("norm"))
                delta = ball(delta + value("step_size") * g, value("epsilon"), value("norm"))
            total = total + r.loss(example, zero) + value("weight") * symmetric(example, delta)
        elif method == "vat":  # Miyato et al. 2018, eq. 5-8 and algorithm 1

            def divergence(example: Example, noise: Tensor) -> Tensor:
                p = r.logits(example, r.zeros(example))[0].detach().log_softmax(-1)
                return F.kl_div(r.logits(example, noise)[0].log_softmax(-1), p, reduction="sum", log_target=True)

            like = torch.empty(len(zero), zero.shape[1])
            d = normed(r.draws(example).normal_like(like).double() * where, "l2")
            for _ in range(value("steps")):
                d = normed(r.slope(divergence, example, value("xi") * d) * where, "l2")
            delta = value("epsilon") * d
            total = total + r.loss(example, zero) + value("weight") * divergence(example, delta)
        else:  # Jain et al. 2024, algorithm 1
            like = torch.empty(len(zero), zero.shape[1])
            uniform = r.draws(example).uniform_like(like, -1.0, 1.0).double() * where
            delta = value("alpha") / elements**0.5 * uniform
            total = total + r.loss(example, delta)
        noises[example.key] = delta
    return noises, total
