"""Loading a base: its attributes, quantised and new weights, device and precision; no silent downloads or repacking."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from budwood.cli.app import run
from budwood.errors import InputError, ResourceError
from budwood.model import base as loading
from budwood.model import machine
from budwood.model.base import check_base, load_base, pick_device_precision, skeleton
from budwood.model.quantizers.bitsandbytes import assert_not_packed

LM = "AutoModelForCausalLM"
CLASSIFIER = "AutoModelForSequenceClassification"


def load(path, quantization="none", auto_class=LM, dtype=torch.float32, **options):
    return load_base(path, quantization, auto_class, dtype, **options)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4", "fp4"])
def test_a_base_is_frozen_complete_and_measured(tiny_base, quantization):
    base = load(tiny_base, quantization)
    original = load_file(tiny_base / "model.safetensors")
    elements = sum(tensor.numel() for tensor in original.values())
    linears = sum(tensor.numel() for name, tensor in original.items() if "proj" in name)
    assert base.parameters == elements
    assert base.bytes_unquantized == 4 * elements
    assert base.quantization == quantization
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert base.new == ()
    if quantization == "none":
        assert base.bytes == pytest.approx(4 * elements, rel=1e-3)  # the rest is rotary frequencies
        assert base.unquantized_share == 1
        assert all(torch.equal(original[name], tensor) for name, tensor in base.model.state_dict().items())
    else:
        assert base.unquantized_share == pytest.approx(1 - linears / elements)
        bits = 8 if quantization == "int8" else 4
        assert linears * bits / 8 < base.bytes - 4 * (elements - linears) < linears * bits / 8 + 25_000
        assert f"in {quantization}" in base.notes[0]
        assert "34% of the weights stay in fp32: embeddings, lm_head" in base.notes[0]
        assert torch.equal(base.model.lm_head.weight, original["lm_head.weight"])


def test_quantised_logits_are_close_to_those_of_the_base(tiny_base):
    ids = torch.arange(5, 45)[None]
    exact = load(tiny_base).model(ids).logits
    spread = exact.std()
    for quantization, most in (("int8", 0.05), ("nf4", 0.3), ("fp4", 0.5)):
        with torch.no_grad():
            error = (load(tiny_base, quantization).model(ids).logits - exact).std() / spread
        assert 0 < error < most, quantization


def test_a_sharded_base_is_the_same(tiny_base, tiny_bases):
    sharded = tiny_bases("sharded", shard="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, many = load(tiny_base, "nf4"), load(sharded, "nf4")
    assert one.fingerprint == many.fingerprint
    a, b = one.model.state_dict(), many.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_tied_embeddings_are_counted_once(tiny_bases):
    base = load(tiny_bases("tied", tie_word_embeddings=True))
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert base.parameters == sum(p.numel() for p in base.model.parameters())


def test_a_new_head_depends_only_on_the_seed(tiny_base):
    def head(seed):
        torch.manual_seed(int(time.time()))
        before = torch.get_rng_state()
        base = load(tiny_base, "nf4", CLASSIFIER, model_kwargs={"num_labels": 3}, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        assert base.new == ("score.weight",)
        return base.model.score.weight

    first = head(1)
    assert type(first) is torch.nn.Parameter
    assert first.shape == (3, 64)
    assert torch.equal(first, head(1))
    assert not torch.equal(first, head(2))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_checkpoint_that_is_already_quantised(tiny_base, tmp_path, quantization):
    base = load(tiny_base, quantization)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    info = check_base(tmp_path)
    assert (info.quantization, info.prequantized) == (quantization, True)
    again = load(tmp_path, None)
    ids = torch.arange(5, 25)[None]
    assert again.quantization == quantization
    assert torch.equal(base.model(ids).logits, again.model(ids).logits)
    narrow, fresh = load(tmp_path, None, dtype=torch.bfloat16), load(tiny_base, quantization, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.model.parameters() if p.dtype.is_floating_point} == {torch.bfloat16}
    assert narrow.bytes == fresh.bytes
    with pytest.raises(InputError, match=f"already quantised, with {quantization}: set quantization to {quantization}"):
        check_base(tmp_path, "fp4")


def test_a_base_that_is_already_quantised_is_taken_as_it_is_where_nothing_says_how(tiny_base, tmp_path, capsys):
    base = load(tiny_base, "nf4")
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": " b"}\n' * 8)
    words = [str(tmp_path / "rows.jsonl"), "--base", str(tmp_path / "base"), "-o", f"output={tmp_path / 'run'}"]
    assert run(["tune", *words, "-o", "train.steps=2", "-o", "train.precision=bf16"]) == 0
    assert "in nf4" in capsys.readouterr().err
    assert run(["eval", str(tmp_path / "run" / "adapter"), "--data", words[0]]) == 0
    assert run(["generate", str(tmp_path / "base"), "--prompt", "a", "--max-new-tokens", "1"]) == 0
    assert run(["generate", str(tmp_path / "base"), "--prompt", "a", "--quantization", "int8"]) == 2
    assert "set quantization to nf4, or give the unquantised" in capsys.readouterr().err  # a recipe's words or a flag's
    assert run(["tune", *words, "--overwrite", "-o", "base.quantization=int8"]) == 2
    assert "already quantised, with nf4: set quantization to nf4" in capsys.readouterr().err


def test_skeleton_has_names_and_no_weights(tiny_base):
    frame = skeleton(tiny_base, CLASSIFIER, num_labels=5)
    assert {p.device.type for p in frame.parameters()} == {"meta"}
    assert frame.score.weight.shape == (5, 64)


def test_a_model_class_that_reads_values_while_it_is_built_is_refused(tiny_base, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForSequenceClassification.__init__", lambda *_: torch.ones(1).item())
    with pytest.raises(InputError, match="llama reads values of tensors while it is built.*take another base"):
        skeleton(tiny_base, CLASSIFIER)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_head_of_an_encoder_decoder_stays_unquantised(tmp_path, tiny_base, quantization):
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    from budwood.model.quantizers import is_quantized

    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=300, **sizes, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path)
    base = load_base(tmp_path, quantization, "AutoModelForSeq2SeqLM", torch.float32)
    model = base.model
    assert not is_quantized(model.lm_head) and is_quantized(model.encoder.block[0].layer[0].SelfAttention.q)
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits.isfinite().all()


# --- the repacking of 4-bit weights on a CPU with AVX512-BF16


def gradient(model) -> torch.Tensor:
    embeddings = model.get_input_embeddings()(torch.arange(5, 25)[None]).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.float().square().mean().backward()
    return embeddings.grad


def evaluate(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        logits = model(torch.arange(5, 25)[None]).logits
    model.train()
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_evaluation_changes_no_bit_of_the_gradient(tiny_base, quantization, dtype):
    model = load(tiny_base, quantization, dtype=dtype).model.train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = gradient(model)
    logits = evaluate(model)
    assert torch.equal(logits, evaluate(model))
    assert torch.equal(gradient(model), before)
    assert before.abs().max() > 0
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert_not_packed(model)


def test_copied_and_moved_layers_keep_the_guard(tiny_base):
    model = load(tiny_base, "nf4").model.train()
    before = gradient(model)
    for other in (copy.deepcopy(model), copy.deepcopy(model).to("cpu")):
        evaluate(other)
        assert_not_packed(other)
        assert torch.equal(gradient(other), before)


def test_without_the_guard_the_gradient_is_garbage(tiny_base):
    from bitsandbytes.functional import has_avx512bf16
    from bitsandbytes.nn import Linear4bit

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes does not repack")
    model = load(tiny_base, "nf4").model.train()
    before = gradient(model)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = True  # the default in bitsandbytes
    evaluate(model)
    with pytest.raises(RuntimeError, match="repacked"):
        assert_not_packed(model)
    assert (gradient(model) - before).norm() > 0.5 * before.norm()


@pytest.mark.parametrize("copied", [False, True])
def test_autocast_does_not_round_the_sums_of_an_8_bit_linear(tiny_base, monkeypatch, copied):
    def product(codes, weights):  # as bitsandbytes computes it on a CPU without AVX-512
        return (codes.float() @ weights.float()).to(torch.int32)

    monkeypatch.setattr(torch, "_int_mm", product)
    model = load(tiny_base, "int8", dtype=torch.bfloat16).model
    layer = (copy.deepcopy(model) if copied else model).model.layers[0].mlp.down_proj
    x = torch.randn(20, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        alone = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), alone)
            assert torch.equal(layer(x.float()), alone), "cast to autocast's dtype, as in a 16-bit linear"
    codes, scales = layer.state.CB.double(), layer.state.SCB.double() / 127
    most = x.double().abs().amax(-1, keepdim=True)
    exact = ((x.double() * 127 / most).round() @ codes.T) * (most / 127) * scales
    # The result is rounded to bf16 once. fp16 also rounds inputs, which can change a code by one if it is near a half.
    codes_off = (most / 127) * (codes.abs().amax(-1) * scales) * 2
    assert ((alone.double() - exact).abs() <= 2**-8 * exact.abs() + codes_off).all()


# --- device and precision


def test_device_and_precision_are_chosen_and_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(machine, "_onednn_multiplies", lambda precision: True)
    assert pick_device_precision(None, None) == (torch.device("cpu"), torch.bfloat16, "native here")
    assert pick_device_precision("cpu", "fp16")[1:] == (torch.float16, "as requested; this device emulates it, slowly")
    monkeypatch.setattr(machine, "_onednn_multiplies", lambda precision: False)
    assert pick_device_precision(None, None)[1] == torch.float32, "the processor has bf16, but oneDNN may not use it"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert pick_device_precision("auto", "auto") == (torch.device("cpu"), torch.float32, "no fast bf16 here")
    assert pick_device_precision("cpu", "fp32")[1:] == (torch.float32, "as requested")
    with pytest.raises(ResourceError, match="'cuda'.*none here"):
        pick_device_precision("cuda", None)
    with pytest.raises(InputError, match="unknown device"):
        pick_device_precision("gpu0", None)
    with pytest.raises(InputError, match="precision 'int4'"):
        pick_device_precision("cpu", "int4")


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_weights_in_another_dtype_than_the_base_are_named(tiny_base, quantization):
    base = load_base(tiny_base, quantization, "AutoModelForCausalLM", torch.bfloat16, needs_tokenizer=False)
    assert "weights in float" not in base.notes[-1]
    base.model.model.norm.float()  # as classes do that keep modules in fp32
    assert loading._describe(base, ["lm_head"]).endswith("; 64 weights in float32")


# --- the hub's cache, memory and output


def child(code: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_HOME")} | environment
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=120
    )


def test_hub_name_from_the_cache(tiny_base, tmp_path, monkeypatch):
    repo = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_base, repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    assert constants.is_offline_mode()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    base = load("someone/tiny")
    assert (base.name, base.model.config.name_or_path, base.path.name) == ("someone/tiny", "someone/tiny", "abc")


def test_loading_streams_is_silent_and_downloads_nothing(tiny_base, tiny_bases, tmp_path):
    """A sharded base of 201 MB in 16 bit: peak memory, output, connections, kernels from the hub."""
    (tmp_path / "kernels").mkdir()  # shadows the package with which bitsandbytes downloads native code
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(*_, **__): raise SystemExit('kernel fetched')")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24, "num_key_value_heads": 4}
    folder = tiny_bases("streamed", dtype=torch.bfloat16, shard="40MB", **sizes)
    assert len(list(folder.glob("*.safetensors"))) >= 4
    result = child(
        f"""
        import json, socket
        def refuse(self, address):
            raise SystemExit(f"connection to {{address}}")
        socket.socket.connect = socket.socket.connect_ex = refuse
        import kernels
        from budwood.model.base import silence_libraries, load_base
        silence_libraries()
        import peft, torch, transformers.models.llama.modeling_llama
        torch.set_num_threads(1)
        def memory(key):
            line = next(line for line in open("/proc/self/status") if line.startswith(key))
            return int(line.split()[1]) * 1024
        load_base({str(tiny_base)!r}, "nf4", "AutoModelForCausalLM", torch.bfloat16)  # does all imports
        open("/proc/self/clear_refs", "w").write("5")  # resets the peak
        before = memory("VmRSS")
        base = load_base({str(folder)!r}, "nf4", "AutoModelForCausalLM", torch.bfloat16)
        print(json.dumps([memory("VmHWM") - before, base.bytes, base.bytes_unquantized]))
        """,
        PYTHONPATH=str(tmp_path),
    )
    assert result.stderr == ""
    grown, stored, full = json.loads(result.stdout)
    assert full > 200e6
    assert stored < 0.3 * full
    assert grown < 0.7 * full
