"""Invalid input is refused in one line that names the option, with exit code 2 and before the base loads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from budwood import BudwoodError, CorruptError, InputError, Plan, Run
from budwood.adapters.store import sealed
from budwood.recipe.schema import build_composition
from budwood.training.loop import tune

Runs = Callable[..., Run]
LABELS = ("yes", "no", "maybe")


@pytest.fixture
def refused(run_it: Runs, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Function of `run_it`'s arguments -> the error message; the base must not have loaded."""

    def run(*args: Any, kind: type[BudwoodError] = InputError, **kwargs: Any) -> str:
        with monkeypatch.context() as patch:

            def loaded(*args: Any, **kwargs: Any) -> None:
                raise AssertionError("the base was loaded")

            patch.setattr("budwood.training.setup.load_base", loaded)
            with pytest.raises(kind) as error:
                run_it(*args, **kwargs)
        assert error.value.exit_code == (2 if kind is InputError else 4)
        assert "\n" not in str(error.value)
        return str(error.value)

    return run


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        os.link(path, to / path.name)
    return to


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "distillation.teacher: missing"),
        ({"teacher": "base+"}, "distillation.teacher: must name the adapter's folder"),
        ({"teacher": "base", "quantization": "nf4"}, "quantization: the teacher 'base' is the run's own base"),
        ({"teacher": "base+x", "quantization": "nf4"}, "quantization: the teacher 'base+x' is the run's own base"),
        ({"teacher": "base", "beta": 0.3}, "beta: not used by forward-kl"),
        ({"teacher": "base", "divergence": "jensen-shannon", "beta": 1.0}, "distillation.beta: "),
        ({"teacher": "base", "divergence": "jsd"}, "distillation.divergence: "),
        ({"teacher": "base", "temperature": 0}, "distillation.temperature: "),
        ({"teacher": "base", "weight": 0}, "distillation.weight: "),
        ({"teacher": "base", "weight": 1.5}, "distillation.weight: "),
        ({"teacher": "base", "hidden_distance": "mse"}, "hidden_distance: needs a hidden_weight above 0"),
        ({"teacher": "base", "top_k": 5}, "top_k: applies only to a cache; set its folder with cache"),
        ({"teacher": "base", "cache": "c", "top_k": 0}, "distillation.top_k: "),
        ({"teacher": "base", "cache": "c", "hidden_weight": 1}, "hidden_weight: the cache stores no hidden states"),
        ({"teacher": "base", "temprature": 2}, "Did you mean 'temperature'?"),
    ],
)
def test_options(refused: Callable[..., str], options: dict[str, Any], message: str) -> None:
    assert message in refused(options)


def test_a_teacher_that_does_not_exist(refused: Callable[..., str], tiny_base: Path, tmp_path: Path) -> None:
    message = refused({"teacher": str(tiny_base.parent / "tinny")})
    assert "strategy 'distillation'" in message and "teacher: '" in message
    assert f"no such folder. Did you mean '{tiny_base}'?" in message
    assert "teacher: " in refused({"teacher": f"base+{tmp_path / 'none'}"})
    assert "no adapter" in refused({"teacher": f"base+{tiny_base}"})
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused({"teacher": str(tmp_path / "empty")})
    assert "quantiser 'nf5' is not installed. Did you mean 'nf4'?" in refused(
        {"teacher": str(tiny_base), "quantization": "nf5"}
    )


def test_a_teacher_with_custom_code(refused: Callable[..., str], tiny_base: Path, tmp_path: Path) -> None:
    """`trust_remote_code` of the recipe applies only to the base."""
    folder = copy(tiny_base, tmp_path / "copy")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    values |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config"}}
    (folder / "config.json").write_text(json.dumps(values))
    message = refused({"teacher": str(folder)}, base={"trust_remote_code": True})
    assert f"teacher: '{folder}' needs custom Python code, which a teacher may not run" in message


def test_a_corrupt_teacher(refused: Callable[..., str], tiny_base: Path, tmp_path: Path) -> None:
    folder = copy(tiny_base, tmp_path / "copy")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(weights[:-10])
    assert "truncated" in refused({"teacher": str(folder)}, kind=CorruptError)


def test_a_teacher_that_is_the_student(
    refused: Callable[..., str], run_it: Runs, tiny_base: Path, tmp_path: Path
) -> None:
    message = "in none is the base itself: write `teacher: base`"
    assert message in refused({"teacher": str(tiny_base)})
    (tmp_path / "link").symlink_to(tiny_base)
    assert message in refused({"teacher": str(tmp_path / "link")})
    assert message in refused({"teacher": str(copy(tiny_base, tmp_path / "copy"))})
    assert "in nf4 is the base itself" in refused(
        {"teacher": str(tiny_base), "quantization": "nf4"}, base={"quantization": "nf4"}
    )
    run = run_it({"teacher": str(tiny_base)}, "other", base={"quantization": "nf4"})
    assert run.step == 2, "with another quantization it is a valid teacher"


def test_a_different_vocabulary(
    refused: Callable[..., str], tiny_bases: Callable[..., Path], tiny_base: Path, tmp_path: Path
):
    folder = copy(tiny_bases("foreign", seed=4), tmp_path / "foreign")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    names = {index: token for token, index in vocabulary.items()}
    vocabulary[names[40]], vocabulary[names[41]] = 41, 40
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused({"teacher": str(folder)})
    assert f"the vocabulary of '{folder}' differs from that of the base '{tiny_base}'" in message
    assert f'token 40 is "{names[41]}" there and "{names[40]}" in the base' in message

    tokenizer["model"]["vocab"] |= {names[40]: 40, names[41]: 41}
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 300, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert 'token 300 is "<new>" there and none in the base' in refused({"teacher": str(folder)})


