"""Every hook: attribution of errors, checks of results, measured costs. New hooks are covered automatically."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from budwood import BudwoodError, DataFormat, Event, InputError, Outputs, PluginError, Strategy, ask_owner, hookimpl
from budwood.contract.calls import attribute_errors, noted
from budwood.contract.hookspecs import HookSpecs
from budwood.contract.loading import CORE, HOOKS, WRAPPABLE
from budwood.contract.registry import Composition
from budwood.contract.results import _MUST_RETURN
from budwood.data.fields import read_weight
from budwood.data.recognition import check_rows
from budwood.model.task import Task

RUN = SimpleNamespace(step=7)
STEP = SimpleNamespace(run=RUN)


def make(name: str = "mine", **members: Any) -> Strategy:
    """Return a strategy of a new class with these members, from the distribution NAME-dist 1.0."""
    return type(name.capitalize(), (Strategy,), members)(name=name, distribution=f"{name}-dist 1.0")


def implement(hook: str, body: Callable[[], Any], wrapper: bool = False) -> Strategy:
    """Return a strategy whose `hook` returns `body()`; a wrapper calls it after its yield."""

    def plain(self):
        return body()

    def wraps(self):
        yield
        return body()

    return make(**{hook: hookimpl(wrapper=wrapper)(wraps if wrapper else plain)})


def call(hooks: Composition, hook: str) -> list[str]:
    """Call a hook as core does; return the messages shown to the user."""
    arguments: dict[str, Any] = dict.fromkeys(list(getattr(HookSpecs, hook).__annotations__)[:-1])
    if "run" in arguments:
        arguments["run"] = RUN
    if "step" in arguments:
        arguments["step"] = STEP
    messages: list[str] = []
    mode = getattr(HookSpecs, hook).call_style
    if mode == "chain":
        hooks.chain(hook, list(arguments)[-1], None, **arguments)
    elif mode == "observe":
        hooks.notify(Event("step", 1, {}), messages.append)
    elif mode == "adapter owner":
        ask_owner(hooks.strategies[0], hook, **arguments)
    elif mode == "per strategy":
        hooks.ask(hook, "mine", **arguments)
    else:
        hooks.call(hook, **arguments)
        hooks.collect(hook, **arguments) if mode == "collect" else None
    return messages


def prefix(hook: str) -> str:
    """Return the prefix of messages about `hook`."""
    steps = HOOKS[HOOKS.index("next_examples") : HOOKS.index("after_optimizer_step") + 1]
    after = HOOKS[HOOKS.index("on_event") : HOOKS.index("attach_adapter")]
    where = ", step 8" if hook in steps else ", after step 7" if hook in after else ""
    return f"strategy 'mine' (mine-dist 1.0), hook {hook}{where}: "


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("error", [ZeroDivisionError("by zero\nmore"), SystemExit(3), TypeError()])
def test_an_error_in_any_hook_names_the_strategy(hook, error):
    def body():
        raise error

    hooks = Composition([implement(hook, body, hook in CORE)])
    text = {ZeroDivisionError: "ZeroDivisionError: by zero", SystemExit: "SystemExit: 3"}.get(type(error), "TypeError")
    if hook == "on_event":
        assert call(hooks, hook) == [f"strategy 'mine' (mine-dist 1.0) failed in on_event and is disabled: {text}"]
        return
    with pytest.raises(PluginError) as raised:
        call(hooks, hook)
    assert str(raised.value) == f"{prefix(hook)}{text}. Report it to its author; --debug shows the traceback."
    assert raised.value.__cause__ is error and raised.value.exit_code == 3


@pytest.mark.parametrize("hook", HOOKS)
def test_the_result_of_any_hook_is_checked(hook):
    hooks = Composition([implement(hook, object, hook in CORE)])
    problem = f"returned an object; it must return {_MUST_RETURN[hook][0]}."
    if hook == "on_event":
        [message] = call(hooks, hook)
        assert message.startswith("strategy 'mine' (mine-dist 1.0) failed in on_event and is disabled: ")
        assert message.endswith(f"hook on_event: {problem}")
        return
    with pytest.raises(PluginError) as raised:
        call(hooks, hook)
    assert str(raised.value) == prefix(hook) + problem


def test_the_required_result_of_every_hook_is_known():
    assert set(_MUST_RETURN) == set(HOOKS)


@pytest.mark.parametrize("hook", WRAPPABLE)
def test_an_error_in_any_wrapper_names_the_strategy(hook):
    def fails():
        raise KeyError("delta")

    @hookimpl(wrapper=True)
    def early(self):
        fails()
        yield

    @hookimpl(wrapper=True)
    def never(self):
        if self is None:
            yield

    @hookimpl(wrapper=True)
    def twice(self):
        yield
        yield

    for wrapper, problem in (
        (implement(hook, fails, wrapper=True), "KeyError: 'delta'. Report it"),
        (make(**{hook: early}), "KeyError: 'delta'. Report it"),
        (make(**{hook: never}), "never reaches its yield, so the wrapped call would not run."),
        (make(**{hook: twice}), "yields a second time; the wrapped call runs only once."),
        (implement(hook, lambda: 3, wrapper=True), "returned an int; it must return "),
    ):
        with pytest.raises(PluginError) as raised:
            call(Composition([wrapper]), hook)
        assert str(raised.value).startswith(prefix(hook) + problem)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left"), InputError("mine: x is wrong")])
def test_a_resource_or_input_error_keeps_its_type(hook, error):
    def body():
        raise error

    error.__notes__ = []
    hooks = Composition([implement(hook, body, hook in CORE)])
    if hook == "on_event":
        assert len(call(hooks, hook)) == 1
        return
    with pytest.raises(type(error)) as raised:
        call(hooks, hook)
    assert raised.value is error
    assert noted(error) == ("" if isinstance(error, InputError) else f" in {prefix(hook).removesuffix(': ')}")


@pytest.mark.parametrize("hook", HOOKS)
def test_signals_pass_through_any_hook(hook):
    def body():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(Composition([implement(hook, body, hook in CORE)]), hook)


def test_an_error_that_cannot_be_printed_is_still_attributed():
    class Odd(Exception):
        def __str__(self):
            raise ValueError

    def body():
        raise Odd

    with pytest.raises(PluginError, match=r"hook before_clip, step 8: Odd\. Report"):
        call(Composition([implement("before_clip", body)]), "before_clip")


class Model(Task):
    """A task whose forward calls `layer`, which a strategy may have added to the model."""

    name, auto_class = "made", ""
    distribution = "made 2.0"

    def __init__(self, layer: Callable[[], Any]) -> None:
        self.layer = layer

    @hookimpl
    def forward(self, step):
        return self.layer()

    @hookimpl
    def evaluate(self, run):
        return {}


def test_an_error_in_a_strategys_code_is_attributed_to_it_in_other_plugins_hooks():
    class Mine(Strategy):
        def layer(self):
            raise IndexError("rank 3")

    strategy = Mine(name="mine", distribution="mine-dist 1.0")
    hooks = Composition([strategy])
    hooks.register_core(Model(strategy.layer), "task made")
    with pytest.raises(PluginError) as raised:
        hooks.call("forward", step=STEP)
    assert str(raised.value).startswith(
        "strategy 'mine' (mine-dist 1.0), in hook forward of task 'made' (made 2.0), step 8: IndexError: rank 3. "
    )


def test_an_error_in_a_strategys_package_is_attributed_to_the_strategy(distribution):
    source = "def layer(): return [][0]\nclass Mine(Strategy): pass"
    distribution("sprout", source, {"mine": "Mine"})
    import sprout  # the package made above

    hooks = Composition([sprout.Mine(name="mine", distribution="sprout 1.0"), make("other")])
    hooks.register_core(Model(sprout.layer), "task made")
    with pytest.raises(PluginError, match=r"^strategy 'mine' \(sprout 1.0\), in hook forward of task 'made'"):
        hooks.call("forward", step=STEP)


def test_an_error_in_a_task_is_attributed_to_the_task():
    hooks = Composition([make("other")])
    hooks.register_core(Model(lambda: None), "task made")
    with pytest.raises(PluginError, match=r"^task 'made' \(made 2.0\), hook forward, step 8: returned None; it must"):
        hooks.call("forward", step=STEP)


def test_an_error_in_cores_code_is_not_blamed_on_its_caller():
    """Either the plugin called core wrongly or core has a bug; the message names both."""
    hooks = Composition([implement("before_clip", lambda: read_weight(None, ""))])
    with pytest.raises(BudwoodError) as raised:
        call(hooks, "before_clip")
    assert str(raised.value).startswith(f"{prefix('before_clip')}AttributeError: 'NoneType'")
    assert "raised in Budwood's own code. Either the strategy calls it wrongly, or this is a bug" in str(raised.value)
    assert "author" not in str(raised.value) and raised.value.exit_code == 1


def test_an_error_in_a_library_is_that_of_its_caller():
    hooks = Composition([implement("before_clip", lambda: torch.zeros(2) @ torch.zeros(3))])
    with pytest.raises(PluginError, match="RuntimeError: inconsistent tensor size.*Report it to its author"):
        call(hooks, "before_clip")


@pytest.mark.parametrize("body", [lambda: 1 / 0, lambda: read_weight(None, ""), object])
def test_a_plugin_of_budwoods_own_has_no_other_author(body):
    strategy = implement("before_clip", body)
    strategy.distribution = "budwood 0.1.0"
    with pytest.raises(BudwoodError, match="This is a bug; run again with --debug") as raised:
        call(Composition([strategy]), "before_clip")
    assert "author" not in str(raised.value) and raised.value.exit_code == 1


class Lenient(DataFormat):
    """A format whose `item` is what a test needs."""

    name, columns, tasks, distribution = "lenient", ("text",), ("causal-lm",), "lenient-dist 1.0"


@pytest.mark.parametrize(
    ("item", "message", "code"),
    [
        (lambda self, row, where: row["text"].x, "AttributeError: .*Report it to its author", 3),
        (lambda self, row: row, "TypeError: .*Report it to its author", 3),
        (lambda self, row, where: read_weight(None, where), "AttributeError: .*raised in Budwood's own code", 1),
    ],
)
def test_an_error_outside_of_hooks_is_attributed_to_its_cause(item, message, code, tmp_path, monkeypatch):
    monkeypatch.setattr(Lenient, "item", item)
    monkeypatch.setattr("budwood.data.recognition.recognise_rows", lambda *_: Lenient())
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(BudwoodError, match=f"^data format 'lenient' .lenient-dist 1.0., item: {message}") as raised:
        check_rows(tmp_path / "a.jsonl", "causal-lm")
    assert raised.value.exit_code == code


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace the clock that times calls."""
    clock = Clock()
    monkeypatch.setattr("budwood.contract.calls.perf_counter", clock)
    return clock


