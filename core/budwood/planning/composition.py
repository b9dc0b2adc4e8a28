"""Plans a recipe before it runs: its strategies, the order of calls of every hook, and every problem.

Reads the base's configuration and tokenizer, but no weights and no data; `estimate` adds memory and time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from budwood.contract.discovery import find
from budwood.contract.hookspecs import HookSpecs
from budwood.contract.loading import HOOKS
from budwood.contract.registry import Composition
from budwood.contract.strategy import Strategy
from budwood.contract.types import Plan, Run
from budwood.data.sources import label
from budwood.errors import BudwoodError, InputError, plural
from budwood.model.base import check_base, load_tokenizer, pick_device_precision, skeleton
from budwood.model.checkpoint import one_revision
from budwood.model.embeddings import resize, resize_note
from budwood.model.quiet import silence_libraries
from budwood.model.task import Task
from budwood.planning.early import Part, Problems, compose, read
from budwood.planning.estimate import Estimate
from budwood.recipe.continued import read_start
from budwood.recipe.data import check_quantized, embeddings_wanted, read_task_base, recipe_task
from budwood.recipe.file import UNKNOWN
from budwood.recipe.schema import QUANTIZERS, TASKS, Recipe
from budwood.training.output import check_output
from budwood.training.setup import check_plan, check_trackers, precision_name, register_parts, register_task
from budwood.training.step import Engine
from budwood.untrusted.redaction import redact, redact_values


@dataclass(frozen=True)
class Call:
    """One callee of a hook: kind "strategy", "task", "quantizer" or "core".

    `wraps` names the callees inside it, in order; `replaced` marks core's implementation if a strategy replaces it.
    """

    name: str
    kind: str
    distribution: str
    wraps: list[str]
    replaced: bool = False


@dataclass
class RunPlan(Plan):
    """The result of `plan`: a `Plan` with one `Part` per strategy and, for every hook, its calls in order."""

    parts: list[Part] = field(default_factory=list)
    hooks: dict[str, list[Call]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Remarks about this machine that are not problems."""
    estimate: Estimate | None = None
    """Memory, time and disk, if they were estimated."""
    problem_codes: list[int] = field(default_factory=list)
    """The exit code of each problem."""
    exit_code: int = 0
    """The command's exit code: 0 without problems, that of an `InputError` if one is among them, else the highest."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as `budwood plan --json` prints them; `steps` is None if it depends on the data."""
        recipe: Recipe | None = self.recipe
        values: dict[str, Any] = {
            "recipe": recipe.to_dict() if recipe else None,
            "steps": self.steps,
            "strategies": [vars(part) for part in self.parts],
            "hooks": [
                {
                    "name": hook,
                    "how": getattr(HookSpecs, hook).call_style,
                    "wrappable": getattr(HookSpecs, hook).wrappable,
                    "calls": [vars(call) for call in calls],
                }
                for hook, calls in self.hooks.items()
            ],
            "notes": self.notes,
            "problems": self.problems,
            **(self.estimate.as_dict() | {"notes": [*self.notes, *self.estimate.notes]} if self.estimate else {}),
        }
        return redact_values(values)


def plan(
    recipe: Recipe | str | Path, overrides: Sequence[str] = (), allow_code: bool = False, without_data: bool = False
) -> RunPlan:
    """Compose a recipe; the result's `problems` lists everything for which `tune` would refuse it.

    Args:
        recipe: a `Recipe`, or its path.
        overrides: KEY=VALUE, applied to the recipe at a path.
        allow_code: run Python files that the recipe names; otherwise they are a problem.
        without_data: the data's files need not exist.

    Raises:
        InputError: the file is not a recipe.
    """
    silence_libraries()
    problems = Problems()
    loaded: Recipe | None = recipe if isinstance(recipe, Recipe) else read(recipe, problems, overrides, without_data)
    if loaded is None:
        return _attach(problems, RunPlan(None, []))  # type: ignore[arg-type]  # the recipe cannot be read
    loaded = loaded.allowing_code(allow_code)
    with one_revision(loaded.base.model, loaded.base.revision):
        return _plan(loaded, problems)


