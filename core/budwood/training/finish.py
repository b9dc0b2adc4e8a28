"""The end of a run: check that training changed the model, then write the adapter, plot, manifest and report.html."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from budwood.adapters.golden import measure
from budwood.adapters.manifest import ChatRecord, EvaluationRecord, HeldOutRecord
from budwood.adapters.store import write_adapter
from budwood.adapters.use import use_adapters
from budwood.contract.examples import Example
from budwood.contract.registry import Composition
from budwood.contract.strategy import RUN_ADAPTER
from budwood.contract.types import Run
from budwood.errors import BudwoodError, DivergedError, describe, is_out_of_memory, plural
from budwood.model.experts import trains
from budwood.training.mixture import describe_loads, loads
from budwood.training.outcome import advice
from budwood.training.output import MANIFEST, written_by_strategies
from budwood.training.page import write_page
from budwood.training.progress import Best, Progress, restore
from budwood.training.report import Report, duration, peak_memory
from budwood.training.setup import precision_name, strategies_record
from budwood.untrusted.files import complete_file
from budwood.untrusted.formats import json_numbers

PROBES = 4
PROBE_TOKENS = 64
SHOWN = ("loss", "perplexity", "token_accuracy", "exact_match", "accuracy", "macro_f1")
"""Metrics reported at the end, before and after training, in addition to the run's best metric."""


@dataclass
class Probe:
    """Probe examples from the data, and the base's logits on them: [probes, …] fp32."""

    examples: list[Example]
    base: Tensor


class RunFinalizer:
    """Ends a run. Create it before the first step, since it copies the initial trainable parameters.

    Attributes:
        start: the trainable parameters before the first step, on the CPU.
    """

    def __init__(self, run: Run, hooks: Composition, report: Report) -> None:
        self.run, self.hooks, self.report = run, hooks, report
        self.start = [p.detach().cpu().clone() for p in run.trainable]
        self.probe = adapter_probe(run)

    def complete(self, progress: Progress) -> None:
        """Restore the best parameters, check that they changed, and write adapter, plot and manifest.

        Raises:
            DivergedError: training changed nothing.
        """
        with self.hooks.part("finish"):
            restore(self.run, progress.best)
            self._report_missing_average(progress.best)
            logits = check_changed(self.run, self.start, self.probe)
            write_results(self.run, self.hooks, self.report, self.probe, logits)
        finish_manifest(self.run, self.report, True)

    def _report_missing_average(self, best: Best) -> None:
        """Report that the final parameters are not an average although the run averages."""
        average = self.run.average
        if average is not None and (best.step or self.run.step) < average.start:
            step = f"the best evaluation, of step {best.step}," if best.step else f"the last step, {self.run.step},"
            self.run.say(
                f"note: {step} came before averaging began at step {average.start}: the adapter is that step's"
            )

    def write_best(self, progress: Progress, partial_step: bool = False) -> str:
        """Write the adapter of a run that ends early: the best, or the last without an evaluation.

        Args:
            partial_step: only some parameters have been updated by the current step.

        Returns:
            A clause for the run's last message: where the adapter is, or why there is none.
        """
        run = self.run
        if run.step == 0:
            return "no adapter is kept, since none was trained"
        try:
            with self.hooks.part("finish"):
                reason = self._write(progress.best, partial_step)
            if not reason:
                finish_manifest(run, self.report, False)
        except Exception as error:
            if not isinstance(error, BudwoodError) and not is_out_of_memory(error):
                raise
            reason = str(error)
        if reason:
            return f"no adapter is kept: {reason}"
        self.report.plot(run)
        return f"the adapter of step {run.metrics['best_step']:.0f} is kept in {run.directory / 'adapter'}"

    def _write(self, best: Best, partial_step: bool) -> str:
        """Restore and write the adapter of a run that ends early; return why there is none, or an empty string."""
        run = self.run
        restore(run, best)
        self._report_missing_average(best)
        averaged = run.average is not None and run.average.updates > 0
        if partial_step and not (best.step or averaged):
            return "the step updated only some parameters, and no evaluation came before it"
        if not all(bool(torch.isfinite(p).all()) for p in run.trainable):
            return "the trained parameters are not finite, and no evaluation came before them"
        logits = check_changed(run, self.start, self.probe)
        write_results(run, self.hooks, Report(quiet=True), self.probe, logits, finished=False)
        return ""


