"""Checkpoints that bitsandbytes quantised, whose tensors contradict their configuration or each other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from budwood.cli.app import run
from budwood.errors import CorruptError, InputError
from budwood.model.base import load_base
from budwood.model.checkpoint import read_config, read_tensors
from budwood.model.checks import find_quantizer, skeleton, stored_quantization
from budwood.model.quantizers.stored import check_linears

LINEAR = "model.layers.0.self_attn.k_proj"
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]


def save(base: Path, folder: Path, options: dict[str, Any], auto: str = "AutoModelForCausalLM") -> Path:
    """Save a base as bitsandbytes quantises it."""
    import transformers

    config = transformers.BitsAndBytesConfig(**options)
    model = getattr(transformers, auto).from_pretrained(base, quantization_config=config, device_map="cpu")
    model.save_pretrained(folder)
    for file in base.glob("*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def saved(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    return {kind: save(tiny_base, folder / kind, options) for kind, options in KINDS.items()}


def check(folder: Path) -> None:
    """Compare a checkpoint's tensors with its configuration, as before a run."""
    name = stored_quantization(folder)
    assert name is not None
    config = read_config(folder)
    model = skeleton(folder, "AutoModelForCausalLM" if "llama" in config["model_type"] else "AutoModelForSeq2SeqLM")
    check_linears(model, find_quantizer(name), config["quantization_config"], read_tensors(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_sound_checkpoints_pass(saved: dict[str, Path], kind: str) -> None:
    check(saved[kind])


def test_what_is_not_quantised_on_purpose_passes(tiny_base: Path, tmp_path: Path) -> None:
    check(save(tiny_base, tmp_path / "skipped", {**KINDS["nf4"], "llm_int8_skip_modules": ["lm_head", "k_proj"]}))
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 40}
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(tmp_path / "t5")
    quantised = save(tmp_path / "t5", tmp_path / "quantised", KINDS["nf4"], "AutoModelForSeq2SeqLM")
    stored = read_tensors(quantised)
    assert stored["encoder.block.0.layer.1.DenseReluDense.wo.weight"].dtype == "F32"  # T5's own wish
    assert stored["encoder.block.0.layer.1.DenseReluDense.wi.weight"].dtype == "U8"
    check(quantised)


def without(name: str) -> Change:
    return lambda tensors, config: tensors.pop(f"{LINEAR}.{name}")


def shorter(name: str) -> Change:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[f"{LINEAR}.{name}"] = tensors[f"{LINEAR}.{name}"][:-2].clone()

    return change


def unquantised(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.startswith(LINEAR)]:
        del tensors[name]
    tensors[f"{LINEAR}.weight"] = torch.zeros(32, 64)


def configured(**changes: Any) -> Change:
    return lambda tensors, config: config["quantization_config"].update(changes)


def described(text: bytes) -> Change:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[f"{LINEAR}.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("kind", "change", "error", "message"),
    [
        ("nf4", without("weight.absmax"), CorruptError, f"the tensor '{LINEAR}.weight.absmax' is missing, without"),
        ("nf4", without("weight.quant_map"), CorruptError, "quant_map' is missing"),
        ("nf4", without("weight.nested_absmax"), CorruptError, "nested_absmax' is missing"),
        ("nf4", without("weight.quant_state.bitsandbytes__nf4"), CorruptError, "bitsandbytes__nf4' is missing"),
        ("nf4", shorter("weight"), CorruptError, "has 1,022 bytes, and a weight of 32 × 64 needs 1,024"),
        ("nf4", shorter("weight.absmax"), CorruptError, "has 30 scales, and a weight of 32 × 64 needs 32"),
        ("fp4", shorter("weight.absmax"), CorruptError, "has 30 scales, and a weight of 32 × 64 needs 32"),
        ("nf4", shorter("weight.nested_quant_map"), CorruptError, "has 254 values, .* needs 256"),
        ("nf4", unquantised, InputError, f"the tensor '{LINEAR}.weight' is not quantised, but quantization_config"),
        ("nf4", configured(bnb_4bit_quant_type="fp4"), InputError, "is quantised in nf4, but bnb_4bit_quant_type in"),
        ("nf4", configured(llm_int8_skip_modules=["k_proj["]), InputError, r"llm_int8_skip_modules: .'k_proj.'. is no"),
        ("nf4", configured(llm_int8_skip_modules="k_proj"), InputError, "llm_int8_skip_modules: k_proj is no list"),
        ("nf4", described(b"{"), CorruptError, "does not describe a weight"),
        ("nf4", described(b'{"blocksize": 0, "shape": [32, 64]}'), CorruptError, "does not describe a weight"),
        ("nf4", described(b'{"blocksize": 64, "shape": [64, 64]}'), CorruptError, r"\(64, 64\), and config.json gives"),
        ("int8", without("SCB"), CorruptError, f"the tensor '{LINEAR}.SCB' is missing"),
        ("int8", unquantised, InputError, "is not quantised, but quantization_config in config.json says so"),
        ("int8", shorter("SCB"), CorruptError, r"SCB' has the shape \(30,\), and config.json gives \(32,\)"),
        ("int8", shorter("weight"), CorruptError, r"has the shape \(30, 64\), and config.json gives \(32, 64\)"),
    ],
)
def test_contradictions_are_named_before_weights_load(
    saved: dict[str, Path], tmp_path: Path, kind: str, change: Change, error: type[Exception], message: str
) -> None:
    folder = shutil.copytree(saved[kind], tmp_path / "base")
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        check(folder)
    with pytest.raises(error, match=message):
        load_base(folder, None, "AutoModelForCausalLM", torch.float32, needs_tokenizer=False)


def test_a_run_and_its_plan_refuse_scales_that_are_too_few(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It trained on whatever lay behind them in memory."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(saved["nf4"], tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    shorter("weight.absmax")(tensors, {})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    Path("data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    Path("recipe.yaml").write_text("base: {model: base}\ndata: {train: data.jsonl}\nstrategies: [lora]\noutput: out\n")
    for command in ("tune", "plan"):
        assert run([command, "recipe.yaml"]) == 4
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert line.startswith(
            "error: base/model.safetensors: the tensor 'model.layers.0.self_attn.k_proj.weight.absmax'"
        )
    assert not Path("out").exists()
