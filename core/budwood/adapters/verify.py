"""Replay an adapter's golden logits: does it still answer what it answered when it was saved?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from budwood.adapters.golden import TOLERANCE, Distance, Golden, comparable, current_setting, threads
from budwood.adapters.manifest import GoldenRecord
from budwood.adapters.pool import AdapterPool
from budwood.adapters.store import GOLDEN, SavedAdapter, read_adapter
from budwood.errors import CorruptError, InputError
from budwood.model.base import check_base, fingerprint
from budwood.model.checkpoint import one_revision, would_fetch

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class VerifyReport:
    """What a replay found.

    Attributes:
        exact: the setting is the recorded one, so that logits had to agree to 1e-5, and did.
        prompts: how many were replayed.
        adapter: base and adapter now, from what was recorded.
        base: the base alone now, from what was recorded: what the setting itself changes.
        effect: base and adapter from the base alone, as recorded: what the adapter changes.
        recorded: setting of the record.
        current: setting of the replay.
        notes: what the user should know.
    """

    exact: bool
    prompts: int
    adapter: Distance
    base: Distance
    effect: Distance
    recorded: GoldenRecord
    current: GoldenRecord
    notes: list[str] = field(default_factory=list)


def base_name(saved: SavedAdapter, base: str | None = None) -> str | None:
    """The base that the user named, else the one that the adapter names; None where nobody names one.

    Raises:
        InputError: the adapter's would have to be fetched, which only the user may ask for.
    """
    if base is not None or saved.manifest is None:
        return base
    name = saved.manifest.base.name
    if would_fetch(name):
        raise InputError(
            f"{saved.directory}: was trained on the base '{name}', which is not on this machine, and only a base that "
            f"you name is fetched: --base {name}"
        )
    return name


def open_pool(
    saved: SavedAdapter,
    base: str | None = None,
    *,
    quantization: str | None = None,
    precision: str | None = None,
    device: str = "auto",
    allow_other_base: bool = False,
) -> AdapterPool:
    """Load the base that an adapter was trained on, as it was trained on it; arguments override what it records.

    Raises:
        InputError: no base is recorded or given, or it is another one, which is found before it loads.
    """
    recorded = saved.manifest.base if saved.manifest else None
    name = base_name(saved, base)
    if name is None:
        raise InputError(f"{saved.directory}: an adapter of stock PEFT; give its base with --base.")
    quantization = quantization or (recorded.quantization if recorded else "none")
    with one_revision(name, recorded.revision if recorded and base is None else None):
        try:
            info = check_base(name, quantization)
        except InputError as error:
            if base is None:
                raise InputError(
                    f"{error} It is what {saved.directory} was trained on; --base says where it is now."
                ) from error
            raise
        read_adapter(
            saved.directory,
            base_name=name,
            base_fingerprint=fingerprint(info.path),
            allow_other_base=allow_other_base,
            hashes=False,
        )
        return AdapterPool(
            name,
            quantization,
            task=saved.manifest.task if saved.manifest else "causal-lm",
            labels=saved.manifest.labels if saved.manifest else (),
            precision=precision or (PRECISIONS.get(recorded.dtype, "auto") if recorded else "auto"),
            device=device,
            double_quantization=recorded.double_quantization if recorded else True,
        )


def verify(
    directory: str | Path,
    base: str | None = None,
    *,
    quantization: str | None = None,
    precision: str | None = None,
    device: str = "auto",
    allow_other_base: bool = False,
) -> VerifyReport:
    """Replay an adapter's golden logits; on the recorded device, dtype and quantization they must agree to 1e-5.

    Args:
        directory: the adapter.
        base: where its base is now; absent: where it was.
        quantization: absent: as recorded.
        precision: fp32, bf16, fp16; absent: as recorded.
        device: cpu, cuda or auto.
        allow_other_base: replay on another base all the same.

    Raises:
        InputError: it has no golden logits; what `AdapterPool` refuses.
        CorruptError: in the recorded setting the logits differ; in any setting the adapter changes nothing, or the
            answers differ by more than the base's.
    """
    saved = read_adapter(directory)
    if saved.manifest is None or saved.manifest.golden is None:
        raise InputError(f"{saved.directory}: holds no golden logits, so there is nothing to replay.")
    recorded = saved.manifest.golden
    golden = Golden.load(saved.directory / GOLDEN)
    pool = open_pool(
        saved,
        base,
        quantization=quantization,
        precision=precision,
        device=device,
        allow_other_base=allow_other_base,
    )
    loaded = pool.load("adapter", saved.directory, allow_other_base=allow_other_base)
    problem = next(filter(None, (pool.kind.check_inputs(pool.model, probe) for probe in golden.probes)), "")
    if problem:
        raise CorruptError(f"{saved.directory / GOLDEN}: {problem}.")
    with threads(recorded.threads):
        current = current_setting(pool.base)
        base_now = pool.measure(golden.probes)
        pool.use("adapter")
        adapter_now = pool.measure(golden.probes)
    if adapter_now.shape != golden.adapter.shape:
        raise CorruptError(
            f"{saved.directory / GOLDEN}: {golden.adapter.shape[1]} logits, and {adapter_now.shape[1]} now."
        )
    report = VerifyReport(
        comparable(recorded, current),
        len(golden.probes),
        Distance.between(golden.adapter, adapter_now),
        Distance.between(golden.base, base_now),
        Distance.between(golden.base, golden.adapter),
        recorded,
        current,
        loaded.notes,
    )
    if torch.equal(base_now, adapter_now):
        raise CorruptError(f"{saved.directory}: changes no logit of the base on its golden prompts.")
    if report.exact and not report.adapter.largest <= TOLERANCE:
        whose = "the base itself answers otherwise" if report.base.largest > TOLERANCE else "the base answers as before"
        raise CorruptError(
            f"{saved.directory}: golden logits differ by up to {report.adapter.largest:.3g}, and at most {TOLERANCE:g} "
            f"is due in the same setting; {whose}."
        )
    if report.adapter.is_another_model(report.base):
        raise CorruptError(
            f"{saved.directory}: in this setting it is another model than the one that training recorded "
            f"({report.adapter}; the base alone: {report.base})."
        )
    return report
