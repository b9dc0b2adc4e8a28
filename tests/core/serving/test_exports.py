"""Exports for PEFT and vLLM: what vLLM's rules make of them, what is refused by name, and the comparison."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.core.adapters.conftest import make_saved
from tests.core.serving.conftest import PREFIX, make_adalora, make_adapter, write
from transformers import AutoModelForCausalLM

from budwood import AdapterPool, BudwoodError, CorruptError, InputError
from budwood.serving.exports import targets
from budwood.serving.exports.factors import write_lora
from budwood.serving.exports.targets import export_for
from budwood.serving.exports.wanted import Wanted

PROMPTS = [[1, 40, 50, 60, 70], [1, 99, 7], [1, 200, 201, 202, 203, 204, 205]]
PATTERNS = {
    "rank_pattern": {"v_proj": 12, "layers.0.mlp.up_proj": 2},
    "alpha_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 50},
}


def vllm_logits(base: Path, folder: Path, limit: int = 64) -> torch.Tensor:
    """Logits by vLLM's rules: r, lora_alpha and use_rslora are read; one scale for every module; patterns are not."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["modules_to_save"] and not config.get("use_dora") and config["bias"] == "none"
    assert config["r"] <= limit
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    modules, tensors, pairs = dict(model.named_modules()), load_file(folder / "adapter_model.safetensors"), {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        assert key.startswith("base_model.model.") and parts[-2] in ("lora_A", "lora_B") and parts[-1] == "weight"
        pairs.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = tensor
    with torch.no_grad():
        for path, pair in pairs.items():
            modules[path].weight += scale * pair["lora_B"] @ pair["lora_A"]
        return torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])


def pool_logits(base: Path, adapter: Path) -> torch.Tensor:
    pool = AdapterPool(base, precision="fp32", device="cpu")
    pool.load("a", adapter)
    pool.use("a")
    return pool.logits(PROMPTS)


def test_vllm_reads_from_the_export_what_the_adapter_computes(tiny_base, tmp_path):
    folder = make_saved(tiny_base, tmp_path / "a", use_rslora=True, **PATTERNS)
    wanted = pool_logits(tiny_base, folder)
    assert (vllm_logits(tiny_base, folder) - wanted).abs().max() > 0.1, "vLLM ignores patterns of the adapter itself"
    done = export_for(folder, tmp_path / "out", Wanted("vllm", max_lora_rank=16))
    torch.testing.assert_close(vllm_logits(tiny_base, tmp_path / "out", 16), wanted, atol=1e-4, rtol=0)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 16 and config["lora_alpha"] == 16 and config["rank_pattern"] == {}
    assert {t.shape[0] for k, t in load_file(tmp_path / "out" / "adapter_model.safetensors").items() if "_A" in k} == {
        16
    }
    assert done.replay is not None and done.replay.same and done.replay.recorded.largest < 1e-4
    assert done.replay.error < 1e-4 and not done.approximate
    expected = f"vllm serve {tiny_base} --enable-lora --max-lora-rank 16 --lora-modules out={tmp_path / 'out'}"
    assert done.lines[-1] == expected


def test_adalora_becomes_lora_for_vllm(tiny_base, tmp_path):
    folder = make_adalora(tmp_path / "a", 3)
    done = export_for(folder, tmp_path / "out", Wanted("vllm", base=str(tiny_base)))
    wanted = pool_logits(tiny_base, folder)
    torch.testing.assert_close(vllm_logits(tiny_base, tmp_path / "out"), wanted, atol=1e-4, rtol=0)
    assert done.replay is not None and done.replay.recorded is None


def test_dora_becomes_lora_by_the_difference_of_the_weights(tiny_base, tmp_path):
    folder = make_saved(tiny_base, tmp_path / "a", use_dora=True, target_modules=["q_proj", "down_proj"])
    with pytest.raises(InputError, match=r"it is DoRA \(use_dora\), which vLLM cannot hold: convert it with --as lora"):
        export_for(folder, tmp_path / "out", Wanted("vllm"))
    errors = []
    for rank in (1, 16, 64):
        done = export_for(folder, tmp_path / f"r{rank}", Wanted("vllm", "lora", rank, force=True))
        assert done.approximate
        errors.append(done.replay.error)
        found, wanted = vllm_logits(tiny_base, tmp_path / f"r{rank}"), pool_logits(tiny_base, folder)
        assert done.replay.conversion.largest == pytest.approx(float((found - wanted).abs().max()), rel=0.05, abs=1e-4)
    assert errors[0] > 0.25 > errors[1] > errors[2] < 1e-3, "64 is the full rank"
    with pytest.raises(InputError, match=r"changes the answers by \d+% .*more than 25%.*larger --rank, or --force"):
        export_for(folder, tmp_path / "small", Wanted("vllm", "lora", 1))
    assert not (tmp_path / "small").exists()


