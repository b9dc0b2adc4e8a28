"""An adapter of one of PEFT's methods on a model: create, write, attach, serve, merge."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from budwood import (
    RUN_ADAPTER,
    InputError,
    LiveAdapter,
    ParameterGroup,
    Run,
    copy_adapter_tensors,
    match_targets,
    whole_modules,
)
from budwood.lowrank import (
    adapter_layers,
    fan_in_fan_out,
    fit_whole,
    live_low_rank,
    merge_whole_parts,
    new_tokens,
    register_adapter,
    remove_adapter,
    saved_targets,
    saved_tokens,
    saved_whole_modules,
    select_adapters,
    whole_groups,
    whole_tensors,
    without_base_tensors,
    wrap_tokens,
    wrap_whole,
)
from budwood_peft_methods.layers import Adapter, Computed, MethodUpdate, add_layers, build, check_positions
from budwood_peft_methods.saved import Saved

if TYPE_CHECKING:
    from budwood_peft_methods.strategies import PeftMethod


class Placed:
    """An adapter on a model, with what its file says beside the tensors."""

    def __init__(self, adapter: Adapter, config: Any, whole: Collection[str], tokens: Mapping[str, list[int]]) -> None:
        self.adapter, self.config, self.whole, self.tokens = adapter, config, list(whole), dict(tokens)

    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """Return its live tensors, by key in PEFT's file."""
        return self.adapter.slots() | whole_tensors(model, name)


def create(strategy: PeftMethod, run: Run, model: nn.Module) -> Placed:
    """Add the run's adapter to its model, new or continued, and activate it."""
    if run.start_adapter is not None:
        training = {
            strategy.Options.FIELDS[name]: getattr(strategy.options, name) for name in strategy.Options.TRAINING
        }
        saved, tensors = run.start_adapter.config, run.start_adapter.load_tensors()
        for field, value in strategy.Options.INIT.items():
            if field.endswith("dropout") and saved.get(field, value) != value:
                run.say(
                    f"{strategy.name}: the adapter's '{field}: {saved[field]}' is not supported in training: this run "
                    "trains without it"
                )
        placed = attach(strategy, model, saved, tensors, RUN_ADAPTER, training, run.planning)
    else:
        options = strategy.options
        whole = whole_modules(model, options.modules_to_save, run.task, run.base)
        targets = match_targets(model, options.targets, options.layers, whole)
        fields = options.fields() | strategy.module_fields(targets)
        if "random_seed" in fields and fields["random_seed"] is None:
            fields["random_seed"] = run.seed
        tokens = new_tokens(model, run.base, whole)
        with torch.random.fork_rng(devices=[]):  # the initialisation depends on the seed alone
            torch.manual_seed(run.seed)
            placed = _place(
                strategy, model, fields, targets, whole, tokens, RUN_ADAPTER, options.needs_weight, True, run.planning
            )
    placed.config.task_type = run.task.peft_task_type
    placed.config.base_model_name_or_path = run.recipe.base.model
    select_adapters(model, strategy.name, [RUN_ADAPTER])
    return placed


def parameter_groups(strategy: PeftMethod, placed: Placed, model: nn.Module) -> list[ParameterGroup]:
    """Return the adapter's parameters, and what trains beside them."""
    decay = {} if strategy.decays else {"weight_decay": 0.0}
    groups: dict[float, dict[str, nn.Parameter]] = {}
    for name, parameter in placed.adapter.parameters().items():
        ratio = next((ratio for part, ratio in strategy.RATIOS.items() if part in name), 1.0)
        groups.setdefault(ratio, {})[name] = parameter
    own = [
        ParameterGroup(strategy.name if ratio == 1 else f"{strategy.name} x{ratio:g}", named, ratio, **decay)
        for ratio, named in groups.items()
    ]
    return [*own, *whole_groups(model, RUN_ADAPTER)]


def write(placed: Placed, model: nn.Module, directory: Path) -> None:
    """Write the run's adapter in PEFT's format."""
    config = placed.config
    config.inference_mode = True
    config.save_pretrained(str(directory))
    path = directory / "adapter_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved = {
        key: sorted(value) if key in _UNORDERED and isinstance(value, list) else value for key, value in saved.items()
    }
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in placed.tensors(model, RUN_ADAPTER).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


_UNORDERED = ("target_modules", "feedforward_modules")
"""Fields that PEFT makes unordered sets."""


