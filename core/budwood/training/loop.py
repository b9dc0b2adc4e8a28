"""The training loop, from a recipe to the written adapter. Reads top to bottom."""

from __future__ import annotations

import atexit
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from budwood.contract.registry import Composition
from budwood.contract.types import Event, Run
from budwood.errors import DivergedError, Interrupted, ResourceError, plural
from budwood.model.checkpoint import one_revision
from budwood.model.halves.take_over import describe_others
from budwood.model.ops import kernels
from budwood.model.ops.attention import take_reasons
from budwood.model.quiet import silence_libraries
from budwood.parallel.processes import Processes
from budwood.parallel.together import together
from budwood.recipe.schema import Recipe, load_recipe
from budwood.training.batches import StepBatches, optimizer_steps
from budwood.training.compilation import unused
from budwood.training.durability.checkpoint import NotSavedError, Saver
from budwood.training.durability.lock import locked
from budwood.training.durability.resume import Resume, find_resume
from budwood.training.durability.signals import Signals, exit_code
from budwood.training.finish import RunFinalizer
from budwood.training.memory import (
    DoesNotFitError,
    PartialStepError,
    accumulate,
    explain_out_of_memory,
    optimizer_step,
)
from budwood.training.non_finite import check_parameters, check_skip
from budwood.training.output import after_restart, check_output
from budwood.training.progress import Progress, evaluate
from budwood.training.report import Report, profile_table
from budwood.training.setup import Planner, prepare
from budwood.training.step import Engine


def tune(
    recipe: Recipe | str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    accept_changes: bool = False,
    profile: bool = False,
    quiet: bool = False,
    before: float = 0.0,
    allow_code: bool = False,
    planner: Planner | None = None,
) -> Run:
    """Train a recipe and write the adapter, log and plot to its output folder.

    Args:
        recipe: a `Recipe`, or the path of a recipe file.
        overwrite: replace the contents of the output folder.
        resume: resume from the newest valid checkpoint in the output folder. Without a checkpoint the run starts from
            the beginning; a finished run is returned unchanged.
        accept_changes: resume although the recipe, the data or library versions have changed.
        profile: print the time and memory of every strategy's hooks at the end. On CUDA, measuring itself takes time.
        quiet: print nothing.
        before: seconds that the process ran before, which the times of the run include as `startup`.
        allow_code: run Python files that the recipe names, such as rewards.
        planner: estimates memory and time before the base is loaded, refuses what cannot fit, and settles
            `train.micro_tokens` and `train.gradient_checkpointing` where they are auto. None: micro-batches then have
            the usual size of a CPU, and all layers recompute. `budwood.tune` plans, as the command does.

    Returns:
        The finished run; `run.metrics` holds the last evaluation, `run.directory` is the output folder.

    Raises:
        BudwoodError: one of its subclasses, each with the command's exit code.
    """
    silence_libraries()
    world, report = Processes.from_environment(), Report(quiet, before=before)
    report.mute = not world.first
    with together(report.say, world):
        recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
        recipe = recipe.allowing_code(allow_code)
        overwrite, resume = after_restart(recipe.output, overwrite, resume)
        check_output(recipe.output, overwrite, resume)
        run = _tune(recipe, report, overwrite, resume, accept_changes, profile, planner)
    atexit.unregister(world.leave)
    atexit.register(world.leave)
    return run


def _tune(
    recipe: Recipe, report: Report, overwrite: bool, resume: bool, accept_changes: bool, profile: bool,
    planner: Planner | None,
) -> Run:  # fmt: skip
    """See `tune`."""
    signals = Signals()
    try:
        with (
            signals.handled(),
            nullcontext() if report.mute else locked(recipe.output, report.say),
            one_revision(recipe.base.model, recipe.base.revision),
        ):
            previous = find_resume(recipe, report, accept_changes) if resume else None
            if isinstance(previous, Run):
                return previous
            run, hooks, engine = prepare(recipe, report, overwrite, previous, resume, profile, planner)
            try:
                train(run, hooks, engine, report, previous, signals)
            finally:
                for line in profile_table(hooks.costs, report.seconds) if profile else ():
                    report.say(line)
            return run
    except KeyboardInterrupt as error:
        text = f"interrupted before the first step; {'checkpoints are kept' if resume else 'nothing was saved'}"
        raise Interrupted(text, exit_code(signals.number or error)) from None
    finally:
        kernels.compile_ops(False)  # what else this process does is not this run's
        report.close()


