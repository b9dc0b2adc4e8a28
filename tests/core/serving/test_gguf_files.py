"""GGUF files as other readers see them: transformers' reader, and the sum of base and adapter in llama.cpp's layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import make_tokenizer
from tests.core.adapters.conftest import make_saved
from tests.core.serving.conftest import make_adapter

from budwood import BudwoodError, InputError
from budwood.adapters.manifest import ChatRecord
from budwood.cli.app import run
from budwood.serving.exports import llama_cpp
from budwood.serving.exports.architectures import architecture_of, rope_factors
from budwood.serving.exports.conversation import rendered
from budwood.serving.exports.gguf_files import adapter_names
from budwood.serving.exports.ollama import frames_of, go_template
from budwood.serving.exports.targets import export_for
from budwood.serving.exports.vocabulary import read_vocabulary
from budwood.serving.exports.wanted import Wanted

gguf = pytest.importorskip("gguf")
PROMPTS = torch.tensor([[1, 40, 50, 60, 70], [1, 99, 7, 3, 4]])


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {t.name: torch.from_numpy(t.data.copy()).float() for t in gguf.GGUFReader(path).tensors}


def value(path: Path, key: str):
    field = gguf.GGUFReader(path).get_field(key)
    return None if field is None else field.contents()


def logits(folder: Path, **options) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(PROMPTS).logits


def make_model(folder: Path, kind: str, **changes) -> Path:
    """Save a random model of a type with the tests' tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {
        "vocab_size": 304, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(options | changes)))
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_transformers_reads_from_the_gguf_the_models_own_logits(tmp_path, kind):
    base = make_model(tmp_path / "base", kind)
    names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    folder = make_adapter(tmp_path / "a", 1, names=names)
    done = export_for(folder, tmp_path / "out", Wanted("gguf", with_base=True, base=str(base)))
    options = {"head_dim": 16} if kind == "qwen3" else {}  # transformers does not read key_length for this one
    found = logits(tmp_path / "out", gguf_file="base.gguf", **options)
    torch.testing.assert_close(found[..., :300], logits(base)[..., :300], atol=1e-4, rtol=0)
    assert done.replay.error < 1e-3
    assert value(tmp_path / "out" / "adapter.gguf", "general.type") == "adapter"
    assert value(tmp_path / "out" / "adapter.gguf", "adapter.type") == "lora"
    export_for(folder, tmp_path / "merged", Wanted("gguf", merged=True, dtype="fp32", base=str(base)))
    one, other = tensors_of(tmp_path / "out" / "base.gguf"), tensors_of(tmp_path / "merged" / "model.gguf")
    adapter = tensors_of(tmp_path / "out" / "adapter.gguf")
    rank = value(tmp_path / "out" / "adapter.gguf", "adapter.lora.alpha")
    changed = {name.removesuffix(".lora_a") for name in adapter if name.endswith(".lora_a")}
    assert len(changed) == 6 and one.keys() == other.keys()
    for name, weight in one.items():
        if name in changed:
            a, b = adapter[f"{name}.lora_a"], adapter[f"{name}.lora_b"]
            weight = weight + rank / len(a) * b @ a
        torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=1e-5, msg=name)
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == ["model.gguf"]


def test_gemmas_adapters_are_written_but_not_its_models(tmp_path):
    base = make_model(tmp_path / "base", "gemma3_text", pad_token_id=0)
    folder = make_adapter(tmp_path / "a", 1, names=("self_attn.k_proj", "mlp.down_proj"))
    done = export_for(folder, tmp_path / "out", Wanted("gguf", base=str(base)))
    assert done.replay.error < 1e-3 and value(tmp_path / "out" / "adapter.gguf", "general.architecture") == "gemma3"
    found = tensors_of(tmp_path / "out" / "adapter.gguf")
    saved = load_file(folder / "adapter_model.safetensors")
    for name, path in (("attn_k", "self_attn.k_proj"), ("ffn_down", "mlp.down_proj")):
        b = saved[f"base_model.model.model.layers.1.{path}.lora_B.weight"]
        torch.testing.assert_close(found[f"blk.1.{name}.weight.lora_b"], 2 * b)
    with pytest.raises(InputError, match="only adapters of model type 'gemma3_text' are written as GGUF"):
        export_for(folder, tmp_path / "more", Wanted("ollama", base=str(base)))


