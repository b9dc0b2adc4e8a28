"""Bases that are refused, by their name, folder or device; and what of a folder is ignored or needs trust."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.core.model.test_base_loading import CLASSIFIER, LM, child, load

from budwood.errors import BudwoodError, CorruptError, InputError, ResourceError
from budwood.model.base import check_base, load_tokenizer, skeleton


@pytest.fixture
def broken(tiny_base, tmp_path):
    """A copy of the tiny base, to be broken."""
    return Path(shutil.copytree(tiny_base, tmp_path / "broken"))


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def refused(error: type[BudwoodError], message: str, path, quantization: str | None = "nf4", **options) -> None:
    start = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        check_base(path, quantization, **options)
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)


def test_no_such_folder(tiny_base, tmp_path):
    refused(InputError, "no such folder", tmp_path / "nothing")
    refused(InputError, f"Did you mean '{tiny_base}'", f"{tiny_base}x")
    refused(InputError, "is a file", tiny_base / "config.json")
    refused(InputError, "no such folder", "../a/b/c")


def test_no_model_files(broken):
    (broken / "model.safetensors").unlink()
    refused(InputError, "has neither model.safetensors", broken)
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(InputError, r"only pickled weights \(pytorch_model.bin\).*convert", broken)
    (broken / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    refused(InputError, "GGUF", broken)
    (broken / "config.json").unlink()
    refused(InputError, "GGUF", broken)
    (broken / "model.Q4_K_M.gguf").unlink()
    (broken / "pytorch_model.bin").unlink()
    refused(InputError, "no config.json", broken)
    (broken / "adapter_config.json").write_text("{}")
    refused(InputError, "is an adapter", broken)


def test_pickles_beside_safetensors_are_ignored(broken):
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04not read")
    check_base(broken, "nf4")


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\xff"])
def test_damaged_config(broken, text):
    (broken / "config.json").write_bytes(text.encode("latin-1"))
    refused(CorruptError, "config.json", broken)


def test_a_config_cannot_select_a_kernel_on_the_hub(broken):
    change_config(broken, _attn_implementation="kernels-community/flash-attn2")
    assert load(broken).model.config._attn_implementation == "sdpa"


def test_an_unknown_architecture_never_runs_code(broken, tmp_path):
    change_config(broken, model_type="budwood-unknown")
    refused(InputError, "does not support model type 'budwood-unknown'", broken)
    trap = tmp_path / "ran"
    (broken / "code.py").write_text(f"open({str(trap)!r}, 'w')\nclass Config: pass\n")
    change_config(broken, auto_map={"AutoConfig": "code.Config", LM: "code.Config"})
    refused(InputError, "trust_remote_code: true", broken)
    with pytest.raises(InputError, match="trust_remote_code"):
        load(broken)
    change_config(broken, model_type="llama")  # supported by transformers: the code is not needed
    check_base(broken, "nf4")
    load(broken)
    assert not trap.exists()


def test_custom_code_runs_if_it_is_trusted(broken):
    (broken / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'budwood-own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = {"AutoConfig": "modeling_own.OwnConfig", LM: "modeling_own.OwnForCausalLM"}
    change_config(broken, model_type="budwood-own", auto_map=own)
    refused(InputError, "needs custom Python code", broken)
    base = load(broken, "nf4", trust_remote_code=True)
    assert type(base.model).__name__ == "OwnForCausalLM"
    assert base.unquantized_share < 0.4


@pytest.mark.parametrize("chosen", [0, 20])
def test_a_router_that_chooses_more_experts_than_there_are_or_none(broken, chosen):
    change_config(broken, num_experts=8, num_experts_per_tok=chosen)
    refused(InputError, f"config.json: num_experts_per_tok is {chosen}, and each layer has 8 experts: take", broken)
    change_config(broken, num_experts_per_tok=8)
    check_base(broken)


@pytest.mark.parametrize("method", ["quip", "vptq"])
def test_other_quantised_checkpoints_are_refused_by_name(broken, method):
    change_config(broken, quantization_config={"quant_method": method, "bits": 4})
    refused(InputError, f"with {method}, which no installed quantiser reads", broken)


def test_unknown_quantization(tiny_base):
    refused(InputError, "Did you mean 'nf4'", tiny_base, "nf44")


def test_a_quantisation_that_the_device_does_not_support(tiny_base, monkeypatch):
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    refused(ResourceError, "does not support 'cpu'.*set quantization to none", tiny_base, "int8", device="cpu")
    check_base(tiny_base, "none", device="cpu")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused(ResourceError, "pip install bitsandbytes", tiny_base, "nf4", device="cpu")


def test_fused_experts_of_an_unknown_form_are_refused_by_name(tiny_base, tmp_path, monkeypatch):
    import transformers

    from budwood.model.quantizers import NF4, Quantizer

    config = transformers.MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    load_tokenizer(tiny_base).save_pretrained(tmp_path)
    monkeypatch.setattr(NF4.__mro__[1], "pack_experts", Quantizer.pack_experts)
    name = r"4 fused tensors such as '(model.)?layers.0.mlp.experts.gate_up_proj.weight' hold .* kB of .* kB"
    refused(InputError, name, tmp_path)
    with pytest.raises(InputError, match=name):
        load(tmp_path, "nf4")
    assert load(tmp_path, "none").unquantized_share == 1


def test_model_without_a_class_for_the_task(tiny_base, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=300, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'t5' is an encoder-decoder, but causal-lm needs a decoder-only model"):
        skeleton(tmp_path, LM)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("bart", "is an encoder-decoder"),
        ("bert", "is no decoder"),
        ("roberta", "is no decoder"),
        ("xlnet", "is no dec"),
    ],
)
def test_a_model_with_a_causal_class_that_is_not_a_decoder(tmp_path, kind, what):
    """They have causal classes, but XLNet permutes the order, BERT sees both sides, and BART is an encoder-decoder."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(InputError, match=f"'{kind}' {what}.*needs a decoder-only model.*take another base"):
        skeleton(tmp_path, LM)
    if kind in ("bert", "roberta"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "is_decoder": True}))
        skeleton(tmp_path, LM)
        skeleton(tmp_path, "AutoModelForSequenceClassification")