FULL = """
    class Full(Strategy):
        'A third-party method: adds a full matrix to a weight.'

        api = 2
        adapter_types = ("FULL",)

        @hookimpl
        def attach_adapter(self, model, config, tensors, name):
            self.handles, self.tensors = [], tensors

        @hookimpl
        def use_adapters(self, model, names, index):
            while self.handles:
                self.handles.pop().remove()
            for path in self.tensors if names else ():
                def add(module, inputs, output, delta=self.tensors[path]):
                    return output + inputs[0] @ delta.T
                self.handles.append(model.get_submodule(path).register_forward_hook(add))

        @hookimpl
        def detach_adapter(self, model, name):
            self.use_adapters(model, [], index=[])

        @hookimpl
        def merge_adapter(self, model, name):
            self.use_adapters(model, [], index=[])
            for path, delta in self.tensors.items():
                weight = model.get_submodule(path).weight
                weight.data = weight.data + delta
"""


def test_a_third_partys_full_matrix_becomes_lora(tiny_base, tmp_path, distribution):
    distribution("budwood-full", FULL, {"full": "Full"})
    draw = torch.Generator().manual_seed(0)
    delta = torch.randn(128, 3, generator=draw) @ torch.randn(3, 64, generator=draw) / 20
    folder = write(tmp_path / "full", {"peft_type": "FULL"}, {"model.layers.1.mlp.up_proj": delta})
    with pytest.raises(InputError, match="adapter type 'full' is not LoRA, which vLLM needs: convert it with --as"):
        export_for(folder, tmp_path / "out", Wanted("vllm", base=str(tiny_base)))
    done = export_for(folder, tmp_path / "out", Wanted("peft", "lora", 3, base=str(tiny_base)))
    assert done.lines == ["LoRA of rank 3 on 1 linear"] and done.replay.error < 1e-3
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}model.layers.1.mlp.up_proj.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(b @ a, delta, atol=1e-5, rtol=0)


