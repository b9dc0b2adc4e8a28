"""Replay an adapter's golden logits to check that it still computes what it did when it was saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from budwood.adapters.golden import TOLERANCE, Distance, Golden, comparable, current_setting, threads
from budwood.adapters.manifest import GoldenRecord
from budwood.adapters.match import mismatch
from budwood.adapters.recorded_base import base_name, check_named_base
from budwood.adapters.store import GOLDEN, SavedAdapter, read_adapter
from budwood.contract.discovery import installed
from budwood.contract.loading import build_task, load
from budwood.errors import BudwoodError, CorruptError, InputError
from budwood.model.base import Base, silence_libraries, skeleton
from budwood.model.checkpoint import one_revision
from budwood.model.embeddings import resize_base
from budwood.model.limits import embeddings_of
from budwood.model.task import Task
from budwood.serving.pool import AdapterPool, load_for_task
from budwood.untrusted.redaction import shorten

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class VerifyReport:
    """The result of a replay.

    Attributes:
        exact: the setting is the recorded one, so the logits had to agree to 1e-5, and did.
        prompts: number of replayed prompts.
        adapter: distance of base and adapter now from the record.
        base: distance of the base alone now from the record: the effect of the setting itself.
        effect: distance of base and adapter from the base alone, as recorded: the effect of the adapter.
        recorded: setting of the record.
        current: setting of the replay.
        notes: messages for the user.
    """

    exact: bool
    prompts: int
    adapter: Distance
    base: Distance
    effect: Distance
    recorded: GoldenRecord
    current: GoldenRecord
    notes: list[str] = field(default_factory=list)


def open_base(
    saved: SavedAdapter,
    base: str | None = None,
    *,
    quantization: str | None = None,
    precision: str | None = None,
    device: str = "auto",
    allow_other_base: bool = False,
) -> tuple[Base, Task]:
    """Load the base that an adapter was trained on, in the recorded setting; arguments override the record.

    Returns:
        The base, and the adapter's task.

    Raises:
        InputError: no base is recorded or passed, or the base differs, which is checked before it loads; or the task
            of an adapter of stock PEFT is not supported.
    """
    silence_libraries()
    recorded = saved.manifest.base if saved.manifest else None
    name = base_name(saved, base)
    if name is None:
        raise InputError(f"{saved.directory}: an adapter of stock PEFT records no base: pass it with --base.")
    task_name, labels = task_of(saved)
    task: Task = build_task(task_name, saved.manifest.task_options if saved.manifest else {})
    quantization = quantization or (recorded.quantization if recorded else None)
    with one_revision(name, recorded.revision if recorded and base is None else None):
        check_named_base(saved, name, base, quantization, allow_other_base)
        loaded = load_for_task(
            name,
            quantization,
            task,
            labels,
            precision=precision or (PRECISIONS.get(recorded.dtype, "auto") if recorded else "auto"),
            device=device,
            double_quantization=recorded.double_quantization if recorded else True,
        )
        if rows := _embeddings(saved, name, task):
            resize_base(loaded, rows)
    return loaded, task


def open_pool(
    saved: SavedAdapter,
    base: str | None = None,
    *,
    quantization: str | None = None,
    precision: str | None = None,
    device: str = "auto",
    allow_other_base: bool = False,
) -> AdapterPool:
    """Open a pool on an adapter's base; see `open_base`."""
    loaded, task = open_base(
        saved, base, quantization=quantization, precision=precision, device=device, allow_other_base=allow_other_base
    )
    return AdapterPool(loaded, task=task)


def task_of(saved: SavedAdapter) -> tuple[str, list[str]]:
    """Return an adapter's task and its class names.

    Raises:
        InputError: the task of an adapter of stock PEFT is not supported.
    """
    return (saved.manifest.task, saved.manifest.labels) if saved.manifest else _task_of_stock(saved)


def _embeddings(saved: SavedAdapter, base: str, task: Task) -> int:
    """Return to how many token embeddings the base was resized for the adapter; 0 if it was not.

    Raises:
        CorruptError: the adapter cannot hold so many new rows.
    """
    recorded = saved.manifest.base.embeddings if saved.manifest else 0
    if not recorded:
        return 0
    rows = embeddings_of(skeleton(base, task.auto_class)) or 0
    most = max(info.shape[0] if info.shape else 0 for info in saved.infos.values())
    if recorded > rows + most:
        raise CorruptError(f"{saved.directory}: {recorded:,} embeddings, but the adapter holds at most {most:,} new.")
    return recorded if recorded > rows else 0


