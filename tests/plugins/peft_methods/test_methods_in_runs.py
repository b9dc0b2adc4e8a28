"""PEFT's methods in runs and recipes: continuation, precision, heads, all options and their limits, and the page."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from budwood.cli import app
from budwood.contract.loading import load_strategy
from budwood.recipe.schema import Recipe
from budwood.serving.pool import AdapterPool
from budwood.serving.verify import verify
from budwood.training import setup
from budwood.training.loop import tune
from budwood_peft_methods.options import RoAdOptions

from .methods import CLOSE, EVERYTHING, METHODS, PAGE, PROMPTS, cells, load, page, put_stock, read, recipe_of

TRAINED = list(METHODS)
if not os.environ.get(EVERYTHING):  # one of each kind of layer, start and file; `make combinations` trains all
    TRAINED = [
        "ia3",
        "vera",
        "boft",
        "shira",
        "hira",
        "ln_tuning",
        "trainable_tokens",
        "vblora",
        "tinylora",
        "glora",
        "supertuning",
    ]


@pytest.mark.parametrize("method", TRAINED)
def test_a_run_continues_an_adapter_of_stock_peft_on_packed_rows(tiny_base: Path, tmp_path: Path, method: str) -> None:
    put_stock(load(tiny_base), method, METHODS[method]).save_pretrained(tmp_path / "stock")
    run = tune(Recipe.from_dict(recipe_of(tiny_base, tmp_path, method, adapter=str(tmp_path / "stock"))), quiet=True)
    assert run.packed
    before, after = read(tmp_path / "stock"), read(run.directory / "adapter")
    assert before[1].keys() == after[1].keys()
    frozen = {key for key, value in before[1].items() if value.equal(after[1][key])}
    fixed = ("vera_A", "vera_B", "randlora_", "indices", "w_norm", "tinylora_A", "tinylora_B", "tinylora_P", "zeros")
    assert all(any(name in key for name in fixed) for key in frozen)
    ends = tuple(before[0].pop("target_modules"))
    assert all(name.endswith(ends) for name in after[0].pop("target_modules"))
    differing = {key for key, value in before[0].items() if value != after[0][key]}
    assert differing <= {"base_model_name_or_path", "feedforward_modules"}
    on = torch.tensor([[5, 6, 7]])
    again = PeftModel.from_pretrained(load(tiny_base), run.directory / "adapter").eval()
    pool = AdapterPool(str(tiny_base), precision="fp32", device="cpu")
    pool.load("own", run.directory / "adapter")
    pool.use("own")
    with torch.no_grad():
        torch.testing.assert_close(pool.logits(on.tolist()), again(on).logits[:, -1], **CLOSE)


def test_dropout_of_a_file_that_training_does_not_have_is_reported(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = put_stock(load(tiny_base), "loha", METHODS["loha"])
    stock.peft_config["default"].module_dropout = 0.25
    stock.save_pretrained(tmp_path / "stock")
    tune(Recipe.from_dict(recipe_of(tiny_base, tmp_path, "loha", adapter=str(tmp_path / "stock"))))
    assert "loha: the adapter's 'module_dropout: 0.25' is not supported in training" in capsys.readouterr().err


def test_a_divisor_that_is_suggested_divides_every_size() -> None:
    options = RoAdOptions(group_size=64)
    shapes = {"a": (90, 8), "b": (60, 8)}
    assert options.indivisible(shapes).endswith("group_size 64 does not divide its output size 90; 30 divides all")
    assert options.indivisible({**shapes, "c": (45, 8)}).endswith("name targets whose sizes have a common divisor")
    assert not RoAdOptions(group_size=30).indivisible(shapes)


@pytest.mark.parametrize("strategy", [{"loha": {"rank": 2, "rank_dropout": 0.3}}, {"oft": {"block_size": 8}}, "hra"])
def test_recomputed_activations_give_the_same_adapter(tiny_base: Path, tmp_path: Path, strategy: Any) -> None:
    trained = []
    for again in (False, True):
        recipe = recipe_of(tiny_base, tmp_path / str(again), strategy)
        recipe["train"]["gradient_checkpointing"] = again
        trained.append(tune(Recipe.from_dict(recipe), quiet=True).trainable)
    for first, second in zip(*trained, strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", TRAINED)
def test_in_bf16_master_weights_are_fp32_and_the_adapter_is_served_as_it_was_trained(
    tiny_base: Path, tmp_path: Path, method: str
) -> None:
    recipe = recipe_of(tiny_base, tmp_path, {method: METHODS[method]})
    recipe["train"]["precision"] = "bf16"
    run = tune(Recipe.from_dict(recipe), quiet=True)
    assert {parameter.dtype for parameter in run.trainable} == {torch.float32}
    assert all(bool(parameter.isfinite().all()) for parameter in run.trainable)
    assert verify(run.directory / "adapter", device="cpu").exact


@pytest.mark.parametrize("method", ["oft", "ln_tuning"])
def test_a_classifiers_head_trains_and_is_saved_beside_it(tiny_base: Path, tmp_path: Path, method: str) -> None:
    recipe = recipe_of(tiny_base, tmp_path, {method: METHODS[method]})
    rows = [{"text": word, "label": label} for word, label in (("one", "a"), ("two", "b"), ("six", "a"), ("ten", "b"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["base"]["task"] = "sequence-classification"
    run = tune(Recipe.from_dict(recipe), quiet=True)
    saved = run.directory / "adapter"
    assert "base_model.model.score.weight" in read(saved)[1]
    assert verify(saved, device="cpu").exact
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2, dtype=torch.float32)
    again = PeftModel.from_pretrained(model, saved).eval()
    pool = AdapterPool(
        str(tiny_base), task="sequence-classification", labels=["a", "b"], precision="fp32", device="cpu"
    )
    pool.load("own", saved)
    pool.use("own")
    with torch.no_grad():
        expected = torch.cat([again(torch.tensor([prompt])).logits for prompt in PROMPTS])
    torch.testing.assert_close(pool.logits(PROMPTS), expected, **CLOSE)


def test_trainable_tokens_without_a_place_for_a_head_are_refused(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tiny_base, tmp_path, {"trainable_tokens": {"tokens": [5]}})
    (tmp_path / "rows.jsonl").write_text('{"text": "one", "label": "a"}\n{"text": "two", "label": "b"}\n' * 2)
    recipe["base"]["task"] = "sequence-classification"
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert app.run(["tune", str(tmp_path / "recipe.json")]) == 2
    assert "PEFT's trainable tokens cannot hold 'score', which must train too: use lora" in capsys.readouterr().err


def test_trainable_tokens_that_no_example_has_are_refused_before_training(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], forked: None
) -> None:
    recipe = recipe_of(tiny_base, tmp_path, {"trainable_tokens": {"tokens": [3, 4]}})
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert app.run(["tune", str(tmp_path / "recipe.json")]) == 2
    said = capsys.readouterr().err
    assert "tokens: no training example has 3, 4, so nothing would train: name tokens of the data." in said
    assert "step 1/" not in said
    assert app.run(["plan", str(tmp_path / "recipe.json"), "--tokens", "64"]) == 0


REFUSALS: list[tuple[Any, dict[str, Any], str]] = [
    ({"loha": {"rnk": 4}}, {}, "rank"),
    ({"oft": {"dora": True}}, {}, "dora"),
    ({"hra": {"rank": 3}}, {}, "rank 3 is odd"),
    ({"oft": {"block_size": 7}}, {}, "block_size 7 does not divide its input size 64; 4 divides all"),
    ({"oft": {"blocks": 4}}, {}, "give block_size or blocks"),
    ({"boft": {"block_size": 0}}, {}, "are both 0"),
    ({"c3a": {"block_size": 48}}, {}, "block_size 48 does not divide its output size 64; 32 divides all"),
    ({"lokr": {"rank": 64}}, {}, "rank 64 is above the size of its factors"),
    ({"miss": {"rank": 65}}, {}, "rank 65 is above its 64 inputs"),
    ({"miss": {"rank": 8, "variant": "mini", "mini_rank": 5}}, {}, "multiple of mini_rank 5"),
    ({"road": {"group_size": 48}}, {}, "group_size 48 does not divide its output size 64; 32 divides all"),
    ({"oft": {"r": 3}}, {}, "oft.r: unknown key. Did you mean 'blocks'?"),
    ({"vera": {"d_initial": 0}}, {}, "d_initial 0: both vectors would start at 0"),
    ({"glora": {"weight": "none", "coupling": "none", "bias": "none"}}, {}, "nothing would train"),
    (
        {"ln_tuning": {"targets": ["input_layernom"]}},
        {},
        "targets: the model has no module 'input_layernom'. Did you mean 'input_layernorm'?",
    ),
    ("LoHa", {}, "strategy 'LoHa' is not installed. Did you mean 'loha'?"),
    ("bone", {}, "what Bone called bat: use miss."),
    ({"gralora": {"rank": 5}}, {}, "rank 5 is no multiple of blocks 2"),
    ({"shira": {"rank": 60}}, {}, "rank 60 trains"),
    ({"vblora": {"vector_length": 24}}, {}, "vector_length 24 does not divide its output size 64; 16 divides all"),
    ({"vblora": {"vector_length": 8, "topk": 3}}, {}, "topk 3 is none of 2, 4, 8"),
    ({"waveft": {"wavelet": "db39"}}, {}, "wavelet 'db39': must be db1"),
    ({"waveft": {"frequencies": 6000, "proportional": True}}, {}, "frequencies 6000 is above the 5266 elements"),
    ({"supertuning": {"alpha": 4}}, {}, "alpha is that of a LoRA update: give rank too"),
    ({"supertuning": {"sparsity": 0.9999}}, {}, "sparsity 0.9999 leaves none of its 4096 weights to train"),
    ({"tinylora": {"rank": 65}}, {}, "rank 65 is above its 64 singular directions"),
    ({"peanut": {"activation": "prelu"}}, {}, "activation"),
    ({"fourierft": {"frequencies": 5000}}, {}, "frequencies 5000 is above its 4096 elements"),
    ({"ia3": {"feedforward": ["down_prj"]}}, {}, "feedforward: 'down_prj' is none of the targets. Did you mean"),
    ({"vera": {"targets": ["q_prj"]}}, {}, "no linear module is called 'q_prj'. Did you mean 'q_proj'?"),
    ({"miss": {"rank": 8, "variant": "bat"}}, {"quantization": "nf4"}, "computes with the base's weight"),
    ("trainable_tokens", {}, "tokens: name at least one token id"),
    ({"trainable_tokens": {"tokens": [300]}}, {}, "tokens: 300 is beyond the embeddings, which have 300 rows"),
    ({"ln_tuning": {"targets": ["q_proj"]}}, {}, "'model.layers.0.self_attn.q_proj' is no norm"),
    ("delora", {"precision": "fp16"}, "the quotient exceeds the largest number of fp16: use train.precision: bf16"),
]


@pytest.mark.parametrize(
    ("strategy", "base", "message"), REFUSALS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_options_are_refused_before_the_base_loads(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    strategy: Any,
    base: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(setup, "load_base", lambda *_: pytest.fail("the base loads"))
    recipe = recipe_of(tiny_base, tmp_path, strategy)
    for name, value in base.items():
        recipe["train" if name == "precision" else "base"][name] = value
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert app.run(["tune", str(tmp_path / "recipe.json")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line
    assert not (tmp_path / "run").exists()


def test_options_are_those_of_pefts_config_classes() -> None:
    """A field that a new PEFT adds, and a default that it changes, must be looked at here."""
    selection = {
        "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias",
        "fan_in_fan_out", *(field.name for field in dataclasses.fields(peft.PeftConfig)),
    }  # fmt: skip
    for method in METHODS:
        cls = load_strategy(method)[0]
        fields = {field.name: field for field in dataclasses.fields(getattr(peft, cls.peft_config))}
        if not hasattr(cls.Options, "FIELDS"):
            assert fields.keys() - selection <= {*cls.FIELDS, "modules_to_save"}, method
            continue
        known = {*cls.Options.FIELDS.values(), *cls.Options.INIT, *cls.Options.ONLY, *cls.Options.PATTERNS}
        assert fields.keys() - selection == known | {*cls.OTHER_FIELDS}, method
        for option, field in cls.Options.FIELDS.items():
            ours = cls.Options().fields()[field]
            assert ours == fields[field].default, f"{method}: {option}"


@pytest.mark.parametrize("method", METHODS)
def test_it_has_no_budget_of_ranks_that_training_divides(method: str) -> None:
    """PEFT's tuners with a budget have a method that divides it, which would have to be called here too."""
    tuners = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
    assert hasattr(tuners["ADALORA"], "update_and_allocate")
    assert not hasattr(tuners[load_strategy(method)[0].adapter_types[0]], "update_and_allocate")


def test_the_page_of_methods_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(dict.fromkeys(cells(), True)), "run `make combinations`"
