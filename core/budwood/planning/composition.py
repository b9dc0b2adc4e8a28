"""A recipe before it runs: which strategies, who is called in which order, and all that stands against it.

Reads the base's configuration and tokenizer, no weights and no data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from budwood.contract.discovery import find
from budwood.contract.hookspecs import HookSpecs
from budwood.contract.loading import HOOKS, build_strategy, create, load_strategy
from budwood.contract.registry import Composition
from budwood.contract.strategy import Strategy
from budwood.contract.types import Plan, Run
from budwood.errors import BudwoodError, InputError
from budwood.model.base import check_base, load_tokenizer, pick_device_precision, skeleton
from budwood.model.checkpoint import one_revision
from budwood.model.quiet import hush
from budwood.model.task import Task
from budwood.recipe.file import UNKNOWN
from budwood.recipe.schema import QUANTIZERS, TASKS, Choice, Recipe, read_recipe
from budwood.training.parameters import NOTHING_TRAINS
from budwood.training.preflight import check_output
from budwood.training.setup import check_plan, check_trackers, precision_name, register_parts
from budwood.training.step import Engine
from budwood.untrusted.redaction import redact, redact_values

DECLARED = ("slots", "provides", "requires", "conflicts", "before", "after")


@dataclass(frozen=True)
class Part:
    """A strategy of the recipe: whose it is, what it declares, and its options (as written, where they are wrong)."""

    name: str
    distribution: str
    version: str
    api: int
    declared: dict[str, list[str]]
    options: dict[str, Any]
    sound: bool


@dataclass(frozen=True)
class Call:
    """One that a hook calls: kind "strategy", "task", "quantizer" or "core".

    `wraps` names those inside of it, in order; `replaced` is core, where a strategy stands in its place.
    """

    name: str
    kind: str
    distribution: str
    wraps: list[str]
    replaced: bool = False


@dataclass
class RunPlan(Plan):
    """What `plan` returns: a `Plan` with the strategies' parts and, for every hook, who is called in which order."""

    parts: list[Part] = field(default_factory=list)
    hooks: dict[str, list[Call]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What does not stand against the plan, and is worth knowing on this machine."""
    exit_code: int = 0
    """What the command ends with: that of an `InputError`, if there is one among the problems; 0 without problems."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `budwood plan --json` prints them; `steps` is None where only the data tells."""
        recipe: Recipe | None = self.recipe
        values: dict[str, Any] = {
            "recipe": recipe.to_dict() if recipe else None,
            "steps": self.steps,
            "strategies": [vars(part) for part in self.parts],
            "hooks": [
                {
                    "name": hook,
                    "how": getattr(HookSpecs, hook).how,
                    "wrappable": getattr(HookSpecs, hook).wrappable,
                    "calls": [vars(call) for call in calls],
                }
                for hook, calls in self.hooks.items()
            ],
            "notes": self.notes,
            "problems": self.problems,
        }
        return redact_values(values)


def plan(recipe: Recipe | str | Path, overrides: Sequence[str] = ()) -> RunPlan:
    """Compose a recipe and find all that stands against it: `problems` of what is returned, which `tune` would refuse.

    Args:
        recipe: a `Recipe`, or the path of one.
        overrides: KEY=VALUE, on top of a path's.

    Raises:
        InputError: the file is no recipe at all.
    """
    hush()
    problems = _Problems()
    loaded: Recipe | None
    if isinstance(recipe, Recipe):
        loaded = recipe
    else:
        loaded, wrong = read_recipe(recipe, overrides)
        problems.texts += wrong
        problems.codes += [InputError.exit_code] * len(wrong)
    if loaded is None:
        return problems.on(RunPlan(None, []))  # type: ignore[arg-type]  # it cannot be read
    with one_revision(loaded.base.model, loaded.base.revision):
        return _plan(loaded, problems)


def _plan(loaded: Recipe, problems: _Problems) -> RunPlan:
    """See `plan`; `problems` holds those of the file."""
    strategies, parts = _build(loaded, problems)
    whole = UNKNOWN not in (part.version for part in parts)
    sound = [s for s, part in zip(strategies, parts, strict=True) if part.sound]
    clashes: list[str] = []
    hooks = Composition(strategies, clashes, complete=whole)
    for text in clashes:
        problems.add(InputError(text))
    if whole and not hooks.implements("trainable_parameters"):
        problems.add(InputError(NOTHING_TRAINS))
    order = {id(strategy): index for index, strategy in enumerate(hooks.strategies)}
    by_order = sorted(zip(strategies, parts, strict=True), key=lambda pair: order[id(pair[0])])
    made = RunPlan(loaded, hooks.strategies, loaded.train.steps, parts=[part for _, part in by_order])
    made.task = problems.of(lambda: create(loaded.base.task, TASKS))
    _look_at_base(loaded, made, problems)
    _look_at_machine(loaded, made.notes, problems)
    ready = whole and len(sound) == len(strategies) and made.model is not None and made.tokenizer is not None
    for strategy in sound if loaded.base.model != UNKNOWN and made.task is not None else ():
        try:
            check_plan(made, Composition([strategy], []))
        except BudwoodError as error:
            if ready or isinstance(error, InputError):
                problems.add(error)
            else:  # it may have stumbled over what is missing
                made.notes.append(f"{strategy} could not check the plan: mend what stands against it first")
    made.hooks = _resolve(loaded, made.task or _bare_task(loaded.base.task), hooks)
    return problems.on(made)


@dataclass
class _Problems:
    """What stands against a plan, each once, with its exit code."""

    texts: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    def add(self, error: BudwoodError) -> None:
        for text in error.problems if isinstance(error, InputError) else (str(error),):
            if text not in self.texts and not any(known.endswith(f": {text}") for known in self.texts):
                self.texts.append(text)
                self.codes.append(error.exit_code)

    def of(self, find_out: Callable[[], Any]) -> Any:
        """Return what a function finds; None, and its error among the problems, where it fails."""
        try:
            return find_out()
        except BudwoodError as error:
            self.add(error)
            return None

    def on(self, made: RunPlan) -> RunPlan:
        made.problems = self.texts
        made.exit_code = InputError.exit_code if InputError.exit_code in self.codes else max(self.codes, default=0)
        return made


def _build(recipe: Recipe, problems: _Problems) -> tuple[list[Strategy], list[Part]]:
    """The recipe's strategies in its order; one that cannot start is there for its declarations and hooks alone."""
    strategies, parts = [], []
    for index, choice in enumerate(recipe.strategies):

        def where(*place: str | int, name: str = choice.name) -> str:
            return recipe.where("strategies", name, *place)

        sound = False
        try:
            strategy = build_strategy(choice.name, choice.options, where)
            sound = True
        except BudwoodError as error:
            if choice.name != UNKNOWN:
                problems.add(error)
            strategy = _stand_in(choice, index)
        known = type(strategy) is not Strategy
        owner = find(choice.name) if known else None
        strategies.append(strategy)
        parts.append(
            Part(
                name=choice.name,
                distribution=owner.distribution if owner else UNKNOWN,
                version=owner.version if owner else UNKNOWN,
                api=strategy.api,
                declared={key: list(getattr(strategy, key)) for key in DECLARED},
                options=redact_values(strategy.options.model_dump(mode="json") if sound else choice.options),
                sound=sound,
            )
        )
    return strategies, parts


def _stand_in(choice: Choice, index: int) -> Strategy:
    """A strategy that never started; a bare one where its class cannot be loaded."""
    try:
        cls, entry = load_strategy(choice.name)
    except BudwoodError:
        return Strategy(name=choice.name if choice.name != UNKNOWN else f"{UNKNOWN}{index}")
    strategy = cls.__new__(cls)
    strategy.name, strategy.distribution, strategy.options = choice.name, entry.owner, None
    return strategy


def _bare_task(name: str) -> Task:
    """What every task implements, in the place of one that cannot be loaded."""
    task = Task()
    task.name = name  # type: ignore[misc]  # of this one
    return task


def _look_at_base(recipe: Recipe, made: RunPlan, problems: _Problems) -> None:
    base = recipe.base
    if base.model == UNKNOWN:
        return
    problems.of(lambda: check_base(base.model, base.quantization, base.trust_remote_code))
    made.tokenizer = problems.of(lambda: load_tokenizer(base.model))
    if made.task is not None:
        made.model = problems.of(lambda: skeleton(base.model, made.task.auto_class, base.trust_remote_code))


def _look_at_machine(recipe: Recipe, notes: list[str], problems: _Problems) -> None:
    """What this machine says to the recipe. A plan may be made for another one, so that only the output counts."""
    problems.of(lambda: check_output(recipe.output, overwrite=True))
    if (recipe.output / "manifest.json").is_file():
        notes.append(f"output: {recipe.output} holds another run")
    try:
        device, dtype, reason = pick_device_precision(recipe.base.device, recipe.train.precision)
        notes.append(f"here it would run on {device} in {precision_name(dtype)} ({reason})")
    except BudwoodError as error:
        notes.append(f"not on this machine: {error}")
    try:
        check_trackers(recipe.train.trackers)
    except BudwoodError as error:
        notes.append(f"not on this machine: {error}")


def _resolve(recipe: Recipe, task: Task, hooks: Composition) -> dict[str, list[Call]]:
    """For every hook those that it calls, in order, core and task among them."""
    run = Run(recipe, recipe.output, torch.device("cpu"), torch.float32, hooks.strategies, hooks, task, planning=True)
    register_parts(hooks, task, Engine(run, hooks))
    found: dict[str, list[Call]] = {}
    for hook in HOOKS:
        names = [_describe(call.plugin, recipe) for call in hooks.calls(hook)]
        inside = [[name for name, _, _ in names[index + 1 :]] for index in range(len(names))]
        found[hook] = [
            Call(*name, wraps=rest if call.wraps else [], replaced=_is_replaced(hook, index))
            for index, (name, rest, call) in enumerate(zip(names, inside, hooks.calls(hook), strict=True))
        ]
    if not found["load_base"]:
        quantizer = recipe.base.quantization
        owner = _owner(quantizer, QUANTIZERS)
        found["load_base"] = [Call(quantizer, "quantizer", owner, [])]
    return found


def _is_replaced(hook: str, index: int) -> bool:
    return bool(getattr(HookSpecs, hook).how == "one owner" and index)


def _describe(plugin: Any, recipe: Recipe) -> tuple[str, str, str]:
    """Name, kind and distribution of one that a hook calls."""
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


def show_plan(made: RunPlan, console: Console) -> None:
    """Print the plan as tables; without a terminal as plain columns, one line a row."""
    recipe: Recipe | None = made.recipe
    if recipe is None:
        return
    head = Table.grid(padding=(0, 2))
    base, data, train = recipe.base, recipe.data, recipe.train
    steps = f"{made.steps:,}" if made.steps is not None else f"unknown: {train.epochs} epochs, counted with the data"
    rows = [
        ("base", f"{base.model} · {base.quantization} · {base.task}"),
        ("data", f"{data.train}" + (f" · measured on {data.eval}" if data.eval else "")),
        ("steps", steps + ("" if made.steps else "; `budwood tune` checks the plan again then")),
        ("output", str(recipe.output)),
    ]
    for key, value in (*rows, *(("note", note) for note in made.notes)):
        head.add_row(_text(key), _text(value))
    strategies = _table("strategy", "distribution", "declares", "options")
    for part in made.parts:
        declared = "; ".join(f"{key} {', '.join(names)}" for key, names in part.declared.items() if names)
        options = ", ".join(f"{key} {json.dumps(value)}" for key, value in part.options.items() if value is not None)
        flaw = "" if part.sound else " (with problems)"
        row = (part.name + flaw, f"{part.distribution} {part.version}", declared or "–", options or "–")
        strategies.add_row(*map(_text, row))
    hooks = _table("hook", "called", "in this order")
    for hook, calls in made.hooks.items():
        spec = getattr(HookSpecs, hook)
        how = spec.how + (", wrappable" if spec.wrappable and spec.how != "core's own" else "")
        hooks.add_row(*map(_text, (hook, how, describe_order(calls))))
    everything = Group(head, Text(), strategies, Text(), hooks)
    if console.is_terminal:
        console.print(everything)
        return
    wide = Console(width=10_000, color_system=None, force_terminal=False)
    with wide.capture() as captured:
        wide.print(everything)
    for line in captured.get().splitlines():
        console.print(Text(line.rstrip()), soft_wrap=True)


def describe_order(calls: Sequence[Call]) -> str:
    """One line: `a wraps b wraps (c → task causal-lm)`."""
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
