"""Misuse of hooks: each gives one line that names the plugin and the hook."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.core.training.misuse import LORA, WHO, Make, mine

from budwood import PluginError, tune
from budwood.cli import app as cli
from budwood.errors import DivergedError, InputError


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("[ParameterGroup('lora_A', {'x': new})]", "two groups are called 'lora_A': rename one."),
        ("[ParameterGroup('a', {'x': new}), ParameterGroup('a', {})]", "two groups are called 'a': rename one."),
        (
            "[ParameterGroup('a', {'x': new}), ParameterGroup('b', {'x': other})]",
            "parameter 'x' is in the groups 'a' and 'b': list it in one.",
        ),
        (
            "[ParameterGroup('a', {'x': new}), ParameterGroup('b', {'y': new})]",
            "parameter 'y' is in the groups 'a' and 'b': list it in one.",
        ),
    ],
)
def test_groups_and_parameters_have_unique_names(refused: Callable, groups: str, message: str) -> None:
    body = f"""
@hookimpl
def trainable_parameters(self, run, model):
    new, other = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    return {groups}
after = ("adapter",)
"""
    assert refused(body) == f"{WHO}, hook trainable_parameters: {message}"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{'a': {1, 2}}", "strategies/mine/a: a set cannot be saved"),
        ("{'a': [{(1, 2): 3}]}", "strategies/mine/a/0: the key (1, 2) cannot be saved"),
        ("{'a': {float('inf'): 3}}", "strategies/mine/a: the key inf cannot be saved"),
        ("{'a': np.array(['x'])}", "strategies/mine/a: an array of <U1 cannot be saved"),
        ("{'a': np.array([1], dtype='>i4')}", "strategies/mine/a: an array of >i4 cannot be saved"),
        ("{'a': torch.eye(2).to_sparse()}", "strategies/mine/a: a tensor of torch.sparse_coo and torch.float32 cannot"),
        ("{'a': torch.ones(2, dtype=torch.complex128)}", "and torch.complex128 cannot be saved"),
        (
            "{'a': enum.IntEnum('Colour', 'RED').RED}",
            "strategies/mine/a: a Colour comes back from a checkpoint as a int",
        ),
        (
            "{'a': enum.StrEnum('Colour', 'RED').RED}",
            "strategies/mine/a: a Colour comes back from a checkpoint as a str",
        ),
        ("{'a': [dataclasses.make_dataclass('P', ['x'])(1)]}", "strategies/mine/a/0: a P cannot be saved"),
        ("{'a': __import__('collections').namedtuple('P', 'x')(1)}", "a P comes back from a checkpoint as a tuple"),
        ("{1: 2}", "returned a dict; it must return a dict with string keys"),
    ],
)
def test_a_state_that_a_checkpoint_cannot_restore(refused: Callable, state: str, message: str) -> None:
    """Rejected before the first step, not at the resume that needs it."""
    body = f"""
@hookimpl
def state_dict(self, run):
    assert run.step == 0
    return {state}
@hookimpl
def load_state_dict(self, run, state): ...
"""
    line = refused(body, train={"steps": 2, "save_every": 1})
    assert line.startswith(f"{WHO}, hook state_dict") and message in line


def test_a_state_with_every_supported_type(distribution: Callable, make_recipe: Make) -> None:
    body = """
@hookimpl
def state_dict(self, run):
    return {
        "t": torch.ones(2, dtype=torch.bfloat16), "a": np.ones((2, 1), dtype=np.int16), "n": None, "s": np.float32(0.5),
        "nested": {1: [True, "x", float("nan")], 2.5: (float("-inf"), {"$tensor": "x"})}, "empty": {}, "list": [],
    }
@hookimpl
def load_state_dict(self, run, state):
    assert (state["t"].dtype, state["a"].dtype, state["s"]) == (torch.bfloat16, np.int16, 0.5)
    assert state["nested"][1][:2] == [True, "x"] and state["nested"][2.5] == (float("-inf"), {"$tensor": "x"})
    type(self).taken_back = True
taken_back = False
@hookimpl
def before_clip(self, run):
    if run.step == 1 and not self.taken_back:
        raise ValueError("stop here")
