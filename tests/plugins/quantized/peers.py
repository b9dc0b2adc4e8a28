"""Compares GPTQ and HQQ with the libraries that made the formats, in an environment of its own: see `make quantized`.

GPTQ: gptqmodel's TorchLinear, through optimum and transformers, on tiny checkpoints. An adapter that Budwood trained on
one is opened by stock PEFT on gptqmodel's layers, and has the same logits. HQQ: hqq quantises the linears of a base,
and its own state dict is the checkpoint, as transformers 4 saved it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.conftest import make_base
from tests.core.conftest import write_rows
from tests.plugins.quantized.layouts import gptq
from transformers import AutoModelForCausalLM, GPTQConfig

from budwood import linear_weight, load_base
from budwood.recipe.schema import Recipe
from budwood.training.loop import tune

LM = "AutoModelForCausalLM"
LAYOUTS: tuple[dict[str, Any], ...] = (
    {}, {"order": True}, {"bits": 8}, {"bits": 3}, {"bits": 3, "order": True}, {"bits": 2, "layout": "gptq_v2"},
)  # fmt: skip
HALF = 2.0**-11
"""Relative rounding of fp16, in which both libraries multiply codes and scales."""


def main() -> int:
    """Run every comparison; returns the exit code."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_base(folder / "base")
        results = [gptq_weights(base, folder / f"gptq{i}", options) for i, options in enumerate(LAYOUTS)]
        results.append(gptq_adapter(base, folder))
        results += [
            hqq_weights(base, folder / f"hqq{bits}{axis}", bits, axis) for bits in (8, 4, 3, 2) for axis in (0, 1)
        ]
    for text, error, bound in results:
        print(f"{'ok' if error <= bound else 'FAILED':7}{text}: differs by {error:.1e}, at most {bound:.1e}")
    return int(any(error > bound for _, error, bound in results))


def gptq_weights(base: Path, folder: Path, options: dict[str, Any]) -> tuple[str, float, float]:
    """Compare every weight with gptqmodel's, relative to the largest."""
    values = gptq(base, folder, **options)
    theirs, ours = by_gptqmodel(folder, options.get("bits", 4)), load_base(folder, None, LM, torch.float32).model
    error = 0.0
    for key, value in values.items():
        path = key.removesuffix(".weight")
        own = linear_weight(ours.get_submodule(path), torch.float32)
        other = theirs.get_submodule(path).dequantize_weight().t()
        error = max(error, float((own - other.float()).abs().max() / value.abs().max()))
    return f"gptq {options or ''}".strip(), error, HALF


def by_gptqmodel(folder: Path, bits: int) -> Any:
    """Load a checkpoint with gptqmodel's layers in plain torch, which compile no kernel."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=GPTQConfig(bits, backend="gptq_torch")
    )
    kind = type(model.model.layers[0].mlp.up_proj).__name__
    assert kind == "TorchLinear", kind
    return model.eval()


def gptq_adapter(base: Path, folder: Path) -> tuple[str, float, float]:
    """Train an adapter on a GPTQ checkpoint, and compare its logits with stock PEFT's on gptqmodel's layers."""
    gptq(base, folder / "stored", order=True)
    train = {"steps": 6, "batch_examples": 8, "micro_tokens": 512, "learning_rate": 1e-2, "precision": "fp32"}
    run = tune(
        Recipe.from_dict(
            {
                "base": {"model": str(folder / "stored"), "quantization": "gptq"},
                "data": {"train": str(write_rows(folder / "train.jsonl")), "max_length": 128, "eval": "none"},
                "strategies": [{"lora": {"rank": 4}}],
                "train": {**train, "schedule": "constant", "warmup": 0},
                "output": str(folder / "run"),
            }
        ),
        quiet=True,
    )
    ids = torch.arange(1, 61).view(3, 20)
    stock = by_gptqmodel(folder / "stored", 4)
    with torch.no_grad():
        plain = stock(ids).logits
        theirs = PeftModel.from_pretrained(stock, folder / "run" / "adapter").eval()(ids).logits
        ours = run.model.eval()(input_ids=ids).logits
    assert (theirs - plain).abs().max() > 0.05, "the adapter does nothing"
    # Two layers with seven products each, of weights that gptqmodel rounds to fp16.
    return "an adapter on gptq, in stock PEFT", float((theirs - ours).abs().max() / theirs.abs().max()), 14 * HALF


def hqq_weights(base: Path, folder: Path, bits: int, axis: int) -> tuple[str, float, float]:
    """Quantise a base with hqq, save its state dict, and compare every weight with hqq's, relative to the largest."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    options = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    shutil.copytree(base, folder)
    tensors, made = load_file(base / "model.safetensors"), {}
    for key in [key for key in tensors if "_proj.weight" in key]:
        weight = tensors.pop(key)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        layer = made[key] = HQQLinear(linear, options, compute_dtype=torch.float16, device="cpu")
        state = layer.state_dict()
        tensors |= {f"{key.removesuffix('weight')}{name}": value for name, value in state.items()}
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "quant_config": options, "skip_modules": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    ours, error = load_base(folder, None, LM, torch.float32).model, 0.0
    for key, layer in made.items():
        own, other = linear_weight(ours.get_submodule(key.removesuffix(".weight")), torch.float32), layer.dequantize()
        error = max(error, float((own - other.float()).abs().max() / other.abs().max()))
    # hqq rounds the difference of code and zero, and its product with the scale.
    return f"hqq in {bits} bits, axis {axis}", error, 4 * HALF


if __name__ == "__main__":
    sys.exit(main())