def _task_of_stock(saved: SavedAdapter) -> tuple[str, list[str]]:
    """Return the task of an adapter of stock PEFT, and names for the classes of its head, if it has one.

    Raises:
        InputError: the task is not supported.
    """
    types: dict[str, str] = {}
    for installed_task in installed("budwood.tasks"):
        with suppress(BudwoodError):  # a broken plugin, which `budwood plugins` reports
            types.setdefault(load(installed_task, "budwood.tasks")[0].peft_task_type or "", installed_task)
    name = saved.config.get("task_type") or "CAUSAL_LM"
    task = types.get(str(name))
    if task is None:
        known = ", ".join(filter(None, types))
        raise InputError(f"{saved.directory}: task_type {shorten(str(name))} is not supported, only {known}.")
    heads = ("score.weight", "classifier.weight", "out_proj.weight", "logits_proj.weight")
    rows = [info.shape[0] for key, info in saved.infos.items() if key.endswith(heads) and "lora_" not in key]
    return task, [f"LABEL_{i}" for i in range(rows[-1])] if rows and task != "causal-lm" else []


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
        directory: the adapter's folder.
        base: current location of its base; None: as recorded.
        quantization: None: as recorded.
        precision: fp32, bf16, fp16; None: as recorded.
        device: cpu, cuda or auto.
        allow_other_base: replay on a base with a different fingerprint.

    Raises:
        InputError: the adapter has no golden logits, or `AdapterPool` rejects it.
        CorruptError: the logits differ in the recorded setting; in any other one they differ by more than those of the
            base alone; or the adapter changes no logit, which only one made from others may.
    """
    saved = read_adapter(directory)
    if saved.manifest is None or saved.manifest.golden is None:
        raise InputError(f"{saved.directory}: holds no golden logits, so there is nothing to replay.")
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

    def measured(adapter: bool) -> torch.Tensor:
        pool.use("adapter" if adapter else None)
        return pool.measure(golden.probes)

    return judge(saved, golden, pool.base, pool.task_plugin, measured, loaded.notes)


def judge(
    saved: SavedAdapter,
    golden: Golden,
    base: Base,
    task: Task,
    measured: Callable[[bool], torch.Tensor],
    notes: Sequence[str] = (),
) -> VerifyReport:
    """Compare an adapter on a live model with its golden logits; see `verify`.

    Args:
        measured: computes the logits at each golden probe's position, [probes, …]: with the adapter, or the base's.
        notes: messages for the user, passed on.
    """
    assert saved.manifest is not None and saved.manifest.golden is not None
    recorded = saved.manifest.golden
    problem = next(filter(None, (task.check_inputs(base.model, probe) for probe in golden.probes)), "")
    if problem:
        raise CorruptError(f"{saved.directory / GOLDEN}: {problem}.")
    with threads(recorded.threads):
        current = current_setting(base)
        base_logits, adapter_logits = measured(False), measured(True)
    if adapter_logits.shape != golden.adapter.shape:
        raise CorruptError(
            f"{saved.directory / GOLDEN}: {golden.adapter.shape[1]} logits per probe, but the model now returns "
            f"{adapter_logits.shape[1]}."
        )
    report = VerifyReport(
        comparable(recorded, current),
        len(golden.probes),
        Distance.between(golden.adapter, adapter_logits),
        Distance.between(golden.base, base_logits),
        Distance.between(golden.base, golden.adapter),
        recorded,
        current,
        list(notes),
    )
    # One that was made from others may have no effect, such as a weighted sum that is zero.
    none = saved.manifest.made is not None and torch.equal(golden.base, golden.adapter)
    if not none and torch.equal(base_logits, adapter_logits):
        raise CorruptError(f"{saved.directory}: changes no logit of the base on its golden prompts.")
    wrong = mismatch(saved, base.fingerprint)
    if report.exact and not report.adapter.largest <= TOLERANCE:
        base_changed = report.base.largest > TOLERANCE
        cause = "the base's own logits differ too" if base_changed else "the base's own logits are unchanged"
        raise wrong(
            f"{saved.directory}: golden logits differ by up to {report.adapter.largest:.3g}, more than the "
            f"{TOLERANCE:g} allowed in the same setting; {cause}."
        )
    if report.adapter.is_another_model(report.base):
        raise wrong(
            f"{saved.directory}: in this setting it is another model than the one that training recorded "
            f"({report.adapter}; the base alone: {report.base})."
        )
    return report
