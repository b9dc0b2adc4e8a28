"""Leave Budwood: merge an adapter into its base's original weights, or write a folder that stock PEFT opens."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from budwood import __version__
from budwood.adapters.golden import Distance, Golden, measure
from budwood.adapters.owner import start_owner
from budwood.adapters.store import CONFIG, GOLDEN, WEIGHTS, SavedAdapter, read_adapter
from budwood.adapters.verify import base_name, open_pool
from budwood.contract.calls import ask_owner
from budwood.contract.discovery import PluginError
from budwood.contract.loading import load_strategy
from budwood.errors import CorruptError, InputError
from budwood.model.checkpoint import read_config, resolve
from budwood.model.text_tasks import as_probe
from budwood.untrusted.files import complete_directory

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_ROUNDED_AWAY = 0.05
"""Largest share of an update that may be lost to rounding unasked."""
EXACT = 1e-3
"""Largest difference of a logit between adapter and merged weights in fp32, relative to the largest logit."""
RECORD = "budwood-merge.json"
SENTENCES = ("The", "In the beginning there was", "def main():\n    ", "1, 2, 3, 4,")
"""What an adapter without golden prompts is compared on."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        weights: how many of the base's tensors it changed.
        rounded_away: share of the update that rounding to `dtype` takes away, 1 - <applied, update> / <update, update>
            over all changed weights: 0 where nothing is lost, 1 where every weight rounds back to what it was.
        worst: name of the weight that loses most, and its share.
        unquantized: merged model from the unquantised base with the adapter, on the golden prompts.
        recorded: merged model from the golden logits, which a quantised base may have given; None without any.
        notes: what the user should know.
    """

    directory: Path
    dtype: str
    weights: int
    rounded_away: float
    worst: tuple[str, float]
    unquantized: Distance
    recorded: Distance | None
    notes: list[str] = field(default_factory=list)


def merge(
    directory: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str = "bf16",
    device: str = "cpu",
    force: bool = False,
    allow_other_base: bool = False,
) -> MergeReport:
    """Merge an adapter into the original, unquantised weights of its base and save a stock transformers folder.

    The sum is computed in fp32 and rounded once; memory for it is 4 bytes a parameter, and 2 for the originals.

    Args:
        directory: the adapter.
        out: where the merged model goes; must not exist.
        base: where the base is now; absent: where it was.
        dtype: of the merged weights: bf16, fp16 or fp32.
        device: where it is computed.
        force: write although more than 5 % of the update is rounded away.
        allow_other_base: merge into another base all the same; recorded.

    Raises:
        InputError: the base is quantised on disk; `out` exists; too much would be rounded away. Nothing is written.
        CorruptError: the result answers otherwise than training recorded, and the base does not explain it.
        PluginError: the strategy merged it into something that answers otherwise than base and adapter.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already: choose another folder, or remove it.")
    saved = read_adapter(directory)
    _refuse_quantised(saved, base)
    pool = open_pool(
        saved, base, quantization="none", precision="fp32", device=device, allow_other_base=allow_other_base
    )
    model, target = pool.model, DTYPES[dtype]
    before = _originals(model)
    notes = pool.load("adapter", saved.directory, allow_other_base=allow_other_base).notes
    golden = Golden.load(saved.directory / GOLDEN) if (saved.directory / GOLDEN).exists() and saved.manifest else None
    probes = golden.probes if golden else [as_probe(pool.tokenizer(text)["input_ids"]) for text in SENTENCES]
    base_alone = measure(pool.kind, model, pool.tokenizer, probes, torch.float32)
    pool.use("adapter")
    with_adapter = measure(pool.kind, model, pool.tokenizer, probes, torch.float32)
    pool.merge("adapter")
    exact = Distance.between(with_adapter, measure(pool.kind, model, pool.tokenizer, probes, torch.float32))
    if not exact.largest <= EXACT * max(1.0, float(with_adapter.abs().max())):
        raise PluginError(
            f"strategy '{saved.adapter_type}' merged {saved.directory} into another model ({exact}): nothing was "
            "written. Report it to its author."
        )
    changed, rounded_away, worst = _round(model, before, target)
    if not changed:
        raise InputError(f"{saved.directory}: merging changes no weight of the base.")
    merged = measure(pool.kind, model, pool.tokenizer, probes, torch.float32)
    report = MergeReport(
        out,
        dtype,
        changed,
        rounded_away,
        worst,
        Distance.between(with_adapter, merged),
        Distance.between(golden.adapter, merged) if golden else None,
        notes,
    )
    if rounded_away > MAX_ROUNDED_AWAY and not force:
        raise InputError(
            f"{dtype} would round away {rounded_away:.0%} of the update ({report.unquantized}): "
            "nothing was written. Use --dtype fp32, or --force."
        )
    if report.unquantized.is_another_model():
        raise InputError(
            f"rounding to {dtype} would give another model ({report.unquantized}): nothing was written. "
            "Use --dtype fp32."
        )
    if golden is not None and report.recorded is not None:
        setting = Distance.between(golden.base, base_alone)
        if report.recorded.is_another_model(setting):
            raise CorruptError(
                f"{saved.directory}: on this base it is another model than the one that training recorded "
                f"({report.recorded}; the bases alone: {setting}): nothing was written. Use the base of its run."
            )
    with complete_directory(out) as folder:
        model.to(target).save_pretrained(folder)  # type: ignore[operator]
        pool.tokenizer.save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps(_record(saved, pool.base.name, report, force), indent=2) + "\n")
    return report