def adapter_probe(run: Run) -> Probe | None:
    """Choose a few probes from the data and compute the base's logits on them; None if no strategy owns an adapter."""
    owner = _owner(run)
    if not owner:
        return None
    examples = run.eval_examples if run.eval_examples is not None else run.examples
    chosen = [index * max(len(examples) // PROBES, 1) for index in range(min(PROBES, len(examples)))]
    probes = [run.task.probe(examples[index], PROBE_TOKENS) for index in chosen]
    use_adapters(owner, run.model)
    try:
        return Probe(probes, _measure(run, probes))
    finally:
        use_adapters(owner, run.model, [RUN_ADAPTER])


def _measure(run: Run, probes: list[Example]) -> Tensor:
    return measure(run.task, run.model, run.tokenizer, probes, run.dtype)


def check_changed(run: Run, start: list[Tensor], probe: Probe | None) -> Tensor | None:
    """Check that training changed the model and left its logits finite; returns those on the probes, if there are any.

    Raises:
        DivergedError: no trained tensor moved, the adapter does not change the logits, or its logits are not finite.
    """
    # A tensor that has lost rows counts as changed: `equal` is False if shapes differ.
    moved = sum(not torch.equal(p.detach().cpu(), old) for p, old in zip(run.trainable, start, strict=True))
    if moved == 0 and run.metrics.get("skipped") == run.step:
        half = "take more steps, each of which halves the scale of the loss, or train.precision: bf16 or fp32"
        raise DivergedError(
            f"all {run.step} steps were skipped, since their loss or gradient was not finite: "
            + (half if run.dtype == torch.float16 else "lower train.learning_rate, or look at the rows")
        )
    if moved == 0:
        raise DivergedError(
            f"no trained tensor moved in {plural(run.step, 'step')}: raise train.learning_rate, or check that labels "
            "remain"
        )
    if probe is None:
        return None
    logits = _measure(run, probe.examples)
    if torch.equal(logits, probe.base):
        why = "it trained nothing that the model uses"
        if run.dtype != torch.float32:
            why = (
                f"what it learned is lost in the rounding of {precision_name(run.dtype)}, or {why}: raise "
                "train.learning_rate or train.steps, or set train.precision: fp32"
            )
        raise DivergedError(f"the adapter changes no logit of the base: {why}")
    if probe.base.isfinite().all() and not logits.isfinite().all():
        raise DivergedError("the adapter makes the model's logits NaN or infinite: lower train.learning_rate")
    return logits


def _chat_record(run: Run) -> ChatRecord | None:
    data, date = run.recipe.data, run.examples.date
    if run.tokenizer is None or (data.chat_template is None and not data.template_options and date is None):
        return None
    template = run.tokenizer.chat_template if data.chat_template is not None else None
    return ChatRecord(template=template, options=data.template_options, date=date)


def _held_out_record(run: Run) -> HeldOutRecord | None:
    if run.eval_examples is None:
        return None
    data = run.recipe.to_dict()["data"]
    return HeldOutRecord(
        data=data["train" if run.held_out else "eval"],
        sha256=run.eval_examples.sha256,
        rows=run.held_out or None,
        skip_bad_rows=data["on_bad_row"] == "skip",
    )


def write_results(
    run: Run, hooks: Composition, report: Report, probe: Probe | None, logits: Tensor | None, finished: bool = True
) -> None:
    """Write the adapter (complete or absent) and the plot, and report where they are.

    Args:
        logits: those of the trained model on the probes, from `check_changed`; None: without probes.
    """
    owner = _owner(run)
    if not run.world.first:
        return
    directory = run.directory
    if owner and probe is not None and logits is not None:
        write_adapter(
            directory / "adapter",
            lambda folder: hooks.call("export", run=run, model=run.model, directory=folder),
            adapter_type=owner.name,
            distribution=owner.distribution,
            base=run.base,
            task=run.task.name,
            task_options=run.task.options.model_dump(mode="json", exclude_none=True),
            labels=run.examples.labels,
            tokenizer=run.tokenizer,
            metrics=run.metrics,
            evaluation=EvaluationRecord(
                max_length=run.examples.max_length,
                tokens=run.eval_tokens,
                packed=run.packed,
                attention=str(run.model.config._attn_implementation),
                generate=run.recipe.train.eval_generate,
                loss_on=run.recipe.data.loss_on,
                as_chat=run.recipe.data.as_chat,
                held_out=_held_out_record(run),
            ),
            chat=_chat_record(run),
            on_messages=run.examples.rendered if run.model.can_generate() else None,
            needs_quantization=not run.starts_as_base,
            parent=run.start_adapter.hashes if run.start_adapter is not None else None,
            grown_from=run.grown_from,
            strategies=strategies_record(run.strategies),
            stop_ids=run.examples.stop_ids,
            probes=probe.examples,
            base_logits=list(probe.base),
            adapter_logits=list(logits),
            needs=sum(p.numel() * p.element_size() for p in run.trainable) + 2 * probe.base.nbytes + (1 << 20),
        )
    report.stop()
    report.plot(run)
    seconds = report.seconds
    shown = [f"eval_{name}" for name in SHOWN]
    for name in dict.fromkeys([*shown, *([run.best_metric.name] if run.best_metric else [])]):
        if name in run.metrics and name in run.before:
            label = name.removeprefix("eval_").replace("_", " ")
            report.say(f"{label}: {run.before[name]:.4f} before, {run.metrics[name]:.4f} after")
    memory = peak_memory() / 2**30
    report.say(f"{duration(seconds)} · {report.tokens_per_second:,.0f} tokens/s · peak memory {memory:.2f} GiB")
    if run.planned:
        report.say(_compare(run))
    if shares := loads(run):
        report.say(describe_loads(shares, {path for path in shares if trains(run.model, path)}))
    report.say(
        f"adapter: {directory / 'adapter'} · log: {directory / 'metrics.jsonl'} · report: {directory / 'report.html'}"
    )
    name = directory.name if re.fullmatch(r"[\w-]+", directory.name, re.ASCII) else "adapter"
    if run.model.can_generate():
        adapter = f"--adapter {name}={directory / 'adapter'}"
        chat = "--chat " if run.examples.rendered else ""
        report.say(f"next: budwood generate {run.recipe.base.model} {adapter} {chat}--prompt '…'")
    if finished and (text := advice(run, directory / "metrics.jsonl")):
        report.say(text)


def _compare(run: Run) -> str:
    """Return a line with the planned and the actual peak memory and time; `run.planned` is not empty."""
    cuda = run.device.type == "cuda"
    memory, seconds = run.planned["memory"], run.planned["time"]["training_seconds"]
    context = memory["parts"].get("CUDA's context", 0)  # torch does not count it
    peak = memory["peak_bytes"] - context if cuda else run.planned["host"]["peak_bytes"]
    spent = sum(cost.seconds for cost in run.hooks.costs if (cost.owner, cost.hook) == ("core", "steps"))
    span = "" if seconds is None else f"; steps {seconds[0]:,.0f} to {seconds[1]:,.0f} s planned, {spent:,.0f} s taken"
    return f"plan and run: peak memory {peak / 2**30:.2f} GiB planned, {peak_memory() / 2**30:.2f} GiB taken{span}"


def finish_manifest(run: Run, report: Report, finished: bool) -> None:
    """Write the metrics and times of a run to its manifest, and its report.html; the other processes wait for it."""
    if not run.world.first:
        run.world.barrier()
        return
    path, seconds = run.directory / MANIFEST, report.seconds
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest |= {
        "finished": finished,
        "step": run.step,
        "before": json_numbers(run.before),
        "metrics": json_numbers(run.metrics),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(report.tokens_per_second, 1),
        "peak_memory_bytes": peak_memory(),
        **({"planned": run.planned} if run.planned else {}),
        **({"experts": shares} if (shares := loads(run)) else {}),
        "hooks": [cost.record(run.hooks.measures_memory) for cost in run.hooks.costs],
        "lost": report.lost,
        "files": written_by_strategies(path.parent),
    }
    complete_file(path, (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode())
    try:
        write_page(run.directory)
    except Exception as error:  # the run is complete without it
        report.say(f"warning: report.html was not written: {describe(error)}")
    run.world.barrier()


def _owner(run: Run) -> Any:
    """Return the strategy that owns the adapter, or None."""
    return next((s for s in run.strategies if "adapter" in s.slots), None)
