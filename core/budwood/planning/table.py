"""Prints an estimate as a table."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from budwood.errors import plural
from budwood.planning.composition import show
from budwood.planning.estimate import Estimate, advice, gib


def operations(flops: float) -> str:
    """Return floating-point operations with a unit."""
    return f"{flops / 1e12:,.2f} TFLOP" if flops > 1e11 else f"{flops / 1e9:,.2f} GFLOP"


def show_estimate(result: Estimate, recipe: Any, console: Console, advised: bool = True) -> None:
    """Print what a recipe needs: memory by part, time, disk, and whether it fits.

    Args:
        advised: also say what to change if it does not fit; a search for settings that fit has better advice.
    """
    device, step = result.device, result
    rows = [("memory", f"{gib(result.peak)} at the peak, in {result.where}")]
    rows += [("", f"{gib(size):>11}  {part}") for part, size in result.parts.items() if size > 50_000]
    if result.kept:
        rows.append(("", f"{gib(result.kept)} more for weights that stay dequantised, since the memory is free"))
    if result.largest[0]:
        rows.append(("", f"largest temporary tensor: {gib(result.largest[0])} ({result.largest[1]})"))
    if result.kv_cache and "KV cache" not in result.parts:
        rows.append(("", f"generation of answers needs {gib(result.kv_cache)} of keys and values, outside of the step"))
    count = f"{step.micro_batches:.1f} micro-batches, the largest of {step.largest_micro:,} tokens"
    if recipe.train.micro_tokens is None:
        count += f" (train.micro_tokens: auto, {step.micro_tokens:,})"
    work = f"{operations(step.flops)}, {step.moved / 1e9:,.1f} GB moved, {step.operations:,.0f} operations"
    rows.append(("step", f"{step.tokens:,.0f} tokens in {count}; {work}"))
    if step.recomputed:
        text = f"{step.recomputed} of {step.layers} layers recompute their activations"
        text += " (train.gradient_checkpointing: auto)" if recipe.train.gradient_checkpointing == "auto" else ""
        text += f"; {gib(step.offloaded)} of their inputs on the host" if step.offloaded else ""
        rows.append(("", text))
    rows += [("processes" if not index else "", text) for index, text in enumerate(_exchange(result))]
    rows.append(("time", _time(result)))
    download = f"; download {result.download / 1e9:,.1f} GB" if result.download else ""
    rows.append(("disk", f"{result.disk / 1e6:,.1f} MB for checkpoints and the adapter{download}"))
    rows.append(("host", f"{gib(result.host)} of memory, {gib(result.loading)} of it while the base loads"))
    verdict = f"fits: {gib(result.needed)} of {gib(device.memory)}"
    if not result.fits:
        change = f"; {advice(result, recipe)}" if advised else ""
        verdict = f"does not fit: {gib(result.needed)} of {gib(device.memory)}{change}"
    rows.append(("device", f"{device.name}{f' ({device.source})' if device.source else ''}: {verdict}"))
    rows += [("note", note) for note in result.notes]
    table = Table.grid(padding=(0, 2))
    for key, value in rows:
        table.add_row(Text(key), Text(value))
    show(Group(Text(), table), console)


def _exchange(result: Estimate) -> list[str]:
    """Return lines on what several processes hold and exchange; none if the run is one process."""
    found = result.exchange
    if found is None:
        return []
    reason = "" if not found.chosen else ", since it fits" if found.parallel == "replicate" else ", to fit"
    if found.chosen and found.parallel == "replicate" and not result.fits:
        reason = ", since the base cannot be sharded"
    lines = [f"{found.processes}, train.parallel: {found.parallel}{reason}; all figures here are of one of them"]
    if found.parallel == "shard":
        lines.append(
            f"base: {gib(found.share)} of layers, its share; {gib(found.replicated)} of embeddings, head and vectors on"
            f" every process; {gib(found.gathered)} of complete layers while it computes"
        )
    else:
        lines.append(f"base: {gib(found.replicated)}, all of it on every process")
    lines.append(f"adapters, gradients and optimizer: {gib(found.trained)} on every process")
    sent = f"{found.reduced / 1e6:,.1f} MB each way for the gradients, in one all-reduce"
    if found.gathers:
        sent += f"; {found.received / 1e6:,.1f} MB of layers in {found.gathers:,.0f} all-gathers"
    if found.link is None or found.seconds is None:
        lines.append(f"traffic a step: {sent}; its time is not counted: give --link")
    else:
        took = f"{_range(found.seconds)} at {found.link / 1e9:,.1f} GB/s"
        lines.append(f"traffic a step: {sent}; {took}")
    return lines


def _time(result: Estimate) -> str:
    if result.steps is None:
        return "unknown without data: the recipe counts epochs"
    if result.seconds is None:
        return f"unknown for {result.device.name}: name a card of the table to estimate it"
    assert result.training is not None
    low, high = result.training
    slow, fast = (result.tokens * result.steps / seconds for seconds in (high, low))
    text = f"{_range(result.seconds)}: {plural(result.steps, 'step')} {_range(result.training)}"
    text += f", {slow:,.0f} to {fast:,.0f} tokens/s"
    if result.evaluations and result.evaluation is not None:
        text += f"; {plural(result.evaluations, 'evaluation')} {_range(result.evaluation)}"
    if result.generation is not None and result.generation[1]:
        text += f"; generation of answers {_range(result.generation)}"
    return text


def _range(seconds: tuple[float, float]) -> str:
    return f"{span(seconds[0])} to {span(seconds[1])}"


def span(seconds: float) -> str:
    """Return a duration as an estimate is read: "3.1 ms", "12.3 s", "8 min", "2.4 h"."""
    if 0 < seconds < 0.05:
        return f"{1e3 * seconds:.1f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
