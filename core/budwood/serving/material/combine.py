"""Combines several adapters of one base: sums of low-rank updates into one LoRA adapter, others by their own type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from budwood.adapters.base_names import named_differently
from budwood.adapters.golden import Distance
from budwood.adapters.manifest import MadeRecord, PartRecord
from budwood.adapters.store import SavedAdapter, read_adapter
from budwood.errors import InputError
from budwood.serving.exports.difference import decomposed
from budwood.serving.exports.factors import (
    Factors,
    check_same_shapes,
    factors_of,
    largest_rank,
    norm_share,
    squared_norm,
    truncated,
    write_lora,
)
from budwood.serving.material.options import PRUNING, check_combination
from budwood.serving.material.own_sums import FP32_MAX, Parts, combine_own, has_own_sum, too_large
from budwood.serving.verify import task_of
from budwood.untrusted.files import check_new_folder
from budwood.untrusted.redaction import shorten


@dataclass(frozen=True)
class Combined:
    """What `combine` wrote.

    Attributes:
        directory: the new adapter's folder.
        rank: its rank; None: it is not LoRA.
        modules: number of linears that it changes; of another type than LoRA, of what its config names.
        kept: share of the combination's squared norm that this rank holds; 1 if it is zero.
        distance: distance of its answers from those of the exact weighted sum.
        error: the same as a fraction of the sum's own effect; 0: it is the sum; None: the sum has no effect.
        notes: messages for the user.
        adapter_type: of the new adapter.
    """

    directory: Path
    rank: int | None
    modules: int
    kept: float
    distance: Distance
    error: float | None
    notes: list[str] = field(default_factory=list)
    adapter_type: str = "lora"


def combine(
    directories: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: str = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
    base: str | None = None,
    device: str = "auto",
    allow_other_base: bool = False,
) -> Combined:
    """Write the combination of several adapters as one adapter, with golden logits of its own.

    Adapters of one type that is no sum of low-rank updates are combined by its owner (`combine_adapters`): linear
    alone, and exactly. All others become one LoRA adapter.

    With updates ΔWᵢ and weights wᵢ, the combined update is

    - linear: Σ wᵢ ΔWᵢ, exactly; its rank is the sum of the ranks.
    - svd: the nearest of a lower rank to Σ wᵢ ΔWᵢ.
    - magnitude: Σ wᵢ of each ΔWᵢ's largest elements.
    - ties: as magnitude, of the elements that agree with the elected sign (Yadav et al., 2023).
    - dare: Σ wᵢ of randomly kept elements of ΔWᵢ, divided by the density (Yu et al., 2024).

    All but linear are cut to `rank`. The last three prune with PEFT's functions, but complete updates instead of A
    and B apart: products of pruned factors are not pruned products.

    Args:
        directories: at least two adapters of one base, each LoRA or convertible to it, or all of one other type.
        out: the new adapter's folder; it may not exist yet.
        weights: one for each adapter; None: 1 / n.
        rank: of the result; None: the largest of the parts. Not for linear.
        density: fraction of elements that pruning keeps; None: 0.5.
        seed: of the random choice of dare, and for no other method; None: 0.
        base: current location of the base; None: as recorded.
        device: cpu, cuda or auto.
        allow_other_base: accept a base that an adapter was not trained on.

    Raises:
        InputError: an option is out of range; or an adapter is of another base, task or type, or of a type whose sums
            are not of that type.
        CorruptError: an adapter is damaged.
    """
    check_combination(len(directories), weights, method, rank, density, seed)
    out = Path(out)
    check_new_folder(out)
    parts = [read_adapter(directory) for directory in directories]
    values = [1 / len(parts)] * len(parts) if weights is None else [float(weight) for weight in weights]
    notes = _check_parts(parts, allow_other_base)
    bench = Parts(parts, base, device, allow_other_base)
    record = MadeRecord(
        how="combine",
        method=method,
        parts=[PartRecord(**part.hashes.model_dump(), weight=value) for part, value in zip(parts, values, strict=True)],
    )
    if has_own_sum(parts, method):
        distance, modules = combine_own(bench, values, out, record)
        kind = parts[0].adapter_type
        return Combined(out, None, modules, 1.0, distance, 0.0, [*notes, *bench.notes], kind)
    updates = [bench.naming(part, partial(factors_of, part, "a combination")) for part in parts]
    exact = _sum(parts, updates, values)
    if not all(float(a.double().norm()) * float(b.double().norm()) < FP32_MAX for a, b in exact.values()):
        raise too_large()
    if method == "linear":
        result, kept = exact, 1.0
    else:
        size = rank or max(map(largest_rank, updates))
        pruning = (0.5 if density is None else density) if method in PRUNING else None
        result, kept = _approximation(exact, updates, values, method, size, pruning, seed or 0)
    answers = bench.logits_of(lambda folder: write_lora(folder, result, parts[0]))
    summed = answers if method == "linear" else bench.logits_of(lambda folder: write_lora(folder, exact, parts[0]))
    distance, error = bench.open().compare(summed, answers)
    bench.open().write(out, lambda folder: write_lora(folder, result, parts[0]), "LORA", record, answers)
    return Combined(out, largest_rank(result), len(result), kept, distance, error, [*notes, *bench.notes])


def _check_parts(parts: Sequence[SavedAdapter], allow_other_base: bool) -> list[str]:
    """Refuse adapters of different bases or tasks; return notes on what is recorded of the first alone."""
    first, notes = parts[0], []
    for part in parts[1:]:
        if task_of(part) != task_of(first):
            raise InputError(
                f"{part.directory}: its task is {task_of(part)[0]}, but that of {first.directory} is "
                f"{task_of(first)[0]}: adapters of one task can be combined."
            )
        one, other = first.manifest, part.manifest
        if one is None or other is None:
            if named_differently(first.base_name, part.base_name) and not allow_other_base:
                raise InputError(
                    f"{part.directory} names the base '{shorten(part.base_name)}', but {first.directory} "
                    f"'{shorten(first.base_name)}': adapters of one base can be combined. If they are the same: "
                    "--allow-other-base."
                )
            unknown = [saved.directory for saved in (first, part) if saved.manifest is None]
            lines = [f"{directory} records no base: that it is the same is trusted." for directory in unknown]
            notes += [line for line in lines if line not in notes]
            continue
        if one.base.fingerprint != other.base.fingerprint and not allow_other_base:
            raise InputError(
                f"{part.directory} was trained on the base '{other.base.name}' ({other.base.fingerprint[:12]}), but "
                f"{first.directory} on '{one.base.name}' ({one.base.fingerprint[:12]}): adapters of one base can be "
                "combined. If the difference is meant: --allow-other-base."
            )
        bound = one.needs_quantization or other.needs_quantization
        if bound and one.base.quantization != other.base.quantization:
            raise InputError(
                f"{part.directory}: is of a base in {other.base.quantization}, and {first.directory} of one in "
                f"{one.base.quantization}, whose error one of them makes up for: they cannot be combined."
            )
        for name, what in (("template", "chat template"), ("on_messages", "use of messages"), ("chat", "chat options")):
            if getattr(one, name) != getattr(other, name):
                notes.append(f"{part.directory} differs in its {what}: that of {first.directory} is recorded.")
    return notes


def _sum(parts: Sequence[SavedAdapter], updates: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return Σ wᵢ Bᵢ Aᵢ as one pair of factors for each path: their ranks side by side."""
    result: Factors = {}
    for path in dict.fromkeys(path for update in updates for path in update):
        pairs = [(update[path], weight) for update, weight in zip(updates, weights, strict=True) if path in update]
        owners = [part for part, update in zip(parts, updates, strict=True) if path in update]
        check_same_shapes(path, owners, [pair for pair, _ in pairs])
        result[path] = (
            torch.cat([a for (a, _), _ in pairs]),
            torch.cat([weight * b for (_, b), weight in pairs], 1),
        )
    return result


