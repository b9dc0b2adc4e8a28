"""Prepare a run for training: composition, plan, data, base, adapter and optimizer.

Everything that can be checked without the base is checked before it loads.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState, is_initialized
from accelerate.tracking import get_available_trackers

from budwood.adapters.manifest import merged_into
from budwood.contract.discovery import PluginError
from budwood.contract.registry import Composition
from budwood.contract.strategy import RUN_ADAPTER, Strategy, hookimpl
from budwood.contract.types import BestMetric, Plan, Run
from budwood.data.bad_rows import skipped_lines
from budwood.errors import InputError, ResourceError, plural
from budwood.model.allocator import use_expandable_segments
from budwood.model.base import (
    Base,
    check_base,
    fingerprint,
    load_base,
    pick_device_precision,
)
from budwood.model.checks import size
from budwood.model.embeddings import resize_base
from budwood.model.limits import default_length
from budwood.model.ops import attention, kernels
from budwood.model.quantizers.room import keep_dequantized
from budwood.model.recompute import recompute_layers
from budwood.model.streaming import keep_heap
from budwood.model.task import Task
from budwood.parallel.processes import Processes
from budwood.parallel.together import share, wait_for_all
from budwood.recipe.continued import read_start
from budwood.recipe.data import (
    check_quantized,
    embeddings_wanted,
    read_task_base,
    recipe_skeleton,
    recipe_task,
    recipe_tokenizer,
)
from budwood.recipe.device import check_device
from budwood.recipe.schema import Recipe, build_composition, find_code, load_recipe
from budwood.training import recompute
from budwood.training.agreement import check_agreement
from budwood.training.compilation import compile_ops
from budwood.training.durability import changes
from budwood.training.durability.resume import Resume
from budwood.training.durability.sent import load_state
from budwood.training.micro_tokens import settle, settle_as_before, shared_out, wanted
from budwood.training.mixture import balance_load, describe_experts
from budwood.training.new_head import scale_new_head
from budwood.training.output import MANIFEST, SKIPPED, make_output, read_manifest
from budwood.training.packing_check import check_packing
from budwood.training.parameters import torch_groups, trainable_groups
from budwood.training.preflight import NOTHING_TRAINS, preflight
from budwood.training.reference import cache_reference
from budwood.training.report import Report, peak_memory, resident_peak
from budwood.training.run_data import read_data
from budwood.training.sampling import sample
from budwood.training.schedule import make_scheduler, warmup_note
from budwood.training.sharding import check_trained, describe_processes, naming_whole_weights, shards_base
from budwood.training.starting import check_classes, check_fit, check_start, complete_start, naming_start
from budwood.training.step import Engine
from budwood.untrusted.chat_template import today
from budwood.untrusted.files import complete_file
from budwood.untrusted.redaction import redact_values

FEW_STEPS = 20
"""A run with fewer steps than this gets a note, unless the recipe sets the steps."""


Planner = Callable[[Run, Any], None]
"""Estimates a run before its base is loaded, from the run with its data, and the base's modules without weights."""