def test_a_lower_rank_is_the_best_approximation(tiny_base, tmp_path):
    folder = make_adapter(tmp_path / "a", 1, rank=6, names=("self_attn.q_proj",))
    done = export_for(folder, tmp_path / "out", Wanted("peft", "lora", 2, base=str(tiny_base), force=True))
    assert done.approximate and done.replay.error > 1e-3
    before, after = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "out"))
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_"
    exact = 2.0 * before[f"{key}B.weight"] @ before[f"{key}A.weight"]
    found = after[f"{key}B.weight"] @ after[f"{key}A.weight"]
    left = torch.linalg.svdvals(exact.double())[2:].norm()
    assert (exact - found).double().norm() == pytest.approx(float(left), rel=1e-4), "Eckart and Young"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, r"holds whole modules \(modules_to_save: \[\"lm_head\"\]\), which vLLM"),
        ({"trainable_token_indices": [4, 5]}, r"rows of embeddings \(trainable_token_indices: \[4, 5\]\), which vLLM"),
        ({"bias": "lora_only"}, r"holds biases \(bias: lora_only\), which vLLM cannot hold: merge it instead"),
        ({"use_dora": True}, r"DoRA \(use_dora\), which vLLM cannot hold: convert it with --as lora"),
        ({"task_type": "SEQ_CLS"}, "its task is sequence-classification, but vLLM holds adapters of causal-lm only"),
        ({"rank": 24}, r"'model.layers.0.mlp.down_proj' has rank 24, more than --max-lora-rank 16: cut it"),
    ],
    ids=str,
)
def test_what_vllm_cannot_hold_is_refused_by_name_before_a_base_loads(tmp_path, changes, message):
    folder = make_adapter(tmp_path / "a", 1, **changes)
    with pytest.raises(InputError, match=message):
        export_for(folder, tmp_path / "out", Wanted("vllm", max_lora_rank=16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_an_export_that_computes_something_else_is_not_written(tiny_base, tmp_path, monkeypatch):
    folder = make_adapter(tmp_path / "a", 1)
    wrong = "model.layers.1.self_attn.v_proj"

    def damaged(place, factors, saved):
        return write_lora(place, {p: (a, b * (0.5 if p == wrong else 1)) for p, (a, b) in factors.items()}, saved)

    monkeypatch.setattr(targets, "write_lora", damaged)
    with pytest.raises(
        BudwoodError, match=r"computes something else than the adapter .*nothing was written. This is a bug"
    ):
        export_for(folder, tmp_path / "out", Wanted("vllm", base=str(tiny_base)))
    assert not (tmp_path / "out").exists()
    unchecked = export_for(folder, tmp_path / "out", Wanted("vllm", base="elsewhere", check=False))
    assert unchecked.replay is None and (tmp_path / "out" / "adapter_config.json").exists()


def test_the_export_for_peft_is_the_adapter_and_is_compared_with_its_golden_answers(
    tiny_base, tiny_bases, tmp_path, capsys, monkeypatch
):
    from budwood.adapters.golden import Golden
    from budwood.cli.app import run

    folder = make_saved(tiny_base, tmp_path / "a", modules_to_save=["lm_head"], target_modules=["q_proj"])
    assert run(["adapter", "export", str(folder), str(tmp_path / "out"), "--for", "peft"]) == 0
    shown = capsys.readouterr().out
    assert "loaded again: 3 prompts on the base (none, fp32)" in shown and "vs. what training recorded" in shown
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == (
        load_file(folder / "adapter_model.safetensors").keys()
    )
    other = tiny_bases("other", seed=5)
    with pytest.raises(InputError, match="was trained on the base"):
        export_for(folder, tmp_path / "b", Wanted("peft", base=str(other)))
    with pytest.raises(InputError, match="another model than the one that training recorded"):
        export_for(folder, tmp_path / "b", Wanted("peft", base=str(other), allow_other_base=True))
    load = Golden.load
    moved = torch.eye(3, 300)
    monkeypatch.setattr(Golden, "load", lambda path: replace(load(path), adapter=load(path).adapter + moved))
    with pytest.raises(CorruptError, match="another model than the one that training recorded"):
        export_for(folder, tmp_path / "b", Wanted("peft"))
    assert not (tmp_path / "b").exists()


@pytest.mark.filterwarnings("ignore")
def test_the_bases_own_head_that_peft_writes_beside_its_update_is_left_out(tiny_base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "a")
    assert f"{PREFIX}lm_head.base_layer.weight" in load_file(tmp_path / "a" / "adapter_model.safetensors")
    export_for(tmp_path / "a", tmp_path / "out", Wanted("vllm", base=str(tiny_base)))
    expected = pool_logits(tiny_base, tmp_path / "a")
    torch.testing.assert_close(vllm_logits(tiny_base, tmp_path / "out"), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "quantization"), [("LoHa", "nf4"), ("HRA", "int8")])
def test_methods_without_layers_for_quantised_weights_are_compared_on_what_those_weights_are(
    tiny_base, tmp_path, method, quantization
):
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = peft.get_peft_model(model, getattr(peft, f"{method}Config")(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "a")
    wanted = Wanted("peft", base=str(tiny_base), quantization=quantization)
    replay = export_for(tmp_path / "a", tmp_path / "out", wanted).replay
    assert replay.quantization == quantization and replay.conversion.largest < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--for", "vlm"], "--for vlm: no such target: choose one of peft, .* Did you mean 'vllm'?"),
        (["--for", "peft", "--merged"], "--merged: has no effect with --for peft"),
        (["--for", "merged", "--as", "lora"], "--as: has no effect with --for merged"),
        (["--for", "gguf", "--merged", "--with-base"], "--with-base: has no effect with --for gguf --merged"),
        (["--for", "gguf", "--dtype", "fp32"], "--dtype: has no effect with --for gguf"),
        (["--for", "merged", "--no-check"], "--no-check: has no effect with --for merged"),
        (["--for", "vllm", "--as", "ia3"], "--as ia3: vLLM knows LoRA only"),
        (["--for", "vllm", "--rank", "4"], "--rank: needs --as lora"),
        (["--for", "peft", "--as", "lora", "--rank", "0"], "--rank 0: must be at least 1"),
        (["--for", "vllm", "--max-lora-rank", "24"], "--max-lora-rank 24: vLLM knows 1, 8, 16,"),
        (["--for", "merged", "--dtype", "int8"], "--dtype int8: choose one of bf16, fp16, fp32"),
        (["--rank", "4"], "--rank: needs --for peft, vllm, gguf, ollama or merged"),
        (["--for", "peft", "--push", "no name"], "--push no name: give a repository of the hub, OWNER/NAME"),
        (["--for", "peft"], "records no base: pass it with --base"),
    ],
    ids=str,
)
def test_bad_options_are_one_line_and_write_nothing(tmp_path, capsys, options, message):
    from budwood.cli.app import run

    folder = make_adapter(tmp_path / "a", 1)
    assert run(["adapter", "export", str(folder), str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_and_a_hub_that_is_offline(tiny_base, tmp_path, capsys):
    from budwood.cli.app import run

    folder = make_adapter(tmp_path / "a", 1)
    arguments = ["adapter", "export", str(folder), str(tmp_path / "out"), "--for", "vllm", "--no-check"]
    assert run([*arguments, "--push", "me/mine"]) == 3
    shown = capsys.readouterr()
    assert "not compared (--no-check)" in shown.out
    assert f"the export is complete in {tmp_path / 'out'}; push it later: hf upload me/mine" in shown.err
    assert run(arguments) == 2 and "already exists" in capsys.readouterr().err