def _approximation(
    exact: Factors,
    updates: Sequence[Factors],
    weights: Sequence[float],
    method: str,
    rank: int,
    density: float | None,
    seed: int,
) -> tuple[Factors, float]:
    """Return the combination cut to a rank, and the share of its squared norm that is left."""
    if density is None or not any(map(squared_norm, exact.values())):  # of a sum that is zero, nothing can be pruned
        result = truncated(exact, rank)
        return result, norm_share(sum(map(squared_norm, result.values())), sum(map(squared_norm, exact.values())))
    result, kept, whole = {}, 0.0, 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path in exact:
            deltas = [update[path][1] @ update[path][0] for update in updates if path in update]
            used = [weight for update, weight in zip(updates, weights, strict=True) if path in update]
            delta = _pruned(method, deltas, torch.tensor(used), density)
            if not delta.any():
                continue
            result[path] = decomposed(delta, rank)
            kept, whole = kept + squared_norm(result[path]), whole + float(delta.double().square().sum())
    if not result:
        raise InputError(f"--method {method}: pruning leaves nothing: raise --density.")
    return result, norm_share(kept, whole)


def _pruned(method: str, deltas: list[Tensor], weights: Tensor, density: float) -> Tensor:
    from peft.utils import merge_utils

    functions: Mapping[str, object] = {
        "ties": merge_utils.ties, "dare": merge_utils.dare_linear, "magnitude": merge_utils.magnitude_prune
    }  # fmt: skip
    delta: Tensor = functions[method](deltas, weights, density)  # type: ignore[operator]
    return delta
