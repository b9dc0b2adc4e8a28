"""PEFT's types that are no strategies: each is refused by name, with the reason and what to use instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType
from safetensors.torch import save_file

from budwood.cli import app
from budwood.contract.discovery import ABSENT, absence, installed
from budwood.contract.loading import adapter_owner
from budwood.errors import InputError


def test_every_type_of_peft_is_a_strategy_or_absent_with_a_reason_and_a_remedy() -> None:
    owned = {name for entry in _strategies() for name in entry.declared("adapter_types")}
    absent = {name.upper() for name in installed(ABSENT)}
    types = {str(member.value) for member in PeftType}
    assert not owned & absent
    assert types == (owned | absent) & types, f"nobody decided on {sorted(types - owned - absent)}"
    for name in absent:
        assert ": use " in absence(name) or ": train " in absence(name)


def _strategies() -> list[Any]:
    return [entry for entries in installed().values() for entry in entries]


def test_remedies_name_strategies_that_exist() -> None:
    known = {*installed(), "lora"}
    for name in installed(ABSENT):
        remedy = absence(name).rpartition(": ")[2] if "bias:" not in absence(name) else "use glora"
        assert known & set(remedy.replace(",", " ").split()), name


@pytest.mark.parametrize("name", ["xlora", "prompt_tuning", "prefix-tuning", "p_tuning", "adaption_prompt", "POLY"])
def test_a_recipe_that_names_one_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = {
        "base": {"model": "tiny"}, "data": {"train": str(tmp_path / "rows.jsonl")}, "strategies": [name],
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert app.run(["check", str(tmp_path / "recipe.json")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if f"'{name}'" in line]
    assert len(lines) == 1 and f"strategy '{name}' is not offered: it " in lines[0]


def test_an_adapter_of_one_is_refused_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING"}))
    save_file({"prompt_embeddings": torch.zeros(2, 4)}, tmp_path / "adapter_model.safetensors")
    assert app.run(["adapter", "verify", str(tmp_path)]) == 2
    assert "'PREFIX_TUNING' is not offered: it trains virtual tokens" in capsys.readouterr().err


def test_a_type_that_nobody_knows_has_no_reason() -> None:
    with pytest.raises(InputError, match="no installed strategy reads PEFT's adapter type 'NEW'"):
        adapter_owner("NEW")


def test_plugins_say_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["plugins", "xlora"]) == 2
    assert "'xlora' is not offered: it weighs adapters anew" in capsys.readouterr().err