def train(
    run: Run, hooks: Composition, engine: Engine, report: Report, resume: Resume | None = None,
    signals: Signals | None = None,
) -> None:  # fmt: skip
    """Train a prepared run to its end, then restore the best adapter, check that it changes the model, and write it."""
    signals = signals or Signals()
    with hooks.part("setup"):
        finalizer = RunFinalizer(run, hooks, report)
    progress = Progress(torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16))
    saver = Saver(run, hooks, progress, resume)
    try:
        if resume is not None:
            saver.restore(resume)
        saver.check_space()
        if resume is None:
            run.before = evaluate(run, hooks, report, progress.best)
            torch.manual_seed(run.seed + run.process_index)  # for dropout, the only random draw that is not keyed
        try:
            with signals.deferred(), hooks.part("steps"):
                take_steps(run, hooks, engine, report, progress, saver, signals)
        except Exception as error:
            failure = explain_out_of_memory(run, error)
            if not isinstance(failure, DivergedError | ResourceError):
                raise
            report.stop()
            if run.processes > 1 and not isinstance(failure, DivergedError | DoesNotFitError):
                raise failure from error  # writing would wait for the other processes, which do not know of the failure
            outcome = finalizer.write_best(progress, partial_step=isinstance(failure, PartialStepError))
            if saver.last and not isinstance(failure, NotSavedError):  # whose message includes the hint
                outcome = f"{outcome}; {saver.resume_hint()}"
            raise type(failure)(f"{str(failure).removesuffix('.')}; {outcome}") from failure
        report.stop()
        if skipped := int(run.metrics.get("skipped", 0)):
            steps = "step was skipped: its" if skipped == 1 else "steps were skipped: their"
            report.say(f"{skipped} {steps} loss or gradient was not finite")
        evaluate(run, hooks, report, progress.best)
        finalizer.complete(progress)
        saver.finish(report)
        hooks.notify(Event("end", run.step, run.metrics), report.say)
    except KeyboardInterrupt as error:
        report.stop()
        if run.step == 0:
            raise
        raise interrupted(error, signals, saver, finalizer, progress) from None
    finally:
        saver.close(wait=signals.count < 3)


def take_steps(
    run: Run, hooks: Composition, engine: Engine, report: Report, progress: Progress, saver: Saver, signals: Signals
) -> None:
    """Take the remaining optimizer steps of a run."""
    report.start(run.steps or 0, run.step, [name for strategy in run.strategies for name in strategy.shows])
    hooks.notify(Event("start", run.step, {"steps": run.steps}), report.say)
    run.model.train()
    run.optimizer.zero_grad(set_to_none=True)
    if run.step and not between_steps(run, hooks, report, progress, saver, signals):
        return
    begun = run.step
    notes_of_first_step(run)  # what was computed before the steps does not count
    for step, counts in optimizer_steps(run, hooks, progress):
        metrics = train_step(run, hooks, engine, progress, step, counts)
        run.metrics |= {**metrics, "skipped": run.metrics.get("skipped", 0.0) + metrics["skipped"]}
        report.step(run.step, int(counts["token"]), metrics)
        hooks.notify(Event("step", run.step, metrics), report.say)
        for note in notes_of_first_step(run) if run.step == begun + 1 else ():
            report.say(note)
        if not between_steps(run, hooks, report, progress, saver, signals):
            return


def notes_of_first_step(run: Run) -> list[str]:
    """Return what a run's first step has shown of its speed; before it, a strategy may still add hooks or adapters."""
    others = describe_others(run.model)
    apart = [f"attention takes many operations instead of a kernel, which is slower: {why}" for why in take_reasons()]
    return [*filter(None, [unused(run.recipe)]), *(f"note: {text}" for text in filter(None, [others, *apart]))]


