"""Checks everything before a run: composition, data, memory, time, disk, versions. Trains nothing, loads no weights."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from budwood.adapters.store import template_hash, tokenizer_hash
from budwood.contract.types import Run
from budwood.data.build import overlap
from budwood.data.examples import Examples
from budwood.errors import BudwoodError, CorruptError, InputError, ResourceError, plural
from budwood.model.base import check_base, pick_device_precision
from budwood.model.checkpoint import one_revision
from budwood.planning.admission import HALVED, available, estimate_here, fits_halved
from budwood.planning.composition import plan, show
from budwood.planning.early import Problems
from budwood.planning.estimate import Estimate, gib, refusal
from budwood.planning.table import span
from budwood.recipe.data import recipe_task
from budwood.recipe.device import check_device
from budwood.recipe.schema import Recipe, build_composition
from budwood.training.durability.changes import pinned_versions, version
from budwood.training.output import check_output
from budwood.training.report import Report
from budwood.training.run_data import read_data
from budwood.training.setup import check_trackers, make_accelerator, plan_run, precision_name
from budwood.untrusted.chat_template import today
from budwood.untrusted.redaction import redact, redact_values

OK, NOTE, NO = "ok", "note", "no"


@dataclass
class Check:
    """The result of `check`: rows of (part, verdict, text), all problems, and the values behind them."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)
    values: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as `budwood check --json` prints them."""
        rows = [{"part": part, "verdict": verdict, "text": text} for part, verdict, text in self.rows]
        result = {"go": not self.problems.texts, "problems": self.problems.texts, "checks": rows, **self.values}
        return redact_values(result)

    def fail(self, part: str, error: BudwoodError) -> None:
        """Add what makes the run impossible."""
        self.problems.add(error)
        self.rows.append((part, NO, str(error)))


def check(recipe: Recipe, overwrite: bool = False, resume: bool = False) -> Check:
    """Check a recipe on this machine, as far as it goes: what one part lacks does not hide the others.

    Args:
        overwrite, resume: as for `tune`.
    """
    result = Check()
    with one_revision(recipe.base.model, recipe.base.revision):
        _composition(recipe, result)
        try:
            check_output(recipe.output, overwrite, resume)
        except BudwoodError as error:
            result.fail("output", error)
        try:
            device, dtype, reason = pick_device_precision(recipe.base.device, recipe.train.precision)
            if not result.problems.texts:  # else the base may have been refused
                check_base(recipe.base.model, recipe.base.quantization, recipe.base.trust_remote_code, device)
            check_trackers(recipe.train.trackers)
            check_device(recipe, device.type)
            result.rows.append(("device", OK, f"{device}, {precision_name(dtype)} ({reason})"))
        except BudwoodError as error:
            result.fail("device", error)
        if not any(part in ("composition", "device") and verdict == NO for part, verdict, _ in result.rows):
            run = _run(recipe, device, dtype)
            if _data(run, result):
                _resources(run, result)
    versions = {"budwood": version("budwood"), **pinned_versions()}
    result.values["versions"] = versions
    result.rows.append(("versions", OK, ", ".join(f"{name} {version}" for name, version in versions.items())))
    return result


def _composition(recipe: Recipe, result: Check) -> None:
    made = plan(recipe)
    names = ", ".join(f"{part.name} ({part.distribution} {part.version})" for part in made.parts)
    result.values["strategies"] = [vars(part) for part in made.parts]
    for text, code in zip(made.problems, made.problem_codes, strict=True):
        error = next((kind for kind in (InputError, CorruptError) if kind.exit_code == code), ResourceError)
        result.fail("composition", error(text))
    if not made.problems:
        result.rows.append(("composition", OK, f"{names} on {recipe.base.model}, {recipe.base.task}"))
    result.values["tokenizer_sha256"] = tokenizer_hash(made.tokenizer)
    if made.tokenizer is not None:
        result.rows.append(("tokenizer", OK, f"SHA-256 {result.values['tokenizer_sha256'][:16]}"))


def _run(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Run:
    hooks = build_composition(recipe)
    return Run(
        recipe, recipe.output, device, dtype, hooks.strategies, hooks, recipe_task(recipe), seed=recipe.train.seed,
        accelerator=make_accelerator(device), planning=True, say=lambda text: None,
    )  # fmt: skip


def _data(run: Run, result: Check) -> bool:
    """Read the data as the run does, and report what of it has no effect; returns whether it can be used."""
    lines: list[str] = []
    report = Report(quiet=True)
    report.say = run.say = lines.append  # type: ignore[method-assign, assignment]
    try:
        read_data(run, run.hooks, report, today(), plan_run(run, run.hooks).model)
    except BudwoodError as error:
        result.fail("data", error)
        return False
    template = template_hash(run.tokenizer)
    result.values["template_sha256"] = template
    if template:
        used = "" if run.examples.rendered else ", not used by this data"
        result.rows.append(("chat template", OK, f"SHA-256 {template[:16]}{used}"))
    result.values["data"] = {}
    for part, examples in (("train", run.examples), ("eval", run.eval_examples)):
        if examples is not None:
            _examples(part, examples, run, result)
    for line in lines:
        if line.startswith(("note:", "warning:")):
            result.rows.append(("data", NOTE, line.partition(": ")[2]))
    result.values["notes"] = lines
    return True


def _examples(part: str, examples: Examples, run: Run, result: Check) -> None:
    stats = examples.stats
    shared = overlap(run.examples, examples) if part == "eval" else 0
    values = {
        "path": str(examples.path), "sha256": examples.sha256, "rows": stats.rows, "examples": len(examples),
        "tokens": int(examples.lengths.sum()), "longest": int(examples.lengths.max(initial=0)),
        "truncated": stats.truncated, "tokens_cut": stats.tokens_cut, "supervised_share": stats.supervised_share,
        "dropped": stats.dropped, "bad_rows": stats.skipped, "overlap": shared, "max_length": examples.max_length,
    }  # fmt: skip
    result.values["data"][part] = values
    tokens = plural(int(examples.lengths.sum()), "token")
    text = f"{plural(len(examples), 'example')}, {tokens}, the longest {values['longest']:,}"
    if not examples.labels and not run.hooks.implements("next_examples"):
        text += f"; {stats.supervised_share:.0%} with a loss"
    result.rows.append((f"data, {part}", OK, f"{text}; {examples.path}"))
    if stats.truncated:
        share = stats.truncated / max(stats.examples, 1)
        lost = f"{stats.truncated:,} examples ({share:.0%}) lose {stats.tokens_cut:,} tokens"
        result.rows.append((f"data, {part}", NOTE, f"{lost} at data.max_length {examples.max_length}"))
    for word, counts, first in (
        ("dropped", stats.dropped, stats.first_dropped), ("bad, skipped", stats.skipped, stats.first_skipped),
    ):  # fmt: skip
        for reason, count in counts.items():
            text = f"{plural(count, 'row')} {word}: {reason} (first {first[reason]})"
            result.rows.append((f"data, {part}", NOTE, text))


def _resources(run: Run, result: Check) -> None:
    """Check memory, time and disk with an estimate."""
    try:
        estimate = estimate_here(run, available(run))
    except BudwoodError as error:
        result.rows.append(("memory", NOTE, f"not planned: {error}"))
        return
    result.values["plan"] = estimate.as_dict()
    device = estimate.device
    if not estimate.fits and fits_halved(run, estimate):
        result.rows.append(("memory", NOTE, HALVED))
    elif estimate.fits:
        text = f"{gib(estimate.needed)} of {gib(device.memory)}, peak in {estimate.where}; micro-batches of at most "
        result.rows.append(("memory", OK, f"{text}{estimate.micro_tokens:,} tokens"))
    else:
        result.fail("memory", ResourceError(refusal(estimate, run.recipe)))
    result.rows.append(("time", OK if estimate.seconds else NOTE, _time(estimate)))
    _disk(run.directory, estimate, result)


def _time(estimate: Estimate) -> str:
    steps = plural(estimate.steps, "step") if estimate.steps is not None else "steps unknown"
    if estimate.seconds is None:
        return f"{steps}; the time on {estimate.device.name} is not known"
    return f"{steps}, {span(estimate.seconds[0])} to {span(estimate.seconds[1])}"


def _disk(directory: Path, estimate: Estimate, result: Check) -> None:
    folder = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    result.values["disk"] = {"bytes": estimate.disk, "free_bytes": free, "download_bytes": estimate.download}
    text = f"{estimate.disk / 1e6:,.1f} MB for checkpoints and the adapter, {free / 1e9:,.1f} GB free"
    if estimate.download:
        text += f"; {estimate.download / 1e9:,.1f} GB to download"
    if estimate.disk > free:
        remedy = "make room, lower train.keep_checkpoints, or name another folder"
        result.fail("disk", ResourceError(f"output: {directory} needs {text}: {remedy}."))
    else:
        result.rows.append(("disk", OK, text))


def show_check(result: Check, console: Console) -> None:
    """Print the table and the verdict."""
    table = Table.grid(padding=(0, 2))
    styles = {OK: "green", NOTE: "yellow", NO: "bold red"}
    for part, verdict, text in result.rows:
        clean = "".join(c if c.isprintable() else "?" for c in redact(" ".join(text.split())))
        table.add_row(Text(part), Text(verdict, styles[verdict]), Text(clean))
    count = len(result.problems.texts)
    counted = plural(count, "problem") if count else ""
    table.add_row(Text("verdict", "bold"), Text("no" if count else "go", styles[NO if count else OK]), Text(counted))
    show(table, console)
