"""Merges an adapter into its base's original weights."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from budwood import __version__
from budwood.adapters.golden import Distance, measure, relative_error
from budwood.adapters.manifest import MERGED, merged_into
from budwood.adapters.match import mismatch
from budwood.adapters.rounding import round_stochastically
from budwood.adapters.store import SavedAdapter, read_adapter
from budwood.contract.discovery import find, plugin_fault
from budwood.errors import BudwoodError, InputError
from budwood.model.base import Base
from budwood.model.checkpoint import read_config, resolve
from budwood.model.decoding import end_tokens
from budwood.model.outputs import give_back_outputs
from budwood.serving.pool import AdapterPool, load_for_task
from budwood.serving.probes import probes_of
from budwood.serving.verify import base_name, open_pool
from budwood.untrusted.files import complete_directory

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_ERROR = 0.25
"""Largest error of a merged model without `force`, as a fraction of the adapter's own effect."""
EXACT = 1e-3
"""Largest difference of a logit between adapter and merged weights in fp32, relative to the largest logit."""


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    Attributes:
        weights: number of the base's tensors that changed.
        rounded_away: fraction of the update lost by rounding to `dtype`, 1 - <applied, update> / <update, update> over
            all changed weights: 0 if nothing is lost, 1 if every weight rounds back to its old value.
        worst: name of the weight with the largest loss, and its fraction.
        error: distance of the merged model from the unquantised base with the adapter, as a fraction of the adapter's
            distance from the base alone: of logits on the golden prompts; None: it has no effect, see `relative_error`.
        unquantized: distance of the merged model from the unquantised base with the adapter, on the golden prompts.
        recorded: distance of the merged model from the golden logits, which a quantised base may have produced; None
            without golden logits.
        notes: messages for the user.
    """

    directory: Path
    dtype: str
    weights: int
    rounded_away: float
    worst: tuple[str, float]
    error: float | None
    unquantized: Distance
    recorded: Distance | None
    notes: list[str] = field(default_factory=list)


def merge(
    directory: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    force: bool = False,
    allow_other_base: bool = False,
    again: bool = False,
) -> MergeReport:
    """Merge an adapter into the original, unquantised weights of its base and save a stock transformers folder.

    The sum is computed in fp32 and rounded once, to 16 bits stochastically with a fixed seed, since most updates are
    smaller than the resolution of the dtype: rounding to the nearest would lose them. It takes 4 bytes of memory per
    parameter, plus 2 for the originals.

    Args:
        directory: the adapter's folder.
        out: folder for the merged model; it may not exist yet.
        base: current location of the base; None: as recorded.
        dtype: dtype of the merged weights: bf16, fp16 or fp32; None: that in which the base is stored.
        device: device of the computation.
        force: write even if the merged model differs by more than a quarter of the adapter's effect.
        allow_other_base: merge into a base with a different fingerprint; recorded.
        again: load the folder again before it appears, and compare its logits with those of the merge; this takes
            another 4 bytes of memory per parameter.

    Raises:
        InputError: the base is quantised on disk, `out` exists, or rounding would change too much. Nothing is written.
        CorruptError: the merged model differs from what training recorded by more than the base alone does (on another
            base than its own: InputError).
        BudwoodError: before rounding, the merged weights differ from base and adapter: the strategy has a fault.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already: choose another folder, or remove it.")
    saved = read_adapter(directory)
    _check_unquantised(saved, base)
    pool = open_pool(
        saved, base, quantization="none", precision="fp32", device=device, allow_other_base=allow_other_base
    )
    model, originals = pool.model, original_weights(pool.model)
    dtype = dtype or _default_dtype(pool.base.path)
    target = DTYPES[dtype]
    notes = pool.load("adapter", saved.directory, allow_other_base=allow_other_base).notes
    golden, probes = probes_of(saved, pool)
    base_alone = measure(pool.task_plugin, model, pool.tokenizer, probes, torch.float32)
    pool.use("adapter")
    with_adapter = measure(pool.task_plugin, model, pool.tokenizer, probes, torch.float32)
    pool.merge("adapter")
    exact = Distance.between(with_adapter, measure(pool.task_plugin, model, pool.tokenizer, probes, torch.float32))
    if not exact.largest <= EXACT * max(1.0, float(with_adapter.abs().max())):
        text = f"strategy '{saved.adapter_type}' merged {saved.directory} into another model ({exact})"
        raise plugin_fault(find(saved.adapter_type).owner, f"{text}: nothing was written", True)
    changed, rounded_away, worst = _round(model, originals, target)
    if not changed:
        raise InputError(f"{saved.directory}: merging changes no weight of the base.")
    merged = measure(pool.task_plugin, model, pool.tokenizer, probes, torch.float32)
    report = MergeReport(
        out,
        dtype,
        changed,
        rounded_away,
        worst,
        relative_error(base_alone, with_adapter, merged),
        Distance.between(with_adapter, merged),
        Distance.between(golden.adapter, merged) if golden else None,
        notes,
    )
    if report.error is not None and not report.error <= MAX_ERROR and not force:
        raise InputError(
            f"rounding to {dtype} would change the answers by {report.error:.0%} of the adapter's effect, more than "
            f"{MAX_ERROR:.0%} ({report.unquantized}): nothing was written. Use --dtype fp32, or --force."
        )
    if report.unquantized.is_another_model():
        raise InputError(
            f"rounding to {dtype} would give another model ({report.unquantized}): nothing was written. "
            "Use --dtype fp32."
        )
    if golden is not None and report.recorded is not None:
        setting = Distance.between(golden.base, base_alone)
        if report.recorded.is_another_model(setting):
            raise mismatch(saved, pool.base.fingerprint)(
                f"{saved.directory}: on this base it is another model than the one that training recorded "
                f"({report.recorded}; the bases alone: {setting}): nothing was written. Use the base of its run."
            )
    give_back_outputs(model.config)
    with complete_directory(out) as folder:
        model.to(target).save_pretrained(folder)  # type: ignore[operator]
        _keep_chat(saved, pool, folder)
        evaluation = saved.manifest.evaluation if saved.manifest else None
        files = pool.task_plugin.model_files(model, evaluation.max_length if evaluation else None)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        if again:
            _compare_again(saved, pool, folder, probes, merged)
        (folder / MERGED).write_text(json.dumps(_record(saved, pool.base, report, force), indent=2) + "\n")
    return report