def _refuse_quantised(saved: SavedAdapter, base: str | None) -> None:
    name = base_name(saved, base)
    if name is not None and "quantization_config" in read_config(resolve(name, weights=False)):
        raise InputError(
            f"base '{name}' is quantised on disk, and an adapter is merged into original weights only: "
            "give the unquantised original with --base DIR --allow-other-base."
        )


def _originals(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, tied ones by each name, in the 16-bit dtype that holds them exactly if there is one."""
    copies = {parameter: _narrowed(parameter.detach()) for parameter in model.parameters()}
    return {name: copies[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}


def _narrowed(value: Tensor) -> Tensor:
    for dtype in (torch.bfloat16, torch.float16):
        narrow = value.to(dtype)
        if narrow.to(value.dtype).equal(value):
            return narrow
    return value.clone()


@torch.no_grad()
def _round(model: nn.Module, before: dict[str, Tensor], target: torch.dtype) -> tuple[int, float, tuple[str, float]]:
    """Round every parameter to what `target` holds; return how many changed, the share rounded away, and the worst."""
    changed, update, applied = 0, 0.0, 0.0
    worst = ("", -math.inf)
    for name, parameter in model.named_parameters():
        old, whole = before[name].to(parameter.dtype), parameter.detach().clone()
        parameter.copy_(whole.to(target))
        if whole.equal(old):
            continue
        delta, done = (whole - old).double(), (parameter - old.to(target).to(parameter.dtype)).double()
        square, kept = float((delta * delta).sum()), float((done * delta).sum())
        changed, update, applied = changed + 1, update + square, applied + kept
        if 1 - kept / square >= worst[1]:
            worst = (name, 1 - kept / square)
    return changed, max(1 - applied / update, 0.0) if update else 0.0, worst


def _record(saved: SavedAdapter, base: str, report: MergeReport, force: bool) -> dict[str, Any]:
    values = asdict(report) | {"directory": None, "base": base, "forced": force, "created_by": f"budwood {__version__}"}
    values["adapter"] = {"adapter_type": saved.adapter_type, "files": saved.manifest.files if saved.manifest else {}}
    values.pop("directory")
    return values


def export(directory: str | Path, out: str | Path, format: str = "peft") -> Path:
    """Write a folder that stock PEFT opens: config and weights alone, without what Budwood adds.

    Args:
        directory: the adapter.
        out: where it goes; must not exist.
        format: peft: as it is; or another adapter type that its owner can turn it into, such as lora.

    Raises:
        InputError: a format that the adapter does not have, a type that PEFT does not know, or `out` exists.
        CorruptError: the adapter is damaged.
    """
    saved = read_adapter(directory)
    config, tensors = saved.config, saved.load_tensors()
    if format not in ("peft", saved.adapter_type):
        config, tensors = _convert(saved, tensors, format)
    from peft import PeftType

    if config.get("peft_type") not in list(PeftType):
        raise InputError(
            f"{saved.directory}: PEFT does not know the adapter type '{saved.adapter_type}': it cannot be exported."
        )
    with complete_directory(Path(out)) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        if format != "peft" and (made := read_adapter(folder).adapter_type) != format:
            raise PluginError(
                f"strategy '{saved.adapter_type}' made an adapter of type '{made}' where '{format}' was asked for."
            )
    return Path(out)


def _convert(
    saved: SavedAdapter, tensors: dict[str, Tensor], adapter_type: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of the adapter as one of another type, by its owner."""
    cls, _ = load_strategy(saved.adapter_type)
    converted = None
    if hasattr(cls, "convert_adapter"):
        owner = start_owner(saved)
        converted = ask_owner(owner, "convert_adapter", config=saved.config, tensors=tensors, adapter_type=adapter_type)
    if converted is None:
        raise InputError(
            f"{saved.directory}: adapter type '{saved.adapter_type}' cannot be exported as '{adapter_type}': use peft."
        )
    config, tensors = converted
    return config, {key: tensor.contiguous() for key, tensor in tensors.items()}
