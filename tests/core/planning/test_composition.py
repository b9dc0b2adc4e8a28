"""The plan: the order of calls, all problems together, and a second check once the number of steps is known."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import budwood
from budwood import InputError, Plan
from budwood.planning import composition as planning
from budwood.planning.composition import Call, describe_order, show_plan
from budwood.training import setup
from budwood.training.loop import tune

ORDER = """
    LOG = []

    class First(Strategy):
        '''Wraps, and comes first.'''
        before = ("second",)

        @hookimpl
        def before_clip(self, run):
            LOG.append("first")

        @hookimpl(wrapper=True)
        def backward(self, step):
            LOG.append("first in")
            yield
            LOG.append("first out")

    class Second(Strategy):
        '''Wraps too.'''
        provides = ("order",)

        @hookimpl
        def before_clip(self):
            LOG.append("second")

        @hookimpl(wrapper=True)
        def backward(self, step):
            LOG.append("second in")
            yield
            LOG.append("second out")

        @hookimpl
        def build_scheduler(self, run, optimizer):
            import torch
            return torch.optim.lr_scheduler.ConstantLR(optimizer)
"""


@pytest.fixture
def ordered(distribution):
    """Install the strategies `first` and `second` of the distribution sprout 1.0; return their log."""
    distribution("sprout", ORDER, {"first": "First", "second": "Second"})
    import sprout

    return sprout.LOG


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def names(run_plan, hook: str) -> list[str]:
    return [call.name for call in run_plan.hooks[hook]]


def test_a_plan_lists_distributions_declarations_and_options(make_recipe, ordered):
    run_plan = budwood.plan(make_recipe(strategies=[{"second": None}, {"first": None}, {"lora": {"rank": 2}}]))
    assert (run_plan.problems, run_plan.exit_code) == ([], 0)
    assert isinstance(run_plan, Plan)
    parts = {part.name: part for part in run_plan.parts}
    assert list(parts) == ["first", "second", "lora"]  # in resolved order, not the recipe's
    assert (parts["first"].distribution, parts["first"].version) == ("sprout", "1.0")
    assert parts["first"].declared["before"] == ["second"]
    assert parts["second"].declared["provides"] == ["order"]
    assert parts["lora"].declared["slots"] == ["adapter"]
    assert parts["lora"].options["rank"] == 2
    assert parts["lora"].options["dropout"] == 0.0  # defaults included


def test_every_hook_lists_its_calls_in_order(make_recipe, ordered):
    run_plan = budwood.plan(make_recipe(strategies=[{"lora": None}, {"second": None}, {"first": None}]))
    assert set(run_plan.hooks) == set(planning.HOOKS)
    assert [(c.name, c.kind, c.wraps) for c in run_plan.hooks["backward"]] == [
        ("first", "strategy", ["second", "core"]),
        ("second", "strategy", ["core"]),
        ("core", "core", []),
    ]
    assert [(c.name, c.kind, c.distribution) for c in run_plan.hooks["forward"]] == [
        ("causal-lm", "task", f"budwood {budwood.__version__}")
    ]
    assert names(run_plan, "before_clip") == ["first", "second"]
    assert [(c.name, c.replaced) for c in run_plan.hooks["build_scheduler"]] == [("second", False), ("core", True)]
    assert [(c.name, c.replaced) for c in run_plan.hooks["build_optimizer"]] == [("core", False)]
    assert [(c.name, c.kind) for c in run_plan.hooks["load_base"]] == [("none", "quantizer")]
    assert run_plan.hooks["prepare_batch"] == []


def test_a_run_calls_hooks_in_the_planned_order(make_recipe, ordered):
    recipe = make_recipe(strategies=[{"lora": None}, {"second": None}, {"first": None}], train={"steps": 1})
    run_plan = budwood.plan(recipe)
    assert ordered == []
    tune(recipe, quiet=True)
    wrappers = [call.name for call in run_plan.hooks["backward"] if call.kind == "strategy"]
    into = [entry.removesuffix(" in") for entry in ordered if entry.endswith(" in")]
    out = [entry.removesuffix(" out") for entry in ordered if entry.endswith(" out")]
    assert into == wrappers
    assert out == wrappers[::-1]
    assert ordered[-2:] == names(run_plan, "before_clip")


def test_neither_data_nor_weights_are_read(make_recipe, monkeypatch, tmp_path):
    recipe = make_recipe()
    (tmp_path / "train.jsonl").write_text("no JSON")

    def refuse(*args, **kwargs):
        raise AssertionError("read")

    monkeypatch.setattr("budwood.training.run_data.build_examples", refuse)
    monkeypatch.setattr(setup, "load_base", refuse)
    monkeypatch.setattr("safetensors.safe_open", refuse)
    run_plan = budwood.plan(recipe)
    assert run_plan.problems == []
    assert {p.device.type for p in run_plan.model.parameters()} == {"meta"}
    assert not (tmp_path / "run").exists()


def test_steps_are_unknown_if_they_depend_on_the_data(make_recipe):
    assert budwood.plan(make_recipe(train={"steps": 7})).steps == 7
    run_plan = budwood.plan(make_recipe(train={"epochs": 2}))
    assert run_plan.steps is None
    assert json.loads(json.dumps(run_plan.as_dict()))["steps"] is None
    assert "(2 epochs)" in rendered(run_plan)


LATE = """
    SEEN = []

    class Late(Strategy):
        '''Refuses more than three steps.'''

        @hookimpl
        def check_plan(self, plan):
            SEEN.append(plan.steps)
            if plan.steps is not None and plan.steps > 3:
                plan.problem(self, f"{plan.steps} steps are too many.")
                plan.problem(self, "The schedule does not fit.")

        @hookimpl
        def prepare_examples(self, run, examples):
            SEEN.append("data")
            return examples
