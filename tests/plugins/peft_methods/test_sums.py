"""Weighted sums of adapters of one method: against sums of what each changes, in every linear; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.conftest import make_base
from typer.testing import CliRunner

from budwood.adapters.store import read_adapter
from budwood.cli.app import app
from budwood.contract.loading import load_strategy
from budwood.errors import BudwoodError, InputError
from budwood.serving.exports.targets import export_for
from budwood.serving.exports.wanted import Wanted
from budwood.serving.material.combine import combine
from budwood.serving.verify import verify

from .methods import METHODS, SUMMED, load, put_stock

WEIGHTS = (0.7, -0.4)
CASES: list[tuple[str, dict[str, Any]]] = [
    *((method, METHODS[method]) for method in SUMMED),
    ("ia3", {}),
    ("miss", {"rank": 8, "variant": "bat"}),
    ("miss", {"rank": 8, "variant": "mini", "mini_rank": 16}),
    ("waveft", {"frequencies": 30, "wavelet": "db3"}),
    ("supertuning", {"sparsity": 0.95, "rank": 2, "alpha": 3.0}),
    ("glora", {"weight": "vector", "coupling": "none"}),
]


def stock(base: Path, folder: Path, method: str, options: dict[str, Any], seed: int, **changes: Any) -> Path:
    """Save an adapter of stock PEFT whose random choices, such as positions, depend on the seed."""
    model = put_stock(load(base), method, options, **changes)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (3.0 if "spectrum" in name or "c3a" in name else 0.1))
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


@torch.no_grad()
def changes(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return what stock PEFT's merge changes of each tensor of the base, in float64."""
    plain = dict(load(base).named_parameters())
    opened = PeftModel.from_pretrained(load(base), adapter)
    merged = dict(opened.merge_and_unload().named_parameters())
    return {name: merged[name].double() - value.double() for name, value in plain.items()}


