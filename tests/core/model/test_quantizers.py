"""A third-party quantiser: loading, counting, training, swapping adapters and merging."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from torch import nn

from budwood import AdapterPool, load_base
from budwood.adapters.targets import match_targets
from budwood.cli.app import run as command
from budwood.contract.discovery import PluginError
from budwood.errors import InputError
from budwood.lowrank import low_rank_linear
from budwood.model.base import check_base
from budwood.model.quantizers import claim, is_quantized, linear_shape, quantizer_of
from budwood.serving.merge import merge
from budwood.training.loop import tune

LM = "AutoModelForCausalLM"
GROUP = "budwood.quantizers"
ROWS = '''
import torch
from budwood import Quantizer
from torch import nn

class RowLinear(nn.Module):
    """A linear that is not an nn.Linear: int8 codes and one scale per row."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype), self.bias)

class Rows(Quantizer):
    """Eight bits, one scale per row, in plain torch."""

    api = 2

    def reads(self, config):
        return config.get("quant_method") == "rows"

    def after_load(self, model, skip):
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name.split(".")[0] not in skip:
                model.set_submodule(name, RowLinear(module))

    def is_linear(self, module):
        return isinstance(module, RowLinear)

    def weight(self, module):
        return module.codes

    def constants(self, module):
        return [module.scale]

    def dequantize(self, module, dtype):
        return module.codes.to(dtype) * module.scale.to(dtype)