"""


def test_problems_that_depend_on_the_steps_are_raised_before_the_base_is_loaded(
    make_recipe, distribution, monkeypatch, tmp_path
):
    distribution("late", LATE, {"late": "Late"})
    recipe = make_recipe(strategies=[{"lora": None}, {"late": None}], train={"epochs": 2})
    assert budwood.plan(recipe).problems == []
    import late

    assert late.SEEN == [None]
    late.SEEN.clear()

    def load(*args, **kwargs):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(setup, "load_base", load)
    with pytest.raises(InputError, match="6 steps are too many.*The schedule does not fit") as error:
        tune(recipe, quiet=True)
    assert len(error.value.problems) == 2
    assert late.SEEN == [None, "data", 6]
    assert not (tmp_path / "run").exists()
    late.SEEN.clear()
    known = make_recipe(strategies=[{"lora": None}, {"late": None}], train={"steps": 6})
    assert budwood.plan(known).problems == list(error.value.problems)


def test_problems_of_recipe_options_composition_and_plan_are_listed_together(tiny_base, tmp_path, ordered):
    path = write(
        tmp_path,
        f"""\
base: {{model: {tiny_base}, quantization: none, devise: cpu}}
data: {{train: nowhere.jsonl}}
strategies:
  - lora: {{rnk: 3}}
  - adalora: {{targets: [nothing], initial_rank: 4, target_rank: 2}}
  - first: {{x: 1}}
train: {{steps: 100, epochs: 1}}
""",
    )
    run_plan = budwood.plan(path, ["train.seed=-1"])
    assert run_plan.exit_code == 2
    expected = [
        f"{path}:1: base.devise: unknown key. Did you mean 'device'?",
        f"{path}:7: train.steps: cannot be combined with train.epochs",
        "-o train.seed=-1: train.seed: must be greater than or equal to 0",
        f"{path}:2: data.train: no such file: nowhere.jsonl",
        f"{path}:4: lora.rnk: unknown key. Did you mean 'rank'?",
        f"{path}:6: first.x: unknown key.",
        f"strategy 'lora' (budwood {budwood.__version__}) and strategy 'adalora' (budwood {budwood.__version__}) both",
        f"strategy 'adalora' (budwood {budwood.__version__}): targets: no linear module is called 'nothing'",
    ]
    assert len(run_plan.problems) == len(expected)
    for problem, start in zip(run_plan.problems, expected, strict=True):
        assert problem.startswith(start)
    # one problem does not hide the others
    assert names(run_plan, "before_clip") == ["adalora", "first"]
    assert [(part.name, part.sound) for part in run_plan.parts] == [
        ("lora", False),
        ("adalora", True),
        ("first", False),
    ]
    assert run_plan.parts[0].options == {"rnk": 3}


BROKEN = """
    class Needs(Strategy):
        requires = ("magic",)

    class Fails(Strategy):
        @hookimpl
        def check_plan(self, plan):
            raise ZeroDivisionError("division by zero")
