"""The starts of A and B, with PEFT's own code where it has them, on a copy of one frozen weight at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import collect_eigens_for_layer, crop_corda_eigens
from peft.tuners.lora.layer import Linear
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor, nn

from budwood import RUN_ADAPTER, Batch, InputError, OriginalWeights, Run, linear_weight
from budwood.lowrank import adapter_layers, set_starts, update_of
from budwood_initialisations.statistics import (
    Observe,
    over_inputs,
    passes,
    rows_of,
    sample,
    square_bytes,
    weight_gradients,
)

if TYPE_CHECKING:
    from budwood_initialisations.strategies import Initialisation

Starts = dict[str, tuple[Tensor, Tensor]]


def initialise(strategy: Initialisation, run: Run, model: nn.Module) -> Starts:
    """Compute the starts, the same on all processes, and put them on the model; returns them, on the CPU."""
    began = time.perf_counter()
    if run.planning:  # tensors without values: their shapes alone matter
        layers = dict(adapter_layers(model, RUN_ADAPTER))
        starts = {p: (x.lora_A[RUN_ADAPTER].weight, x.lora_B[RUN_ADAPTER].weight) for p, x in layers.items()}
        set_starts(model, RUN_ADAPTER, starts, strategy.subtracts)
        return {}
    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
        torch.manual_seed(run.seed)  # for randomised decompositions
        starts, text = strategy.find_starts(run, model)
    starts = {path: (a.detach().float().cpu(), b.detach().float().cpu()) for path, (a, b) in starts.items()}
    starts = run.world.broadcast(starts)
    set_starts(model, RUN_ADAPTER, starts, strategy.subtracts)
    run.say(f"{strategy.name}: {text}; {time.perf_counter() - began:.1f} s")
    return starts


def restore(strategy: Initialisation, run: Run, saved: Mapping[str, tuple[Tensor, Tensor]]) -> Starts:
    """Replace the starts that the resumed run computed by those of its checkpoint; returns them."""
    numbers = {id(parameter): number for number, parameter in enumerate(run.trainable)}
    for path, layer in adapter_layers(run.model, RUN_ADAPTER):
        down, up = layer.lora_A[RUN_ADAPTER].weight, layer.lora_B[RUN_ADAPTER].weight
        a, b = (value.to(down.device) for value in saved[path])
        run.start[numbers[id(down)]].copy_(a)
        run.start[numbers[id(up)]].copy_(b)
        if strategy.subtracts:
            update_of(run.model, layer, RUN_ADAPTER).start = (a, b)
    return dict(saved)


def peft_start(
    weight: Tensor, layer: Any, init: Any, gradient: Tensor | None = None, eigens: Any = None, **fields: Any
) -> tuple[Tensor, Tensor]:
    """Return the A and B that PEFT gives a linear with this weight [out, in], which it may change.

    Args:
        layer: the model's layer of the linear, with rank and scale.
        init: PEFT's `init_lora_weights`.
        gradient: of the weight, for LoRA-GA.
        eigens: of the weight, for CorDA.
        fields: further fields of PEFT's config.
    """
    rank, use_rslora = layer.r[RUN_ADAPTER], layer.use_rslora[RUN_ADAPTER]
    alpha = layer.lora_alpha[RUN_ADAPTER]
    base = _linear(weight)
    if gradient is not None:
        base._peft_loraga_grad = gradient
    if eigens is not None:
        base.eigens = eigens
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=use_rslora, init_lora_weights=init, **fields)
    result: Any = Linear(base, RUN_ADAPTER, config=config, r=rank, lora_alpha=alpha)
    return result.lora_A[RUN_ADAPTER].weight.detach(), result.lora_B[RUN_ADAPTER].weight.detach()


def _linear(weight: Tensor) -> Any:
    linear: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def from_weights(run: Run, model: nn.Module, init: str) -> tuple[Starts, str]:
    """Return the starts of PiSSA (section 3) or OLoRA (equation 5), which need the weights alone."""
    starts, share = {}, _Share()
    for path, layer in adapter_layers(model, RUN_ADAPTER):
        weight = linear_weight(layer, torch.float32)
        share.norm(weight)
        starts[path] = peft_start(weight, layer, init)
        share.part(layer, starts[path])
    return starts, f"{len(starts):,} linears; {share}"


class _Share:
    """The share of the weights' squared norm that the starts have."""

    def __init__(self) -> None:
        self.whole = self.taken = 0.0

    def norm(self, weight: Tensor) -> None:
        self.whole += float(weight.square().sum(dtype=torch.float64))

    def part(self, layer: Any, start: tuple[Tensor, Tensor]) -> None:
        # ‖B A‖² = tr(Bᵀ B · A Aᵀ), of [r, r]
        a, b = (factor.double() for factor in start)
        self.taken += float(((b.t() @ b) * (a @ a.t())).sum()) * layer.scaling[RUN_ADAPTER] ** 2

    def __str__(self) -> str:
        share = self.taken / max(self.whole, 1e-300)
        return (
            f"the start has {share:.0%} of the weights' squared norm and is subtracted, so training begins at the base"
        )


