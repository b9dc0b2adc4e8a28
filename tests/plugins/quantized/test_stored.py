"""Bases that other libraries have quantised: they are recognised, adapters train on them, or they are refused."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.conftest import make_tokenizer
from tests.core.conftest import write_rows
from tests.plugins.quantized.layouts import gptq, hqq
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.utils import is_compressed_tensors_available, is_torchao_available

from budwood import AdapterPool, CorruptError, InputError, MXFP4Experts, ResourceError, load_base
from budwood.model.base import check_base, skeleton
from budwood.model.checkpoint import read_tensors
from budwood.model.checks import find_quantizer
from budwood.model.fake import fake_base, fake_tensors
from budwood.model.quantizers import is_quantized, quantizer_of
from budwood.model.quantizers.stored import check_linears
from budwood.planning.check import check
from budwood.planning.composition import plan
from budwood.recipe.schema import Recipe
from budwood.serving.exports.targets import export_for
from budwood.serving.exports.wanted import Wanted
from budwood.serving.merge import merge
from budwood.serving.verify import verify
from budwood.training import loop
from budwood.training.loop import tune

LM = "AutoModelForCausalLM"
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""The levels of e2m1."""
IDS = torch.tensor([[1, 40, 50, 60, 70, 99, 7]])
GROUP = 32


class Killed(BaseException):
    """The process ends."""


def torchao(base: Path, folder: Path, kind: str) -> Path:
    """Quantise a base with torchao and save it: kind is int8, fp8 or intx4."""
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    config = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "fp8": lambda: quantization.Float8WeightOnlyConfig(),
        "intx4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)),
    }[kind]()
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=TorchAoConfig(quant_type=config), device_map={"": "cpu"}
    )
    return saved(model, base, folder)


def packed(base: Path, folder: Path, symmetric: bool = True) -> Path:
    """Quantise a base to int4 in groups with compressed-tensors, as llm-compressor does, and save it packed."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor

    weights = quantization.QuantizationArgs(
        num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=GROUP
    )
    config = quantization.QuantizationConfig(
        config_groups={"group_0": quantization.QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head"],
        format="pack-quantized",
        quantization_status="compressed",
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.data.view(len(module.weight), -1, GROUP)
            module.weight_scale.data = (groups.abs().amax(-1) / 7).to(module.weight_scale.dtype)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.zero_()
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    saved(model, base, folder)
    compressor.update_config(str(folder))
    return folder


def saved(model: Any, base: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    for file in base.iterdir():
        if "token" in file.name or "chat_template" in file.name:
            shutil.copy(file, folder)
    return folder


def recipe_of(base: Path, quantization: str, folder: Path) -> Recipe:
    train = {"steps": 6, "batch_examples": 8, "micro_tokens": 512, "learning_rate": 1e-2, "precision": "fp32"}
    return Recipe.from_dict(
        {
            "base": {"model": str(base), "quantization": quantization},
            "data": {"train": str(write_rows(folder / "train.jsonl")), "max_length": 128, "eval": "none"},
            "strategies": [{"lora": {"rank": 4}}],
            "train": {**train, "schedule": "constant", "warmup": 0, "save_every": 2},
            "output": str(folder / "run"),
        }
    )


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradients of the adapter."""
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def reference(plain: Any, quantised: Any, adapter: Path) -> Any:
    """Stock PEFT on an unquantised model with the dequantised weights."""
    for path, module in quantised.named_modules():
        if is_quantized(module):
            plain.get_submodule(path).weight.data = quantizer_of(module).dequantize(module, torch.float32).clone()
    return PeftModel.from_pretrained(plain, adapter, is_trainable=True)


