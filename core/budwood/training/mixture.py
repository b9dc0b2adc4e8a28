"""What a run does for a mixture of experts: the auxiliary loss that the base asks for, and the load of its experts."""

from __future__ import annotations

from collections.abc import Collection, Generator
from typing import Any

import torch
from torch import Tensor, nn

from budwood.contract.registry import Composition
from budwood.contract.strategy import hookimpl
from budwood.contract.types import LossTerm, Outputs, Run, Step
from budwood.model.evaluation import at_least_fp32
from budwood.model.experts import RoutedExperts, count_experts, expert_load
from budwood.model.outputs import asks_for


class LoadBalance:
    """The loss that keeps the load of experts even, as transformers adds it (Fedus et al., 2021, eq. 4 to 6).

    With E experts it is E Σ f_e p_e over the tokens of an optimizer step in all layers, where f_e is the mean number of
    times that a token chose the expert e, and p_e the mean probability that the router gave it.
    """

    beside_outputs = True

    def __init__(self, model: Any, coefficient: float, chosen: int) -> None:
        self.coefficient, self.chosen = coefficient, chosen
        self.recording = False
        self.logits: list[Tensor] = []
        for module in _routers(model):
            module.register_forward_hook(self._record)

    @classmethod
    def of(cls, model: Any) -> LoadBalance | None:
        """Return the loss of a model whose configuration asks for it with `output_router_logits`."""
        config = model.config.get_text_config()
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
        if not asks_for(config, "output_router_logits") or not coefficient or not _routers(model):
            return None
        return cls(model, coefficient, config.num_experts_per_tok)

    def _record(self, module: nn.Module, _: Any, output: Any) -> None:
        if self.recording:
            self.logits.append(output[0] if isinstance(output, tuple) else output)

    @hookimpl(wrapper=True)
    def forward(self, step: Step) -> Generator[None, Outputs, Outputs]:
        if not step.compared:
            self.recording, self.logits = True, []
        try:
            return (yield)
        finally:
            self.recording = False

    @hookimpl
    def step_values(self, step: Step) -> dict[str, Tensor] | None:
        real = step.batch.example_of_position >= 0
        logits, self.logits = self.logits, []
        return routing_sums(logits, self.chosen, real) if logits else None

    @hookimpl
    def step_terms(self, values: dict[str, Tensor]) -> LossTerm:
        return LossTerm("load_balance", load_balance(values), "step", self.coefficient)


def balance_load(run: Run, hooks: Composition) -> None:
    """Register the auxiliary loss, if the base asks for it."""
    balance = LoadBalance.of(run.model)
    if balance is not None:
        hooks.register_core(balance, "core load balance")


def routing_sums(logits: list[Tensor], chosen: int, real: Tensor) -> dict[str, Tensor]:
    """Return sums over tokens of what routers choose in every layer: times, probabilities [1, E], and tokens [1].

    Args:
        logits: [n, E] of each layer.
        chosen: number of experts that are used.
        real: [n] bool, false for padding.
    """
    counted = real.repeat(len(logits))[:, None]  # rows are masked, not selected: their number is unknown to a plan
    rows = torch.cat([layer.reshape(-1, layer.shape[-1]) for layer in logits]).masked_fill(~counted, 0)
    probabilities = at_least_fp32(rows).softmax(-1)
    picked = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(chosen, -1).indices, 1.0)
    return {
        "chosen": (picked * counted).sum(0, keepdim=True).long(),
        "probabilities": (probabilities * counted).sum(0, keepdim=True),
        "tokens": counted.sum(0),
    }


def load_balance(sums: dict[str, Tensor]) -> Tensor:
    """Return the auxiliary loss of sums [m, E] over the parts of a step, see `routing_sums`."""
    tokens = sums["tokens"].sum()
    probabilities = sums["probabilities"].sum(0) / tokens
    return probabilities.numel() * (sums["chosen"].sum(0) / tokens * probabilities).sum()


def _routers(model: Any) -> list[nn.Module]:
    """Return the modules whose output transformers records as logits of routers."""
    found = []
    for module in model.modules():
        entry = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        for one in entry if isinstance(entry, list | tuple) else [entry] if entry is not None else []:
            kind: Any = getattr(one, "target_class", one)
            found += [part for part in module.modules() if isinstance(part, kind) and part not in found]
    return found


def describe_experts(run: Run) -> str:
    """Return how many experts the model has, how many are quantised, and how many adapted; empty without experts."""
    experts = count_experts(run.model)
    if not experts.total:
        return ""
    quantized = f"{experts.quantized:,} of {experts.total:,} in {run.base.quantization}"
    quantized = f"{experts.total:,}, not quantised" if run.base.quantization == "none" else quantized
    return f"experts: {quantized}, {experts.trained:,} adapted"


def loads(run: Run) -> dict[str, list[float]]:
    """Return each expert's share of the tokens of its layer that this process has trained on, by module."""
    found = {}
    for path, module in run.model.named_modules():
        if isinstance(module, RoutedExperts) and (total := sum(load := expert_load(module))):
            found[path] = [round(count / total, 6) for count in load]
    return found


def describe_loads(shares: dict[str, list[float]], trained: Collection[str]) -> str:
    """Return a line about the load of the experts; `trained` are the modules of `shares` whose experts train."""
    every = [share * len(layer) for layer in shares.values() for share in layer]
    idle = {path: layer.count(0) for path, layer in shares.items()}
    total, untrained = sum(idle.values()), sum(count for path, count in idle.items() if path in trained)
    text = f"load of the experts: {min(every):.2f} to {max(every):.2f} times an even share of their layer's tokens"
    if total:
        text += f"; {total:,} of {len(every):,} got none"
    if untrained:
        text += f", and {'their adapters' if untrained == total else f'the adapters of {untrained:,}'} did not train"
    return text