def costs(hooks: Composition) -> dict[tuple[str, str], tuple[int, float, float]]:
    """Return (calls, own seconds, seconds) for each row."""
    return {(c.owner, c.hook): (c.calls, c.own_seconds, c.seconds) for c in hooks.costs}


def test_a_call_by_another_strategy_is_attributed_to_the_owner_and_timed_separately(clock):
    @hookimpl
    def use_adapters(self, model, names):
        clock.work(2)
        if names == ["x"]:
            raise KeyError("x")

    owner = make("owner", use_adapters=use_adapters)

    @hookimpl
    def before_clip(self, run):
        clock.work(1)
        ask_owner(owner, "use_adapters", model=None, names=self.names)

    caller = make("caller", before_clip=before_clip, names=[])
    hooks = Composition([owner, caller])
    hooks.call("before_clip", run=RUN)
    assert costs(hooks) == {("owner", "use_adapters"): (1, 2, 2), ("caller", "before_clip"): (1, 1, 3)}
    caller.names = ["x"]
    with pytest.raises(
        PluginError, match=r"^strategy 'owner' \(owner-dist 1.0\), hook use_adapters, after step 7: Key"
    ):
        hooks.call("before_clip", run=RUN)


def test_an_owner_without_the_hook_is_refused():
    with pytest.raises(PluginError, match="strategy 'mine' .* has no hook 'attach_adapter', which an adapter owner"):
        ask_owner(make(), "attach_adapter", model=None)