def test_missing_weights(broken):
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(broken, lambda tensors: {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(CorruptError, match=f"it lacks 1 weight: {name}"):
        load(broken, "nf4")
    with pytest.raises(CorruptError, match=name):
        load(broken, "none", CLASSIFIER)


def test_missing_head_of_a_language_model(broken):
    change_tensors(broken, lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"})
    with pytest.raises(CorruptError, match="lacks 1 weight: lm_head.weight"):
        load(broken)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_weights_of_the_wrong_shape(broken, quantization):
    change_config(broken, intermediate_size=96)
    with pytest.raises(CorruptError, match="6 weights in another shape than config.json gives: model.layers.0"):
        load(broken, quantization)


def test_more_layers_than_in_the_configuration(broken):
    change_config(broken, num_hidden_layers=1)
    with pytest.raises(CorruptError, match="more layers than config.json: model.layers.1"):
        load(broken)


def test_unused_tensors_are_reported(broken):
    change_tensors(broken, lambda tensors: tensors | {"vision.weight": torch.zeros(2)})
    assert load(broken).notes[1] == "not used: 1 tensor of the checkpoint, vision.weight"


def test_tokenizer_is_missing_or_damaged(broken):
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(CorruptError, match="tokenizer does not load"):
        load_tokenizer(broken)
    for file in broken.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(broken)


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        ("RepositoryNotFoundError", InputError, "neither a local folder nor on the hub"),
        ("GatedRepoError", ResourceError, "is gated.*hf auth login"),
        ("LocalEntryNotFoundError", ResourceError, "neither a local folder nor in the hub's cache"),
        ("HfHubHTTPError", ResourceError, "cannot be downloaded"),
    ],
)
def test_errors_of_the_hub(monkeypatch, failure, error, message):
    import huggingface_hub

    def snapshot_download(*args, **options):
        kind = getattr(huggingface_hub.errors, failure)
        raise kind.__new__(kind, "text of the error")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    refused(error, message, "someone/some-model")


def test_hub_name_while_offline(tmp_path):
    result = child(
        """
        import time
        from budwood.errors import ResourceError
        from budwood.model.checks import check_base
        start = time.monotonic()
        try:
            check_base("someone/some-model", "nf4")
        except ResourceError as error:
            print(error.exit_code, time.monotonic() - start < 3, error)
        """,
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path),
    )
    assert result.stdout.startswith("3 True base 'someone/some-model' is neither a local folder nor in the hub's cache")
    assert "HF_HUB_OFFLINE is set" in result.stdout
