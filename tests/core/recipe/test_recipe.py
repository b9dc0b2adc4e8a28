"""The recipe: defaults, overrides, and a one-line error with its location for each invalid input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood import InputError
from budwood.recipe.file import UNKNOWN, read_recipe_file
from budwood.recipe.schema import Recipe, build_composition, default_recipe, load_recipe, read_recipe

SMALLEST = """\
base:
  model: some/base
data:
  train: train.jsonl
strategies: [lora]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that contains train.jsonl and eval.jsonl."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        Path(name).write_text('{"text": "x"}\n')
    return tmp_path


def load(text: str | bytes, *overrides: str, name: str = "recipe.yaml") -> Recipe:
    Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
    return load_recipe(Path(name), overrides)


def error_of(text: str | bytes, *overrides: str, name: str = "recipe.yaml") -> str:
    with pytest.raises(InputError) as error:
        load(text, *overrides, name=name)
    assert "\n" not in str(error.value)
    return str(error.value)


def with_train(lines: str) -> str:
    return SMALLEST.replace("train.jsonl", "train.jsonl\n  eval: eval.jsonl") + "train:\n" + lines


def test_the_smallest_recipe_has_five_lines():
    recipe = load(SMALLEST)
    assert SMALLEST.count("\n") == 5
    assert recipe.base.model == "some/base"
    assert recipe.base.quantization == "nf4"
    assert recipe.data.train == Path("train.jsonl")
    assert recipe.train.epochs is recipe.train.batch_examples is recipe.train.learning_rate is None  # see test_defaults
    assert recipe.train.precision == "auto"
    assert [choice.name for choice in recipe.strategies] == ["lora"]
    assert recipe.output == Path("runs/recipe")
    assert recipe.source == Path("recipe.yaml")


def test_every_field_can_be_set():
    text = """
    {"base": {"model": "b", "quantization": "none", "double_quantization": false, "task": "sequence-classification",
      "trust_remote_code": true, "device": "cuda:1"},
     "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 512},
     "strategies": [{"lora": {"rank": 4}}],
     "train": {"steps": 200, "batch_examples": 16, "micro_tokens": 1024, "learning_rate": 1e-4, "weight_decay": 0.01,
      "schedule": "linear", "warmup": 10, "clip": 0, "precision": "fp32", "eval_every": 50, "eval_generate": 0,
      "patience": 3, "gradient_checkpointing": true, "seed": 7, "trackers": ["wandb"]},
     "output": "runs/x"}"""
    recipe = load(text, name="recipe.json")
    assert recipe.train.learning_rate == 1e-4
    assert recipe.train.epochs is None
    assert recipe.train.batch_tokens is None
    assert recipe.strategies[0].options == {"rank": 4}


