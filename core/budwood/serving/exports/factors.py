"""The low-rank updates of an adapter as plain pairs A, B, from its file alone: no base, no scale, one rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from budwood.adapters.export import can_be_lora, converted
from budwood.adapters.live_update import LiveUpdate
from budwood.adapters.peft_config import PREFIX
from budwood.adapters.store import CONFIG, WEIGHTS, SavedAdapter
from budwood.contract.calls import ask_owner
from budwood.contract.loading import adapter_owner, build_strategy
from budwood.errors import CorruptError, InputError
from budwood.serving.verify import task_of
from budwood.untrusted.redaction import shorten

Factors = dict[str, tuple[Tensor, Tensor]]
"""A [r, in] and B [out, r] by the path of the base's linear, in fp32: its weight changes by B A."""


def check_language_model(saved: SavedAdapter, program: str) -> None:
    """Refuse an adapter of a task that is not language modelling.

    Args:
        program: the program that the export is for.

    Raises:
        InputError: the adapter is one of another task.
    """
    task, _ = task_of(saved)
    if task != "causal-lm":
        raise InputError(f"{saved.directory}: its task is {task}, but {program} holds adapters of causal-lm only.")


def check_plain(saved: SavedAdapter, program: str, exporting: bool) -> None:
    """Refuse, by its name in adapter_config.json, whatever a sum of low-rank updates cannot express.

    Args:
        program: what the updates are for.
        exporting: see `factors_of`.

    Raises:
        InputError: the adapter replaces biases, modules or rows of embeddings.
    """
    config, remedy = saved.config, _merged(saved, exporting)
    for key, what in (
        ("modules_to_save", "whole modules"),
        ("trainable_token_indices", "rows of embeddings"),
    ):
        if config.get(key):
            shown = shorten(json.dumps(config[key]))
            raise InputError(
                f"{saved.directory}: it holds {what} ({key}: {shown}), which {program} cannot hold: {remedy}"
            )
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        key = "lora_bias" if config.get("lora_bias") else f"bias: {shorten(str(config['bias']))}"
        raise InputError(f"{saved.directory}: it holds biases ({key}), which {program} cannot hold: {remedy}")


def _merged(saved: SavedAdapter, exporting: bool) -> str:
    """Return the remedy for what no low-rank update can hold."""
    if exporting:
        return "merge it instead: --for merged"
    return f"merge it into its base: budwood adapter merge {saved.directory} OUT"


def factors_of(saved: SavedAdapter, program: str, *, alone: bool = True, exporting: bool = False) -> Factors:
    """Return the updates of an adapter that is LoRA, or that its owner converts to LoRA.

    Each module's own alpha, rank and rsLoRA are in its B. Reads the adapter's file alone.

    Args:
        program: what the updates are for.
        alone: refuse an adapter that holds anything else.
        exporting: the command is an export, so that a remedy is an option of it.

    Raises:
        InputError: the adapter is not a sum of low-rank updates; the message says what it is, and the remedy.
        CorruptError: config and tensors do not match.
    """
    if alone:
        check_plain(saved, program, exporting)
    command = f"budwood adapter export {saved.directory} OUT --for peft --as lora --rank R"
    remedy = f"convert it to LoRA first, which is lossy: {command}"
    if exporting:
        remedy = "convert it with --as lora --rank R, or merge it: --for merged"
    if not can_be_lora(saved):
        remedy = _merged(saved, exporting)
    if saved.config.get("use_dora"):
        raise InputError(f"{saved.directory}: it is DoRA (use_dora), which {program} cannot hold: {remedy}")
    if saved.config.get("target_parameters"):
        raise InputError(
            f"{saved.directory}: it adapts experts (target_parameters), which {program} does not take: "
            f"{_merged(saved, exporting)}"
        )
    if path := next((key for key in saved.infos if ".lora_embedding_" in key), ""):
        path = path.removeprefix(PREFIX).partition(".lora_")[0]
        raise InputError(
            f"{saved.directory}: it adapts an embedding ('{path}'), which {program} cannot hold: merge it into its "
            "base with PEFT's merge_and_unload."
        )
    config, tensors = saved.config, saved.load_tensors()
    if config.get("peft_type") != "LORA":
        result = converted(saved, tensors, "lora")
        if result is None:
            raise InputError(
                f"{saved.directory}: adapter type '{saved.adapter_type}' is not LoRA, which {program} needs: {remedy}"
            )
        config, tensors = result
    if not alone:
        tensors = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    paths = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors if ".lora_" in key}
    for path in paths:  # PEFT writes the base's own head beside its update; another one is refused on the base
        tensors.pop(f"{PREFIX}{path}.base_layer.weight", None)
    config = config | {
        "target_modules": sorted(paths), "target_parameters": None, "exclude_modules": None,
        "layers_to_transform": None, "modules_to_save": None, "trainable_token_indices": None, "bias": "none",
    }  # fmt: skip
    owner = build_strategy(adapter_owner("LORA").name, {}, str(saved.directory / CONFIG))
    try:
        live = ask_owner(owner, "live_adapter", model=_linears(tensors), config=config, tensors=tensors)
    except (InputError, CorruptError) as error:
        raise type(error)(f"{saved.directory}: {error}") from error
    factors = {path: _folded(saved, path, update, exporting) for path, update in live.updates.items() if update.rank}
    if not factors:
        raise InputError(f"{saved.directory}: every rank of it is 0: it adapts no linear module.")
    return factors