def from_covariance(strategy: Any, run: Run, model: nn.Module) -> tuple[Starts, str]:
    """Return the starts of CorDA (equations 3 to 5): W C = U S Vᵀ, B A = U S Vᵀ C⁻¹ of r directions.

    C is the covariance of the linear's inputs, not centred.
    """
    layers, starts, share = dict(adapter_layers(model, RUN_ADAPTER)), {}, _Share()
    indices = sample(run, strategy.name, strategy.options.examples)
    for group in passes(square_bytes(layers, "in")):
        chosen = {path: layers[path] for path in group}
        covariances = _covariances(run, model, chosen, indices)
        for path, layer in chosen.items():
            weight = linear_weight(layer, torch.float32)
            share.norm(weight)
            linear = _linear(weight)
            linear.covariance_matrix = covariances.pop(path)
            linear.corda_method, linear.rank = strategy.options.mode, layer.r[RUN_ADAPTER]
            config = LoraConfig(target_modules=["0"], corda_config=CordaConfig(corda_method=linear.corda_method))
            linear.eigens = collect_eigens_for_layer(linear, config)
            crop_corda_eigens(nn.Sequential(linear), config)
            starts[path] = peft_start(weight, layer, "corda", eigens=linear.eigens)
            share.part(layer, starts[path])
    return starts, f"{len(starts):,} linears, by the activations of {len(indices):,} training examples; {share}"


def _over_moments(
    run: Run, model: nn.Module, layers: Mapping[str, Any], indices: list[int], labels_only: bool, add: Observe
) -> None:
    """Call `add` with the path of each layer and its inputs [n, in] fp32; refuse the run if a layer had none."""
    counts = dict.fromkeys(layers, 0)

    def observe(path: str, x: Tensor, batch: Batch) -> None:
        rows = rows_of(x, batch, labels_only)
        counts[path] += len(rows)
        add(path, rows, batch)

    over_inputs(run, model, layers, indices, observe)
    for path, count in counts.items():
        if not count:
            where = "scored position" if labels_only else "token"
            raise InputError(
                f"no {where} of the {len(indices):,} sampled training examples reached '{path}': raise `examples`"
                f"{', or set labels_only: false' if labels_only else ''}."
            )


def _covariances(run: Run, model: nn.Module, layers: Mapping[str, Any], indices: list[int]) -> dict[str, Tensor]:
    """Return the mean over the examples of Σ x xᵀ [in, in] over their tokens, as CorDA's authors and PEFT compute it.

    Each example's inputs are first divided by their largest element, which balances A and B.
    """
    sums = {p: torch.zeros(x.in_features, x.in_features, device=run.device) for p, x in layers.items()}
    counts = dict.fromkeys(layers, 0)

    def add(path: str, rows: Tensor, batch: Batch) -> None:
        owners = batch.example_of_position[batch.example_of_position >= 0]
        parts = [rows[owners == i] for i in range(len(batch.keys))] if len(owners) == len(rows) else [rows]
        for part in parts:
            if len(part):
                part = part / part.max().abs().clamp(min=1e-12)
                sums[path].addmm_(part.t(), part)
                counts[path] += 1

    _over_moments(run, model, layers, indices, False, add)
    return {path: total.div_(counts[path]) for path, total in sums.items()}


def from_activations(strategy: Any, run: Run, model: nn.Module) -> tuple[Starts, str]:
    """Return the starts of EVA (section 3): A of the principal components of the inputs, B = 0, ranks by variance."""
    options, layers = strategy.options, dict(adapter_layers(model, RUN_ADAPTER))
    indices = sample(run, strategy.name, options.examples)
    components: dict[str, Tensor] = {}
    ratios: dict[str, Tensor] = {}
    for group in passes(square_bytes(layers, "in")):
        chosen = {path: layers[path] for path in group}
        sums = {p: torch.zeros(x.in_features, device=run.device, dtype=torch.float64) for p, x in chosen.items()}
        moments = {p: torch.zeros(x.in_features, x.in_features, device=run.device) for p, x in chosen.items()}
        counts = dict.fromkeys(chosen, 0)

        def add(
            path: str, rows: Tensor, batch: Batch, sums: Any = sums, moments: Any = moments, counts: Any = counts
        ) -> None:
            sums[path] += rows.sum(0, dtype=torch.float64)
            moments[path].addmm_(rows.t(), rows)
            counts[path] += len(rows)

        _over_moments(run, model, chosen, indices, options.labels_only, add)
        for path, layer in chosen.items():
            most = min(round(layer.r[RUN_ADAPTER] * options.rho), layer.in_features)
            components[path], ratios[path] = principal(
                moments.pop(path), sums[path], counts[path], most, options.whiten
            )
    ranks = share_ranks(ratios, sum(layer.r[RUN_ADAPTER] for layer in layers.values()))
    starts = {}
    for path, layer in layers.items():
        a = components[path][: ranks[path]]
        starts[path] = (a, a.new_zeros(layer.out_features, len(a)))
    used = [rank for rank in ranks.values() if rank]
    dropped = f"; {len(ranks) - len(used)} are left out" if len(used) < len(ranks) else ""
    return starts, (
        f"{len(used):,} linears, by the activations of {len(indices):,} training examples; ranks {min(used)} to "
        f"{max(used)}{dropped}"
    )