def test_a_different_hidden_size(refused: Callable[..., str], tiny_bases: Callable[..., Path]) -> None:
    wide = tiny_bases("wide", hidden_size=96)
    message = refused({"teacher": str(wide), "hidden_weight": 1.0})
    assert f"hidden_weight: the hidden size of the base is 64 and that of '{wide}' 96" in message


def test_an_adapter_with_a_different_base_task_or_type(
    refused: Callable[..., str], run_it: Runs, tiny_bases: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    other = tiny_bases("other-base", seed=7)
    adapter = run_it(None, "first", base={"model": str(other)}).directory / "adapter"
    message = refused({"teacher": f"base+{adapter}"})
    assert f"was trained on the base '{other}', not on '{tiny_base}'" in message
    own = run_it(None, "second").directory / "adapter"
    assert "is for causal-lm, not sequence-classification" in refused({"teacher": f"base+{own}"}, labels=LABELS)
    manifest = json.loads((own / "budwood.json").read_text())
    (own / "budwood.json").write_text(sealed({**manifest, "adapter_type": "distillation"}))
    message = refused({"teacher": f"base+{own}"})
    assert "is of type 'distillation' and the run's of type 'lora'" in message and "budwood adapter merge" in message


def test_classes(refused: Callable[..., str], run_it: Runs, tiny_base: Path, tmp_path: Path) -> None:
    def classifier(name: str, labels: tuple[str, ...], kind: str = "LlamaForSequenceClassification") -> str:
        folder, names = tmp_path / name, dict(enumerate(labels))
        config = LlamaConfig.from_pretrained(tiny_base, id2label=names, label2id={v: k for k, v in names.items()})
        LlamaForSequenceClassification(config).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((tiny_base / file).read_bytes())
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "architectures": [kind]}))
        return str(folder)

    reordered = classifier("reordered", ("yes", "no", "maybe"))
    message = refused({"teacher": reordered}, labels=LABELS)
    assert f"the classes of '{reordered}' are yes, no, maybe, and the data's are maybe, no, yes" in message
    assert "are yes, no, and the data's are" in refused({"teacher": classifier("two", ("yes", "no"))}, labels=LABELS)
    headless = classifier("headless", ("maybe", "no", "yes"), "LlamaForCausalLM")
    assert "has no trained 'score': use a model trained for" in refused({"teacher": headless}, labels=LABELS)
    message = refused({"teacher": "base"}, labels=LABELS)
    assert f"the base '{tiny_base}' has no trained 'score'" in message
    adapter = run_it(None, "first", labels=("yes", "no")).directory / "adapter"
    assert "are no, yes, and the data's are maybe, no, yes" in refused({"teacher": f"base+{adapter}"}, labels=LABELS)


def test_encoders(refused: Callable[..., str], tiny_base: Path, tmp_path: Path) -> None:
    names = dict(enumerate(sorted(LABELS)))
    config = BertConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        id2label=names, label2id={v: k for k, v in names.items()},
    )  # fmt: skip
    bert = tmp_path / "bert"
    BertForSequenceClassification(config).save_pretrained(bert)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bert / file).write_bytes((tiny_base / file).read_bytes())
    message = refused({"teacher": str(bert)}, labels=LABELS)
    assert "pools by row and the base by token" in message
    message = refused({"teacher": "base", "hidden_weight": 1.0}, labels=LABELS, base={"model": str(bert)})
    assert "hidden_weight: the base pools by row" in message


@pytest.mark.parametrize("option", ["cache", "adapter", "folder"])
def test_folders_that_overwrite_would_empty(
    make_recipe: Callable, run_it: Runs, tiny_bases: Callable[..., Path], option: str
) -> None:
    run = run_it(None, "run")
    inside = run.directory / "adapter"
    if option == "folder":
        inside = copy(tiny_bases("inside", seed=4), run.directory / "merged")
    options = {
        "cache": {"teacher": "base", "cache": str(run.directory / "cache")},
        "adapter": {"teacher": f"base+{inside}"},
        "folder": {"teacher": str(inside)},
    }[option]
    with pytest.raises(
        InputError, match="output folder, which --overwrite empties: move it|merged was not written by a run"
    ):
        tune(make_recipe(options), overwrite=True, quiet=True)
    assert inside.is_dir()


def test_two_teachers(refused: Callable[..., str]) -> None:
    message = refused({"teacher": "base"}, others=({"distillation": {"teacher": "base"}},))
    assert "strategy 'distillation' appears twice" in message


def test_teacher_base_without_an_adapter(make_recipe: Callable) -> None:
    recipe = make_recipe({"teacher": "base"})
    strategy = next(s for s in build_composition(recipe).strategies if s.name == "distillation")
    plan = Plan(recipe, [strategy])  # with trainable parameters, but no adapter
    strategy.check_plan(plan)
    assert len(plan.problems) == 1
    assert "teacher: base needs a strategy that owns an adapter: add one such as lora" in plan.problems[0]


def test_exit_code_2(make_recipe: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from budwood.cli.app import run

    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe({"teacher": str(tmp_path / "none")}).to_yaml(), encoding="utf-8")
    assert run(["tune", str(path)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "strategy 'distillation'" in last and "no such folder" in last