"""
    distribution("sprout", mine(body), {"mine": "Mine"})
    recipe = make_recipe(strategies=[LORA, "mine"], train={"steps": 2, "save_every": 1})
    with pytest.raises(PluginError, match="stop here"):
        tune(recipe, quiet=True)
    assert tune(recipe, quiet=True, resume=True).step == 2


CORES = (
    "loss",
    "gradient_norm",
    "learning_rate",
    "skipped",
    "step",
    "epoch",
    "tokens",
    "tokens_per_second",
    "best_step",
)


@pytest.mark.parametrize("name", CORES)
def test_a_logged_value_may_not_use_cores_names(refused: Callable, name: str) -> None:
    line = refused(f"@hookimpl\ndef before_clip(self, run):\n    run.log('{name}', 1.0)")
    assert line.startswith(
        f"{WHO}, hook before_clip, step 1: '{name}' is one of core's own metrics: choose another name"
    )


@pytest.mark.parametrize("name", ["loss", "skipped"])
def test_a_metric_may_not_use_cores_names(refused: Callable, name: str) -> None:
    line = refused(f"@hookimpl\ndef evaluate(self, run):\n    return {{'{name}': 1.0}}", evaluate=True)
    assert line.startswith(f"{WHO}, hook evaluate, after step 0: '{name}' is one of core's own metrics")


TASK = "task 'causal-lm' (budwood 0.1.0), hook evaluate"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "def evaluate(self, run):\n    return {'eval_loss': 0.0}",
            "task 'causal-lm' (budwood 0.1.0), hook evaluate, after step 0: 'eval_loss' is also logged by "
            f"{WHO}, hook evaluate: rename one of them.",
        ),
        (
            "def before_clip(self, run):\n    run.log('eval_loss', 0.0)",
            f"{WHO}, hook before_clip, step 1: 'eval_loss' is also logged by {TASK}: rename one of them",
        ),
        (
            "def before_clip(self, run):\n    run.log('causal_lm', 0.0)",
            f"{WHO}, hook before_clip, step 1: 'causal_lm' is also logged by task 'causal-lm' (budwood 0.1.0), hook "
            "token_terms: rename one of them",
        ),
        (
            "def loss_terms(self, step, outputs):\n    return LossTerm('eval_loss', torch.zeros(()), 'step')",
            f"{WHO}, hook loss_terms, step 1: 'eval_loss' is also logged by {TASK}: rename one of them",
        ),
    ],
)
def test_a_value_may_not_use_the_tasks_names(refused: Callable, body: str, message: str) -> None:
    assert refused(f"@hookimpl\n{body}", evaluate=True).startswith(message)


def test_two_strategies_may_not_log_under_the_same_name(distribution: Callable, make_recipe: Make) -> None:
    """The caller is identified from the stack, even if a helper of its package logs."""
    distribution("sprout", mine("@hookimpl\ndef before_clip(self, run):\n    run.log('x', 1.0)"), {"mine": "Mine"})
    helper = "def note(run):\n    run.log('x', torch.ones(1))\n"
    theirs = mine("@hookimpl\ndef evaluate(self, run):\n    note(run)\n    return {}", "Theirs")
    distribution("twig", helper + theirs, {"theirs": "Theirs"})
    with pytest.raises(PluginError) as caught:
        tune(make_recipe(strategies=[LORA, "theirs", "mine"], evaluate=True), quiet=True)
    says = f"{WHO}, hook before_clip, step 1: 'x' is also logged by strategy 'theirs' (twig 1.0), hook evaluate"
    assert str(caught.value).startswith(says)


def test_a_strategys_own_name_may_be_used_from_several_of_its_hooks(distribution: Callable, make_recipe: Make) -> None:
    body = """
@hookimpl
def before_clip(self, run):
    run.log("x", 1)
@hookimpl
def after_optimizer_step(self, run):
    run.log("x", torch.tensor([2.0]))
@hookimpl
def evaluate(self, run):
    return {"eval_x": 3.0}