def principal(moment: Tensor, total: Tensor, count: int, most: int, whiten: bool = False) -> tuple[Tensor, Tensor]:
    """Return the first principal components [most, in] of inputs, and the share of the variance that each explains.

    Args:
        moment: Σ x xᵀ [in, in].
        total: Σ x [in].
        count: number of inputs.
        whiten: divide each component by the root of its singular value.
    """
    scatter = moment.double() - torch.outer(total.double(), total.double()) / max(count, 1)
    values, vectors = torch.linalg.eigh(scatter)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1).t()
    # The sign of an eigenvector is not determined: its largest element is made positive.
    signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    chosen, ratio = (vectors * signs)[:most], values[:most] / values.sum().clamp(min=1e-300)
    if whiten:
        chosen = chosen / values[:most].sqrt().sqrt().clamp(min=1e-12)[:, None]
    return chosen.float(), ratio.float()


def share_ranks(ratios: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Return the rank of each linear: the `budget` components that explain the largest shares (section 3.3 of EVA).

    Components of equal shares are taken in the order of the linears.
    """
    owners = [path for path, ratio in ratios.items() for _ in ratio]
    order = torch.cat(list(ratios.values())).argsort(descending=True, stable=True)[:budget].tolist()
    ranks = dict.fromkeys(ratios, 0)
    for index in order:
        ranks[owners[index]] += 1
    return ranks


def from_gradients(strategy: Any, run: Run, model: nn.Module) -> tuple[Starts, str]:
    """Return the starts of LoRA-GA (theorem 3.1 and section 3.3), from the gradient of the task's loss."""
    options, layers, starts = strategy.options, dict(adapter_layers(model, RUN_ADAPTER)), {}
    indices, share = sample(run, strategy.name, options.examples), _Share()
    config = LoraGAConfig(options.direction, options.scale, options.stable_gamma)
    for group in passes(square_bytes(layers, "out")):
        chosen = {path: layers[path] for path in group}
        gradients = weight_gradients(run, model, chosen, indices)
        for path, layer in chosen.items():
            weight = linear_weight(layer, torch.float32)
            share.norm(weight)
            starts[path] = peft_start(weight, layer, "lora_ga", gradients.pop(path), lora_ga_config=config)
            share.part(layer, starts[path])
    return starts, (f"{len(starts):,} linears, by the gradient of {len(indices):,} training examples; {share}")


@torch.no_grad()
def from_residual(strategy: Any, run: Run, model: nn.Module) -> tuple[Starts, str]:
    """Return the starts of LoftQ (algorithm 1 with T = 1): s B A = the r first singular parts of W - Q.

    Further iterations quantise the base anew, and so would not leave its bytes as they are.
    """
    layers, starts = dict(adapter_layers(model, RUN_ADAPTER)), {}
    originals = OriginalWeights(model, run.base.path)
    error = torch.zeros(3, dtype=torch.float64)
    for path, layer in layers.items():
        weight = originals.read(path).to(run.device)
        residual = weight - linear_weight(layer, torch.float32)
        parts = _low_rank_decomposition(residual, layer.r[RUN_ADAPTER])
        root = layer.scaling[RUN_ADAPTER] ** 0.5
        a, b = parts["R"] / root, parts["L"] / root
        left = residual - layer.scaling[RUN_ADAPTER] * b @ a
        error += torch.tensor([float(t.square().sum(dtype=torch.float64)) for t in (weight, residual, left)])
        starts[path] = (a, b)
    text = f"{len(starts):,} linears; error of the quantised weights: {_fall(error)}"
    indices = sample(run, strategy.name, strategy.options.examples)
    if indices:
        text += f"; of their outputs on {len(indices):,} training examples: "
        text += _fall(_output_error(run, model, layers, originals, starts, indices))
    return starts, text


def _fall(squares: Tensor) -> str:
    whole, before, after = squares.sqrt().tolist()
    return f"{before / whole:.2%} before, {after / whole:.2%} after" if whole else "0 before and after"


def _output_error(
    run: Run,
    model: nn.Module,
    layers: Mapping[str, Any],
    originals: OriginalWeights,
    starts: Starts,
    indices: list[int],
) -> Tensor:
    """Return the squared norms of the unquantised linears' outputs, of their error, and of the error with the start."""
    squares = torch.zeros(3, dtype=torch.float64)

    def observe(path: str, x: Tensor, batch: Batch) -> None:
        rows, layer = rows_of(x, batch), layers[path]
        weight, (a, b) = originals.read(path).to(run.device), starts[path]
        exact = rows @ weight.t()
        before = exact - rows @ linear_weight(layer, torch.float32).t()
        after = before - layer.scaling[RUN_ADAPTER] * (rows @ a.t()) @ b.t()
        squares.add_(torch.tensor([float(t.square().sum(dtype=torch.float64)) for t in (exact, before, after)]))

    over_inputs(run, model, layers, indices, observe)
    return squares