def test_times_of_wrappers_replays_and_parts_are_counted_once(clock):
    class Core:
        def run(self):
            clock.work(8)
            with hooks.part("inner"):
                clock.work(4)

        @hookimpl
        def backward(self, step):
            self.run()

    core = Core()

    @hookimpl(wrapper=True)
    def backward(self, step):
        clock.work(1)
        yield
        clock.work(2)
        with hooks.part("replay"):
            core.run()

    hooks = Composition([make(backward=backward)])
    hooks.register_core(core, "core")
    hooks.call("backward", step=STEP)
    assert costs(hooks) == {
        ("core", "backward"): (1, 8, 12),
        ("core", "inner"): (2, 8, 8),
        ("core", "replay"): (1, 8, 12),
        ("mine", "backward"): (1, 3, 27),
    }
    assert sum(cost.own_seconds for cost in hooks.costs) == clock.now
    assert list(costs(hooks))[-1] == ("mine", "backward")  # most expensive first


def test_the_time_of_a_nested_call_of_the_same_hook_counts_once(clock):
    """For example, a strategy's forward runs the model again: the outer call's time includes the inner call's."""

    class Core:
        @hookimpl
        def forward(self, step):
            clock.work(1)
            if step.depth == 0:
                hooks.call("forward", step=SimpleNamespace(run=RUN, depth=1))
            return outputs

    outputs = Outputs(torch.zeros(1, 1, 1), torch.nn.Identity())
    hooks = Composition([])
    hooks.register_core(Core(), "core")
    hooks.call("forward", step=SimpleNamespace(run=RUN, depth=0))
    assert costs(hooks) == {("core", "forward"): (2, 2, 2)}


