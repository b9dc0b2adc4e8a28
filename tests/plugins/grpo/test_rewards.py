"""The rewards that come with Budwood, and what happens if a reward fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from budwood import InputError, PluginError, Reward, Run, Sample, build_plugin
from budwood.recipe.schema import Recipe
from budwood.training.loop import tune
from budwood_grpo.scores import score


def of(name: str, **options: Any) -> Reward:
    """Build a reward, and check it as a plan does."""
    reward: Reward = build_plugin(name, "budwood.rewards", options)
    reward.check(SimpleNamespace())  # type: ignore[arg-type]
    return reward


def judge(reward: Reward, *pairs: tuple[str, Any]) -> list[float]:
    """Return the rewards of completions, each with the value of the reward's column."""
    rows = [{column: value for column in reward.columns} for _, value in pairs]
    return list(reward.score(["?"] * len(pairs), [text for text, _ in pairs], rows))


def test_exact_match() -> None:
    assert of("exact-match").columns == ("answer",)
    pairs = ((" 42\n", "42"), ("42.", "42"), ("A", "a"), ("7", 7))
    assert judge(of("exact-match"), *pairs) == [1, 0, 0, 1]
    assert judge(of("exact-match", ignore_case=True, column="x"), *pairs) == [1, 0, 1, 1]
    extract = of("exact-match", extract=r"####\s*(\S+)")
    assert judge(extract, ("so #### 42", "42"), ("42", "42"), ("#### 4 or 2", "42")) == [1, 0, 0]


def test_regular_expression() -> None:
    assert judge(of("regex", pattern="yes|no"), ("oh yes", 0), ("maybe", 0)) == [1, 0]
    assert judge(of("regex", pattern="yes|no", whole=True), ("oh yes", 0), (" no\n", 0)) == [0, 1]


def test_length() -> None:
    run: Any = SimpleNamespace(tokenizer=None)
    samples = [Sample([1], [5] * size, [0.0] * size, "x y", "eos") for size in (4, 10, 15, 20, 40)]
    rows: list[dict[str, Any]] = [{}] * 5
    soft = of("length", soft_limit=10, limit=20)
    assert soft.score_samples(run, samples, rows) == [0, 0, -0.5, -1, -1]
    assert of("length", target=10).score_samples(run, samples, rows) == [-0.6, 0, -0.5, -1, -3]
    assert judge(of("length", target=4, unit="words"), ("a b c", 0)) == [-0.25]
    assert judge(of("length", target=4, unit="characters"), ("abcd", 0)) == [0]