class Core:
    """Core's default implementations of exclusive hooks, which a strategy may replace."""

    @hookimpl
    def build_optimizer(self, run: Run, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW (Loshchilov & Hutter, 2019), fused."""
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)

    @hookimpl
    def build_scheduler(self, run: Run, optimizer: torch.optim.Optimizer) -> Any:
        """Linear warm-up, then cosine, linear or constant."""
        steps = run.steps or 1
        if note := warmup_note(run.recipe.train, steps):
            run.say(note)
        return make_scheduler(optimizer, run.recipe.train, steps)


def register_task(hooks: Composition, task: Task) -> None:
    """Register the task's hooks, below those of the strategies."""
    hooks.register_core(task, f"task {task.name}")


def register_parts(hooks: Composition, engine: Engine) -> None:
    """Register core's hooks, below those of the strategies and the task."""
    hooks.register_core(engine, "core step")
    hooks.register_core(Core(), "core")


def prepare(
    recipe: Recipe | str | Path, report: Report, overwrite: bool, resume: Resume | None = None,
    in_place: bool = False, profile: bool = False, planner: Planner | None = None,
) -> tuple[Run, Composition, Engine]:  # fmt: skip
    """Prepare a run for training. With `resume`, the checkpoint's state is not restored yet.

    Args:
        overwrite: remove an old run from the output folder.
        in_place: keep an old run's files until this run's files replace them.
        profile: measure the memory of every hook on CUDA too, and the time of the device's work instead of its launch.
        planner: called with the run and the base's skeleton once the data is read; raises if the run cannot fit.

    Raises:
        InputError: the recipe, the data or the plan is invalid, or something changed since the checkpoint.
        ResourceError: the machine cannot run it.
        CorruptError: the base is damaged.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Path(recipe))
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    preflight(recipe, overwrite, in_place)
    hooks = build_composition(recipe)
    hooks.account("startup", report.seconds)
    with hooks.part("setup"):
        run, engine = _prepare(recipe, hooks, report, overwrite, resume, profile, planner)
    return run, hooks, engine


def _prepare(
    recipe: Recipe, hooks: Composition, report: Report, overwrite: bool, resume: Resume | None, profile: bool,
    planner: Planner | None,
) -> tuple[Run, Engine]:  # fmt: skip
    """See `prepare`; the recipe's output, options and files have been checked."""
    if not hooks.implements("trainable_parameters"):
        raise InputError(NOTHING_TRAINS)
    task, given = recipe_task(recipe), recipe
    directory = Path(recipe.output)
    device, dtype, reason = pick_device_precision(recipe.base.device, recipe.train.precision)
    if device.type == "cuda":
        use_expandable_segments()
    check_device(recipe, device.type)
    compiled = compile_ops(recipe, device, dtype)
    check_base(recipe.base.model, recipe.base.quantization, recipe.base.trust_remote_code, device)
    check_trackers(recipe.train.trackers)
    if profile or device.type == "cpu":  # a query takes a microsecond on the CPU, but much longer on CUDA
        on_cuda = device.type == "cuda"
        hooks.measure(peak_memory if on_cuda else resident_peak, torch.cuda.synchronize if on_cuda else None)
    world = Processes.from_environment()
    wait_for_all("checked")
    world.join(device)
    accelerator = make_accelerator(device, log_with=recipe.train.trackers or None, project_dir=directory)
    if world.size > 1:
        device = accelerator.device
    if recipe.train.deterministic:
        torch.use_deterministic_algorithms(True)
    report.mute = not world.first
    run = Run(
        recipe, directory, device, dtype, hooks.strategies, hooks, task,
        seed=recipe.train.seed, say=report.say, accelerator=accelerator, world=world,
    )  # fmt: skip
    report.say(f"{device} · {precision_name(dtype)} ({reason}) · {plural(torch.get_num_threads(), 'thread')}{compiled}")
    trust = recipe.base.trust_remote_code
    plan = plan_run(run, hooks)
    recipe, model = run.recipe, plan.model
    run.sharded = shards_base(run, hooks, model)

    with hooks.part("read_data"):
        date = share("date", lambda: _date(directory) if resume is not None else str(today()))
        read_data(run, hooks, report, date, model, resume)
    recipe = run.recipe
    check_classes(run)
    check_fit(run)
    plan.steps = run.steps
    check_plan(plan, hooks)
    check_agreement(run)
    if resume is not None:
        settle_as_before(run, resume.checkpoint.setting)
        recompute.settle_as_before(run, resume.checkpoint.setting)
        now = changes.setting(run)
        if not hooks.implements("load_base"):
            now["base"] = {"fingerprint": fingerprint(recipe.base.model)}
        resume.compare(now, run)
        resume.check_steps(run)
        if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
            report.say(
                "note: on CUDA a resumed run is identical up to rounding, and bitwise identical with "
                "train.deterministic"
            )
    chosen = run.recipe.train.micro_tokens is None
    if planner is not None:
        planner(run, model)
    if run.recipe.train.gradient_checkpointing == "auto":
        recompute.settle(run, True)
    if run.recipe.train.micro_tokens is None:
        settle(run, shared_out(run, wanted(run, "cpu")))
    recipe = run.recipe
    make_output(directory, overwrite, run.world)

    run.base = _base(run, hooks, task, trust)
    if recipe.base.resize_embeddings:
        resize_base(run.base, embeddings_wanted(recipe, run.tokenizer))
    if device.type == "cpu":
        keep_heap()
    if not run.sharded and recipe.base.keep_dequantized:
        kept = keep_dequantized(run.base.model, run.spare_memory, run.dtype)
        run.base.notes += [f"dequantised weights are kept, in {size(kept)} of free memory"] * bool(kept)
    merged = [f"adapter {record.weights[:12]} is merged into it" for record in merged_into(run.base.path)]
    report.say(f"base {run.base.name}: " + "; ".join([*run.base.notes, *merged]))
    if run.processes > 1:
        report.say(describe_processes(run))
    for problem in kernels.prepare(device, run.dtype):
        report.say(problem)
    if run.start_adapter is not None:
        check_start(run, run.start_adapter)
    run.model = run.base.model
    attention.register()
    check_packing(run, report)
    scale_new_head(run)
    adapt_model(run, hooks)
    run.sampler = sample
    if resume is not None:
        resume.compare(changes.adapted(run), run)
    if resume is not None and not resume.changes and any(strategy.caches_reference for strategy in run.strategies):
        state = load_state(resume.checkpoint, world)
        run.reference_tokens = state.get("reference_tokens", run.reference_tokens)
    engine = build_engine(run, hooks)
    _report_size(run, report, chosen)
    build_optimizer(run, hooks)
    if world.first:
        write_manifest(run, resume, changes.chosen(given, run))
        complete_file(directory / "recipe.yaml", recipe.to_yaml(hooks.strategies).encode())
        write_skipped(run, report)
    step = resume.checkpoint.step if resume is not None else 0
    report.open(directory, accelerator, recipe.train.trackers, redact_values(recipe.model_dump(mode="json")), step)
    return run, engine


def _date(directory: Path) -> str:
    """Return the date that a resumed run's chat templates wrote, today's if it is not known."""
    return str((read_manifest(directory) or {}).get("date") or today())


def make_accelerator(device: torch.device, **options: Any) -> Accelerator:
    """Create the Accelerator, which rejects `cpu=True` in a process that used a GPU; one process needs no device."""
    used_gpu = is_initialized() and PartialState().device.type != "cpu"
    return Accelerator(cpu=device.type == "cpu" and not used_gpu, **options)


def check_trackers(names: Sequence[str]) -> None:
    """Reject a tracker that is not installed, which accelerate would skip silently.

    Raises:
        ResourceError: the message names the tracker and how to install it.
    """
    available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in names:
        if name not in available:
            raise ResourceError(f"train.trackers: {name} is not installed: pip install 'budwood[track]'.")


def check_plan(plan: Plan, hooks: Composition) -> None:
    """Collect the plan errors of all strategies, and check that the task provides what their losses need.

    Raises:
        InputError: lists all plan errors.
    """
    plan.problems.clear()
    plan.problems += find_code(plan.recipe, plan.strategies)
    plan.problems += recompute.find_problems(plan.recipe, plan.model)
    hooks.call("check_plan", plan=plan)
    for call in hooks.calls("sequence_terms"):
        if plan.task is not None and isinstance(call.plugin, Strategy) and not plan.task.has_log_probs():
            plan.problem(call.plugin, f"{plan.task} has no log-probabilities, which its loss needs (sequence_terms)")
    if plan.problems:
        raise InputError("; ".join(plan.problems), plan.problems)


def _base(run: Run, hooks: Composition, task: Task, trust: bool) -> Base:
    if hooks.implements("load_base"):
        base: Base = hooks.call("load_base", run=run)
        return base
    recipe = run.recipe.base
    known = run.tokenizer if run.recipe.data.chat_template is None else None  # which would not be the base's own
    with hooks.part("load_base"):
        base = load_base(
            recipe.model, recipe.quantization, task.auto_class, run.dtype, run.device, trust,
            recipe.double_quantization, task.model_kwargs(run.examples.labels), run.seed,
            task.needs_tokenizer and known is None, task.unused_modules, run.world if run.sharded else None,
        )  # fmt: skip
        return base if known is None else replace(base, tokenizer=known)


def prepare_model(run: Run, hooks: Composition) -> Any:
    """Apply every strategy's `prepare_model`, and record which strategy chose the run's best metric.

    Raises:
        PluginError: a strategy set `run.best_metric` to something other than a BestMetric.
    """
    model = run.model
    for call in hooks.calls("prepare_model"):
        before = run.best_metric
        model = hooks.ask("prepare_model", call.name, run=run, model=model)[1]
        if run.best_metric is before:
            continue
        if not isinstance(run.best_metric, BestMetric):
            raise PluginError(f"{call.plugin}: run.best_metric must be a BestMetric, not {run.best_metric!r}.")
        run.best_metric = replace(run.best_metric, owner=str(call.plugin))
    return model


def plan_run(run: Run, hooks: Composition) -> Plan:
    """Read what the base's files say without its weights, and let the task and the strategies check the plan.

    Raises:
        InputError: one of them refuses it, or a file is wrong.
    """
    recipe, task = run.recipe, run.task
    read_task_base(task, recipe)
    register_task(hooks, task)
    if task.needs_tokenizer:
        run.tokenizer = recipe_tokenizer(recipe)
    model = recipe_skeleton(recipe, task.auto_class, run.tokenizer)
    check_quantized(model, recipe)
    run.recipe = recipe = recipe.with_length(default_length(model))
    run.start_adapter = saved = read_start(recipe)
    run.starts_as_base = saved is None or saved.manifest is None or not saved.manifest.needs_quantization
    plan = Plan(
        recipe, hooks.strategies, recipe.train.steps, model, task=task, tokenizer=run.tokenizer,
        start_adapter=run.start_adapter,
    )  # fmt: skip
    check_plan(plan, hooks)
    return plan


def adapt_model(run: Run, hooks: Composition) -> None:
    """Let the strategies change the base, and collect what trains."""
    complete_start(run)
    with naming_start(run.start_adapter, run.base.fingerprint), naming_whole_weights(run):
        run.model = prepare_model(run, hooks)
    train = run.recipe.train
    recompute_layers(run.model, train.gradient_checkpointing, train.activation_offloading)
    run.groups = trainable_groups(run, hooks)
    check_trained(run)
    run.start = [p.detach().clone() for p in run.trainable]
    if run.average is not None:
        run.average.begin(run.trainable)


def build_engine(run: Run, hooks: Composition) -> Engine:
    """Register core's hooks for an adapted model, and cache the reference if a strategy asks for it."""
    balance_load(run, hooks)
    engine = Engine(run, hooks)
    register_parts(hooks, engine)
    cache_reference(run)
    return engine


def build_optimizer(run: Run, hooks: Composition) -> None:
    """Create the run's optimizer and learning-rate schedule."""
    run.optimizer = hooks.call("build_optimizer", run=run, groups=torch_groups(run))
    run.scheduler = hooks.call("build_scheduler", run=run, optimizer=run.optimizer)


def _report_size(run: Run, report: Report, chosen: bool) -> None:
    from budwood.adapters.describe import describe_adapter

    trainable = sum(p.numel() for p in run.trainable)
    total = run.base.parameters + trainable
    train = run.recipe.train
    size = plural(train.batch_examples, "example") if train.batch_examples else plural(train.batch_tokens or 0, "token")
    names = ", ".join(strategy.name for strategy in run.strategies)
    report.say(f"{names}: {trainable:,} trainable parameters ({trainable / total:.2%} of {total:,})")
    adapted = "; ".join(filter(None, (describe_adapter(run.model, RUN_ADAPTER), describe_experts(run))))
    if adapted:
        report.say(f"adapted: {adapted}")
    limit = f"at most {train.micro_tokens:,} tokens at once{' (train.micro_tokens: auto)' if chosen else ''}"
    report.say(f"{plural(run.steps or 0, 'optimizer step')} of {size}, {limit}{recompute.describe(run)}")
    if train.steps is None and (run.steps or 0) < FEW_STEPS:
        unit = "batch_examples" if train.batch_examples else "batch_tokens"
        groups = int(run.examples.groups[-1]) + 1  # which are what batch_examples counts
        epoch = groups if train.batch_examples else int(run.examples.lengths.sum())
        report.say(
            f"note: so few steps have little effect: lower train.{unit} (an epoch has {epoch:,}), or raise train.epochs"
        )


def write_skipped(run: Run, report: Report) -> None:
    """Write skipped.jsonl, with every skipped row, its location and the reason; without skipped rows, no file."""
    files = [run.examples, run.eval_examples]
    skipped = [row for examples in files if examples is not None for row in examples.skipped or ()]
    if skipped:
        complete_file(run.directory / SKIPPED, skipped_lines(skipped))
        report.say(f"note: {len(skipped):,} bad rows were skipped; they are in {run.directory / SKIPPED}")


def precision_name(dtype: torch.dtype) -> str:
    """Return the recipe's name for a dtype."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def write_manifest(run: Run, resume: Resume | None = None, chosen: Sequence[str] = ()) -> None:
    """Write manifest.json: versions, strategies with options, base, data, seed, device, accepted changes.

    Args:
        chosen: the fields of the recipe that the run chose.
    """
    manifest = {
        "budwood": changes.version("budwood"),
        "python": platform.python_version(),
        "versions": changes.pinned_versions(),
        "strategies": strategies_record(run.strategies),
        "base": {
            "name": run.base.name, "revision": run.base.revision, "fingerprint": run.base.fingerprint,
            "quantization": run.base.quantization,
            "bytes": run.base.bytes, "bytes_unquantized": run.base.bytes_unquantized,
        },
        "data": changes.data_setting(run),
        "examples": {n: e.summary() for n, e in (("train", run.examples), ("eval", run.eval_examples)) if e},
        "adapter": run.start_adapter.hashes.model_dump() if run.start_adapter is not None else None,
        "grown_from": run.grown_from,
        "task": run.task.name,
        "best_metric": {"name": run.best_metric.name, "higher": run.best_metric.higher} if run.best_metric else None,
        "seed": run.seed,
        "date": run.examples.date,
        "steps": run.steps,
        "packed": run.packed,
        "device": str(run.device),
        "precision": precision_name(run.dtype),
        "processes": run.processes,
        "parallel": "shard" if run.sharded else "replicate",
        "micro_tokens": run.micro_tokens,
        "chosen": list(chosen),
        "files": sorted({name for strategy in run.strategies for name in strategy.writes}),
    }  # fmt: skip
    if resume is not None:
        manifest |= {"resumed_from_step": resume.checkpoint.step, "accepted_changes": resume.accepted}
    complete_file(
        run.directory / MANIFEST, (json.dumps(redact_values(manifest), indent=2, default=str) + "\n").encode()
    )


def strategies_record(strategies: Sequence[Any]) -> list[dict[str, Any]]:
    """Return name, distribution and options of each strategy, as stored in manifests."""
    return [
        {"name": s.name, "distribution": s.distribution, "options": redact_values(s.options.model_dump(mode="json"))}
        for s in strategies
    ]
