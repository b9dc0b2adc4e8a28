"""The loop: what happens between a ready run and its adapter, read top to bottom."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from budwood.contract.registry import Composition
from budwood.contract.types import Event, Run
from budwood.data.packing import plan_epoch
from budwood.errors import BudwoodError, DivergedError, Interrupted, ResourceError, is_out_of_memory
from budwood.model.quiet import hush
from budwood.training.finish import adapter_probe, check_changed, write_results
from budwood.training.memory import StepBatches, TornStepError, accumulate, explain_out_of_memory, optimizer_step
from budwood.training.non_finite import check_skip
from budwood.training.recipe import Recipe
from budwood.training.report import Report
from budwood.training.setup import prepare
from budwood.training.step import Engine


@dataclass
class Best:
    """The best evaluation so far, with a copy on the CPU of what trained."""

    value: float = float("inf")
    step: int = 0
    parameters: list[Tensor] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    without_gain: int = 0


def tune(recipe: Recipe | str | Path, *, overwrite: bool = False, quiet: bool = False) -> Run:
    """Run a recipe and leave adapter, log and plot in its output folder.

    Args:
        recipe: a `Recipe`, or the path of one.
        overwrite: replace what the output folder holds.
        quiet: show nothing.

    Returns:
        The finished run; `run.metrics` holds the last evaluation, `run.directory` where things are.

    Raises:
        BudwoodError: one of its subclasses, with the exit code that the command ends with.
    """
    hush()
    report = Report(quiet)
    try:
        with _signals():
            run, hooks, engine = prepare(recipe, report, overwrite)
            train(run, hooks, engine, report)
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted before anything was trained; nothing is kept", _signal_code(error)) from None
    finally:
        report.close()
    return run


def train(run: Run, hooks: Composition, engine: Engine, report: Report) -> None:
    """Train a prepared run to its end, then keep the best adapter, check that it changed something, and write it."""
    recipe = run.recipe.train
    start = [p.detach().cpu().clone() for p in run.trainable]
    probe = adapter_probe(run)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    best, skipped, stopped, failure = Best(), 0, None, None
    run.before = evaluate(run, hooks, report, best)
    report.start(run.steps or 0)
    hooks.notify(Event("start", 0, {"steps": run.steps}), report.say)
    torch.manual_seed(run.seed + run.process_index)  # dropout: the only draw that is not keyed
    run.model.train()
    run.optimizer.zero_grad(set_to_none=True)
    try:
        for todo, counts in optimizer_steps(run):
            run.counts = counts
            engine.loss_scale = scaler.scale(torch.ones((), device=run.device)) if scaler.is_enabled() else 1.0
            batches = accumulate(run, hooks, engine, todo)
            sum_gradients(run)
            scaler.unscale_(run.optimizer)
            values = engine.finish_step()
            norm = torch.nn.utils.get_total_norm([p.grad for p in run.trainable if p.grad is not None])
            finite = bool(torch.isfinite(norm) & torch.isfinite(values["loss"]))
            skipped, rate = 0 if finite else skipped + 1, run.optimizer.param_groups[0]["lr"]
            if not finite:
                check_skip(run, engine, hooks, batches, values, norm, skipped, scaler.is_enabled())
            if finite:
                hooks.call("before_clip", run=run)
                if recipe.clip:
                    trained = [p for p in run.trainable if p.grad is not None]
                    torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
                hooks.call("before_optimizer_step", run=run)
                optimizer_step(run, scaler)
                hooks.call("after_optimizer_step", run=run)
                run.scheduler.step()
            scaler.update()
            run.optimizer.zero_grad(set_to_none=True)
            run.step += 1
            numbers = {**values, "gradient_norm": norm, "learning_rate": rate, "skipped": not finite, **run.logged}
            numbers = {name: float(value) for name, value in numbers.items()}
            run.logged.clear()
            run.metrics |= {**numbers, "skipped": run.metrics.get("skipped", 0.0) + numbers["skipped"]}
            report.step(run.step, counts["token"], numbers)
            hooks.notify(Event("step", run.step, numbers), report.say)
            if recipe.eval_every and run.step % recipe.eval_every == 0 and run.step < (run.steps or 0):
                evaluate(run, hooks, report, best)
                if recipe.patience and best.without_gain >= recipe.patience:
                    report.say(f"stopped early at step {run.step}: no gain in {best.without_gain} evaluations")
                    break
    except KeyboardInterrupt as error:
        stopped = error
    except Exception as error:
        failure = explain_out_of_memory(run, error)
        if not isinstance(failure, DivergedError | ResourceError):
            raise
    if failure is not None:
        report.stop()
        kept = _keep(run, hooks, best, start, report, probe, torn=isinstance(failure, TornStepError))
        raise type(failure)(f"{failure}; {kept}") from failure
    report.stop()
    if stopped is not None:
        kept = _keep(run, hooks, best, start, report, probe)
        raise Interrupted(f"interrupted at step {run.step}; {kept}", _signal_code(stopped))
    if run.metrics.get("skipped"):
        report.say(f"{run.metrics['skipped']:.0f} steps were skipped: their loss or gradient was not finite")
    evaluate(run, hooks, report, best)
    restore(run, best)
    check_changed(run, hooks, start, probe)
    write_results(run, hooks, report, probe)
    hooks.notify(Event("end", run.step, run.metrics), report.say)


def optimizer_steps(run: Run) -> Iterator[tuple[StepBatches, dict[str, int]]]:
    """For each optimizer step: this process's micro-batches, and the counts of units over all processes.

    The next step's batches are collated by a thread beside the step.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="collate") as pool:
        plans = _plans(run)
        upcoming = pool.submit(StepBatches.collate, run, next(plans)[1])
        for epoch, step in _ahead(pool, plans, upcoming, run):
            run.epoch = epoch
            if step.micro_tokens != run.micro_tokens:  # it was collated before memory ran out
                step = StepBatches.collate(run, step.indices)
            counts = {unit: sum(b.counts[unit] for b in step.batches) for unit in ("label", "example", "token")}
            if run.processes > 1:
                total = torch.tensor(list(counts.values()), dtype=torch.int64, device=run.device)
                torch.distributed.all_reduce(total)
                counts = dict(zip(counts, total.tolist(), strict=True))
            yield step, counts