@pytest.mark.parametrize("literal", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+1e-4", ".0001"])
def test_scientific_notation_is_a_number(literal):
    assert load(with_train(f"  learning_rate: {literal}\n")).train.learning_rate == 1e-4
    assert load(SMALLEST, f"train.learning_rate={literal}").train.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("  learning_rat: 1", "recipe.yaml:8: train.learning_rat: unknown key. Did you mean 'learning_rate'?"),
        ("  lr: 1", "recipe.yaml:8: train.lr: unknown key. Did you mean 'learning_rate'?"),
        ("  seed: 1\n  epochs: -3", "recipe.yaml:9: train.epochs: must be greater than 0 (got -3)."),
        ("  epochs: 0", "recipe.yaml:8: train.epochs: must be greater than 0 (got 0)."),
        ("  epochs: 10001", "recipe.yaml:8: train.epochs: must be less than or equal to 10000 (got 10001)."),
        ("  epochs: 2.5", "recipe.yaml:8: train.epochs: must be a whole number (got 2.5)."),
        ("  epochs: true", "recipe.yaml:8: train.epochs: must be a whole number (got True)."),
        ("  epochs: '3'", "recipe.yaml:8: train.epochs: must be a whole number (got '3')."),
        ("  batch_tokens: -1", "recipe.yaml:8: train.batch_tokens: must be greater than 0 (got -1)."),
        ("  learning_rate: .nan", "recipe.yaml:8: train.learning_rate: must be a finite number (got nan)."),
        ("  learning_rate: .inf", "recipe.yaml:8: train.learning_rate: must be a finite number (got inf)."),
        ("  learning_rate: 1e999", "recipe.yaml:8: train.learning_rate: must be a finite number (got inf)."),
        ("  learning_rate: 0", "recipe.yaml:8: train.learning_rate: must be greater than 0 (got 0)."),
        ("  learning_rate: fast", "recipe.yaml:8: train.learning_rate: must be a number (got 'fast')."),
        ("  schedule: cos", "recipe.yaml:8: train.schedule: must be 'cosine', 'linear' or 'constant' (got 'cos')."),
        (
            "  warmup: 1.5",
            "recipe.yaml:8: train.warmup: a value of 1 or more counts steps and must be whole (got 1.5).",
        ),
        ("  warmup: -1", "recipe.yaml:8: train.warmup: must be greater than or equal to 0 (got -1)."),
        ("  epochs: 2\n  steps: 3", "recipe.yaml:9: train.steps: cannot be combined with train.epochs; give only one."),
        (
            "  batch_tokens: 2\n  batch_examples: 3",
            "recipe.yaml:9: train.batch_examples: cannot be combined with train.batch_tokens; give only one.",
        ),
        (
            "  micro_tokens: much",
            "recipe.yaml:8: train.micro_tokens: must be a whole number (got 'much').",
        ),
        (
            "  patience: 2\n  steps: 9",
            "recipe.yaml:8: train.patience: counts evaluations during the run; set train.eval_every too.",
        ),
        *(
            (
                f"  gradient_checkpointing: {value}",
                "recipe.yaml:8: train.gradient_checkpointing: must be true, false, auto, or the number of layers to "
                f"recompute (got {shown}).",
            )
            for value, shown in (("0", "0"), ("1.5", "1.5"), ("half", "'half'"), ("", "None"))
        ),
        (
            "  activation_offloading: true",
            "recipe.yaml:8: train.activation_offloading: is about the inputs of recomputed layers; set "
            "train.gradient_checkpointing too.",
        ),
        ("  trackers: wandb", "recipe.yaml:8: train.trackers: must be a list (got 'wandb')."),
        (
            "  trackers: [mlflow]",
            "recipe.yaml:8: train.trackers[0]: must be 'tensorboard', 'wandb' or 'trackio' (got 'mlflow').",
        ),
        ("  seed: 1\n  epochs: 1\n  seed: 2", "recipe.yaml:10: duplicate key 'seed' (first on line 8)."),
        ("  seed: &s 1", "recipe.yaml:8: '&s': anchors and aliases are not allowed; write the value out."),
        ("\tseed: 1", "recipe.yaml:8: is not YAML: a tab cannot indent or start a value; use spaces."),
        (
            "  seed: !!python/object/apply:os.system [ls]",
            "recipe.yaml:8: 'tag:yaml.org,2002:python/object/apply:os.system': tags are not allowed; "
            "write a plain value.",
        ),
        ("  seed: [1", "recipe.yaml:9: is not YAML: expected ',' or ']', but got '<stream end>'."),
        ("  ? [1, 2]\n  : 3", "recipe.yaml:8: a key must be a plain string."),
        ("  seed: " + "9" * 5000, "recipe.yaml:1: is not a recipe: a number has too many digits."),
    ],
)
def test_invalid_training_section(lines, message):
    assert error_of(with_train(lines + "\n")) == message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("base:", "bas:", "recipe.yaml:1: bas: unknown key. Did you mean 'base'?"),
        ("model:", "modle:", "recipe.yaml:2: base.modle: unknown key. Did you mean 'model'?"),
        ("some/base", "5", "recipe.yaml:2: base.model: must be text (got 5)."),
        ("some/base", "''", "recipe.yaml:2: base.model: must have at least 1 character (got '')."),
        ("base:\n  model: some/base", "base:", "recipe.yaml:1: base.model: missing (a folder with safetensors"),
        ("base:\n  model: some/base\n", "", "recipe.yaml: base: missing (the frozen base model)."),
        ("base:\n  model: some/base", "base: some/base", "recipe.yaml:1: base: must be a mapping (got 'some/base')."),
        ("some/base", "x\n  device: gpu", "recipe.yaml:3: base.device: must match pattern"),
        (
            "some/base",
            "x\n  quantization: nf5",
            "recipe.yaml:3: quantiser 'nf5' is not installed. Did you mean 'nf4'? Installed: awq, ",
        ),
        (
            "some/base",
            "x\n  task: causal_lm",
            "recipe.yaml:3: task 'causal_lm' is not installed. Did you mean 'causal-lm'? "
            "Installed: causal-lm, embedding, ",
        ),
        (
            "train.jsonl",
            "train.jsonl\n  max_length: -5",
            "recipe.yaml:5: data.max_length: must be greater than 0 (got -5).",
        ),
        ("strategies: [lora]", "", "recipe.yaml: strategies: missing"),
        ("[lora]", "[]", "recipe.yaml:5: strategies: must have at least 1 item after validation, not 0 (got [])."),
        ("[lora]", "lora", "recipe.yaml:5: strategies: must be a list, such as [lora]."),
        ("[lora]", "{lora: }", "recipe.yaml:5: strategies: must be a list, such as [lora]."),
        ("[lora]", "[3]", "recipe.yaml:5: strategies[0]: must be NAME or NAME: {OPTION: VALUE}."),
        ("[lora]", "\n  - lora: 8", "recipe.yaml:6: strategies[0].lora: must be a mapping of options."),
        (
            "[lora]",
            "\n  - lora:\n    rank: 8",
            "recipe.yaml:6: strategies[0]: has 2 keys (lora, rank); indent the options below the name.",
        ),
    ],
)
def test_invalid_sections(old, new, message):
    assert error_of(SMALLEST.replace(old, new)).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "recipe.yaml: is empty. The smallest recipe names a base, a data file and a strategy."),
        ("# nothing\n", "recipe.yaml: is empty. The smallest recipe names a base, a data file and a strategy."),
        ("- 1\n", "recipe.yaml:1: is not a recipe: the top level must be a mapping (base, data, strategies)."),
        (b"a: 1\nb: caf\xe9\n", "recipe.yaml:2: is not UTF-8 (byte 0xe9); save it as UTF-8."),
        (
            "a: 1\nb: \x00",
            "recipe.yaml:2: is not YAML: unacceptable character #x0000: special characters are not allowed.",
        ),
        ("[" * 50_000, "recipe.yaml:1: is not a recipe: nested too deeply."),
        ("x" * 200_000, "recipe.yaml: is longer than 100,000 bytes, so it is not a recipe."),
        ("a: 1\n---\nb: 1\n", "recipe.yaml:2: is not YAML: but found another document."),
    ],
)
def test_invalid_files(content, message):
    assert error_of(content) == message


