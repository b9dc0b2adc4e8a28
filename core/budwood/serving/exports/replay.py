"""Replay of an exported adapter: stock PEFT computes it on the base, beside the adapter that it was made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from budwood.adapters.golden import (
    FP32_ROUNDING,
    Distance,
    comparable,
    current_setting,
    is_rounding,
    measure,
    relative_error,
    share_text,
)
from budwood.adapters.match import mismatch
from budwood.adapters.store import CONFIG, SavedAdapter
from budwood.contract.discovery import find, plugin_fault
from budwood.errors import BudwoodError, InputError, describe
from budwood.model.experts import close_experts
from budwood.model.quantizers import is_quantized, linear_shape, linear_weight, quantizer_of
from budwood.serving.merge import MAX_ERROR
from budwood.serving.pool import AdapterPool
from budwood.serving.probes import probes_of
from budwood.serving.verify import open_base
from budwood.untrusted.formats import read_json

EXACT = 1e-2
"""Largest error of an export that is no approximation, as a fraction of the adapter's own effect."""


@dataclass(frozen=True)
class Replay:
    """What an export answers on the adapter's golden prompts, in fp32.

    Attributes:
        prompts: number of prompts.
        quantization: that of the base in the replay; PEFT computes methods for which it has no quantised layers on the
            dequantised weights, and so does Budwood then.
        conversion: distance of base and export from base and adapter.
        error: the same as a fraction of the adapter's own effect; None: it has no effect, see `relative_error`.
        recorded: distance of base and export from the golden logits; None for an adapter without any.
        setting: distance of the base alone from its golden logits.
        same: whether the replay has the setting of the golden logits.
        notes: messages for the user.
    """

    prompts: int
    quantization: str
    conversion: Distance
    error: float | None
    recorded: Distance | None
    setting: Distance | None
    same: bool
    notes: list[str] = field(default_factory=list)


def replay(
    saved: SavedAdapter,
    folder: Path,
    *,
    base: str | None = None,
    quantization: str | None = None,
    device: str = "auto",
    allow_other_base: bool = False,
    approximate: bool = False,
    force: bool = False,
) -> Replay:
    """Compute an exported adapter with stock PEFT, and the adapter itself with Budwood, on the same base.

    Args:
        saved: the adapter that was exported.
        folder: the export, in PEFT's layout.
        base: current location of the base; None: as recorded.
        quantization: of the base; None: as recorded.
        approximate: the export is the nearest one of a lower rank.
        force: accept an approximation that loses more than a quarter of the effect.

    Raises:
        BudwoodError: the export computes something else than the adapter.
        InputError: PEFT does not load the export; an approximation loses too much; or the base is not the adapter's,
            see `open_base`.
        CorruptError: the adapter computes something else than training recorded.
    """
    loaded, task = open_base(
        saved, base, quantization=quantization, precision="fp32", device=device, allow_other_base=allow_other_base
    )
    dequantized = not _has_quantized_layers(folder)
    if dequantized:
        _dequantize(loaded.model, known=False)
    pool = AdapterPool(loaded, task=task)
    golden, probes = probes_of(saved, pool)
    recorded = saved.manifest.golden if saved.manifest is not None else None
    alone = pool.measure(probes)
    notes = pool.load("adapter", saved.directory, allow_other_base=allow_other_base).notes
    pool.use("adapter")
    adapter = pool.measure(probes)
    pool.unload("adapter")
    exported = pool.engine.call(lambda: _by_peft(pool, folder, probes))
    if exported.shape != adapter.shape:
        raise BudwoodError(f"{saved.directory}: the export has {exported.shape[1]} logits, not {adapter.shape[1]}.")
    result = Replay(
        len(probes),
        loaded.quantization,
        Distance.between(adapter, exported),
        relative_error(alone, adapter, exported),
        Distance.between(golden.adapter, exported) if golden else None,
        Distance.between(golden.base, alone) if golden else None,
        recorded is not None and not dequantized and comparable(recorded, current_setting(loaded)),
        notes,
    )
    _judge(saved, result, adapter, approximate, force)
    if not approximate and _differs(result, adapter):
        raise mismatch(saved, loaded.fingerprint)(
            f"{saved.directory}: on this base it is another model than the one that training recorded "
            f"({result.recorded}; the bases alone: {result.setting}): nothing was written. Use the base of its run."
        )
    return result


def _by_peft(pool: AdapterPool, folder: Path, probes: Any) -> torch.Tensor:
    """Return the logits of the exported adapter, which stock PEFT leaves on the model."""
    from peft import PeftModel

    model: Any = pool.model
    pool.engine.table.close()
    _open_to_peft(model)
    try:
        wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        wrapped.eval()
        return measure(pool.task_plugin, model, pool.tokenizer, probes, torch.float32)
    except BudwoodError:
        raise
    except Exception as error:  # PEFT may raise any exception
        raise InputError(
            f"the export does not load in stock PEFT ({describe(error)}): nothing was written. Merge it instead: "
            "--for merged; or --no-check writes it."
        ) from error


def _open_to_peft(model: nn.Module) -> None:
    """Give a model the modules that PEFT adapts: parameters of experts, and linears that it has layers for, in fp32."""
    with torch.no_grad():
        close_experts(model, torch.float32)
    _dequantize(model)


def _has_quantized_layers(folder: Path) -> bool:
    """Return whether PEFT has layers of its own for a method on quantised linears.

    Without them, PEFT takes the packed numbers for the weight where a method computes with it, as LoHa does.
    """
    method = str(read_json(folder / CONFIG).get("peft_type")).lower()
    return method.isidentifier() and find_spec(f"peft.tuners.{method}.bnb") is not None


@torch.no_grad()
def _dequantize(model: nn.Module, known: bool = True) -> None:
    """Replace quantised linears by plain ones, in fp32; with `known`, only those of quantisers that PEFT lacks."""
    for path, module in list(model.named_modules()):
        quantizer: Any = quantizer_of(module)
        if is_quantized(module) and not (known and quantizer.known_to_peft):
            outputs, inputs = linear_shape(module)
            plain = nn.Linear(inputs, outputs, bias=False, device="meta")
            plain.weight = nn.Parameter(linear_weight(module, torch.float32), requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(path, plain)


def _judge(saved: SavedAdapter, result: Replay, adapter: torch.Tensor, approximate: bool, force: bool) -> None:
    if approximate and result.error is not None:
        if not result.error <= MAX_ERROR and not force:
            raise InputError(
                f"{saved.directory}: the nearest LoRA of this rank changes the answers by {result.error:.0%} of the "
                f"adapter's effect, more than {MAX_ERROR:.0%}: nothing was written. Use a larger --rank, or --force."
            )
        return
    close = result.error is not None and result.error <= EXACT
    if not close and not is_rounding(result.conversion.largest, adapter):
        text = (
            f"{saved.directory}: the export of strategy '{saved.adapter_type}' computes something else than the adapter"
        )
        text = f"{text} ({result.conversion}; {share_text(result.error)}): nothing was written"
        raise plugin_fault(find(saved.adapter_type).owner, text, True)


def _differs(result: Replay, adapter: torch.Tensor) -> bool:
    """Return whether the export is another model than the golden logits are of."""
    if result.recorded is None or result.setting is None:
        return False
    if result.same:
        return not result.recorded.largest <= 10 * FP32_ROUNDING * max(1.0, float(adapter.abs().max()))
    return result.recorded.is_another_model(result.setting)