def train_step(
    run: Run, hooks: Composition, engine: Engine, progress: Progress, step: StepBatches, counts: dict[str, float]
) -> dict[str, Any]:
    """Take one optimizer step, and return its metrics.

    They are read before the optimizer, which a loss or gradient that is not finite must not reach. `budwood plan` calls
    this function on fake tensors, whose values cannot be read; there every step is finite.
    """
    recipe, scaler = run.recipe.train, progress.scaler
    run.counts = counts
    engine.loss_scale = scaler.scale(torch.ones((), device=run.device)) if scaler.is_enabled() else 1.0
    batches = accumulate(run, hooks, engine, step)
    sum_gradients(run)
    scaler.unscale_(run.optimizer)
    values = engine.finish_step()
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.trainable if p.grad is not None])
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = dict if run.planning else read_together
    known = {"gradient_norm": norm, "learning_rate": run.optimizer.param_groups[0]["lr"], "skipped": 0.0}
    metrics = read({**values, **known, **run.logged})
    run.logged.clear()
    finite = run.planning or math.isfinite(metrics["gradient_norm"]) and math.isfinite(metrics["loss"])
    metrics["skipped"] = float(not finite)
    progress.skipped = 0 if finite else progress.skipped + 1
    if not finite:
        check_skip(run, engine, hooks, batches, values, norm, progress.skipped, scaler.is_enabled())
    if finite:
        hooks.call("before_clip", run=run)
        if recipe.clip:
            trained = [p for p in run.trainable if p.grad is not None]
            if hooks.implements("before_clip"):  # it may have changed the gradients
                torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
            else:
                torch.nn.utils.clip_grads_with_norm_(trained, recipe.clip, norm)
        hooks.call("before_optimizer_step", run=run)
        with hooks.part("optimizer_step"):
            optimizer_step(run, scaler)
        hooks.call("after_optimizer_step", run=run)
        if run.average is not None:
            run.average.follow(run.step + 1)
        run.scheduler.step()
    scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.step, progress.examples = run.step + 1, progress.examples + step.drawn
    metrics |= read(run.logged)  # by hooks after the passes
    run.logged.clear()
    return metrics


def read_together(values: Mapping[str, Any]) -> dict[str, float]:
    """Return numbers and scalar tensors as floats; a device is read once, since each read waits for all its work."""
    found = {name: math.nan if isinstance(value, Tensor) else float(value) for name, value in values.items()}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    for device in {value.device for value in tensors.values()}:
        names = [name for name, value in tensors.items() if value.device == device]
        stacked = torch.stack([tensors[name].detach().double().reshape(()) for name in names])
        found |= zip(names, stacked.tolist(), strict=True)
    return found


def between_steps(
    run: Run, hooks: Composition, report: Report, progress: Progress, saver: Saver, signals: Signals
) -> bool:
    """Save, stop or evaluate at the end of a step, as due. Returns whether training continues.

    A checkpoint holds the state before the evaluation, and a resumed run repeats the evaluation. An evaluation can
    therefore be interrupted.

    Raises:
        KeyboardInterrupt: a signal requested the end of the run; the step is saved.
        DivergedError: the parameters are not finite.
    """
    recipe, best, last = run.recipe.train, progress.best, run.step == run.steps
    evaluates = bool(recipe.eval_every) and run.step % (recipe.eval_every or 1) == 0 and not last
    signal_number, due = signals.requested(run), saver.due()
    saver.check()
    if not (signal_number or due or last or evaluates):
        return True
    check_parameters(run)
    snapshot = saver.snapshot()
    if signal_number or due or last:
        saver.save(snapshot)
    if signal_number:
        raise KeyboardInterrupt(signal_number)
    if evaluates:
        try:
            with signals.interruptible():
                evaluate(run, hooks, report, best)
        except KeyboardInterrupt:
            saver.save(snapshot)
            raise
        stop = bool(recipe.patience) and best.without_gain >= (recipe.patience or 0)
        if stop or best.step == run.step:
            saver.save(snapshot)
        if stop:
            report.say(f"stopped early at step {run.step}: no improvement in {plural(best.without_gain, 'evaluation')}")
            return False
    return not last


def interrupted(
    error: KeyboardInterrupt, signals: Signals, saver: Saver, finalizer: RunFinalizer, progress: Progress
) -> Interrupted:
    """End an interrupted run: finish the checkpoint being written, then write the best adapter so far."""
    run, outcome = finalizer.run, ""
    with signals.deferred():
        if signals.count < 3:  # the third signal ends the run immediately
            with finalizer.hooks.part("finish"):
                saver.wait()
            if run.processes == 1 or signals.requested(run):
                outcome = f"{finalizer.write_best(progress)}; "
    text = f"interrupted at step {run.step}; {outcome}{saver.resume_hint()}"
    return Interrupted(text, exit_code(signals.number or error))


def sum_gradients(run: Run) -> None:
    """Sum the gradients of all processes, once per optimizer step, with one all-reduce per dtype.

    A parameter without a gradient gets a zero one, since another process may have a gradient for it.
    """
    if run.processes == 1:
        return
    for parameter in run.trainable:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    run.world.sum([parameter.grad for parameter in run.trainable if parameter.grad is not None])