def test_a_tied_head_has_no_weight_in_llama_cpp(tiny_bases, tmp_path):
    base = tiny_bases("tied", tie_word_embeddings=True)
    folder = make_adapter(tmp_path / "a", 1)
    factors = {"lm_head": (torch.zeros(2, 64), torch.zeros(300, 2))}
    config = json.loads((base / "config.json").read_text())
    with pytest.raises(InputError, match=r"a: adapts 'lm_head', which is tied to the embeddings"):
        adapter_names(factors, architecture_of(config, "base"), str(folder))


def test_a_file_that_reads_back_otherwise_is_not_left(tiny_base, tmp_path, monkeypatch):
    folder = make_adapter(tmp_path / "a", 1)

    def damaged(path, factors, arch, where):
        swapped = {p: (a, b.flip(0) if "k_proj" in p else b) for p, (a, b) in factors.items()}
        return write(path, swapped, arch, where)

    write = llama_cpp.write_adapter_gguf
    monkeypatch.setattr(llama_cpp, "write_adapter_gguf", damaged)
    with pytest.raises(BudwoodError, match="computes something else than the adapter"):
        export_for(folder, tmp_path / "out", Wanted("gguf", base=str(tiny_base)))
    assert not (tmp_path / "out").exists()


def test_llama_3s_rotary_factors_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 128, 2).double() / 128)
    values = config.to_dict()
    factors = rope_factors(values, architecture_of(values, "base"))
    torch.testing.assert_close(plain / factors.double(), scaled.double(), rtol=1e-5, atol=0)
    assert factors.min() == 1 and factors.max() == 8


def test_the_vocabulary_holds_what_llama_cpp_needs(tiny_base, tmp_path):
    folder = make_saved(tiny_base, tmp_path / "a", chat=ChatRecord(options={"mode": "x"}))
    done = export_for(folder, tmp_path / "out", Wanted("gguf", with_base=True))
    path = tmp_path / "out" / "base.gguf"
    source = json.loads((tiny_base / "tokenizer.json").read_text())
    tokens = value(path, "tokenizer.ggml.tokens")
    assert {token: number for number, token in enumerate(tokens)} == source["model"]["vocab"]
    assert value(path, "tokenizer.ggml.merges") == [" ".join(pair) for pair in source["model"]["merges"]]
    assert value(path, "tokenizer.ggml.token_type")[:6] == [3, 3, 3, 3, 3, 1]
    assert value(path, "tokenizer.ggml.pre") == "gpt-2"
    assert value(path, "tokenizer.ggml.eos_token_id") == 2
    assert "im_start" in value(path, "tokenizer.chat_template")
    assert value(path, "tokenizer.ggml.add_bos_token") is False, "as its chat template, not as the tokenizer"
    assert any("does not begin with the bos token" in note for note in done.notes)
    assert any('chat_template_kwargs with each request, as in training: {"mode": "x"}' in note for note in done.notes)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)


def altered(tiny_base: Path, folder: Path, change) -> tuple[Path, object]:
    from transformers import AutoTokenizer

    shutil.copytree(tiny_base, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder, AutoTokenizer.from_pretrained(tiny_base)


def split(regex: str, **words):
    first = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [first, last]} | words


DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "name"),
    [
        (split(LLAMA3), True, "llama-bpe"),
        (split(LLAMA3), False, "smaug-bpe"),
        (split(LLAMA3.replace("{1,3}", "")), False, "qwen2"),
        ({"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}, False, "smollm"),
        (BYTES, False, "gpt-2"),
        (BYTES, True, "gpt-2"),
    ],
    ids=str,
)
def test_the_way_of_splitting_has_llama_cpps_name(tiny_base, tmp_path, pre_tokenizer, ignore_merges, name):
    def change(values):
        values["pre_tokenizer"] = pre_tokenizer
        values["model"]["ignore_merges"] = ignore_merges

    folder, tokenizer = altered(tiny_base, tmp_path / "t", change)
    assert read_vocabulary(folder, tokenizer, 300, [2], None).pre == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["model"].update(type="Unigram"), r"model: Unigram \(SentencePiece\): only byte-level BPE"),
        (lambda v: v["model"].update(byte_fallback=True), r"model: BPE with byte_fallback \(SentencePiece\)"),
        (lambda v: v.update(normalizer={"type": "Lowercase"}), "normalizer: Lowercase"),
        (lambda v: v.update(pre_tokenizer=split("[a-z]+")), r"pre_tokenizer .*llama.cpp has no name for it"),
        (lambda v: v["pre_tokenizer"].update(add_prefix_space=True), "llama.cpp has no name for it"),
        (lambda v: v["added_tokens"][3].update(rstrip=True), r"added token '<\|im_start\|>': rstrip"),
        (lambda v: v["model"]["vocab"].update(more=300), "has 301 tokens, but the model only 300 embeddings"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_change_is_refused(tiny_base, tmp_path, change, message):
    folder, tokenizer = altered(tiny_base, tmp_path / "t", change)
    with pytest.raises(InputError, match=message):
        read_vocabulary(folder, tokenizer, 300, [2], None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model type 'gpt2' cannot be written as GGUF, only llama, mistral, qwen2,",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_type: yarn is not what"),
        ({"use_sliding_window": True}, "use_sliding_window is not what llama.cpp computes"),
        ({"hidden_act": "relu"}, "hidden_act: relu is not what llama.cpp computes"),
    ],
    ids=str,
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(tiny_base, changes, message):
    config = json.loads((tiny_base / "config.json").read_text()) | changes
    with pytest.raises(InputError, match=message):
        architecture_of(config, "base")


