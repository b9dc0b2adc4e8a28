"""Composition of strategies: slots, order, wrappers, chains, and attribution of errors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from budwood import Event, Example, InputError, LossTerm, PluginError, Strategy, hookimpl
from budwood.contract.registry import Composition


def make(name: str, distribution: str = "", **members) -> Strategy:
    """Return a strategy of a new class with these members, from the distribution NAME-dist 1.0."""
    cls = type(name.capitalize(), (Strategy,), members)
    return cls(name=name, distribution=distribution or f"{name}-dist 1.0")


def hook(function):
    """Mark a local function as a hook."""
    return hookimpl(function)


def order(*strategies: Strategy) -> list[str]:
    return [strategy.name for strategy in Composition(strategies).strategies]


def test_two_owners_of_a_slot_are_both_named():
    with pytest.raises(InputError) as error:
        Composition([make("lora", slots=("adapter",)), make("ia3", slots=("adapter",))])
    assert str(error.value) == (
        "strategy 'lora' (lora-dist 1.0) and strategy 'ia3' (ia3-dist 1.0) both own the slot 'adapter': leave one out."
    )


def test_two_implementers_of_an_exclusive_hook_are_both_named():
    def build_optimizer(self, run, groups): ...

    with pytest.raises(InputError) as error:
        Composition([make(name, build_optimizer=hook(build_optimizer)) for name in ("a", "b")])
    assert "strategy 'a' (a-dist 1.0) and strategy 'b' (b-dist 1.0) both implement 'build_optimizer'" in str(
        error.value
    )


def test_the_same_strategy_twice_is_refused():
    with pytest.raises(InputError, match="strategy 'lora' appears twice in the recipe"):
        Composition([make("lora"), make("lora")])


@pytest.mark.parametrize("need", ["adapter", "lora", "low-rank"])
def test_a_requirement_is_a_slot_a_strategy_or_a_capability(need):
    lora = make("lora", slots=("adapter",), provides=("low-rank",))
    orthogonal = make("orthogonal", requires=(need,))
    assert order(lora, orthogonal) == ["lora", "orthogonal"]
    with pytest.raises(InputError) as error:
        Composition([orthogonal])
    assert f"strategy 'orthogonal' (orthogonal-dist 1.0) requires '{need}': add" in str(error.value)


def test_a_strategy_does_not_fulfil_its_own_requirement():
    with pytest.raises(InputError, match="requires 'adapter'"):
        Composition([make("lora", slots=("adapter",), requires=("adapter",))])


@pytest.mark.parametrize("clash", ["adapter", "lora", "low-rank"])
@pytest.mark.parametrize("first", [True, False])
def test_conflicts_in_either_order(clash, first):
    pair = [make("prompt", conflicts=(clash,)), make("lora", slots=("adapter",), provides=("low-rank",))]
    with pytest.raises(InputError, match=f"strategy 'prompt' .* conflicts with '{clash}': leave one out"):
        Composition(pair if first else pair[::-1])


def test_the_recipes_order_breaks_ties():
    assert order(make("b"), make("a"), make("c")) == ["b", "a", "c"]


def test_before_and_after_determine_the_order():
    assert order(make("a", after=("c",)), make("b"), make("c")) == ["b", "c", "a"]
    assert order(make("a"), make("b"), make("c", before=("a",))) == ["b", "c", "a"]
    assert order(make("a", after=("absent",)), make("b")) == ["a", "b"]


def test_before_and_after_may_name_slots_and_capabilities():
    assert order(make("noise", after=("adapter",)), make("lora", slots=("adapter",))) == ["lora", "noise"]
    assert order(make("noise", before=("ranks",)), make("lora", provides=("ranks",))) == ["noise", "lora"]
    assert order(make("x", provides=("p",), after=("p",)), make("y", provides=("p",))) == ["y", "x"]


def test_a_cycle_names_the_strategies_and_their_distributions():
    with pytest.raises(InputError) as error:
        Composition([make("a", after=("b",)), make("b", after=("a",))])
    assert "cannot be ordered" in str(error.value)
    assert "strategy 'a' (a-dist 1.0) before strategy 'b' (b-dist 1.0)" in str(error.value)


def test_chain_passes_each_result_to_the_next():
    def append(letter):
        return hook(_chain(letter))

    def _chain(letter):
        def prepare_examples(self, run, examples):
            return [*examples, Example({"x": np.zeros(1)}, np.zeros(0), np.zeros(0), np.zeros(0), key=letter)]

        return prepare_examples

    hooks = Composition([make("a", prepare_examples=append(1), after=("b",)), make("b", prepare_examples=append(2))])
    assert [example.key for example in hooks.chain("prepare_examples", "examples", [], run=None)] == [2, 1]
    assert hooks.implements("prepare_examples") == ["b", "a"]


def test_chain_refuses_none():
    def prepare_model(self, model): ...

    hooks = Composition([make("a", prepare_model=hook(prepare_model))])
    with pytest.raises(
        PluginError, match=r"'a' \(a-dist 1.0\), hook prepare_model: returned None; it must return the model"
    ):
        hooks.chain("prepare_model", "model", [], run=None)


def test_collect_pairs_results_with_strategies():
    def loss_terms(self, step):
        return [LossTerm(self.name, torch.zeros(()), "step")] if self.name != "b" else None

    hooks = Composition([make(name, loss_terms=hook(loss_terms)) for name in "abc"])
    pairs = hooks.collect("loss_terms", step=None, outputs=None)
    assert [(strategy.name, terms[0].name) for strategy, terms in pairs] == [("a", "a"), ("c", "c")]


def test_hooks_may_take_fewer_arguments():
    received = []

    def token_terms(self, positions):
        received.append(positions)

    hooks = Composition([make("a", token_terms=hook(token_terms))])
    hooks.call("token_terms", step=None, logits=None, positions=3)
    hooks.collect("token_terms", step=None, logits=None, positions=4)
    assert received == [3, 4]


def wrapping(name: str, log: list[str], **members) -> Strategy:
    @hookimpl(wrapper=True)
    def backward(self, step):
        log.append(f"{name} in")
        result = yield
        log.append(f"{name} out")
        return result

    return make(name, backward=backward, **members)


class Core:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    @hookimpl
    def backward(self, step):
        self.log.append("core")
        if step == "fail":
            raise ValueError("core failed")


def test_the_first_in_order_wraps_outermost_and_core_is_innermost():
    log: list[str] = []
    hooks = Composition([wrapping("a", log), wrapping("b", log)])
    hooks.register_core(Core(log), "core")
    hooks.call("backward", step=None)
    assert log == ["a in", "b in", "core", "b out", "a out"]
    assert hooks.implements("backward") == ["a", "b", "budwood: core"]


def test_core_is_checked_against_the_contract_too():
    class Misspelt:
        @hookimpl
        def bakcward(self, step): ...

    with pytest.raises(PluginError, match="no hook 'bakcward'. Did you mean 'backward'"):
        Composition([]).register_core(Misspelt(), "core")


def test_properties_of_a_strategy_are_never_read():
    def fails(self):
        raise AssertionError("read")

    Composition([make("a", model=property(fails))])


def test_an_error_in_a_hook_names_the_strategy():
    def before_clip(self, run):
        raise ZeroDivisionError("division by zero\nmore")

    hooks = Composition([make("a", before_clip=hook(before_clip))])
    expected = "strategy 'a' (a-dist 1.0), hook before_clip, step 8: ZeroDivisionError: division by zero. Report"
    for call in (hooks.call, hooks.collect):
        with pytest.raises(PluginError) as error:
            call("before_clip", run=SimpleNamespace(step=7))
        assert str(error.value).startswith(expected)
        assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_an_error_in_a_wrapper_names_the_strategy():
    @hookimpl(wrapper=True)
    def backward(self, step):
        result = yield
        raise KeyError("delta")
        return result

    hooks = Composition([make("fgm", backward=backward), wrapping("other", [])])
    hooks.register_core(Core([]), "core")
    with pytest.raises(PluginError, match=r"strategy 'fgm' \(fgm-dist 1.0\), hook backward, step 1: KeyError: 'delta'"):
        hooks.call("backward", step=SimpleNamespace(run=SimpleNamespace(step=0)))


def test_an_error_in_the_wrapped_call_is_not_attributed_to_the_wrapper():
    hooks = Composition([wrapping("a", []), wrapping("b", [])])
    hooks.register_core(Core([]), "core")
    with pytest.raises(ValueError, match="core failed"):
        hooks.call("backward", step="fail")


def test_an_error_in_a_called_function_is_attributed_to_the_calling_strategy():
    def replay(noise):
        raise RuntimeError("shapes do not match")

    @hookimpl(wrapper=True)
    def backward(self, step):
        result = yield
        replay("noise of a wrong shape")
        return result

    hooks = Composition([make("fgm", backward=backward)])
    hooks.register_core(Core([]), "core")
    with pytest.raises(PluginError, match="strategy 'fgm' .* RuntimeError: shapes do not match"):
        hooks.call("backward", step=SimpleNamespace(run=SimpleNamespace(step=0)))


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's exception."""


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left"), OutOfMemoryError(), InputError("x")])
def test_resource_and_input_errors_pass_unchanged(error):
    def before_clip(self, run):
        raise error

    hooks = Composition([make("a", before_clip=hook(before_clip))])
    for call in (hooks.call, hooks.collect):
        with pytest.raises(type(error)) as raised:
            call("before_clip", run=None)
        assert raised.value is error