"""
    distribution("sprout", mine(body), {"mine": "Mine"})
    run = tune(make_recipe(strategies=[LORA, "mine"], evaluate=True), quiet=True)
    assert (run.metrics["x"], run.metrics["eval_x"]) == (2.0, 3.0)


@pytest.mark.parametrize("value", ["'text'", "None", "torch.ones(2)"])
def test_a_logged_value_is_a_scalar(refused: Callable, value: str) -> None:
    line = refused(f"@hookimpl\ndef before_clip(self, run):\n    run.log('x', {value})")
    assert line.startswith(f"{WHO}, hook before_clip, step 1: ValueError: run.log: 'x' must be a single number")


@pytest.mark.parametrize(
    ("hook", "unit"), [("loss_terms(self, step, outputs)", "step"), ("sequence_terms(self, step, log_probs)", "label")]
)
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_non_finite_term_is_named(
    distribution: Callable, make_recipe: Make, said: list[str], hook: str, unit: str, policy: str
) -> None:
    values = "log_probs" if "log_probs" in hook else "outputs.hidden.sum()"
    body = f"@hookimpl\ndef {hook}:\n    wrong = float('nan') if step.run.step == 1 else 0.0\n"
    body += f"    return LossTerm('odd', {values} * wrong, '{unit}')"
    distribution("sprout", mine(body), {"mine": "Mine"})
    recipe = make_recipe(strategies=[LORA, "mine"], train={"steps": 3, "non_finite": policy})
    if policy == "stop":
        with pytest.raises(DivergedError) as caught:
            tune(recipe)
        said.append(str(caught.value))
    else:
        assert tune(recipe).metrics["skipped"] == 1
    assert any(f"step 2: loss 'odd' of {WHO} is not finite" in line for line in said), said


@pytest.mark.parametrize(
    ("unit", "other"), [("pairs", "strategy 'theirs' (twig 1.0)"), ("label", "core"), ("token", "core")]
)
def test_a_unit_is_counted_once(distribution: Callable, make_recipe: Make, unit: str, other: str) -> None:
    body = f"@hookimpl\ndef batch_counts(self, run, batch):\n    return {{'{unit}': 1.0}}"
    distribution("sprout", mine(body), {"mine": "Mine"})
    theirs = "@hookimpl\ndef batch_counts(self, run, batch):\n    return {'pairs': 1.0}"
    distribution("twig", mine(theirs, "Theirs"), {"theirs": "Theirs"})
    with pytest.raises(PluginError) as caught:
        tune(make_recipe(strategies=[LORA, "theirs", "mine"]), quiet=True)
    assert str(caught.value).startswith(f"{WHO}: batch_counts counts '{unit}', which {other} already counts: rename it")


SEQUENCE = "@hookimpl\ndef sequence_terms(self, step, log_probs):\n    return LossTerm('mine', {values}, '{unit}')"


@pytest.mark.parametrize(
    ("values", "unit", "message"),
    [
        ("log_probs[:3]", "label", "values must be [8] of unit 'example' or [8] of unit 'group' or ["),
        ("log_probs.sum()", "example", "of unit 'label', not [] of unit 'example'"),
        ("log_probs", "pairs", "of unit 'pairs'"),
        ("log_probs", "step", "of unit 'step'"),
        ("log_probs.detach()", "label", "has no graph to the log-probabilities: it would train nothing"),
        ("torch.zeros_like(log_probs).requires_grad_()", "label", "has no graph to the log-probabilities: it would"),
        (
            "log_probs.detach() * next(iter(step.run.trainable)).sum()",
            "label",
            "has no graph to the log-probabilities: it would train nothing. Compute it from `log_probs` without",
        ),
    ],
)
def test_a_sequence_term_of_the_wrong_shape_or_without_a_graph(
    refused: Callable, values: str, unit: str, message: str
) -> None:
    line = refused(SEQUENCE.format(values=values, unit=unit))
    assert line.startswith(f"{WHO}: loss term 'mine' of sequence_terms") and message in line


FORMAT = """
from budwood.data.chat_formats import PromptCompletion

class Pairs(PromptCompletion):
    name, tasks = "pairs", ("regression", "bare")
"""


REGRESSION = """
from budwood import CausalLM

class Regression(CausalLM):
    name = "regression"

    def loss(self, logits, labels):
        return (logits.float().mean(-1) - labels) ** 2

    def has_log_probs(self):
        return False