def _linears(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a module tree without weights that has the linears that a file adapts, in place of the base."""
    root = nn.Module()
    for key, a in tensors.items():
        path, found, _ = key.removeprefix(PREFIX).partition(".lora_A.weight")
        b = tensors.get(f"{PREFIX}{path}.lora_B.weight")
        if not found or b is None or a.ndim != 2 or b.ndim != 2:
            continue  # refused by the owner
        parent, _, name = path.rpartition(".")
        place = root
        for part in filter(None, parent.split(".")):
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(name, nn.Linear(a.shape[1], b.shape[0], bias=False, device="meta"))
    return root


def _folded(saved: SavedAdapter, path: str, update: LiveUpdate, exporting: bool) -> tuple[Tensor, Tensor]:
    assert update.a is not None and update.b is not None
    if update.gain is not None or update.offset is not None or update.row_forward is not None:
        raise InputError(
            f"{saved.directory}: its update of '{path}' is not low-rank alone: {_merged(saved, exporting)}"
        )
    return update.a.float(), update.b.float() * update.scaling


def check_same_shapes(path: str, parts: Sequence[SavedAdapter], pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Check that updates of one linear by several adapters have one shape.

    Args:
        parts: the adapters, in the order of their updates.

    Raises:
        InputError: an update has another shape than the first, so that the bases differ.
    """
    shapes = [[len(b), a.shape[1]] for a, b in pairs]
    for part, shape in zip(parts, shapes, strict=True):
        if shape != shapes[0]:
            raise InputError(
                f"{part.directory}: its update of '{path}' has the shape {shape}, but that of {parts[0].directory} "
                f"{shapes[0]}: they are of different bases."
            )


def padded(factors: Factors, rank: int) -> Factors:
    """Return the same updates with one rank: rows of A and columns of B are zero beyond a module's own."""

    def pad(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        room = rank - len(a)
        return torch.cat([a, a.new_zeros(room, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), room)], 1)

    return {path: pad(a, b) for path, (a, b) in factors.items()}


def largest_rank(factors: Factors) -> int:
    """Return the largest rank of a module."""
    return max(len(a) for a, _ in factors.values())


def squared_norm(pair: tuple[Tensor, Tensor]) -> float:
    """Return the squared Frobenius norm of B A; 0 where its products cancel to rounding."""
    a, b = (tensor.double() for tensor in pair)
    squared = float(((b.mT @ b) * (a @ a.mT)).sum())
    return squared if squared > 1e-14 * float(a.square().sum() * b.square().sum()) else 0.0


def norm_share(part: float, whole: float) -> float:
    """Return the share of a squared norm that an approximation holds: all of 0."""
    return min(part / whole, 1.0) if whole > 0 else 1.0


def truncated(factors: Factors, rank: int) -> Factors:
    """Return the best approximation of each update with at most `rank` (Eckart and Young, 1936), from A and B alone."""

    def cut(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if len(a) <= rank:
            return a, b
        left, upper = torch.linalg.qr(b.double())
        right, lower = torch.linalg.qr(a.double().T)
        u, s, v = torch.linalg.svd(upper @ lower.T)
        return split(left @ u, s, v @ right.T, rank)

    return {path: cut(a, b) for path, (a, b) in factors.items()}


def split(u: Tensor, s: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of the first `rank` singular values of u diag(s) v, with their square roots in both."""
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float()


def write_lora(folder: Path, factors: Factors, saved: SavedAdapter) -> int:
    """Write updates as a LoRA adapter of one rank, with alpha = rank, in PEFT's layout; return the rank.

    Args:
        folder: an existing folder.
        saved: the adapter that they are of, for what the config says besides.
    """
    from peft import LoraConfig

    rank = largest_rank(factors)
    config: dict[str, Any] = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(factors),
        task_type=saved.config.get("task_type"),
        base_model_name_or_path=saved.config.get("base_model_name_or_path"),
        revision=saved.config.get("revision"),
        inference_mode=True,
    ).to_dict()
    config = {key: getattr(value, "value", value) for key, value in config.items()}
    config["target_modules"] = sorted(factors)
    tensors = {}
    for path, (a, b) in padded(factors, rank).items():
        tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = a, b
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    return rank