def _plan(loaded: Recipe, problems: Problems) -> RunPlan:
    """See `plan`; `problems` already holds those of the file."""
    strategies, parts, hooks = compose(loaded, problems)
    complete = UNKNOWN not in (part.version for part in parts)
    valid = [s for s, part in zip(strategies, parts, strict=True) if part.sound]
    order = {id(strategy): index for index, strategy in enumerate(hooks.strategies)}
    by_order = sorted(zip(strategies, parts, strict=True), key=lambda pair: order[id(pair[0])])
    run_plan = RunPlan(loaded, hooks.strategies, loaded.train.steps, parts=[part for _, part in by_order])
    run_plan.task = problems.attempt(lambda: recipe_task(loaded))
    run_plan.start_adapter = problems.attempt(lambda: read_start(loaded))
    _inspect_base(loaded, run_plan, problems)
    _inspect_machine(loaded, run_plan, problems)
    ready = complete and len(valid) == len(strategies) and run_plan.model is not None and run_plan.tokenizer is not None
    alone: list[tuple[Any, Composition]] = [(strategy, Composition([strategy], [])) for strategy in valid]
    if run_plan.task is not None:
        alone.append((run_plan.task, Composition([])))
        register_task(alone[-1][1], run_plan.task)
    for plugin, part in alone if loaded.base.model != UNKNOWN and run_plan.task is not None else ():
        try:
            check_plan(run_plan, part)
        except BudwoodError as error:
            if ready or isinstance(error, InputError):
                problems.add(error)
            else:  # probably caused by another problem
                run_plan.notes.append(f"{plugin} could not check the plan: fix the other problems first")
    run_plan.hooks = _resolve(loaded, run_plan.task or _bare_task(loaded.base.task), hooks)
    return _attach(problems, run_plan)


def _attach(problems: Problems, run_plan: RunPlan) -> RunPlan:
    run_plan.problems, run_plan.problem_codes = problems.texts, problems.codes
    run_plan.exit_code = problems.exit_code
    return run_plan


def _bare_task(name: str) -> Task:
    """Return a bare task in place of one that cannot be loaded."""
    task = Task()
    task.name = name  # type: ignore[misc]  # on the instance
    return task


def _inspect_base(recipe: Recipe, run_plan: RunPlan, problems: Problems) -> None:
    base = recipe.base
    if base.model == UNKNOWN:
        return
    problems.attempt(lambda: check_base(base.model, base.quantization, base.trust_remote_code))
    if run_plan.task is None or run_plan.task.needs_tokenizer:
        run_plan.tokenizer = problems.attempt(lambda: load_tokenizer(base.model))
    if run_plan.task is not None:
        task, tokenizer = run_plan.task, run_plan.tokenizer
        problems.attempt(lambda: read_task_base(task, recipe))
        run_plan.model = problems.attempt(lambda: skeleton(base.model, task.auto_class, base.trust_remote_code))
        if run_plan.model is not None:
            problems.attempt(lambda: check_quantized(run_plan.model, recipe))
        if base.resize_embeddings and run_plan.model is not None and (tokenizer or not task.needs_tokenizer):
            added = problems.attempt(lambda: resize(run_plan.model, embeddings_wanted(recipe, tokenizer), base.model))
            if added is not None:
                run_plan.notes.append(resize_note(added.start, added.stop))


def _inspect_machine(recipe: Recipe, run_plan: RunPlan, problems: Problems) -> None:
    """Check the recipe against this machine. It may be meant for another, so only a bad output folder is a problem."""
    notes, base = run_plan.notes, recipe.base
    problems.attempt(lambda: check_output(recipe.output, overwrite=True))
    if (recipe.output / "manifest.json").is_file():
        notes.append(f"output: {recipe.output} holds another run")
    try:
        device, dtype, reason = pick_device_precision(recipe.base.device, recipe.train.precision)
        notes.append(f"on this machine: {device}, {precision_name(dtype)} ({reason})")
        if run_plan.model is not None:  # else the base has been refused
            check_base(base.model, base.quantization, base.trust_remote_code, device)
    except BudwoodError as error:
        notes.append(f"not on this machine: {error}")
    try:
        check_trackers(recipe.train.trackers)
    except BudwoodError as error:
        notes.append(f"not on this machine: {error}")


def _resolve(recipe: Recipe, task: Task, hooks: Composition) -> dict[str, list[Call]]:
    """Return, for every hook, its callees in order, including core and the task."""
    run = Run(recipe, recipe.output, torch.device("cpu"), torch.float32, hooks.strategies, hooks, task, planning=True)
    register_task(hooks, task)
    register_parts(hooks, Engine(run, hooks))
    calls: dict[str, list[Call]] = {}
    for hook in HOOKS:
        names = [_describe(call.plugin, recipe) for call in hooks.calls(hook)]
        inside = [[name for name, _, _ in names[index + 1 :]] for index in range(len(names))]
        calls[hook] = [
            Call(*name, wraps=rest if call.wraps else [], replaced=_is_replaced(hook, index))
            for index, (name, rest, call) in enumerate(zip(names, inside, hooks.calls(hook), strict=True))
        ]
    if not calls["load_base"]:
        quantizer = recipe.base.quantization
        owner = _owner(quantizer, QUANTIZERS)
        calls["load_base"] = [Call(quantizer, "quantizer", owner, [])]
    return calls