def test_a_billion_laughs_attack_is_refused():
    levels = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 30))
    assert error_of("l0: &l0 [lol]\n" + levels) == (
        "recipe.yaml:1: '&l0': anchors and aliases are not allowed; write the value out."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"base": {},\n "data": {},\n "base": {}}', "recipe.json:3: duplicate key 'base' (first on line 1)."),
        ('{"base": {\n', "recipe.json:2: is not JSON: Expecting property name enclosed in double quotes (column 1)."),
        ('{"base": {},\n "dta": {}}', "recipe.json:2: dta: unknown key. Did you mean 'data'?"),
        (
            '{"base": {"model": "b"}, "data": {"train": "t"}, "strategies": ["lora"],\n\t"train": {"clip": NaN}}',
            "recipe.json:2: train.clip: must be a finite number (got nan).",
        ),
        ("\n", "recipe.json: is empty. The smallest recipe names a base, a data file and a strategy."),
    ],
)
def test_invalid_json(content, message):
    assert error_of(content, name="recipe.json").startswith(message)


def test_bom_and_crlf_are_accepted():
    assert load(b"\xef\xbb\xbf" + SMALLEST.replace("\n", "\r\n").encode()).base.model == "some/base"


def test_missing_files():
    with pytest.raises(InputError, match=r"^nowhere.yaml: no such recipe\.$"):
        load_recipe("nowhere.yaml")
    with pytest.raises(InputError, match=r"cannot be read: Is a directory\.$"):
        load_recipe(Path.cwd())
    assert error_of(SMALLEST.replace("train.jsonl", "trian.jsonl")) == (
        f"recipe.yaml:4: data.train: no such file: trian.jsonl (from {Path.cwd()})."
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file():
    Path("recipe.yaml").touch(mode=0)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        load_recipe("recipe.yaml")


def test_overrides_replace_values_of_the_file():
    recipe = load(
        SMALLEST, "train.learning_rate=1e-3", "lora.rank=16", "strategies.lora.alpha=3", "lora.targets=[q_proj]",
        "output=elsewhere", "base.device=cpu", "train.seed=1", "train.seed=2",
    )  # fmt: skip
    assert recipe.train.learning_rate == 1e-3
    assert recipe.strategies[0].options == {"rank": 16, "alpha": 3, "targets": ["q_proj"]}
    assert recipe.output == Path("elsewhere")
    assert recipe.train.seed == 2


def test_overriding_an_exclusive_field_removes_the_other():
    recipe = load(with_train("  epochs: 3\n  batch_tokens: 4096\n"), "train.steps=10", "train.batch_examples=8")
    assert (recipe.train.epochs, recipe.train.steps) == (None, 10)
    assert (recipe.train.batch_tokens, recipe.train.batch_examples) == (None, 8)


def test_overriding_all_strategies():
    assert load(SMALLEST, "strategies=[{lora: {rank: 2}}]", "lora.alpha=4").strategies[0].options == {
        "rank": 2,
        "alpha": 4,
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=3", "-o train.lr=3: train.lr: unknown key. Did you mean 'learning_rate'?"),
        ("train.epochs=-1", "-o train.epochs=-1: train.epochs: must be greater than 0 (got -1)."),
        ("train.seed", "-o train.seed: write KEY=VALUE, as in -o train.steps=100."),
        ("=3", "-o =3: write KEY=VALUE, as in -o train.steps=100."),
        ("train..seed=3", "-o train..seed=3: write KEY=VALUE, as in -o train.steps=100."),
        ("trian.steps=3", "-o trian.steps=3: the recipe has no 'trian'. Did you mean 'train'?"),
        ("lorra.rank=3", "-o lorra.rank=3: the recipe has no 'lorra'. Did you mean 'lora'?"),
        ("strategies.lorra.rank=3", "-o strategies.lorra.rank=3: the recipe has no 'lorra'. Did you mean 'lora'?"),
        ("base.model.x=3", "-o base.model.x=3: 'model' has no keys below it."),
        ("train.seed=[1", "-o train.seed=[1: is not YAML: expected ',' or ']', but got '<stream end>'."),
        ("train.seed=!!float 1", "-o train.seed=!!float 1: train.seed: must be a whole number (got 1.0)."),
        ("strategies=[lorra]", "-o strategies=[lorra]: strategy 'lorra' is not installed. Did you mean 'lora'?"),
        ("data.train=no.csv", "-o data.train=no.csv: data.train: no such file: no.csv"),
    ],
)
def test_errors_start_with_the_override(override, message):
    assert error_of(SMALLEST, override).startswith(message)


