"""What a run does for a mixture of experts: the auxiliary loss that the base asks for, and the load of its experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from budwood.contract.registry import Composition
from budwood.contract.strategy import hookimpl
from budwood.contract.types import LossTerm, Outputs, Run, Step
from budwood.model.experts import RoutedExperts, expert_load


class LoadBalance:
    """The loss that keeps the load of experts even, as transformers adds it (Fedus et al., 2021, eq. 4 to 6).

    With E experts it is E Σ f_e p_e over the tokens of all layers, where f_e is the mean number of times that a token
    chose the expert e, and p_e the mean probability that the router gave it. It depends on the tokens of a micro-batch
    together.
    """

    def __init__(self, model: Any, coefficient: float, chosen: int) -> None:
        self.coefficient, self.chosen = coefficient, chosen
        self.logits: list[Tensor] = []
        for module in _routers(model):
            module.register_forward_hook(self._record)
        model.base_model.register_forward_pre_hook(lambda *_: self.logits.clear())

    @classmethod
    def of(cls, model: Any) -> LoadBalance | None:
        """Return the loss of a model whose configuration asks for it with `output_router_logits`."""
        config = model.config.get_text_config()
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
        if not getattr(config, "output_router_logits", False) or not coefficient or not _routers(model):
            return None
        return cls(model, coefficient, config.num_experts_per_tok)

    def _record(self, module: nn.Module, _: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self.logits.append(output[0] if isinstance(output, tuple) else output)

    @hookimpl
    def loss_terms(self, step: Step, outputs: Outputs) -> LossTerm | None:
        if not self.logits:
            return None
        value = load_balance(self.logits, self.chosen)
        return LossTerm("load_balance", value.expand(len(step.batch.keys)), "example", self.coefficient)


def balance_load(run: Run, hooks: Composition) -> None:
    """Register the auxiliary loss, if the base asks for it."""
    balance = LoadBalance.of(run.model)
    if balance is not None:
        hooks.register_core(balance, "core load balance")


def load_balance(logits: list[Tensor], chosen: int) -> Tensor:
    """Return the auxiliary loss, fp32, of routers' logits [n, E] of every layer, of which `chosen` experts are used."""
    rows = torch.cat([layer.reshape(-1, layer.shape[-1]) for layer in logits]).float()
    probabilities = rows.softmax(-1)
    picked = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(chosen, -1).indices, 1.0)
    return rows.shape[-1] * (picked.mean(0) * probabilities.mean(0)).sum()


def _routers(model: Any) -> list[nn.Module]:
    """Return the modules whose output transformers records as logits of routers."""
    found = []
    for module in model.modules():
        entry = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        for one in entry if isinstance(entry, list | tuple) else [entry] if entry is not None else []:
            kind: Any = getattr(one, "target_class", one)
            found += [part for part in module.modules() if isinstance(part, kind) and part not in found]
    return found


def loads(run: Run) -> dict[str, list[float]]:
    """Return each expert's share of the tokens of its layer that this process has trained on, by module."""
    found = {}
    for path, module in run.model.named_modules():
        if isinstance(module, RoutedExperts) and (total := sum(load := expert_load(module))):
            found[path] = [round(count / total, 6) for count in load]
    return found


def describe_loads(shares: dict[str, list[float]]) -> str:
    """Return a line about the load of the experts."""
    every = [share * len(layer) for layer in shares.values() for share in layer]
    idle = sum(share == 0 for share in every)
    text = f"load of the experts: {min(every):.2f} to {max(every):.2f} times an even share of their layer's tokens"
    return text + (f"; {idle:,} of {len(every):,} got none, and their adapters did not train" if idle else "")