def _keep_chat(saved: SavedAdapter, pool: AdapterPool, folder: Path) -> None:
    """Save the tokenizer with the chat template of the adapter's run, and the tokens that end its answers."""
    if pool.tokenizer is None:
        return
    chat = saved.manifest.chat if saved.manifest is not None else None
    if chat is not None and chat.template is not None:
        pool.tokenizer.chat_template = chat.template
    pool.tokenizer.save_pretrained(folder)
    stops = saved.manifest.stop_ids if saved.manifest is not None else []
    if not stops or not pool.base.model.can_generate():
        return
    config: Any = copy.deepcopy(pool.base.model.generation_config)
    ends, _ = end_tokens(pool.base.model, pool.tokenizer, ())
    config.eos_token_id = sorted({*ends, *stops})
    config.save_pretrained(folder)


def _compare_again(saved: SavedAdapter, pool: AdapterPool, folder: Path, probes: Any, merged: Tensor) -> None:
    """Load the written folder, and compare its logits with those of the merged weights in memory.

    Raises:
        BudwoodError: they differ by more than fp32's rounding.
    """
    labels = saved.manifest.labels if saved.manifest is not None else []
    loaded = load_for_task(
        folder, "none", pool.task_plugin, labels, precision="fp32", device=str(pool.base.device),
        double_quantization=True,
    )  # fmt: skip
    found = measure(pool.task_plugin, loaded.model, loaded.tokenizer, probes, torch.float32)
    apart = Distance.between(merged, found)
    if not apart.largest <= EXACT * max(1.0, float(merged.abs().max())):
        raise BudwoodError(
            f"{saved.directory}: the merged folder loads as another model ({apart}): nothing is written."
        )


def _check_unquantised(saved: SavedAdapter, base: str | None) -> None:
    if saved.manifest is not None and saved.manifest.needs_quantization:
        raise InputError(
            f"{saved.directory}: makes up for the error of its base in {saved.manifest.base.quantization}, which the "
            "original weights do not have: load the adapter on its quantised base instead."
        )
    name = base_name(saved, base)
    if name is not None and "quantization_config" in read_config(resolve(name, weights=False)):
        raise InputError(
            f"base '{name}' is quantised on disk, but an adapter can only be merged into original weights: "
            "pass the unquantised original with --base DIR --allow-other-base."
        )


def original_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters by every name, each in a 16-bit dtype if one represents it exactly."""
    copies = {parameter: _narrow_copy(parameter.detach()) for parameter in model.parameters()}
    return {name: copies[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}


def _default_dtype(base: Path) -> str:
    """Return the dtype in which a base says that it is stored, so that what the adapter leaves alone stays as it is."""
    config = read_config(base)
    stored = config.get("dtype") or config.get("torch_dtype")
    return next((name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{stored}"), "bf16")


def _narrow_copy(value: Tensor) -> Tensor:
    for dtype in (torch.bfloat16, torch.float16):
        narrow = value.to(dtype)
        if narrow.to(value.dtype).equal(value):
            return narrow
    return value.clone()


@torch.no_grad()
def _round(model: nn.Module, originals: dict[str, Tensor], target: torch.dtype) -> tuple[int, float, tuple[str, float]]:
    """Round all parameters to `target`; return how many changed, the fraction rounded away, and the worst weight."""
    changed, update, applied = 0, 0.0, 0.0
    worst = ("", -math.inf)
    for name, parameter in model.named_parameters():
        old, exact = originals[name].to(parameter.dtype), parameter.detach().clone()
        old = torch.cat([old, exact[len(old) :]]) if len(old) < len(exact) else old  # rows for new tokens
        parameter.copy_(exact.to(target))
        if exact.equal(old):
            continue
        if target != torch.float32:
            parameter.copy_(round_stochastically(exact, target, name))
        delta, rounded = (exact - old).double(), (parameter - old.to(target).to(parameter.dtype)).double()
        square, kept = float((delta * delta).sum()), float((rounded * delta).sum())
        changed, update, applied = changed + 1, update + square, applied + kept
        if 1 - kept / square >= worst[1]:
            worst = (name, 1 - kept / square)
    return changed, max(1 - applied / update, 0.0) if update else 0.0, worst


def _record(saved: SavedAdapter, base: Base, report: MergeReport, force: bool) -> dict[str, Any]:
    made = {"base": base.name, "forced": force, "created_by": f"budwood {__version__}"}
    values = asdict(report) | {"directory": None, **made}
    values["merged"] = [record.model_dump() for record in (*merged_into(base.path), saved.hashes)]
    values["adapter"] = {"adapter_type": saved.adapter_type, "files": saved.manifest.files if saved.manifest else {}}
    values.pop("directory")
    return values