def test_unknown_strategy_suggests_the_closest_match():
    assert error_of(SMALLEST.replace("lora", "lorra")).startswith(
        "recipe.yaml:5: strategy 'lorra' is not installed. Did you mean 'lora'? Installed: "
    )


def test_micro_tokens_are_left_to_the_plan_and_hold_an_example():
    for recipe in (load(SMALLEST), load(with_train("  micro_tokens: auto\n"))):
        assert (recipe.train.micro_tokens, recipe.micro_tokens) == (None, 2048)
        assert "micro_tokens" not in recipe.to_dict()["train"]
    assert load(SMALLEST, "data.max_length=8192").micro_tokens == 8192
    assert load(with_train("  micro_tokens: 512\n")).micro_tokens == 512


def test_where_returns_the_source_of_a_value():
    text = SMALLEST.replace("[lora]", "\n  - lora:\n      rank: 8\n      alpha: 2")
    recipe = load(text, "lora.alpha=4")
    assert recipe.where("data", "train") == "recipe.yaml:4"
    assert recipe.where("data", "max_length") == "recipe.yaml:3"
    assert recipe.where("strategies", "lora", "rank") == "recipe.yaml:7"
    assert recipe.where("strategies", "lora", "dropout") == "recipe.yaml:6"
    assert recipe.where("strategies", "lora", "alpha") == "-o lora.alpha=4"
    assert recipe.where("train", "seed") == "recipe.yaml"