def test_signals_pass_through():
    def before_clip(self, run):
        raise KeyboardInterrupt

    hooks = Composition([make("a", before_clip=hook(before_clip))])
    with pytest.raises(KeyboardInterrupt):
        hooks.call("before_clip", run=None)


def test_a_failing_observer_is_named_once_and_disabled():
    events, messages = [], []

    def fails(self, event):
        raise ConnectionError("no network")

    def on_event(self, event):
        events.append(event.step)

    def silent(self):
        events.append("silent")

    fails.__name__ = silent.__name__ = "on_event"
    hooks = Composition(
        [make("a", on_event=hook(fails)), make("b", on_event=hook(on_event)), make("c", on_event=hook(silent))]
    )
    for step in (1, 2):
        hooks.notify(Event("step", step, {}), messages.append)
    assert events == [1, "silent", 2, "silent"]
    assert messages == ["strategy 'a' (a-dist 1.0) failed in on_event and is disabled: ConnectionError: no network"]


def test_all_incompatibilities_are_reported_together():
    strategies = [
        make("a", slots=("adapter",), after=("b",), requires=("teacher",)),
        make("b", slots=("adapter",), after=("a",)),
        make("c", conflicts=("a",)),
        make("c"),
    ]
    problems: list[str] = []
    hooks = Composition(strategies, problems)
    assert [problem.partition(": ")[0] for problem in problems] == [
        "strategy 'a' (a-dist 1.0) and strategy 'b' (b-dist 1.0) both own the slot 'adapter'",
        "strategy 'c' appears twice in the recipe",
        "strategy 'a' (a-dist 1.0) requires 'teacher'",
        "strategy 'c' (c-dist 1.0) conflicts with 'a'",
        "strategies cannot be ordered",
    ]
    assert hooks.strategies == strategies
    with pytest.raises(InputError) as error:
        Composition(strategies)
    assert list(error.value.problems) == problems
    Composition([strategies[0]], problems := [], complete=False)  # a missing strategy may provide the teacher
    assert problems == []


def test_calls_mark_wrappers():
    hooks = Composition([wrapping("a", []), wrapping("b", [])])
    hooks.register_core(Core([]), "core")
    assert [(call.name, call.wraps) for call in hooks.calls("backward")] == [
        ("a", True), ("b", True), ("budwood: core", False),
    ]  # fmt: skip