def test_costs_continue_to_add_up_after_an_error(clock):
    fail = [True]

    def body():
        clock.work(1)
        if fail.pop():
            raise MemoryError

    hooks = Composition([implement("backward", body, wrapper=True)])
    with pytest.raises(MemoryError):
        call(hooks, "backward")
    fail.append(False)
    call(hooks, "backward")
    assert costs(hooks) == {("mine", "backward"): (2, 2, 2)}


def test_peak_growth_is_attributed_to_the_innermost_call():
    peak, waits = [100], []

    @hookimpl
    def use_adapters(self, model, names):
        peak[0] += 5

    owner = make("owner", use_adapters=use_adapters)

    @hookimpl(wrapper=True)
    def backward(self, step):
        peak[0] += 10
        yield
        ask_owner(owner, "use_adapters", model=None, names=[])
        peak[0] += 1

    hooks = Composition([owner, make(backward=backward)])
    hooks.measure(lambda: peak[0], lambda: waits.append(None))
    call(hooks, "backward")
    assert {(c.owner, c.hook): c.peak_growth for c in hooks.costs if c.peak_growth} == {
        ("mine", "backward"): 11, ("owner", "use_adapters"): 5,
    }  # fmt: skip
    assert waits


@pytest.mark.parametrize("error", [InputError("x"), OSError(28, "No space"), MemoryError()])
def test_an_error_outside_of_hooks_is_attributed_too(error):
    task, pattern = Model(lambda: None), r"^task 'made' \(made 2.0\), metrics: KeyError: 'f1'\. Report it"
    with pytest.raises(PluginError, match=pattern), attribute_errors(task, "metrics"):
        raise KeyError("f1")
    with pytest.raises(type(error)) as raised, attribute_errors(task, "metrics"):
        raise error
    assert raised.value is error