def test_all_problems_are_reported_and_valid_values_are_kept():
    text = """\
base: {modle: some/base}
data: {train: nope.jsonl, evl: eval.jsonl}
strategies:
  - lora: {rank: 4}
  - 3
  - lorra
train: {epochs: 2, steps: 3, patience: 2, eval_every: -1, learning_rate: fast, trackers: [mlflow], schedule: linear}
"""
    Path("recipe.yaml").write_text(text)
    recipe, problems = read_recipe("recipe.yaml", ["train.x=3", "foo=2"])
    assert [problem.partition(": ")[2].split(": ")[0].removesuffix(".") for problem in problems] == [
        "strategies[1]", "the recipe has no 'foo'", "base.modle", "data.evl", "train.steps", "train.x",
        "train.learning_rate", "train.eval_every", "train.trackers[0]",
        "strategy 'lorra' is not installed. Did you mean 'lora'? Installed", "data.train",
    ]  # fmt: skip
    assert problems[0].startswith("recipe.yaml:5: ")
    assert recipe is not None
    assert [choice.name for choice in recipe.strategies] == ["lora", UNKNOWN, "lorra"]
    assert (recipe.base.model, recipe.train.schedule, recipe.train.learning_rate) == (UNKNOWN, "linear", None)
    with pytest.raises(InputError, match=r"^recipe.yaml:5: .*\(10 more: `budwood plan` lists them\)$") as error:
        load_recipe("recipe.yaml", ["train.x=3", "foo=2"])
    assert list(error.value.problems) == problems


@pytest.mark.parametrize(
    ("old", "new", "count"),
    [
        ("max_length: 128", "max_length: many", 1),
        ("eval: eval.jsonl", "evl: eval.jsonl", 1),  # the missing file for eval_every is not reported
        ("strategies: [lora]", "", 1),
        ("base: {model: some/base}", "", 1),
        ("base: {model: some/base}", "base: some/base", 1),
    ],
)
def test_consequences_of_a_problem_are_not_reported(old, new, count):
    text = """\
base: {model: some/base}
data: {train: train.jsonl, eval: eval.jsonl, max_length: 128}
strategies: [lora]
train: {micro_tokens: 512, eval_every: 10}
"""
    Path("recipe.yaml").write_text(text.replace(old, new))
    assert len(read_recipe("recipe.yaml")[1]) == count


OPTIONAL = """
class Mine(Strategy):
    class Options(Options):
        rank: int = Field(8, ge=1)
        layers: list[int] | None = None
"""


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        ("\n  - mine:\n      rnk: 8", [], "recipe.yaml:7: mine.rnk: unknown key. Did you mean 'rank'?"),
        ("[mine: {rank: 0}]", [], "recipe.yaml:5: mine.rank: must be greater than or equal to 1 (got 0)."),
        ("[mine]", ["mine.rank=0"], "-o mine.rank=0: mine.rank: must be greater than or equal to 1 (got 0)."),
    ],
)
def test_errors_in_strategy_options_start_with_their_line(distribution, options, overrides, message):
    distribution("sprout", OPTIONAL, {"mine": "Mine"})
    recipe = load(SMALLEST.replace("[lora]", options), *overrides)
    with pytest.raises(InputError) as error:
        build_composition(recipe)
    assert str(error.value) == message