def test_ollama_gets_the_very_chat_template_or_none(tiny_base, tmp_path, capsys):
    from transformers import AutoTokenizer

    folder = make_saved(tiny_base, tmp_path / "a")
    assert run(["adapter", "export", str(folder), str(tmp_path / "out"), "--for", "ollama"]) == 0
    assert f"ollama create out -f {tmp_path / 'out' / 'Modelfile'}" in capsys.readouterr().out
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<eos>"' in text
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    frames = frames_of(tokenizer.chat_template, tokenizer, {})
    assert frames.before["user"] == "<|im_start|>user\n" and frames.after["assistant"] == "<|im_end|>\n"
    assert f'TEMPLATE """{go_template(frames, None)}"""' in text
    default = (
        "{{ bos_token }}{% if messages[0]['role'] != 'system' %}Be kind.\n{% endif %}{% for m in messages %}"
        "[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    found = frames_of(default, tokenizer, {})
    assert found.start == "<bos>Be kind.\n" and found.prompt == "[assistant]"
    go = go_template(found, "<bos>")
    for role, start in (("system", "[system]"), ("user", "Be kind.\\n"), ("assistant", "Be kind.\\n")):
        assert f'{{{{ if eq .Role "{role}" }}}}{{{{ if not $i }}}}{{{{ "{start}" }}}}{{{{ end }}}}' in go
    assert go.endswith('{{ "[assistant]" }}') and "<bos>" not in go
    trims = default.replace("m.content", "m.content | trim")
    last = default.replace("{{ eos_token }}", "{% if not loop.last %}{{ eos_token }}{% endif %}")
    assert frames_of(trims, tokenizer, {}) is None and frames_of(last, tokenizer, {}) is None
    text = rendered(default, tokenizer, [[{"role": "user", "content": "x"}]])[0]
    assert text == "<bos>Be kind.\n[user]x<eos>[assistant]"
    chat = make_saved(tiny_base, tmp_path / "b", chat=ChatRecord(template=trims))
    done = export_for(chat, tmp_path / "trims", Wanted("ollama", merged=True))
    assert "TEMPLATE" not in (tmp_path / "trims" / "Modelfile").read_text()
    assert any("has no TEMPLATE" in note for note in done.notes)
    assert value(tmp_path / "trims" / "model.gguf", "tokenizer.chat_template") == trims
    assert value(tmp_path / "trims" / "model.gguf", "tokenizer.ggml.add_bos_token") is True


def test_a_merged_chat_model_keeps_template_and_end_tokens(tiny_base, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    folder = make_saved(tiny_base, tmp_path / "a", chat=ChatRecord(template="{{ messages[0].content }}"), stop_ids=(4,))
    done = export_for(folder, tmp_path / "out", Wanted("merged", dtype="fp32"))
    assert done.merged is not None and done.merged.recorded.largest < 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages[0].content }}"
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 4]


def test_an_adapter_of_plain_texts_gets_no_chat_template(tiny_base, tmp_path):
    folder = make_saved(tiny_base, tmp_path / "a", on_messages=False, stop_ids=(7,))
    done = export_for(folder, tmp_path / "out", Wanted("ollama"))
    assert any("trained on texts, not on messages" in note for note in done.notes)
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "out" / "Modelfile").read_text()
    path = tmp_path / "out" / "base.gguf"
    assert value(path, "tokenizer.chat_template") is None
    assert value(path, "tokenizer.ggml.add_bos_token") is True, "as the tokenizer, which begins every text with it"
    assert value(path, "tokenizer.ggml.eot_token_id") == 7
    done = export_for(folder, tmp_path / "vllm", Wanted("vllm", check=False))
    assert any("/v1/completions" in note for note in done.notes)