"""


def test_an_objective_on_a_task_without_log_probabilities_is_rejected_before_the_base_loads(
    distribution: Callable, make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    distribution("sprout", mine(SEQUENCE.format(values="log_probs", unit="label")), {"mine": "Mine"})
    distribution("twig", REGRESSION, {"regression": "Regression"}, "budwood.tasks")
    distribution("leaf", FORMAT, {"pairs": "Pairs"}, "budwood.formats")
    recipe = make_recipe(strategies=[LORA, "mine"], base={"task": "regression"})
    message = f"{WHO}: task 'regression' (twig 1.0) has no log-probabilities, which its loss needs (sequence_terms)"

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded, or the data read")

    monkeypatch.setattr("budwood.training.setup.load_base", never)
    monkeypatch.setattr("budwood.training.setup.read_data", never)
    with pytest.raises(InputError) as caught:
        tune(recipe, quiet=True)
    assert str(caught.value) == message
    monkeypatch.setattr(cli, "silence_libraries", lambda debug: None)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert cli.run(["plan", str(path)]) == 2
    assert message in capsys.readouterr().err


OLD = {
    "prepare_batch(self, run, batch)": [
        ("batch.input_ids", 'Batch.input_ids was removed in version 2 of the contract; use batch.inputs["input_ids"]'),
        ("setattr(batch, 'input_ids', 3)", "Batch.input_ids was removed in version 2"),
        ("dataclasses.replace(batch, position_ids=3)", "Batch.position_ids was removed in version 2"),
        ("batch.example_of_token", "use batch.example_of_position"),
        ("batch.example_ids", "use batch.keys"),
        ("batch.num_tokens", "use sum(batch.lengths)"),
        ("batch.attention_mask", 'use batch.inputs.get("attention_mask")'),
    ],
    "prepare_examples(self, run, examples)": [
        ("examples[0].id", "Example.id was removed in version 2 of the contract; use example.key"),
        ("examples[0].input_ids", 'use example.inputs["input_ids"]'),
        ("examples[0].supervised", "use example.label_positions"),
        ("examples[0].label", "use example.labels"),
        ("examples[0].prompt_length", "use run.task.probe(example)"),
        ("len(examples[0])", "use run.task.length(example)"),
        ("Example(7, input_ids=np.arange(4), supervised=np.zeros(4, bool))", 'use example.inputs["input_ids"]'),
    ],
}


@pytest.mark.parametrize(("hook", "code", "message"), [(hook, *case) for hook, cases in OLD.items() for case in cases])
def test_uses_of_version_1_attributes_are_reported_with_their_line(
    distribution: Callable, make_recipe: Make, hook: str, code: str, message: str
) -> None:
    source = mine(f"@hookimpl\ndef {hook}:\n    gone = {code}").replace("    api = 2\n", "")
    line = next(i for i, text in enumerate(source.splitlines(), 3) if "gone =" in text)  # the fixture adds two lines
    distribution("sprout", source, {"mine": "Mine"})
    with pytest.raises(PluginError) as caught:
        tune(make_recipe(strategies=[LORA, "mine"]), quiet=True)
    where = ", step 1" if "prepare_batch" in hook else ""
    text = str(caught.value)
    assert text.startswith(f"{WHO}, hook {hook.partition('(')[0]}{where}: sprout.py:{line}: ") and message in text


def test_a_task_without_a_method_ends_the_command_with_3(
    distribution: Callable, make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source = "from budwood import Task\nclass Bare(Task):\n    api, name, auto_class = 2, 'bare', 'AutoModel'\n"
    distribution("sprout", source, {"bare": "Bare"}, "budwood.tasks")
    distribution("leaf", FORMAT, {"pairs": "Pairs"}, "budwood.formats")
    monkeypatch.setattr(cli, "silence_libraries", lambda debug: None)
    path = tmp_path / "recipe.json"
    recipe = json.loads(json.dumps(make_recipe(base={"task": "bare"}).to_dict(), default=str))
    path.write_text(json.dumps(recipe), encoding="utf-8")
    assert cli.run(["tune", str(path)]) == 3
    shown = capsys.readouterr().err
    assert "error: task 'bare' of sprout 1.0: sprout:Bare does not implement 'encode', which is required" in shown
    assert "Traceback" not in shown
