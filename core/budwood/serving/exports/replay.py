"""Replay of an exported adapter: stock PEFT computes it on the base, beside the adapter that it was made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from budwood.adapters.golden import Distance, Golden, comparable, current_setting, measure, relative_error
from budwood.adapters.match import mismatch
from budwood.adapters.store import GOLDEN, SavedAdapter
from budwood.errors import BudwoodError, InputError, describe
from budwood.model.text_tasks import as_probe
from budwood.serving.merge import MAX_ERROR, SENTENCES
from budwood.serving.pool import AdapterPool
from budwood.serving.verify import open_base

EXACT = 1e-2
"""Largest error of an export that is no approximation, as a fraction of the adapter's own effect."""
ROUNDING = 1e-5
"""Difference of a logit, relative to the largest one, that fp32 accounts for when products are taken in other orders:
about 2^-24 a sum, over some hundred dependent sums."""


@dataclass(frozen=True)
class Replay:
    """What an export answers on the adapter's golden prompts, in fp32.

    Attributes:
        prompts: number of prompts.
        quantization: that of the base in the replay.
        conversion: distance of base and export from base and adapter.
        error: the same as a fraction of the adapter's own effect, see `relative_error`.
        recorded: distance of base and export from the golden logits; None for an adapter without any.
        setting: distance of the base alone from its golden logits.
        same: whether the replay has the setting of the golden logits.
        notes: messages for the user.
    """

    prompts: int
    quantization: str
    conversion: Distance
    error: float
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
        InputError: an approximation loses too much; or the base is not the adapter's, see `open_base`.
        CorruptError: the adapter computes something else than training recorded.
    """
    loaded, task = open_base(
        saved, base, quantization=quantization, precision="fp32", device=device, allow_other_base=allow_other_base
    )
    golden = Golden.load(saved.directory / GOLDEN) if saved.manifest is not None and saved.manifest.golden else None
    tokenizer: Any = loaded.tokenizer
    probes = golden.probes if golden else [as_probe(tokenizer(text)["input_ids"]) for text in SENTENCES]
    pool = AdapterPool(loaded, task=task)
    alone = pool.measure(probes)
    notes = pool.load("adapter", saved.directory, allow_other_base=allow_other_base).notes
    pool.use("adapter")
    adapter = pool.measure(probes)
    pool.unload("adapter")
    exported = pool.engine.call(lambda: _by_peft(pool, folder, probes))
    if exported.shape != adapter.shape:
        raise BudwoodError(f"{saved.directory}: the export has {exported.shape[1]} logits, not {adapter.shape[1]}.")
    setting = Distance.between(golden.base, alone) if golden else None
    result = Replay(
        len(probes),
        loaded.quantization,
        Distance.between(adapter, exported),
        relative_error(alone, adapter, exported),
        Distance.between(golden.adapter, exported) if golden else None,
        setting,
        golden is not None and comparable(saved.manifest.golden, current_setting(loaded)),  # type: ignore
        notes,
    )
    _judge(saved, result, float(adapter.abs().max()), approximate, force)
    if result.recorded is not None and not approximate and _differs(result, float(golden.adapter.abs().max())):  # type: ignore[union-attr]
        raise mismatch(saved, loaded.fingerprint)(
            f"{saved.directory}: on this base it is another model than the one that training recorded "
            f"({result.recorded}; the bases alone: {setting}): nothing was written. Use the base of its run."
        )
    return result


def _by_peft(pool: AdapterPool, folder: Path, probes: Any) -> torch.Tensor:
    """Return the logits of the exported adapter; stock PEFT adds it to the model and takes it off."""
    from peft import PeftModel

    model: Any = pool.model
    pool.engine.table.close()
    try:
        wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        wrapped.eval()
        return measure(pool.task_plugin, model, pool.tokenizer, probes, torch.float32)
    except BudwoodError:
        raise
    except Exception as error:  # PEFT may raise any exception
        raise BudwoodError(f"the export does not load in stock PEFT: {describe(error)}") from error


def _judge(saved: SavedAdapter, result: Replay, largest: float, approximate: bool, force: bool) -> None:
    if approximate:
        if not result.error <= MAX_ERROR and not force:
            raise InputError(
                f"{saved.directory}: the nearest LoRA of this rank changes the answers by {result.error:.0%} of the "
                f"adapter's effect, more than {MAX_ERROR:.0%}: nothing was written. Use a larger --rank, or --force."
            )
        return
    if not result.error <= EXACT and not result.conversion.largest <= ROUNDING * max(1.0, largest):
        raise BudwoodError(
            f"{saved.directory}: the export computes something else than the adapter ({result.conversion}; "
            f"{result.error:.1%} of its effect): nothing was written. This is a bug; please report it."
        )


def _differs(result: Replay, largest: float) -> bool:
    assert result.recorded is not None and result.setting is not None
    if result.same:
        return not result.recorded.largest <= 10 * ROUNDING * max(1.0, largest)
    return result.recorded.is_another_model(result.setting)