def _is_replaced(hook: str, index: int) -> bool:
    return bool(getattr(HookSpecs, hook).call_style == "exclusive" and index)


def _describe(plugin: Any, recipe: Recipe) -> tuple[str, str, str]:
    """Return name, kind and distribution of a hook's callee."""
    if isinstance(plugin, Strategy):
        return plugin.name, "strategy", plugin.distribution or UNKNOWN
    if isinstance(plugin, Task):
        return plugin.name, "task", _owner(recipe.base.task, TASKS)
    return "core", "core", _owner("none", QUANTIZERS)


def _owner(name: str, group: str) -> str:
    try:
        return find(name, group).owner
    except BudwoodError:
        return UNKNOWN


def show_plan(run_plan: RunPlan, console: Console) -> None:
    """Print the plan as tables; without a terminal, as plain columns with one line per row."""
    recipe: Recipe | None = run_plan.recipe
    if recipe is None:
        return
    summary = Table.grid(padding=(0, 2))
    base, data, train = recipe.base, recipe.data, recipe.train
    steps = (
        f"{run_plan.steps:,}"
        if run_plan.steps is not None
        else f"unknown until the data is read ({plural(train.epochs, 'epoch') if train.epochs else 'chosen from it'})"
    )
    evaluation = f"evaluated on {label(data.evaluated)}" if data.evaluated is not None else "not evaluated"
    evaluation = "evaluated on a held-out part" if data.holds_out else evaluation
    rows = [
        ("base", f"{base.model} · {base.quantization} · {base.task}"),
        *([("adapter", f"{recipe.adapter} (continued)")] if recipe.adapter is not None else []),
        ("data", f"{label(data.train)} · {evaluation}"),
        ("steps", steps + ("" if run_plan.steps else "; `budwood tune` checks the plan again then")),
        ("output", str(recipe.output)),
    ]
    for key, value in (*rows, *(("note", note) for note in run_plan.notes)):
        summary.add_row(_text(key), _text(value))
    strategies = _table("strategy", "distribution", "declares", "options")
    for part in run_plan.parts:
        declared = "; ".join(f"{key} {', '.join(names)}" for key, names in part.declared.items() if names)
        options = ", ".join(f"{key} {json.dumps(value)}" for key, value in part.options.items() if value is not None)
        suffix = "" if part.sound else " (with problems)"
        row = (part.name + suffix, f"{part.distribution} {part.version}", declared or "–", options or "–")
        strategies.add_row(*map(_text, row))
    hooks = _table("hook", "called", "order")
    for hook, calls in run_plan.hooks.items():
        spec = getattr(HookSpecs, hook)
        how = spec.call_style + (", wrappable" if spec.wrappable and spec.call_style != "core" else "")
        hooks.add_row(*map(_text, (hook, how, describe_order(calls))))
    everything = Group(summary, Text(), strategies, Text(), hooks)
    show(everything, console)


def show(content: Any, console: Console) -> None:
    """Print tables; without a terminal, as plain columns with one line per row."""
    if console.is_terminal:
        console.print(content)
        return
    wide = Console(width=10_000, color_system=None, force_terminal=False)
    with wide.capture() as captured:
        wide.print(content)
    for line in captured.get().splitlines():
        console.print(Text(line.rstrip()), soft_wrap=True)


def describe_order(calls: Sequence[Call]) -> str:
    """Return the order on one line: `a wraps b wraps (c → task causal-lm)`."""
    names = [f"{call.kind} {call.name}" if call.kind in ("task", "quantizer") else call.name for call in calls]
    around = sum(bool(call.wraps) for call in calls)
    inner = [name + (" (replaced)" if call.replaced else "") for name, call in zip(names, calls, strict=True)][around:]
    within = " → ".join(inner)
    within = f"({within})" if around and len(inner) > 1 else within
    return " wraps ".join([*names[:around], within]) if calls else "–"


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _text(value: str) -> Text:
    return Text("".join(c if c.isprintable() else "?" for c in redact(value)))