def test_json_schema(tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    pairs = [(text, schema) for text in ('{"name": "a"}', ' {"name": 3}', "{}", "name", '{"name": "a"} x', "[NaN]")]
    assert judge(of("json-schema", path=str(path)), *pairs) == [1, 0, 0, 0, 0, 0]
    assert judge(of("json-schema", column="schema"), *pairs) == [1, 0, 0, 0, 0, 0]
    path.write_text('{"type": "objekt"}')
    with pytest.raises(InputError, match=r"schema\.json: not a JSON schema: 'objekt'"):
        of("json-schema", path=str(path))
    with pytest.raises(InputError, match=r"none\.json: No such file"):
        of("json-schema", path=str(tmp_path / "none.json"))


def test_mathematical_equality() -> None:
    reward = of("math-verify")
    pairs = [(r"The answer is $\frac{1}{2}$.", "0.5"), ("It is 3", "4"), (r"\boxed{x+1}", "$1+x$"), ("no idea", "2")]
    assert judge(reward, *pairs) == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="'' in column 'answer' is not an expression"):
        judge(reward, ("1", ""))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("length", {}, "set either target, or soft_limit and limit"),
        ("length", {"soft_limit": 3}, "set either target, or soft_limit and limit"),
        ("length", {"soft_limit": 3, "limit": 3}, "soft_limit: 3 must be below limit"),
        ("regex", {"pattern": "("}, "pattern: .*is not a regular expression"),
        ("exact-match", {"extract": "["}, "extract: .*is not a regular expression"),
        ("json-schema", {}, "set either path or column"),
        ("file", {"path": "nowhere.py"}, "path: nowhere.py: No such file"),
        ("adapter-log-prob", {}, "adapter: missing"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        of(name, **options)
    assert "\n" not in str(caught.value)


# --- a function in a file

CODE = """
def reward(prompts, completions, rows):
    return [float(len(p) > len(c)) + r["bonus"] for p, c, r in zip(prompts, completions, rows)]

def fails(prompts, completions, rows):
    return [1 / (text != "b") for text in completions]

def infinite(prompts, completions, rows):
    return [float("inf") if text == "b" else 0 for text in completions]

def short(prompts, completions, rows):
    return [0.0]

def undeclared(prompts, completions, rows):
    return [row["bonsu"] for row in rows]
"""


def judged(path: Path, function: str) -> np.ndarray:
    """Apply a function of the file to the completions a, b and c."""
    reward = of("file", path=str(path), function=function, columns=["bonus"])
    tokenizer = SimpleNamespace(batch_decode=lambda ids, **_: ["pq"] * len(ids))
    run: Any = SimpleNamespace(tokenizer=tokenizer)
    samples = [Sample([1], [2], [0.0], text, "eos") for text in "abc"]
    rows = [{"bonus": number, "other": 1} for number in range(3)]
    return score(run, [("file", 1.0, reward)], samples, rows, ["d.jsonl:1", "d.jsonl:2", "d.jsonl:3"])


def test_a_function_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    assert judged(path, "reward").tolist() == [[1.0], [2.0], [3.0]]
    wrong = {
        "fails": r"reward 'file' raised ZeroDivisionError: .* on d\.jsonl:2, completion 'b'",
        "infinite": r"reward 'file' returned inf, not a finite number, on d\.jsonl:2, completion 'b'",
        "short": r"reward 'file' returned 1 values for 3 completions",
        "undeclared": r"raised KeyError: column 'bonsu' is not declared .*Did you mean 'bonus'\?.* on d\.jsonl:1",
        "rewrd": r"mine\.py has no function 'rewrd'\. Did you mean 'reward'\?",
    }
    for function, text in wrong.items():
        with pytest.raises(InputError, match=text) as caught:
            judged(path, function)
        assert "\n" not in str(caught.value)
    digest = of("file", path=str(path)).options.sha256
    path.write_text(CODE + "\n")
    with pytest.raises(InputError, match="is another file than the recipe was written for"):
        of("file", path=str(path), sha256=digest)
    path.write_text("import nothing_of_this_name")
    with pytest.raises(InputError, match=r"mine\.py cannot be imported: ModuleNotFoundError"):
        of("file", path=str(path))


def test_an_installed_reward_that_fails_names_its_distribution(tmp_path: Path) -> None:
    class Broken(Reward):
        def score(self, prompts: Any, completions: Any, rows: Any) -> list[Any]:
            return [None for _ in completions]

    reward = Broken()
    reward.distribution = "theirs 1.0"
    run: Any = SimpleNamespace(tokenizer=SimpleNamespace(batch_decode=lambda ids, **_: [""]))
    with pytest.raises(PluginError, match=r"reward 'own' \(theirs 1\.0\) returned None, .* on d\.jsonl:9, completion"):
        score(run, [("own", 1.0, reward)], [Sample([1], [2], [0.0], "a", "eos")], [{}], ["d.jsonl:9"])


PACKAGE = """
from budwood import Options, Reward
class Keyword(Reward):
    "1 if the answer contains the row's keyword."
    api = 2
    columns = ("keyword",)
    class Options(Options):
        factor: float = 1.0
    def score(self, prompts, completions, rows):
        return [self.options.factor * (row["keyword"] in text) for text, row in zip(completions, rows)]
"""


def test_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from budwood.cli.plugins import plugins

    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (tmp_path / "theirs_rewards.py").write_text(PACKAGE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[budwood.rewards]\nkeyword = theirs_rewards:Keyword\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward = of("keyword", factor=2)
    assert (reward.distribution, judge(reward, ("a game", "game"), ("a", "game"))) == ("theirs 1.0", [2, 0])
    with pytest.raises(InputError, match=r"keyword\.factr: unknown key"):
        of("keyword", factr=2)
    plugins("keyword")
    assert "1 if the answer contains the row's keyword." in capsys.readouterr().out


# --- a held-out adapter


def test_the_log_probability_of_another_adapter(make_recipe: Callable[..., Recipe], said: list[str]) -> None:
    sft = make_recipe(completions=True, output="judge", train={"steps": 2})
    sft = sft.model_copy(update={"strategies": sft.strategies[:1]})
    judge = tune(sft, quiet=True)
    adapter = str(judge.directory / "adapter")
    rewards = [{"adapter-log-prob": {"adapter": adapter}}, {"adapter-log-prob": {"adapter": adapter, "mean": False}}]
    run: Run = tune(make_recipe({"rewards": rewards}, train={"steps": 1, "micro_tokens": 128}), quiet=True)
    lines = (run.directory / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 16
    for line in lines[:4]:
        record = json.loads(line)
        sums, means = record["rewards"]["adapter_log_prob_2"], record["rewards"]["adapter_log_prob"]
        assert sums == pytest.approx(means * record["tokens"], rel=1e-5)
    # The prompt and the greedy answer again, through the adapter's own run.
    sample = judge.generate(["games:"], temperature=0, max_new_tokens=4)[0][0]
    expected = sum(sample.log_probs)
    (reward,) = [r for label, _, r in run.strategies[-1].rewards if label == "adapter_log_prob_2"]  # type: ignore
    with torch.no_grad():
        (value,) = reward.score_samples(run, [sample], [{}])
    assert value == pytest.approx(expected, abs=1e-4)


def test_a_reward_model_scores_answers_as_it_does_by_itself(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [
        {"prompt": f"{word}:", "chosen": f" yes {word}", "rejected": f" no {word}"}
        for word in ("games", "files", "data", "model")
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    task, data = {"task": "reward-model"}, {"train": str(tmp_path / "pairs.jsonl"), "eval": "none"}
    recipe = make_recipe(output="judge", base=task, data=data, train={"steps": 3})
    judge = tune(recipe.model_copy(update={"strategies": recipe.strategies[:1]}), quiet=True)
    adapter = {"adapter": str(judge.directory / "adapter")}
    run: Run = tune(make_recipe({"rewards": [{"reward-model": adapter}]}, train={"steps": 1}), quiet=True)
    line = json.loads((run.directory / "samples.jsonl").read_text().splitlines()[0])

    (reward,) = [each for _, _, each in run.strategies[-1].rewards]  # type: ignore[attr-defined]
    texts = ["games: yes", "files: no games", line["prompt"] + line["completion"]]
    samples = []
    for text in texts:
        ids = run.tokenizer(text)["input_ids"]
        samples.append(Sample(ids[:2], ids[2:], [0.0] * (len(ids) - 2), text, "eos"))
    found = reward.score_samples(run, samples, [{}] * 3)
    with torch.no_grad():
        expected = [float(judge.model(input_ids=torch.tensor([s.prompt + s.tokens])).logits) for s in samples]
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(found)) == 3

    other = {"adapter": str(run.directory / "adapter")}
    with pytest.raises(InputError, match=r"trained for the task 'causal-lm', not 'reward-model'"):
        tune(make_recipe({"rewards": [{"reward-model": other}]}, output="other"), quiet=True)