'''


@pytest.fixture
def rows(distribution):
    distribution("row-quant", ROWS, {"rows": "Rows"}, group=GROUP)


def test_its_base_is_measured_and_equals_the_modules_forward(rows, tiny_base):
    base = load_base(tiny_base, "rows", LM, torch.float32)
    plain = load_base(tiny_base, "none", LM, torch.float32)
    linear = base.model.model.layers[0].mlp.up_proj
    adapted = sum(torch.Size(linear_shape(module)).numel() for module in base.model.modules() if is_quantized(module))
    assert linear_shape(linear) == (128, 64)
    assert quantizer_of(linear).bytes(linear) == 128 * 64 + 128 * 4
    assert base.parameters == plain.parameters
    assert base.unquantized_share == pytest.approx(1 - adapted / base.parameters)
    scales = sum(linear_shape(module)[0] * 4 for module in base.model.modules() if is_quantized(module))
    assert base.bytes == plain.bytes - 3 * adapted + scales
    assert "in rows" in base.notes[0]
    assert match_targets(base.model, "all-linear", None) == match_targets(plain.model, "all-linear", None)
    assert not is_quantized(base.model.lm_head)

    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    a, b = torch.randn(2, 64, dtype=torch.float64), torch.randn(128, 2, dtype=torch.float64)
    output = low_rank_linear(x, linear, a, b, 0.5)
    weight = linear.codes.double() * linear.scale.double()
    torch.testing.assert_close(output, x @ (weight + 0.5 * b @ a).t())
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient, (weight + 0.5 * b @ a).sum(0).expand(5, 64))
    with torch.no_grad():
        single = x.detach().float()
        assert torch.equal(quantizer_of(linear).forward(linear, single, None), linear(single))


def test_copies_keep_their_quantiser(rows, tiny_base):
    model = copy.deepcopy(load_base(tiny_base, "rows", LM, torch.float32).model)
    assert all(is_quantized(model.get_submodule(path)) for path in match_targets(model, "all-linear", None))


@pytest.mark.parametrize(
    "strategy",
    [{"lora": {"rank": 4}}, {"adalora": {"initial_rank": 4, "target_rank": 4, "interval": 2}}],
)
def test_an_adapter_trains_on_it_and_swaps(rows, make_recipe, tiny_base, tmp_path, strategy):
    recipe = make_recipe(base={"quantization": "rows"}, strategies=[strategy], train={"steps": 8})
    run = tune(recipe)
    losses = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in losses if record["kind"] == "step"]
    assert losses[-1] < losses[0]

    pool = AdapterPool(tiny_base, "rows")
    modules = [type(module) for module in pool.model.modules()]
    before = pool.logits(["games:"])
    pool.load("mine", run.directory / "adapter")
    assert torch.equal(pool.logits(["games:"]), before)
    pool.use("mine")
    assert not torch.equal(pool.logits(["games:"]), before)
    with pytest.raises(InputError, match="only be merged into unquantised weights"):
        pool.merge("mine")
    pool.unload("mine")
    assert torch.equal(pool.logits(["games:"]), before)
    assert [type(module) for module in pool.model.modules()] == modules
    report = merge(run.directory / "adapter", tmp_path / "merged", dtype="fp32")  # into the original weights
    assert report.unquantized.largest < 1e-3


def test_dora_needs_a_quantiser_that_peft_supports(rows, make_recipe):
    recipe = make_recipe(base={"quantization": "rows"}, strategies=[{"lora": {"rank": 4, "dora": True}}])
    with pytest.raises(InputError, match="dora is not supported on 'model.layers.0.*', a RowLinear: use plain LoRA"):
        tune(recipe)


@pytest.mark.parametrize(("quantization", "precision"), [("int8", "fp32"), ("int8", "fp16"), ("none", "bf16")])
def test_dora_trains_fp32_magnitudes_on_every_base(make_recipe, capsys, quantization, precision):
    recipe = make_recipe(
        base={"quantization": quantization}, strategies=[{"lora": {"dora": True}}],
        train={"precision": precision, "steps": 2},
    )  # fmt: skip
    folder = tune(recipe, quiet=True).directory / "adapter"
    saved = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    magnitudes = torch.cat([tensor for name, tensor in saved.items() if "magnitude" in name])
    assert not torch.equal(magnitudes, magnitudes.bfloat16().float())
    assert not torch.equal(magnitudes, magnitudes.half().float())
    assert command(["adapter", "verify", str(folder)]) == 0
    assert "largest logit difference 0," in capsys.readouterr().out


# --- checkpoints that are already quantised


@pytest.fixture
def stored(tiny_base, tmp_path):
    """Function (config, *suffixes) -> folder of the tiny base with this quantization_config, and with such tensors."""

    def make(config, *suffixes):
        folder = shutil.copytree(tiny_base, tmp_path / "stored", dirs_exist_ok=True)
        weights = load_file(folder / "model.safetensors")
        added = {f"model.layers.0.self_attn.q_proj.weight{suffix}": torch.zeros(1) for suffix in suffixes}
        save_file(weights | added, folder / "model.safetensors", {"format": "pt"})
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "quantization_config": config}))
        return folder

    return make


@pytest.mark.parametrize(
    ("config", "name", "suffixes"),
    [
        ({"quant_method": "rows", "load_in_4bit": False}, "rows", []),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8", [".SCB"]),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4", [".absmax"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4", [".absmax"]),
    ],
)
def test_a_quantiser_recognises_its_checkpoints(rows, stored, config, name, suffixes):
    info = check_base(stored(config, *suffixes))
    assert (info.quantization, info.prequantized) == (name, True)
    with pytest.raises(InputError, match=f"already quantised, with {name}: set quantization to {name}"):
        check_base(stored(config, *suffixes), "none")


def test_two_quantisers_of_one_checkpoint_are_named_and_the_recipe_decides(rows, stored, distribution):
    distribution("twin-quant", ROWS, {"twins": "Rows"}, group=GROUP)
    folder = stored({"quant_method": "rows"})
    with pytest.raises(
        InputError, match=r"'rows' \(row-quant 1.0\) and .* \(twin-quant 1.0\) read it: set quantization to one"
    ):
        check_base(folder)
    assert check_base(folder, "twins").quantization == "twins"


def test_a_broken_quantiser_is_named_only_if_no_other_reads(rows, stored, distribution):
    distribution("bad-quant", "raise OSError('gone')", {"bad": "Bad"}, group=GROUP)
    assert check_base(stored({"quant_method": "rows"})).quantization == "rows"
    with pytest.raises(PluginError, match="plugin 'bad' of bad-quant 1.0"):
        check_base(stored({"quant_method": "other"}))


# --- the quantiser of a module


def test_modules_that_are_not_linears_are_refused():
    assert quantizer_of(nn.Embedding(3, 4)) is None
    with pytest.raises(TypeError, match="Embedding is not a linear"):
        linear_shape(nn.Embedding(3, 4))
    with pytest.raises(TypeError, match="Embedding is not a linear"):
        low_rank_linear(torch.randn(2, 4), nn.Embedding(3, 4), None, None)


def test_a_linear_inside_a_peft_layer_keeps_its_shape():
    linear = nn.Linear(4, 3)
    layer = LoraLinear(linear, "default", config=LoraConfig(r=2), r=2, lora_alpha=2)
    assert linear_shape(layer) == linear_shape(linear) == (3, 4)


def test_a_quantiser_may_store_plain_modules(rows):
    """Some libraries put a custom tensor into an nn.Linear."""
    from budwood.model.quantizers import Unquantized

    class Doubled(Unquantized):
        def is_linear(self, module):
            return type(module) is nn.Linear and module.in_features == 3

        def dequantize(self, module, dtype):
            return 2 * super().dequantize(module, dtype)

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)).requires_grad_(False)
    assert not is_quantized(model[0])  # recognised as unquantised before it is claimed
    claim(model, Doubled())
    x = torch.randn(2, 3, requires_grad=True)
    low_rank_linear(x, model[0], torch.zeros(1, 3), torch.zeros(4, 1)).sum().backward()
    torch.testing.assert_close(x.grad[0], 2 * model[0].weight.sum(0))
    assert type(quantizer_of(model[1])) is Unquantized