def fine_grained(base: Path, folder: Path, side: int = 32) -> dict[str, torch.Tensor]:
    """Save a base in fp8 with a scale for each block of `side` x `side` weights; return what its weights are then."""
    config = json.loads((base / "config.json").read_text())
    shutil.copytree(base, folder)
    tensors, values = load_file(base / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj.weight" in name]:
        weight = tensors[name]
        blocks = weight.view(len(weight) // side, side, -1, side)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        values[name] = (codes.float() * scale[:, None, :, None]).view_as(weight)
        tensors[name], tensors[f"{name}_scale_inv"] = codes.view(weight.shape), scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [side, side],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return values


@pytest.mark.filterwarnings("ignore")
def test_fine_grained_fp8_is_dequantised_as_it_is_read_and_says_so(tiny_base: Path, tmp_path: Path) -> None:
    values = fine_grained(tiny_base, tmp_path / "stored")
    base = load_base(tmp_path / "stored", None, LM, torch.float32)
    assert base.quantization == "fp8"
    assert "its fp8 weights are dequantised as they are read" in base.notes[0]
    own = base.model.state_dict()
    assert len(values) == 14
    for name, value in values.items():
        torch.testing.assert_close(own[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_mxfp4_experts_stay_in_mxfp4_exactly(tmp_path: Path) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    folder = tmp_path / "stored"
    GptOssForCausalLM(GptOssConfig(**sizes)).save_pretrained(folder)
    make_tokenizer(folder)
    tensors, levels = load_file(folder / "model.safetensors"), torch.tensor(FP4 + [-level for level in FP4])
    draw, values = torch.Generator().manual_seed(0), {}
    for name in [name for name in tensors if name.endswith("_proj") and tensors[name].ndim == 3]:
        experts, inputs, outputs = tensors.pop(name).shape
        codes = torch.randint(16, (experts, outputs, inputs // 32, 32), generator=draw, dtype=torch.uint8)
        scales = torch.randint(120, 126, (experts, outputs, inputs // 32), generator=draw, dtype=torch.uint8)
        wide = levels[codes.int()] * torch.exp2(scales.float() - 127)[..., None]
        values[name] = wide.view(experts, outputs, inputs)
        tensors[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        tensors[f"{name}_scales"] = scales
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    base = load_base(folder, None, LM, torch.float32)
    assert base.quantization == "mxfp4"
    assert "experts: 4 of 4 in mxfp4" in base.notes
    assert len(values) == 2
    for name, value in values.items():
        experts: Any = base.model.get_submodule(name)
        assert isinstance(experts, MXFP4Experts)
        assert torch.equal(experts.dequantize(0, 4, torch.float32), value)
    assert base.model(input_ids=IDS, use_cache=False).logits.isfinite().all()


DAMAGE: list[tuple[str, str, bool, str]] = [
    ("int8", "_weight_scale", True, "_weight_scale' is missing, without which"),
    ("int8", "_weight_scale", False, r"has the shape \(31, 1\), and blocks of \(1, 64\) in \(32, 64\) need \(32, 1\)"),
    ("int8", "_weight_qdata", False, r"has the shape \(31, 64\), and blocks"),
    ("intx4", "_weight_zero_point", False, r"has the shape \(31, 2\), and blocks"),
    ("fine-grained", "weight_scale_inv", True, "weight_scale_inv' is missing, without which"),
    (
        "fine-grained",
        "weight_scale_inv",
        False,
        r"have the shape \(1, 4\), and blocks of \(16, 16\) in \(32, 64\) need",
    ),
]
"""Kind of checkpoint; the tensor of a linear that is missing, or lacks its last row; the message."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "tensor", "missing", "message"), DAMAGE)
def test_tensors_that_do_not_fit_each_other_are_named(
    tiny_base: Path, tmp_path: Path, kind: str, tensor: str, missing: bool, message: str
) -> None:
    """Scales that are too few were repeated, or ended in an error of torch."""
    folder = tmp_path / "stored"
    if kind == "fine-grained":
        fine_grained(tiny_base, folder, side=16)
    else:
        torchao(tiny_base, folder, kind)
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors, name = load_file(folder / "model.safetensors"), f"model.layers.0.self_attn.k_proj.{tensor}"
    tensors[name] = tensors[name][:-1].clone()
    if missing:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata)
    with pytest.raises(CorruptError, match=message):
        load_base(folder, None, LM, torch.float32)


CONFIGS: dict[str, tuple[Any, str]] = {
    "awq": ({"quant_method": "awq", "bits": 4}, "quantised with AWQ, which .* give the unquantised base"),
    "gptq in 5 bits": (
        {"quant_method": "gptq", "bits": 5},
        "GPTQ in 5 bits .*, and 2, 3, 4 and 8 are read: give the un",
    ),
    "gptq for a kernel": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        "GPTQ in the format 'marlin', and only gptq and gptq_v2 are read: give the unquantised base",
    ),
    "hqq in 1 bit": (
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 1}}},
        r"HQQ in a number of bits that is not read .*: give the unquantised base",
    ),
    "int4 on a CPU": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {}}}},
        "Int4WeightOnlyConfig, which does not support a CPU",
    ),
    "torchao with inputs": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig"}}},
        "also quantises inputs and so gives no exact gradient",
    ),
    "compressed with inputs": (
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"input_activations": {"num_bits": 8}}}},
        "quantise inputs, which gives no exact gradient",
    ),
    "compressed in an unknown format": (
        {"quant_method": "compressed-tensors", "config_groups": {"a": {}}, "format": "nope"},
        "quantization_config.format is 'nope', and only pack-quantized, .* are read: take the config.json that was",
    ),
    "compressed without groups": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "quantization_config.config_groups is None, and has to say how linears are quantised: take",
    ),
    "gptq in groups of none": (
        {"quant_method": "gptq", "bits": 4, "group_size": 0},
        "quantization_config.group_size is 0, and has to be a number of inputs",
    ),
    "gptq in groups of text": (
        {"quant_method": "gptq", "bits": 4, "group_size": "big"},
        "quantization_config.group_size is 'big', and has to be a number of inputs",
    ),
    "hqq in groups of text": (
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": "x"}}},
        "quant_config.weight_quant_params.group_size is 'x', and has to be a number of weights",
    ),
    "hqq along no axis": (
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "axis": 5}}},
        "quant_config.weight_quant_params.axis is 5, and has to be 0 or 1",
    ),
    "hqq with text for a linear": (
        {"quant_method": "hqq", "quant_config": {"mlp.up_proj": "4"}},
        "quantization_config.quant_config.mlp.up_proj is '4', and has to be an object",
    ),
    "torchao of no type": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Nope"}}},
        "quantization_config.quant_type.default is {'_type': 'Nope'}, and has to be torchao's description",
    ),
    "fp8 in blocks of text": (
        {"quant_method": "fp8", "weight_block_size": "x"},
        "quantization_config.weight_block_size is 'x', and has to be two numbers",
    ),
    "no object": ("gptq", "quantization_config in config.json is 'gptq', and has to be an object"),
    "no quantised tensors": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
        "quantization_config says that the weights are quantised, but no tensor is",
    ),
    "no 4-bit tensors": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "quantization_config says that the weights are quantised, but no tensor is",
    ),
    "no 8-bit tensors": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "quantization_config says that the weights are quantised, but no tensor is",
    ),
    "unknown": ({"quant_method": "quip"}, "is already quantised, with quip, which no installed quantiser reads"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_base_that_cannot_be_used_is_refused_before_it_loads(tiny_base: Path, tmp_path: Path, name: str) -> None:
    stored, message = CONFIGS[name]
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    with pytest.raises(InputError, match=message):
        check_base(folder, "nf4" if name == "awq" else None, device="cpu")


def test_quantised_tensors_without_a_quantization_config_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    fine_grained(tiny_base, tmp_path / "base")
    shutil.copy(tiny_base / "config.json", tmp_path / "base")
    with pytest.raises(InputError, match="is quantised, but config.json has no quantization_config"):
        check_base(tmp_path / "base")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "library"), [("torchao", "torchao"), ("compressed-tensors", "compressed_tensors")])
def test_a_missing_library_is_named_with_its_extra(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, library: str
) -> None:
    folder = tmp_path / "base"
    if method == "torchao":
        torchao(tiny_base, folder, "int8")
    else:
        packed(tiny_base, folder)
    for available in (is_torchao_available, is_compressed_tensors_available):
        available()  # transformers remembers it
    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == library else own(name, *rest))
    with pytest.raises(ResourceError, match=rf"pip install 'budwood\[{method}\]'"):
        check_base(folder, device="cpu")
    recipe = recipe_of(folder, method, tmp_path)
    checked = check(recipe)  # this machine cannot run it
    assert (checked.problems.exit_code, checked.as_dict()["go"]) == (3, False)
    planned = plan(recipe)  # another may
    assert planned.exit_code == 0
    assert any(re.match(rf"not on this machine: .*budwood\[{method}\]", note) for note in planned.notes)


def test_tensors_of_another_format_than_that_of_the_configuration_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    gptq(tiny_base, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match="quantization_config says int8, but the tensor '.*qweight' is quantised in an"
    ):
        check_base(tmp_path / "base")


COMPRESSED: list[tuple[dict[str, Any], str]] = [
    ({"format": "int-quantized"}, "quantization_config.format is 'int-quantized', and '.*' is stored in another"),
    ({"num_bits": 8}, r"weight_packed' has the shape \(64, 8\), and num_bits and group_size in .* need \(64, 16\)"),
    ({"group_size": 16}, r"weight_scale' has the shape \(64, 2\), and num_bits and group_size in .* need \(64, 4\)"),
    (
        {"type": "nope"},
        "quantization_config in config.json: ValidationError: .*weights.type.*: take the config.json",
    ),
    ({"ignore": ["lm_head", "re:.*k_proj"]}, "k_proj.weight_packed' is quantised, and config_groups and ignore in"),
    ({"weight_scale": None}, "k_proj.weight_scale' is missing, without which"),
    ({"weight_packed": None, "weight_scale": None}, "k_proj.weight' is not quantised, and config_groups and ignore in"),
]
"""Changes to the configuration, or tensors of a linear that are removed; the message."""


@pytest.fixture(scope="module")
def compressed(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tiny_base, tmp_path_factory.mktemp("compressed") / "base")


@pytest.mark.filterwarnings("ignore")
def test_packed_zero_points_are_named_as_what_the_library_cannot_load(tiny_base: Path, tmp_path: Path) -> None:
    folder = packed(tiny_base, tmp_path / "base", symmetric=False)
    with pytest.raises(InputError, match="zero_point' holds packed zero points .symmetric: false .*: give the unquant"):
        load_base(folder, None, LM, torch.float32)


@pytest.mark.filterwarnings("ignore")
def test_a_plan_names_the_quantiser_that_it_cannot_plan(compressed: Path) -> None:
    with fake_tensors():
        planned = fake_base(str(compressed), LM, torch.float32, quantization=None)
    assert re.match(r"quantiser 'compressed-tensors' .*cannot be planned: its base counts unq", planned.notes[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("changes", "message"), COMPRESSED)
def test_compressed_tensors_that_contradict_their_configuration_are_refused(
    compressed: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """A format that is none, or another, trained without a word; the rest was found as weights loaded."""
    folder = shutil.copytree(compressed, tmp_path / "base")
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    stored, name = config["quantization_config"], "model.layers.0.self_attn.k_proj."
    for key, value in changes.items():
        if value is None:
            del tensors[name + key]
        else:
            (stored if key in stored else stored["config_groups"]["group_0"]["weights"])[key] = value
    if "weight_packed" in changes:
        del tensors[f"{name}weight_shape"]
        tensors[f"{name}weight"] = torch.zeros(32, 64)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    info = check_base(folder)
    with pytest.raises((CorruptError, InputError), match=message):
        check_linears(skeleton(folder), find_quantizer(info.quantization), stored, read_tensors(folder))
    with pytest.raises((CorruptError, InputError), match=message):
        load_base(folder, None, LM, torch.float32)


def test_the_name_of_a_stored_format_does_not_quantise_a_base(tiny_base: Path) -> None:
    with pytest.raises(
        InputError, match="is not quantised, and torchao only reads bases that are: set quantization to nf4"
    ):
        check_base(tiny_base, "torchao")


FORMATS: dict[str, Callable[[Path, Path], Path]] = {
    "torchao int8": lambda base, folder: torchao(base, folder, "int8"),
    "torchao fp8": lambda base, folder: torchao(base, folder, "fp8"),
    "torchao intx4": lambda base, folder: torchao(base, folder, "intx4"),
    "compressed-tensors packed": packed,
    "gptq": lambda base, folder: gptq(base, folder, order=True) and folder,
    "hqq": lambda base, folder: hqq(base, folder) and folder,
}


SAME = ("torchao fp8", "torchao intx4", "hqq")
"""Formats whose modules serve and resume like those of another format here."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_an_adapter_trains_on_it_is_verified_swaps_and_resumes(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = FORMATS[name](tiny_base, tmp_path / "stored")
    method = name.split()[0]
    base = load_base(folder, None, LM, torch.float32)
    assert base.quantization == method
    plain = load_base(tiny_base, "none", LM, torch.float32)
    assert base.parameters == plain.parameters
    assert base.bytes < 0.6 * plain.bytes
    linears = [module for module in base.model.modules() if is_quantized(module)]
    assert len(linears) == 14

    # Forward and gradient against the dequantised weight, and against the unquantised one.
    linear = base.model.model.layers[0].mlp.up_proj
    weight = quantizer_of(linear).dequantize(linear, torch.float32)
    original = plain.model.model.layers[0].mlp.up_proj.weight
    assert (weight - original).abs().max() < 0.2 * original.abs().max()
    x = torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), x @ weight.t(), atol=1e-5, rtol=1e-5)

    run = tune(recipe_of(folder, method, tmp_path), quiet=True)
    losses = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in losses if record["kind"] == "step"]
    assert losses[-1] < losses[0]
    assert run.packed

    adapter = run.directory / "adapter"
    ours, theirs = gradients(run.model), gradients(reference(plain.model, base.model, adapter))
    assert len(ours) == 28
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[f"base_model.model.{key}"], atol=1e-5, rtol=1e-3)

    verify(adapter)  # raises if the golden logits differ
    if name in SAME:
        return
    exported = export_for(adapter, tmp_path / "exported", Wanted("peft")).replay  # stock PEFT has no layers for it
    assert exported is not None and exported.error < 1e-3
    pool = AdapterPool(folder, method, precision="fp32", device="cpu")
    before = pool.logits(["games:"])
    pool.load("mine", adapter)
    pool.use("mine")
    assert not torch.equal(pool.logits(["games:"]), before)
    pool.unload("mine")
    assert torch.equal(pool.logits(["games:"]), before)

    whole, original = {p.name: p.read_bytes() for p in adapter.iterdir()}, loop.sum_gradients

    def die(run: Any) -> None:
        if run.step == 4:
            raise Killed
        original(run)

    recipe = recipe_of(folder, method, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "sum_gradients", die)
        tune(recipe, quiet=True, overwrite=True)
    tune(recipe, quiet=True, resume=True)
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == whole
    with pytest.raises(InputError, match="is quantised on disk, but an adapter can only be merged into original"):
        merge(adapter, tmp_path / "merged")