"""


def test_a_broken_plugin_causes_no_further_problems(make_recipe, distribution):
    distribution("twig", BROKEN, {"needs": "Needs", "fails": "Fails"})
    distribution("stump", "import not_there", {"broken": "Broken"})
    recipe = make_recipe(strategies=[{"needs": None}, {"broken": None}])
    run_plan = budwood.plan(recipe)  # `broken` might provide magic, and train something
    assert [problem[:38] for problem in run_plan.problems] == ["plugin 'broken' of stump 1.0 (stump:Br"]
    assert run_plan.exit_code == 3
    assert budwood.plan(make_recipe(strategies=[{"needs": None}])).problems == [
        "strategy 'needs' (twig 1.0) requires 'magic': add a strategy that provides it to the recipe.",
        setup.NOTHING_TRAINS,
    ]
    run_plan = budwood.plan(make_recipe(strategies=[{"lora": None}, {"fails": None}]))
    assert run_plan.exit_code == 3
    assert len(run_plan.problems) == 1
    assert run_plan.problems[0].startswith("strategy 'fails' (twig 1.0), hook check_plan: ZeroDivisionError")


def test_a_missing_base_does_not_affect_the_rest_of_the_plan(make_recipe, distribution):
    distribution("twig", BROKEN, {"needs": "Needs", "fails": "Fails"})
    recipe = make_recipe(strategies=[{"lora": None}, {"fails": None}], base={"model": "no/where", "task": "causal-lm"})
    run_plan = budwood.plan(recipe)
    assert [problem.partition(":")[0].partition(" is ")[0] for problem in run_plan.problems] == ["base 'no/where'"]
    assert run_plan.model is None
    assert names(run_plan, "prepare_model") == ["lora"]
    assert any("'fails' (twig 1.0) could not check the plan" in note for note in run_plan.notes)


def test_limits_of_this_machine_are_notes(make_recipe, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"budwood": "0"}')
    run_plan = budwood.plan(make_recipe(base={"device": "cuda"}))
    assert run_plan.problems == []
    assert any(note.startswith("not on this machine: device 'cuda'") for note in run_plan.notes)
    assert any("holds another run" in note for note in run_plan.notes)


def test_missing_and_unreadable_recipes(tmp_path):
    with pytest.raises(InputError, match="no such recipe"):
        budwood.plan(tmp_path / "nothing.yaml")
    assert budwood.plan(write(tmp_path, "base: {model: x}\ndata: {train: y}\nstrategies: lora\n")).recipe is None


def rendered(run_plan, **options) -> str:
    console = Console(file=io.StringIO(), highlight=False, **options)
    show_plan(run_plan, console)
    return console.file.getvalue()


def test_a_plan_contains_no_secret(make_recipe, distribution):
    source = "class Mine(Strategy):\n    class Options(Options):\n        api_key: str\n        rank: int = 3"
    distribution("sprout", source, {"mine": "Mine"})
    for rank in (3, "x"):  # "x" is invalid, so the options are rendered as written
        recipe = make_recipe(strategies=[{"lora": None}, {"mine": {"api_key": "c0rrect-h0rse", "rank": rank}}])
        run_plan = budwood.plan(recipe)
        for text in (json.dumps(run_plan.as_dict()), rendered(run_plan), *run_plan.problems):
            assert "c0rrect-h0rse" not in text
        assert "api_key" in rendered(run_plan)


def test_without_a_terminal_each_row_is_one_line(make_recipe, ordered):
    run_plan = budwood.plan(make_recipe(strategies=[{"lora": None}, {"second": None}, {"first": None}]))
    lines = rendered(run_plan, width=40).splitlines()
    for hook, calls in run_plan.hooks.items():
        (line,) = [line for line in lines if line.startswith(f"{hook} ")]
        assert line.endswith(f"  {describe_order(calls)}")
    assert all(line == line.rstrip() for line in lines)
    assert max(map(len, rendered(run_plan, width=100, force_terminal=True, color_system=None).splitlines())) <= 100


def test_describe_order():
    def call(name: str, kind: str = "strategy", wraps: tuple[str, ...] = (), replaced: bool = False) -> Call:
        return Call(name, kind, "d 1", list(wraps), replaced)

    assert describe_order([]) == "–"
    assert describe_order([call("a"), call("b"), call("causal-lm", "task")]) == "a → b → task causal-lm"
    wrapped = [call("a", wraps=("b", "c", "d")), call("b", wraps=("c", "d")), call("c"), call("d")]
    assert describe_order(wrapped) == "a wraps b wraps (c → d)"
    assert describe_order([call("a", wraps=("core",)), call("core", "core")]) == "a wraps core"
    assert describe_order([call("a"), call("core", "core", replaced=True)]) == "a → core (replaced)"
