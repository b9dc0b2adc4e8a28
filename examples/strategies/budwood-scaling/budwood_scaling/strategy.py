"""A diagonal scaling of activations: an adapter of a kind that Budwood itself does not know."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from budwood import (
    RUN_ADAPTER,
    CorruptError,
    InputError,
    Options,
    ParameterGroup,
    Plan,
    Run,
    Strategy,
    Targets,
    check_adapter_tensors,
    hookimpl,
    match_targets,
)
from safetensors.torch import save_file
from torch import Tensor, nn


class Scaling(Strategy):
    """Multiplies the outputs of linear modules by learned vectors: y = s ⊙ W x ((IA)³; Liu et al., 2022)."""

    class Options(Options):
        targets: Targets = ["k_proj", "v_proj", "up_proj"]

    slots = ("adapter",)

    def __init__(self, options: Any = None, name: str = "", distribution: str = "") -> None:
        super().__init__(options, name, distribution)
        self._vectors: dict[str, dict[str, nn.Parameter]] = {}  # adapter → path of a linear → s [out]
        self._hooks: list[Any] = []  # of the adapters in use; none where the base answers alone

    # Training: put an adapter on, say what trains, save it.

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        if plan.model is not None:
            try:
                match_targets(plan.model, self.options.targets, None)
            except InputError as error:
                plan.problem(self, str(error))

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        paths = match_targets(model, self.options.targets, None)
        self._add(model, RUN_ADAPTER, {path: torch.ones(_width(model, path)) for path in paths})
        self.use_adapters(model, [RUN_ADAPTER])
        return model

    @hookimpl
    def trainable_parameters(self, run: Run, model: nn.Module) -> list[ParameterGroup]:
        return [ParameterGroup("scaling", dict(self._vectors[RUN_ADAPTER]), weight_decay=0.0)]

    @hookimpl
    def export(self, run: Run, model: nn.Module, directory: Path) -> None:
        tensors = {path: vector.detach().cpu().contiguous() for path, vector in self._vectors[RUN_ADAPTER].items()}
        config = {"method": "scaling", "modules": list(tensors)}
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})

    # Life on a model: the same four hooks serve training, the pool and every command.

    @hookimpl
    def attach_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
        paths, linears = config.get("modules"), set(match_targets(model, "all-linear", None))
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise CorruptError("adapter_config.json: 'modules' must be a list of names.")
        for path in paths:
            if path not in linears:
                raise CorruptError(f"adapter_config.json: the base has no linear module '{path[:80]}'.")
        check_adapter_tensors({path: (_width(model, path),) for path in paths}, tensors)
        self._add(model, name, tensors)

    @hookimpl
    def use_adapters(self, model: nn.Module, names: Sequence[str | None]) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        rows = [self._vectors[name] if name is not None else {} for name in names]
        for path in dict.fromkeys(path for vectors in rows for path in vectors):
            # Whatever stands there now: the base's linear, or a layer in which another method keeps it.
            module = model.get_submodule(path)
            self._hooks.append(module.register_forward_hook(_scale([vectors.get(path) for vectors in rows])))

    @hookimpl
    def detach_adapter(self, model: nn.Module, name: str) -> None:
        self.use_adapters(model, [])
        del self._vectors[name]

    @hookimpl
    @torch.no_grad()
    def merge_adapter(self, model: nn.Module, name: str) -> None:
        for path, vector in self._vectors[name].items():
            linear = model.get_submodule(path)
            linear.weight *= vector[:, None]
            if linear.bias is not None:
                linear.bias *= vector
        self.detach_adapter(model, name)

    def _add(self, model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
        self._vectors[name] = {
            path: nn.Parameter(tensor.float().to(next(model.get_submodule(path).parameters()).device))
            for path, tensor in tensors.items()
        }


def _width(model: nn.Module, path: str) -> int:
    return int(model.get_submodule(path).out_features)


def _scale(rows: list[Tensor | None]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A forward hook that multiplies by one vector for every row, or by one (or none) for each row of the batch."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if len(rows) == 1 and rows[0] is not None:
            return (output * rows[0]).to(output.dtype)  # in fp32: the first steps move s less than bf16 tells
        one = torch.ones(output.shape[-1], device=output.device)
        vectors = torch.stack([one if vector is None else vector for vector in rows])
        return (output * vectors[:, None]).to(output.dtype)

    return hook
