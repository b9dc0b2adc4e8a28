"""Tiny random models of the architectures in transformers, built from configs alone.

One set of sizes serves almost all of them: a config gets the sizes that it has a field for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tests.conftest import make_tokenizer
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LABELS = ("a", "b", "c")
TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "sequence-to-sequence": "AutoModelForSeq2SeqLM",
}
"""Tasks of the walk, and transformers' class for each."""
SIZES: dict[str, Any] = {
    "vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "rotary_dim": 4,
    "intermediate_size": 64, "ffn_dim": 64, "ffn_hidden_size": 64, "hidden_dim": 64, "d_ff": 64, "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64, "max_position_embeddings": 128, "n_positions": 128, "sliding_window": 6,
    "attention_window_size": 6, "layer_norm_eps": 1e-5,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "state_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300, "num_kv_shared_layers": 0, "lru_width": 32,
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots1": {"n_shared_experts": 1},
    "falcon": {"head_dim": None, "alibi": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "jamba": {"layers_block_type": None, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_expand": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longformer": {"attention_window": [8, 8]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "hidden_size": 32, "expand": 2, "chunk_size": 8},
    "mobilebert": {"num_attention_heads": 4, "embedding_size": 32, "intra_bottleneck_size": 32, "hidden_size": 32,
                   "true_hidden_size": 32},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip
"""Sizes that a model type needs beside or instead of `SIZES`; None: the config's own."""
LARGEST = 15_000_000
"""Elements of the largest model that counts as tiny; some configs have parts of a fixed size."""
SLOW = {"kimi_linear"}
"""Their forward takes minutes for nothing that another does not show."""


def model_types(task: str) -> list[str]:
    """Return the model types of a task that the walk goes through: causal-lm, encoders, and T5 and its like."""
    causal, masked, classes, pairs = (
        getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES")
        for name in ("CAUSAL_LM", "MASKED_LM", "SEQUENCE_CLASSIFICATION", "SEQ_TO_SEQ_CAUSAL_LM")
    )
    if task == "causal-lm":
        return [name for name in causal if name not in masked]
    if task == "sequence-classification":
        return [name for name in classes if name in masked]
    return [name for name in pairs if name.startswith(("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "m2m"))]


def config_of(name: str) -> Any:
    """Return a tiny config of a model type; without dropout, so that two runs of a model are the same."""
    cls = CONFIG_MAPPING[name]
    default = cls()
    text = default.get_text_config() if getattr(default, "text_config", None) is not None else default
    sizes = SIZES | CHANGES.get(name, {})
    if hasattr(text, "qk_rope_head_dim"):  # multi-head latent attention has as many keys as queries
        sizes |= {"num_key_value_heads": sizes["num_attention_heads"]}
    own = {key: value for key, value in sizes.items() if value is not None and hasattr(text, key)}
    config = cls(text_config=own) if text is not default else cls(**own)
    for part in (config, config.get_text_config()):
        for key, value in list(vars(part).items()):
            if ("drop" in key or "jitter" in key) and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def build(name: str, task: str, folder: Path) -> type[Any]:
    """Save a random tiny model of a type, with a tokenizer; return its class.

    Raises:
        Exception: transformers cannot build it from these sizes, or it is larger than `LARGEST`.
    """
    config = config_of(name)
    if task == "sequence-classification":
        config.num_labels = len(LABELS)
        config.id2label = dict(enumerate(LABELS))
        config.label2id = {label: number for number, label in enumerate(LABELS)}
    if task == "sequence-to-sequence" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = SIZES["decoder_start_token_id"]
    auto = getattr(transformers, TASKS[task])
    with torch.device("meta"):
        elements = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if elements > LARGEST:
        raise ValueError(f"parts of a fixed size have {elements:,} elements")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = auto.from_config(config)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # no bias is 0, and no scale 1
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return type(model)