def attach(
    strategy: PeftMethod,
    model: nn.Module,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    name: str,
    training: Mapping[str, Any] | None = None,
    planning: bool = False,
) -> Placed:
    """Attach a saved adapter to a model, inactive.

    Args:
        training: fields of PEFT's config that only affect training, in place of the file's.
        planning: tensors have no values; nor do those of a model on the meta device.

    Raises:
        CorruptError: config, tensors and model do not match.
        InputError: the adapter uses an unsupported variant.
    """
    saved = Saved.read(strategy, config)
    targets = saved_targets(model, saved.selection)
    whole = saved_whole_modules(model, saved.selection, tensors)
    tokens, tensors = saved_tokens(model, saved.selection, tensors, whole)
    fields = saved.fields(targets) | dict(training or {})
    planning |= next(model.parameters()).is_meta
    placed = _place(strategy, model, fields, targets, whole, tokens, name, saved.options.needs_weight, False, planning)
    try:
        fit_whole(model, name, tensors)
        slots = placed.tensors(model, name)
        copy_adapter_tensors(slots, without_base_tensors(model, tensors, slots))
        if not planning:
            check_positions(placed.adapter)
    except BaseException:
        remove_adapter(model, name)
        raise
    return placed


def _place(
    strategy: PeftMethod,
    model: nn.Module,
    fields: dict[str, Any],
    targets: list[str],
    whole: list[str],
    tokens: dict[str, list[int]],
    name: str,
    needs_weight: bool,
    new: bool,
    planning: bool,
) -> Placed:
    """Add an adapter to a model in place, inactive."""
    check_transposed(strategy, model, targets)
    config = _config(strategy, fields, targets)
    if tokens and not hasattr(config, "trainable_token_indices"):
        raise InputError(
            f"PEFT's {strategy.name} cannot hold the embeddings of new tokens: name the embeddings and the head in "
            f"modules_to_save ({', '.join(tokens)}), or use lora."
        )
    adapter = build(model, config, targets, needs_weight, new, planning)
    try:
        add_layers(model, adapter, name)
        wrap_whole(model, whole, name)
        wrap_tokens(model, tokens, name)
        register_adapter(model, strategy.name, name, MethodUpdate)
    except BaseException:
        remove_adapter(model, name)
        raise
    config = _config(strategy, fields, targets)
    config.modules_to_save = whole or None
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = fan_in_fan_out(model, targets)
    if tokens:
        config.trainable_token_indices = tokens
    return Placed(adapter, config, whole, tokens)


def _config(strategy: PeftMethod, fields: Mapping[str, Any], targets: list[str]) -> Any:
    return getattr(peft, strategy.peft_config)(target_modules=list(targets), **fields)


def live(strategy: PeftMethod, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> LiveAdapter:
    """Return a saved adapter as entries of the live table: PEFT's layers stand in for the linears that they adapt.

    Raises:
        CorruptError, InputError: see `attach`.
    """
    saved = Saved.read(strategy, config)
    targets = saved_targets(model, saved.selection)
    check_transposed(strategy, model, targets)
    built = _config(strategy, saved.fields(targets), targets)
    adapter = build(model, built, targets, saved.options.needs_weight)
    slots = adapter.slots()
    own = {key: tuple(slot.shape) for key, slot in slots.items()}
    parts = live_low_rank(model, saved.selection, tensors, targets, own, lambda path, checked: None)
    copy_adapter_tensors(slots, {key: tensors[key] for key in slots})
    check_positions(adapter)
    modules = {path: Computed(layer).eval().requires_grad_(False) for path, layer in adapter.layers.items()}
    return LiveAdapter(parts.updates, {**parts.modules, **modules}, parts.biases)


def merge(placed: Placed, model: nn.Module, name: str) -> None:
    """Merge an adapter into the weights of an unquantised base, and detach it."""
    merge_whole_parts(model, name)
    for path, place in adapter_layers(model, name):
        layer = placed.adapter.layers[path]
        stand_in = layer.get_base_layer()
        stand_in.__dict__["base"] = place.get_base_layer()
        stand_in.merge(layer)
    remove_adapter(model, name)


def check_transposed(strategy: PeftMethod, model: nn.Module, targets: Collection[str]) -> None:
    """Check that stock PEFT can adapt linears that store their weight as [in, out].

    Raises:
        InputError: it cannot.
    """
    if not strategy.transposed and fan_in_fan_out(model, targets):
        raise InputError(
            f"{strategy.name} is not supported on linears that store [in, out], as GPT-2's do; PEFT has no layer for "
            "them: use lora, or one of ia3, vera, fourierft, randlora, gralora, vblora, waveft, tinylora."
        )
