"""Keys of other trainers, and fields in another section than theirs, are answered with where a recipe has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from budwood.contract.discovery import STRATEGIES
from budwood.contract.loading import load
from budwood.contract.renames import NAMES
from budwood.errors import InputError
from budwood.recipe.schema import Recipe, build_composition, load_recipe, read_recipe

STEP = "train.batch_examples: the examples of an optimizer step, over all accumulation steps"
OPTION = "an option of the strategy: `- lora: {rank: …}`"
TOP = {
    "base_model": "base.model", "dataset": "data.train", "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length", "num_epochs": "train.epochs", "lr": "train.learning_rate",
    "gradient_accumulation_steps": STEP, "micro_batch_size": STEP, "per_device_train_batch_size": STEP,
    "lora_r": OPTION, "lora_alpha": "an option of the strategy: `- lora: {alpha: …}`",
    "load_in_4bit": "base.quantization: nf4", "keep_checkpoints": "train.keep_checkpoints",
}  # fmt: skip


def recipe(tmp_path: Path, more: str = "", strategies: str = "[lora]", train: str = "{}") -> Path:
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    path = tmp_path / "recipe.yaml"
    data = f"base: {{model: x}}\ndata: {{train: {tmp_path / 'rows.jsonl'}}}\n"
    path.write_text(f"{data}strategies: {strategies}\ntrain: {train}\n{more}")
    return path


def test_every_name_of_the_table_leads_to_a_field() -> None:
    options = load("lora", STRATEGIES)[0].Options.model_fields
    for key, target in NAMES.items():
        *place, name = target.partition(":")[0].partition(",")[0].split(".")
        if place == ["lora"]:
            assert name in options, key
            continue
        section: type[BaseModel] = Recipe
        for part in place:
            kind = section.model_fields[part].annotation
            assert isinstance(kind, type) and issubclass(kind, BaseModel), key
            section = kind
        assert name in section.model_fields, key


def test_keys_of_other_trainers_are_answered_with_the_place_in_a_recipe(tmp_path: Path) -> None:
    path = recipe(tmp_path, "".join(f"{key}: 1\n" for key in TOP))
    expected = [
        f"{path}:{line}: {key}: unknown key. In a recipe, this is {TOP[key]}." for line, key in enumerate(TOP, 5)
    ]
    assert read_recipe(path)[1] == expected
    for key, place in TOP.items():
        with pytest.raises(InputError) as error:
            load_recipe(recipe(tmp_path), [f"{key}=1"])
        assert str(error.value) == f"-o {key}=1: the recipe has no '{key}'. In a recipe, this is {place}."


def test_in_the_right_section_it_is_a_name(tmp_path: Path) -> None:
    path = recipe(tmp_path, train="{num_epochs: 1, batch_size: 2, model: x}", strategies="[lora: {r: 1}]")
    where = f"{path}:4: train."
    assert read_recipe(path)[1] == [
        f"{where}num_epochs: unknown key. Did you mean 'epochs'?",
        f"{where}batch_size: unknown key. In a recipe, this is {STEP}.",
        f"{where}model: unknown key. In a recipe, this is base.model.",
    ]
    options = {
        "r": "Did you mean 'rank'?", "lora_r": "Did you mean 'rank'?", "lora_alpha": "Did you mean 'alpha'?",
        "target_modules": "Did you mean 'targets'?", "learning_rate": "In a recipe, this is train.learning_rate.",
    }  # fmt: skip
    for key, text in options.items():
        with pytest.raises(InputError) as error:
            build_composition(load_recipe(recipe(tmp_path, strategies=f"[lora: {{{key}: 1}}]")))
        assert str(error.value) == f"{path}:3: lora.{key}: unknown key. {text}"


def test_a_section_that_only_another_trainer_names_is_not_also_missing(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("base_model: x\ndataset: rows.jsonl\nlora_r: 8\noutput_dir: out\n")
    _, problems = read_recipe(path)
    assert [problem.removeprefix(f"{path}") for problem in problems] == [
        ":1: base_model: unknown key. In a recipe, this is base.model.",
        ":2: dataset: unknown key. In a recipe, this is data.train.",
        f":3: lora_r: unknown key. In a recipe, this is {OPTION}.",
        ":4: output_dir: unknown key. Did you mean 'output'?",
        ": strategies: missing (the strategies to compose, such as `- lora: {rank: 8}`; names or one-key mappings).",
    ]


def test_a_strategy_in_place_of_an_adapter_to_continue(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter: qlora: no such folder\. .* a new one is named in strategies\.$"):
        build_composition(load_recipe(recipe(tmp_path, "adapter: qlora\n")))