@pytest.mark.parametrize(("method", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_it_changes_the_base_by_the_weighted_sum_of_the_changes(
    tiny_base: Path, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    other = (
        {} if method in ("ln_tuning", "trainable_tokens", "tinylora") else {"target_modules": ["v_proj", "down_proj"]}
    )
    if method == "shira":
        other |= {"random_seed": 1}
    if method == "trainable_tokens":
        other |= {"token_indices": [7, 11]}
    more = options
    if method in ("hira", "glora") and "rank" in options:
        more = {**options, "rank": options["rank"] + 1}
    if method == "trainable_tokens":
        more = {"tokens": other.pop("token_indices")}
    if method == "supertuning":
        more = {**options, "sparsity": 0.97, "select_top": False}
    if method == "ia3" and options:
        more = {"feedforward": ["down_proj"]}
    folders = [
        stock(tiny_base, tmp_path / "a", method, options, seed=1),
        stock(tiny_base, tmp_path / "b", method, more, seed=2, **other),
    ]
    made = combine(folders, tmp_path / "sum", weights=WEIGHTS, base=str(tiny_base), device="cpu")
    assert (made.adapter_type, made.rank, made.error) == (method, None, 0)
    parts = [changes(tiny_base, folder) for folder in folders]
    for name, change in changes(tiny_base, tmp_path / "sum").items():
        expected = sum(weight * part[name] for weight, part in zip(WEIGHTS, parts, strict=True))
        # Weights of the order of 1 are merged, and read again, in fp32.
        torch.testing.assert_close(
            change, expected, atol=1e-6, rtol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert name.endswith("proj.weight") is False or not expected.any() or change.any()
    assert verify(tmp_path / "sum", base=str(tiny_base), device="cpu").exact
    record = read_adapter(tmp_path / "sum").manifest
    assert record is not None and record.made is not None and [part.weight for part in record.made.parts] == [*WEIGHTS]


def test_rows_that_peft_repeats_for_a_tied_head_count_once(tmp_path: Path) -> None:
    """PEFT's file has them twice, Budwood's once: one of each has the sum that two of PEFT's have."""
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    options = METHODS["trainable_tokens"]
    folders = [stock(base, tmp_path / name, "trainable_tokens", options, seed) for name, seed in ("a1", "b2")]
    once = tmp_path / "once"
    shutil.copytree(folders[0], once)
    file = once / "adapter_model.safetensors"
    tensors = load_file(file)
    assert len(tensors) == 2
    save_file({key: value for key, value in tensors.items() if "embed_tokens" in key}, file)
    sums = []
    for first in (folders[0], once):
        out = tmp_path / f"sum-{first.name}"
        combine([first, folders[1]], out, weights=WEIGHTS, base=str(base), device="cpu")
        sums.append(load_file(out / "adapter_model.safetensors"))
    assert sums[0].keys() == sums[1].keys() and all(torch.equal(sums[0][key], sums[1][key]) for key in sums[0])


def test_equal_positions_stay_as_they_are(tiny_base: Path, tmp_path: Path) -> None:
    for method in ("shira", "supertuning"):
        folders = [
            stock(tiny_base, tmp_path / method / name, method, METHODS[method], seed) for name, seed in ("a1", "b2")
        ]
        combine(folders, tmp_path / method / "sum", base=str(tiny_base), device="cpu")
        before, after = (
            load_file(folder / "adapter_model.safetensors") for folder in (folders[0], tmp_path / method / "sum")
        )
        assert {key: value.shape for key, value in before.items()} == {key: value.shape for key, value in after.items()}


@pytest.mark.parametrize("method", [method for method in METHODS if method not in SUMMED])
def test_methods_without_a_sum_say_so_and_what_to_do(tiny_base: Path, tmp_path: Path, method: str) -> None:
    assert not hasattr(load_strategy(method)[0], "combine_adapters")
    folder = stock(tiny_base, tmp_path / "a", method, METHODS[method], 1)
    with pytest.raises(
        InputError, match=f"adapters of type '{method}' is none of that type. Convert each to LoRA first"
    ):
        combine([folder, folder], tmp_path / "sum", base=str(tiny_base), device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_lora_is_suggested_where_an_export_makes_one(tiny_base: Path, tmp_path: Path, method: str) -> None:
    """A pair of types gets the suggestion if both become LoRA, so every type is tried once, beside one that does."""
    folder = stock(tiny_base, tmp_path / "a", method, METHODS[method], 1)
    other = stock(tiny_base, tmp_path / "b", *(("loha", METHODS["loha"]) if method != "loha" else ("ia3", {})), seed=1)
    with pytest.raises(InputError, match="adapters of one type can be combined") as caught:
        combine([folder, other], tmp_path / "sum", base=str(tiny_base), device="cpu")
    wanted = Wanted("peft", "lora", 64, base=str(tiny_base), device="cpu", force=True)
    try:
        export_for(folder, tmp_path / "lora", wanted)
        possible = True
    except InputError:
        possible = False
    assert (
        ("Convert each to LoRA first" in str(caught.value))
        == possible
        == (method not in ("ln_tuning", "trainable_tokens"))
    )


@pytest.mark.parametrize("method", ["loha", "ia3"])
def test_lora_is_not_suggested_beside_a_head_that_no_lora_holds(tiny_base: Path, tmp_path: Path, method: str) -> None:
    folders = [
        stock(tiny_base, tmp_path / name, kind, METHODS[kind], 1, modules_to_save=["lm_head"])
        for name, kind in (("a", method), ("b", "loha"))
    ]
    with pytest.raises(InputError) as caught:
        combine(folders, tmp_path / "sum", base=str(tiny_base), device="cpu")
    assert "to LoRA" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be exported as 'lora': use peft.$"):
        export_for(folders[0], tmp_path / "out", Wanted("peft", "lora", base=str(tiny_base)))


def edited(folder: Path, out: Path, **changes: Any) -> Path:
    """Copy an adapter with other fields in its config, and tensors by the end of their keys; None removes one."""
    out.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, value in changes.items():
        keys = [key for key in tensors if key.endswith(name)]
        for key in keys:
            tensors.pop(key)
            if value is not None:
                tensors[key] = value.clone()
        if not keys:
            config[name] = value
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, out / "adapter_model.safetensors")
    return out


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("ia3", {"q_proj.ia3_l": torch.ones(8, 1)}, "they are of different bases"),
    ("ia3", {"q_proj.ia3_l": torch.ones(64, 1, dtype=torch.int32)}, "has the dtype I32, but must have one of F64"),
    ("ia3", {"modules_to_save": ["lm_head"]}, "its modules_to_save differs"),
    ("ia3", {"feedforward_modules": ["v_proj", "down_proj"]}, "scales the inputs of"),
    (  # as stock PEFT's default is beside Budwood's: the factors of down_proj are of outputs, not of inputs
        "ia3",
        {"feedforward_modules": [], "down_proj.ia3_l": torch.ones(64, 1)},
        "'model.layers.0.mlp.down_proj' (feedforward_modules), but",
    ),
    ("fourierft", {"random_loc_seed": 5}, "its random_loc_seed is 5, but that of"),
    ("fourierft", {"n_frequency_pattern": {"q_proj": 3}}, "its n_frequency_pattern differs"),
    ("tinylora", {"q_proj.tinylora_A": None}, "it adapts other modules than"),
    ("tinylora", {"q_proj.tinylora_A": torch.ones(2, 64)}, "which does not train, differs"),
    ("shira", {"q_proj.shira_weight": torch.ones(3)}, "config and base require [256]"),
    ("hira", {"r": 1}, "but its config 1"),
    ("hira", {"hira_A": None}, "the adapter's"),
    ("trainable_tokens", {"token_indices": [5, 6]}, "has not a row for each of its token_indices"),
]


@pytest.mark.parametrize(("method", "change", "message"), REFUSALS, ids=lambda v: v if isinstance(v, str) else "")
def test_what_does_not_fit_is_refused_by_the_name_of_the_folder(
    tiny_base: Path, tmp_path: Path, method: str, change: dict[str, Any], message: str
) -> None:
    good = stock(tiny_base, tmp_path / "good", method, METHODS[method], 1)
    bad = edited(good, tmp_path / "bad", **change)
    with pytest.raises(BudwoodError) as caught:
        combine([good, bad], tmp_path / "sum", base=str(tiny_base), device="cpu")
    text = str(caught.value)
    assert message in text and str(bad) in text and "\n" not in text and caught.value.exit_code in (2, 4)
    assert not (tmp_path / "sum").exists()


def test_other_refusals_and_the_command(tiny_base: Path, tmp_path: Path) -> None:
    ia3 = stock(tiny_base, tmp_path / "ia3", "ia3", {}, 1)
    loha = stock(tiny_base, tmp_path / "loha", "loha", METHODS["loha"], 1)
    run = CliRunner().invoke
    arguments = ["--base", str(tiny_base), "--device", "cpu"]
    mixed = run(app, ["adapter", "combine", str(ia3), str(loha), str(tmp_path / "x"), *arguments])
    assert isinstance(mixed.exception, InputError) and "adapters of one type can be combined" in str(mixed.exception)
    svd = run(app, ["adapter", "combine", str(ia3), str(ia3), str(tmp_path / "x"), "--method", "svd", *arguments])
    assert "--method svd: is for LoRA" in str(svd.exception)
    huge = run(app, ["adapter", "combine", str(ia3), str(ia3), str(tmp_path / "x"), "--weights", "1e39,1", *arguments])
    assert "--weights: the weighted sum is larger than fp32 can hold" in str(huge.exception)
    made = run(app, ["adapter", "combine", str(ia3), str(ia3), str(tmp_path / "x"), *arguments])
    assert made.exit_code == 0 and "combined: ia3 on 6 modules" in made.output, made.output
    assert "it is the exact weighted sum" in made.output


def test_a_head_beside_a_method_needs_weights_that_sum_to_1(tiny_base: Path, tmp_path: Path) -> None:
    folders = [
        stock(tiny_base, tmp_path / name, "ia3", {}, seed, modules_to_save=["lm_head"]) for name, seed in ("a1", "b2")
    ]
    with pytest.raises(InputError, match="--weights: they sum to 0.8"):
        combine(folders, tmp_path / "sum", weights=[0.4, 0.4], base=str(tiny_base), device="cpu")
    combine(folders, tmp_path / "sum", weights=[0.25, 0.75], base=str(tiny_base), device="cpu")
    heads = [
        load_file(f / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
        for f in [*folders, tmp_path / "sum"]
    ]
    torch.testing.assert_close(heads[2], 0.25 * heads[0] + 0.75 * heads[1])


def test_lora_adapters_that_are_damaged_are_named(tiny_base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(load(tiny_base), config).save_pretrained(tmp_path / "good")
    for name, change in {
        "missing": {"0.self_attn.q_proj.lora_B.weight": None},
        "gone": {"0.self_attn.q_proj.lora_A.weight": None, "0.self_attn.q_proj.lora_B.weight": None},
        "short": {"0.self_attn.q_proj.lora_A.weight": torch.ones(2, 8)},
    }.items():
        bad = edited(tmp_path / "good", tmp_path / name, **change)
        with pytest.raises(BudwoodError) as caught:
            combine([tmp_path / "good", bad], tmp_path / "sum", base=str(tiny_base), device="cpu")
        assert str(bad) in str(caught.value), name
