"""A diagonal scaling of activations: an adapter type that Budwood does not include."""

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
    linear_shape,
    match_targets,
)
from safetensors.torch import save_file
from torch import Tensor, nn


class Scaling(Strategy):
    """Multiplies the outputs of linear modules by learned vectors: y = s ⊙ W x ((IA)³; Liu et al., 2022)."""

    api = 2
    slots = ("adapter",)

    class Options(Options):
        targets: Targets = ["k_proj", "v_proj", "up_proj"]

    def __init__(self, options: Any = None, name: str = "", distribution: str = "") -> None:
        super().__init__(options, name, distribution)
        self._vectors: dict[str, dict[str, nn.Parameter]] = {}  # adapter → path of a linear → s [out]
        self._hooks: list[Any] = []  # of the active adapters

    # Training: add an adapter, list its parameters, save it.

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
        self.use_adapters(model, [RUN_ADAPTER], index=[])
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

    # Adapters on a model: training, the pool and all commands use the same four hooks.

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
    def use_adapters(self, model: nn.Module, names: Sequence[str], index: Sequence[int]) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        used = [self._vectors[name] for name in names]
        for path in dict.fromkeys(path for vectors in used for path in vectors):
            # The current module: the base's linear, or a layer in which another method wraps it.
            module = model.get_submodule(path)
            self._hooks.append(module.register_forward_hook(_scale([vectors.get(path) for vectors in used], index)))

    @hookimpl
    def detach_adapter(self, model: nn.Module, name: str) -> None:
        self.use_adapters(model, [], index=[])
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
    return linear_shape(model.get_submodule(path))[0]


def _scale(vectors: list[Tensor | None], index: Sequence[int]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """Return a forward hook that multiplies by the only vector, or per row (or position) by that of the index."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        factor = vectors[0]
        if index:
            one = torch.ones(output.shape[-1], device=output.device)
            table = torch.stack([one if vector is None else vector for vector in (*vectors, None)])  # -1: ones
            factor = table[list(index)].view(len(output), -1, output.shape[-1])
        return (output * factor).to(output.dtype)  # in fp32: bf16 would round off the first updates of s

    return hook