def test_written_recipes_round_trip(distribution):
    distribution("sprout", OPTIONAL, {"mine": "Mine"})
    recipe = load(SMALLEST.replace("[lora]", "[mine]"), "train.steps=10", "train.learning_rate=1e-5", "output=a b/#c")
    again = load(recipe.to_yaml(), name="again.yaml")
    assert again.to_dict() == recipe.to_dict()
    assert Recipe.from_dict(recipe.to_dict()).to_dict() == recipe.to_dict()
    strategies = build_composition(recipe).strategies
    assert recipe.to_dict(strategies)["strategies"] == [{"mine": {"rank": 8, "layers": None}}]
    resolved = load(recipe.to_yaml(strategies), name="resolved.yaml")
    assert resolved.strategies[0].options == {"rank": 8, "layers": None}


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029"), min_size=1, max_size=40))
@settings(deadline=None, max_examples=50)
def test_any_text_round_trips(text):
    recipe = Recipe.from_dict({"base": {"model": text}, "data": {"train": "t.jsonl"}, "strategies": ["lora"]})
    Path("written.yaml").write_bytes(recipe.to_yaml().encode())
    assert read_recipe_file(Path("written.yaml"))[0]["base"]["model"] == text


def test_default_recipe():
    recipe = default_recipe("train.jsonl", "some/base", eval="eval.jsonl", overrides=["lora.rank=2"])
    assert recipe.data.eval == Path("eval.jsonl")
    assert recipe.strategies[0].options == {"rank": 2}
    assert recipe.output == Path("runs/train")
    with pytest.raises(InputError, match=r"^recipe: base.model: must have at least 1 character"):
        default_recipe("train.jsonl", "")
    with pytest.raises(InputError, match=r"^trian.jsonl: no such file \(from "):
        default_recipe("trian.jsonl", "some/base")


def test_recipes_are_immutable():
    recipe = load(SMALLEST)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.seed = 3
    data = {"base": {"model": "x"}, "data": {"train": "t"}, "strategies": ["lora"]}
    before = json.dumps(data)
    Recipe.from_dict(data, ["lora.rank=3"])
    assert json.dumps(data) == before


def test_loading_a_recipe_imports_neither_torch_nor_a_plugin():
    Path("recipe.yaml").write_text(SMALLEST)
    code = (
        "import sys; from budwood.recipe.schema import load_recipe; load_recipe('recipe.yaml');"
        "print(sorted({'torch', 'transformers', 'datasets', 'budwood_lora'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_chat_template_from_the_user(tiny_base: Path, tmp_path: Path) -> None:
    from budwood.recipe.data import encoding_options, recipe_tokenizer

    file = tmp_path / "mine.jinja"
    data = {"train": "x.jsonl", "chat_template": str(file), "template_options": {"a": 1}, "loss_on": "last"}
    recipe = Recipe.from_dict(
        {"base": {"model": str(tiny_base)}, "data": data, "strategies": ["lora"], "output": "runs/x"}
    )
    options = encoding_options(recipe.with_length(512))
    assert options == {
        "max_length": 512, "loss_on": "last", "template_options": {"a": 1}, "skip_bad_rows": False, "as_chat": False,
        "group_by": None,
    }  # fmt: skip
    with pytest.raises(InputError, match="data.chat_template: .*mine.jinja is not a file of at most 1 MiB"):
        recipe_tokenizer(recipe)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="mine.jinja is not UTF-8"):
        recipe_tokenizer(recipe)
    file.write_text(" \n")
    with pytest.raises(InputError, match="mine.jinja is empty"):
        recipe_tokenizer(recipe)
    file.write_text("{{ messages[0].content }}")
    assert recipe_tokenizer(recipe).chat_template == "{{ messages[0].content }}"
