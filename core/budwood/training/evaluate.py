"""`budwood eval`: the metrics of a saved adapter on data, with the adapter and without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from budwood.adapters.pool import AdapterPool
from budwood.adapters.store import read_adapter
from budwood.contract.discovery import find
from budwood.contract.types import Run
from budwood.data.examples import build_examples
from budwood.errors import InputError
from budwood.model import attention
from budwood.model.base import pick_device_precision
from budwood.training.recipe import default_recipe
from budwood.training.report import Report
from budwood.training.setup import check_packing


@dataclass(frozen=True)
class Evaluation:
    """Metrics with the adapter and of the base alone, and the task's report for people ("" if it has none)."""

    adapter: dict[str, float]
    base: dict[str, float]
    report: str


def evaluate_adapter(
    directory: Path,
    data: Path,
    base: str | None = None,
    quantization: str | None = None,
    precision: str = "auto",
    max_length: int = 1024,
    generate: int = 1000,
    *,
    allow_other_base: bool = False,
    quiet: bool = False,
) -> Evaluation:
    """Measure an adapter, by default on the base and in the quantization that it was trained in.

    Args:
        directory: the adapter.
        data: a file in a form that the adapter's task takes.
        base: folder or hub name; None: the one that the adapter names.
        quantization: None: the adapter's.
        precision: "auto", "bf16", "fp16" or "fp32".
        max_length: tokens; longer rows are cut and counted.
        generate: at most so many prompts are answered for exact match.
        allow_other_base: also where the base's fingerprint is not the adapter's.
        quiet: show nothing.

    Raises:
        InputError, CorruptError, ResourceError: of adapter, data or base.
    """
    report = Report(quiet)
    saved = read_adapter(directory)
    manifest = saved.manifest
    name = base or (manifest.base.name if manifest else None)
    if not name:
        raise InputError(f"{directory} does not name its base: say which with --base DIR.")
    chosen = quantization or (manifest.base.quantization if manifest else "none")
    task_name = manifest.task if manifest else "causal-lm"
    labels = list(manifest.labels) if manifest else []
    overrides = [f"base.quantization={chosen}", f"train.eval_generate={generate}", f"data.max_length={max_length}"]
    overrides.append(f"train.micro_tokens={max(max_length, 2048)}")
    recipe = default_recipe(data, name, task=task_name, overrides=overrides)
    device, dtype, reason = pick_device_precision("auto", precision)
    pool = AdapterPool(
        name, quantization=chosen, precision=precision, task=task_name, labels=labels or None, device=str(device)
    )
    examples = build_examples(data, pool.base.tokenizer, task_name, max_length, labels=labels or None)
    report.say(examples.describe())
    run = Run(recipe, directory, device, dtype, task=find(task_name, "budwood.tasks", "task").load()(), say=report.say)
    run.base, run.model, run.tokenizer, run.examples, run.eval_examples = (
        pool.base, pool.base.model, pool.base.tokenizer, examples, examples,
    )  # fmt: skip
    attention.register()
    check_packing(run, report)
    without = run.task.evaluate(run) if not run.task.head_modules(run.model) else {}
    pool.load("adapter", directory, allow_other_base=allow_other_base)
    pool.use("adapter")
    return Evaluation(run.task.evaluate(run), without, run.task.report)
