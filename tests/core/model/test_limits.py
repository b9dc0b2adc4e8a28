"""The number of tokens that a base takes; longer rows, and ids without an embedding, are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from budwood.cli.app import run
from budwood.errors import InputError
from budwood.model.checks import skeleton
from budwood.model.described import describe_base
from budwood.model.generate import generate
from budwood.model.limits import default_length, embeddings_of, positions_of
from budwood.recipe.schema import Recipe
from budwood.serving.pool import AdapterPool
from budwood.training.loop import tune

Make = Callable[..., Recipe]
SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
GPT = {"vocab_size": 60, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}


def build(name: str, **options: Any) -> Any:
    """Return a model of a configuration class, on the CPU."""
    kind = getattr(transformers, name)
    auto = transformers.AutoModelForCausalLM
    config = kind(**options)
    if type(config) not in auto._model_mapping:
        auto = transformers.AutoModelForSequenceClassification
    return auto.from_config(config).eval()


LEARNED = [
    ("GPT2Config", GPT, 20),
    ("GPTBigCodeConfig", GPT, 20),
    (
        "GPTNeoConfig",
        {"vocab_size": 60, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
        20,
    ),
    ("OPTConfig", {**SMALL, "ffn_dim": 16, "word_embed_proj_dim": 16, "pad_token_id": 1}, 20),
    ("BioGptConfig", {**SMALL, "pad_token_id": 1}, 20),
    ("BertConfig", SMALL, 20),
    ("ElectraConfig", SMALL, 20),
    ("DistilBertConfig", {"vocab_size": 60, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}, 20),
    ("RobertaConfig", {**SMALL, "pad_token_id": 1}, 18),
    ("XLMRobertaConfig", {**SMALL, "pad_token_id": 1}, 18),
    ("MPNetConfig", {**SMALL, "pad_token_id": 1}, 18),
]


@pytest.mark.parametrize(("name", "options", "expected"), LEARNED, ids=[case[0] for case in LEARNED])
def test_learned_positions_end_where_the_model_ends(name: str, options: dict[str, Any], expected: int) -> None:
    """The model itself is the reference: it accepts rows of this length, and fails on rows one token longer."""
    lengths = {"n_positions": 20} if "n_positions" in options else {"max_position_embeddings": 20}
    model = build(name, **{**options, **lengths})
    assert positions_of(model) == expected
    with torch.no_grad():
        model(input_ids=torch.full((1, expected), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, expected + 1), 5))


ROPE = {"max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("LlamaConfig", ROPE, 64),
        ("LlamaConfig", {**ROPE, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 256),
        (
            "Qwen2Config",
            {**ROPE, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
            128,
        ),
        (
            "LlamaConfig",
            {
                **ROPE,
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8,
                },
            },
            64,
        ),
        ("GPTNeoXConfig", ROPE, 64),
    ],
)  # fmt: skip
def test_rotary_positions_end_where_training_ended(name: str, options: dict[str, Any], expected: int) -> None:
    assert positions_of(build(name, **{**SMALL, **options})) == expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("BloomConfig", {"vocab_size": 60, "hidden_size": 16, "n_layer": 1, "n_head": 2}),
        ("FalconConfig", {**SMALL, "alibi": True, "new_decoder_architecture": False}),
        ("MambaConfig", {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1}),
    ],
)
def test_positions_without_an_end(name: str, options: dict[str, Any]) -> None:
    model = build(name, **options)
    assert positions_of(model) is None
    assert default_length(model) == 1024


@pytest.fixture
def short_base(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base with 32 rotary positions."""
    path = tmp_path / "short"
    shutil.copytree(tiny_base, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))
    return path


ROWS = [{"prompt": "model data:", "completion": " model"}, {"prompt": "tokens small " * 40, "completion": " tokens"}]


def test_longer_rows_are_cut_at_the_bases_positions_by_default(make_recipe: Make, short_base: Path, write: Any) -> None:
    recipe = make_recipe(
        base={"model": str(short_base)},
        data={"train": str(write(ROWS, "own.jsonl")), "max_length": None},
        train={"micro_tokens": 1024},
    )
    finished = tune(recipe, quiet=True)
    assert finished.recipe.data.max_length == 32
    assert finished.examples.stats.dropped == {"answer beyond max_length": 1}
    assert json.loads((finished.directory / "adapter" / "budwood.json").read_text())["evaluation"]["max_length"] == 32
    assert "max_length: 32" in (finished.directory / "recipe.yaml").read_text()


