"""`budwood eval`: the metrics of a saved adapter on data, with the adapter and without, and under attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from budwood.adapters.pool import AdapterPool
from budwood.adapters.store import read_adapter
from budwood.adapters.verify import base_name
from budwood.contract.calls import attribute_errors
from budwood.contract.loading import create
from budwood.contract.types import Run
from budwood.data.examples import build_examples
from budwood.data.forms import recognise
from budwood.data.reading import read_rows
from budwood.errors import InputError
from budwood.model.base import pick_device_precision, skeleton
from budwood.model.ops import attention
from budwood.model.tasks import Task
from budwood.recipe.schema import default_recipe
from budwood.training.attacks import build_attacks, measure_attacked
from budwood.training.report import Report
from budwood.training.setup import check_packing


@dataclass(frozen=True)
class Evaluation:
    """Metrics with the adapter and of the base alone, and the task's report for people ("" if it has none).

    `attacks` holds those with the adapter under each attack, by the attack's text.
    """

    adapter: dict[str, float]
    base: dict[str, float]
    report: str
    attacks: dict[str, dict[str, float]]


def evaluate_adapter(
    directory: Path,
    data: Path,
    base: str | None = None,
    quantization: str | None = None,
    precision: str = "auto",
    max_length: int = 1024,
    generate: int = 1000,
    attacks: Sequence[str] = (),
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
        attacks: each as NAME:KEY=VALUE,…; the adapter is measured again under each of them.
        allow_other_base: also where the base's fingerprint is not the adapter's.
        quiet: show nothing.

    Raises:
        InputError, CorruptError, ResourceError: of adapter, data or base.
    """
    report = Report(quiet)
    chosen_attacks = build_attacks(attacks)
    saved = read_adapter(directory)
    manifest = saved.manifest
    name = base_name(saved, base)
    if not name:
        raise InputError(f"{directory} does not name its base: say which with --base DIR.")
    chosen = quantization or (manifest.base.quantization if manifest else "none")
    task_name = manifest.task if manifest else "causal-lm"
    labels = list(manifest.labels) if manifest else []
    overrides = [f"base.quantization={chosen}", f"train.eval_generate={generate}", f"data.max_length={max_length}"]
    overrides.append(f"train.micro_tokens={max(max_length, 2048)}")
    recipe = default_recipe(data, name, task=task_name, overrides=overrides)
    task: Task = create(task_name, "budwood.tasks")
    if chosen_attacks:
        form = recognise(read_rows(data).columns, task_name, str(data)).name
        modules = skeleton(name, task.auto_class)
        for attack in chosen_attacks.values():
            with attribute_errors(attack, "check"):
                attack.check(form, task_name, modules)
    device, dtype, reason = pick_device_precision("auto", precision)
    pool = AdapterPool(
        name, quantization=chosen, precision=precision, task=task_name, labels=labels or None, device=str(device)
    )
    build = partial(build_examples, data, pool.base.tokenizer, task_name, max_length, labels or None)
    examples = build()
    report.say(examples.describe())
    run = Run(recipe, directory, device, dtype, task=task, say=report.say)
    run.base, run.model, run.tokenizer, run.examples, run.eval_examples = (
        pool.base, pool.base.model, pool.base.tokenizer, examples, examples,
    )  # fmt: skip
    attention.register()
    check_packing(run, report)
    without = task.evaluate(run) if not task.head_modules(run.model) else {}
    pool.load("adapter", directory, allow_other_base=allow_other_base)
    pool.use("adapter")
    clean = task.evaluate(run)
    text = task.report
    found = {
        attack.name: measure_attacked(run, attack, lambda change: build(change=change), clean)
        for attack in chosen_attacks.values()
    }
    return Evaluation(clean, without, text, found)