def _ahead(pool: Any, plans: Any, upcoming: Any, run: Run) -> Iterator[tuple[int, StepBatches]]:
    epoch = 0
    for next_epoch, indices in plans:
        step, upcoming = upcoming.result(), pool.submit(StepBatches.collate, run, indices)
        yield epoch, step
        epoch = next_epoch
    yield epoch, upcoming.result()


def _plans(run: Run) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, example indices) of each optimizer step of the run."""
    left, epoch, recipe = run.steps or 0, 0, run.recipe.train
    while left > 0:
        for indices in plan_epoch(run.examples.lengths, run.seed, epoch, recipe.batch_tokens, recipe.batch_examples):
            if left == 0:
                return
            left -= 1
            yield epoch, indices
        epoch += 1


def sum_gradients(run: Run) -> None:
    """Sum the gradients of all processes; adapters are small, so this happens once an optimizer step."""
    if run.processes == 1:
        return
    for parameter in run.trainable:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)


def evaluate(run: Run, hooks: Composition, report: Report, best: Best) -> dict[str, float]:
    """Call the `evaluate` hook and record its metrics; keeps the parameters of the best evaluation."""
    if run.eval_examples is None:
        return {}
    metrics = {k: v for found in hooks.call("evaluate", run=run) for k, v in found.items()}
    report.record("evaluation", run.step, metrics)
    hooks.notify(Event("evaluation", run.step, metrics), report.say)
    run.metrics |= metrics
    value = metrics[run.task.best_metric]
    if run.step == 0 or not run.adapter_final:  # what may still change shape cannot be put back
        return metrics
    if value < best.value:
        best.value, best.step, best.without_gain, best.metrics = value, run.step, 0, metrics
        best.parameters = [p.detach().cpu().clone() for p in run.trainable]
    else:
        best.without_gain += 1
    return metrics


def restore(run: Run, best: Best) -> None:
    """Put the best evaluation's parameters back, where a later one was not the best."""
    if best.step and best.step != run.step:
        with torch.no_grad():
            for parameter, kept in zip(run.trainable, best.parameters, strict=True):
                parameter.copy_(kept)
        run.metrics |= best.metrics  # what is reported is what is written
    run.metrics["best_step"] = best.step or run.step


def _keep(
    run: Run, hooks: Composition, best: Best, start: list[Tensor], report: Report, probe: Any, torn: bool = False
) -> str:
    """Write the best adapter of a run that ends early (the last one if none was evaluated), and say where it is."""
    sound = not torn and all(bool(torch.isfinite(p).all()) for p in run.trainable)
    if run.step == 0 or not (best.step or sound):
        return "no adapter is kept, since none was trained"
    restore(run, best)
    try:
        check_changed(run, hooks, start, probe)
        write_results(run, hooks, Report(quiet=True), probe, finished=False)
    except Exception as error:
        if not isinstance(error, BudwoodError) and not is_out_of_memory(error):
            raise
        return f"no adapter is kept: {error}"
    report.plot(run.directory)
    return f"the adapter of step {run.metrics['best_step']:.0f} is kept in {run.directory / 'adapter'}"


@contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM stop a run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _signal_code(error: BaseException) -> int:
    return 143 if error.args == (signal.SIGTERM,) else 130