@pytest.mark.parametrize("part", ["train", "eval"])
def test_a_longer_length_is_refused_with_the_longest_row(
    make_recipe: Make, short_base: Path, write: Any, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr("budwood.training.setup.load_base", None)  # before the base loads
    rows = {"train": [ROWS[0]], "eval": [ROWS[0]]} | {part: [*ROWS, ROWS[0]]}
    files = {name: str(write(values, f"own-{name}.jsonl")) for name, values in rows.items()}
    recipe = make_recipe(base={"model": str(short_base)}, data={**files, "max_length": 512})
    with pytest.raises(
        InputError,
        match=rf"own-{part}.jsonl:2 has \d+ tokens, but base '.*short' takes 32 .*: set data.max_length to 32",
    ):
        tune(recipe, quiet=True)
    assert not Path(recipe.output).exists()


def test_a_longer_length_that_no_row_uses_is_fine(make_recipe: Make, short_base: Path, write: Any) -> None:
    recipe = make_recipe(
        base={"model": str(short_base)}, data={"train": str(write(ROWS[:1], "own.jsonl")), "max_length": 512}
    )
    assert tune(recipe, quiet=True).step == 4


@pytest.fixture
def added(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base with a tokenizer that has one more token than the model."""
    path = tmp_path / "added"
    shutil.copytree(tiny_base, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    count = json.loads((path / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<|filler{i}|>" for i in range(count - len(tokenizer))])
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(path)
    return path


def test_a_token_without_an_embedding_is_refused_before_the_base_loads(
    make_recipe: Make, added: Path, write: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("budwood.training.setup.load_base", None)
    train = write([ROWS[0], {"prompt": "call <|tool|>:", "completion": " yes"}], "own.jsonl")
    recipe = make_recipe(base={"model": str(added)}, data={"train": str(train)})
    path = train.with_name("recipe.yaml")
    path.write_text(recipe.to_yaml())
    for command in (["tune", str(path)], ["data", str(path)]):
        assert run(command) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "own.jsonl:2 uses token " in line and "'<|tool|>', but base " in line
        assert "base.resize_embeddings: true" in line


def test_a_token_that_is_added_but_not_used_does_no_harm(make_recipe: Make, added: Path, write: Any) -> None:
    recipe = make_recipe(base={"model": str(added)}, data={"train": str(write(ROWS[:1], "own.jsonl"))})
    assert tune(recipe, quiet=True).step == 4


def test_prompts_with_a_token_without_an_embedding_are_refused(added: Path) -> None:
    pool = AdapterPool(added, precision="fp32", device="cpu")
    with pytest.raises(InputError, match=r"prompt 1 uses token \d+ '<\|tool\|>', but base"):
        pool.generate(["call <|tool|>"], [None])
    with pytest.raises(InputError, match=r"prompt 2 uses token \d+ '<\|tool\|>', but base"):
        pool.logits(["call", "call <|tool|>"])


def test_a_prompt_fills_what_learned_positions_leave(tiny_base: Path) -> None:
    """OPT's table has two more rows than positions."""
    options = {**SMALL, "ffn_dim": 16, "word_embed_proj_dim": 16, "pad_token_id": 1, "max_position_embeddings": 20}
    model = build("OPTConfig", **{**options, "vocab_size": 4096})
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    (answer,) = generate(model, tokenizer, [[5] * 18], max_new_tokens=10)
    assert len(answer.tokens) <= 2
    with pytest.raises(InputError, match="prompt 1 has 20 tokens; the base's context holds 20"):
        generate(model, tokenizer, [[5] * 20], max_new_tokens=10)


def test_files_tell_the_limits_of_the_skeleton_or_nothing(tiny_base: Path, tmp_path: Path) -> None:
    """Of a decoder with rotary positions they tell the same limits; learned positions are left to the model's class."""
    scaled = shutil.copytree(tiny_base, tmp_path / "scaled")
    config = json.loads((scaled / "config.json").read_text())
    rope = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}
    (scaled / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    for folder in (tiny_base, scaled):
        described, frame = describe_base(folder, "AutoModelForCausalLM", False), skeleton(folder)
        assert described is not None
        assert positions_of(described) == positions_of(frame)
        assert embeddings_of(described) == embeddings_of(frame) == 300
    assert positions_of(describe_base(scaled, "AutoModelForCausalLM", False)) == 3 * config["max_position_embeddings"]
    build("GPT2Config", **GPT).save_pretrained(tmp_path / "gpt2")
    assert describe_base(tmp_path / "gpt2", "AutoModelForCausalLM", False) is None
    assert describe_base(tiny_base, "AutoModelForSequenceClassification", False) is None
    (scaled / "config.json").write_text(json.dumps(config | {"vocab_size": 299}))
    assert describe_base(scaled, "AutoModelForCausalLM", False) is None
