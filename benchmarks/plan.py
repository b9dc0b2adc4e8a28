"""`python -m benchmarks.plan`: planned against actual peak memory of optimizer steps on this CPU.

Each recipe is planned on fake tensors, and then run for two steps, in which torch's profiler records every allocation.
The base is a random Llama, so that nothing is downloaded; its size does not matter for the comparison of bytes.
Target: within 5 % or 30 MB. Writes docs/benchmarks/plan.json and the table in docs/planning.md.

`--cards` plans Llama 3 for six cards instead, from configurations alone; see `benchmarks.plan_cards`.
"""

from __future__ import annotations

import json
import logging
import platform
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from budwood.model.quiet import silence_libraries
from budwood.planning.estimate import estimate
from budwood.planning.options import Device
from budwood.recipe.schema import Recipe
from budwood.testing.allocations import measured_peak
from budwood.testing.files import save_tokenizer, tiny_encoder

DOCS = Path(__file__).parents[1] / "docs"
SHARE, BYTES = 0.05, 30e6
MARKS = ("<!-- table -->\n", "<!-- end of table -->\n")

GRPO = {"rewards": [{"length": {"target": 20}}], "max_new_tokens": 32, "samples": 4}
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"strategies": [{"lora": {}}]},
    "lora, nf4": {"strategies": [{"lora": {}}], "quantization": "nf4"},
    "lora, fp4, dropout, gradient checkpointing": {
        "strategies": [{"lora": {"dropout": 0.1}}], "quantization": "fp4", "train": {"gradient_checkpointing": True},
    },
    "lora, nf4, one layer recomputed": {
        "strategies": [{"lora": {}}], "quantization": "nf4", "train": {"gradient_checkpointing": 1},
    },
    "lora, nf4, bf16": {"strategies": [{"lora": {}}], "quantization": "nf4", "train": {"precision": "bf16"}},
    "lora, int8, bf16": {"strategies": [{"lora": {}}], "quantization": "int8", "train": {"precision": "bf16"}},
    "lora with DoRA": {"strategies": [{"lora": {"dora": True}}]},
    "lora with DoRA, nf4": {"strategies": [{"lora": {"dora": True}}], "quantization": "nf4"},
    "lora and a whole head": {"strategies": [{"lora": {"modules_to_save": ["lm_head"]}}]},
    "lora and a whole head, adamw-8bit": {
        "strategies": [{"lora": {"modules_to_save": ["lm_head"]}}, {"adamw-8bit": {"min_elements": 1024}}],
    },
    "adalora, nf4": {
        "strategies": [{"adalora": {"initial_phase": 0, "final_phase": 1, "interval": 1}}], "quantization": "nf4",
        "train": {"steps": 10},
    },
    "lora, adversarial (freelb)": {"strategies": [{"lora": {}}, {"adversarial": {"method": "freelb"}}]},
    "lora, adversarial (smart)": {"strategies": [{"lora": {}}, {"adversarial": {"method": "smart"}}]},
    "lora, r-drop": {"strategies": [{"lora": {"dropout": 0.1}}, {"r-drop": {}}]},
    "lora, dpo": {"strategies": [{"lora": {}}, {"dpo": {}}], "rows": "pairs"},
    "lora, kto": {"strategies": [{"lora": {}}, {"kto": {}}], "rows": "judged"},
    "lora, grpo": {
        "strategies": [{"lora": {}}, {"grpo": GRPO}], "rows": "prompts", "train": {"batch_examples": 4},
    },
    "lora, distillation": {"strategies": [{"lora": {}}, {"distillation": {"teacher": "{teacher}"}}]},
    "lora, ema, kl-start": {"strategies": [{"lora": {}}, {"ema": {}}, {"kl-start": {}}]},
    "lora, sequence-classification": {
        "strategies": [{"lora": {}}], "task": "sequence-classification", "rows": "classes",
    },
    "lora, reward-model": {"strategies": [{"lora": {}}], "task": "reward-model", "rows": "pairs"},
    "lora, token-classification": {"strategies": [{"lora": {}}], "task": "token-classification", "rows": "tags"},
    "lora, sequence-regression": {"strategies": [{"lora": {}}], "task": "sequence-regression", "rows": "scores"},
    "lora, masked-lm": {"strategies": [{"lora": {}}], "task": "masked-lm", "base": "encoder", "rows": "texts"},
    "lora, sequence-to-sequence": {"strategies": [{"lora": {}}], "task": "sequence-to-sequence", "base": "t5"},
    "lora, embedding": {"strategies": [{"lora": {}}], "task": "embedding", "rows": "related"},
    "lora, orpo": {"strategies": [{"lora": {}}, {"orpo": {}}], "rows": "pairs"},
    "lora, focal, label smoothing, l2-sp, swa": {
        "strategies": [{"lora": {}}, {"focal": {}}, {"label-smoothing": {}}, {"l2-sp": {}}, {"swa": {}}],
    },
    "ia3, nf4": {"strategies": [{"ia3": {}}], "quantization": "nf4"},
    "oft": {"strategies": [{"oft": {"block_size": 4}}]},
    "vera": {"strategies": [{"vera": {}}]},
    "loha": {"strategies": [{"loha": {}}]},
    "lora, simpo": {"strategies": [{"lora": {}}, {"simpo": {}}], "rows": "pairs"},
    "lora, entropy, layer-decay": {"strategies": [{"lora": {}}, {"entropy": {}}, {"layer-decay": {}}]},
    "randlora": {"strategies": [{"randlora": {}}]},
    "lokr": {"strategies": [{"lokr": {}}]},
    "miss": {"strategies": [{"miss": {}}]},
    "hra": {"strategies": [{"hra": {}}]},
}  # fmt: skip
"""Recipes by name: strategies, task and quantiser, kind of rows, and changes to `train`."""


def main() -> None:
    """Compare all recipes, or those whose names are given, whose rows are then replaced in the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    silence_libraries()
    if sys.argv[1:] == ["--cards"]:
        from benchmarks.plan_cards import plan_cards

        plan_cards()
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_bases(root, hidden=256, inner=688, layers=4, vocabulary=4000)
        rows = write_rows(root, words=5)
        for name in sys.argv[1:] or RECIPES:
            results[name] = compare(build(RECIPES[name], root / "base", rows, root / "run"))
            row = results[name]
            print(f"{name:45} {row['planned'] / 1e6:9.2f} {row['actual'] / 1e6:9.2f} MB {row['difference']:+7.2%}")
    failed = [name for name, row in results.items() if not is_close(row["planned"], row["actual"])]
    write(results)
    if failed:
        sys.exit(f"further apart than {SHARE:.0%} and {BYTES / 1e6:.0f} MB: {', '.join(failed)}")


SHAPES = {"1B": (2048, 8192, 16, 32), "8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64)}
"""Hidden size, size of the MLP, layers and heads of Llama 3, whose models have 8 key heads and 128,256 tokens."""


def describe_base(
    folder: Path, shape: tuple[int, int, int, int], vocabulary: int = 128256, length: int = 8192
) -> None:  # fmt: skip
    """Write a base's configuration, its tokenizer and the headers of its weights, whose file is sparse."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads = shape
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, max_position_embeddings=length, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype="bfloat16", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.save_pretrained(folder)
    save_tokenizer(folder)
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def is_close(planned: float, actual: float) -> bool:
    """Whether a plan is within the target."""
    return abs(planned - actual) <= max(SHARE * actual, BYTES)


def compare(recipe: Recipe) -> dict[str, Any]:
    """Plan a recipe, run it, and return both peaks in bytes, the place of the planned one, and the plan's seconds."""
    started = time.perf_counter()
    planned = estimate(recipe, Device("this machine", "cpu", 1 << 40))
    seconds = time.perf_counter() - started
    actual = measured_peak(recipe)
    return {
        "planned": planned.peak, "actual": actual, "difference": planned.peak / actual - 1, "where": planned.where,
        "seconds": round(seconds, 1),
    }  # fmt: skip


def build(case: dict[str, Any], base: Path, rows: dict[str, Path], output: Path, steps: int = 2) -> Recipe:
    """Build the recipe of an entry of `RECIPES`, on a base that `make_bases` saved."""
    text = json.dumps(case["strategies"]).replace("{teacher}", str(base.with_name("teacher")))
    train = {"steps": steps, "precision": "fp32", "learning_rate": 1e-3, **case.get("train", {})}
    if not {"batch_examples", "batch_tokens"} & train.keys():
        train["batch_tokens"] = 3000
    return Recipe.from_dict(
        {
            "base": {
                "model": str(base.with_name(case.get("base", "base"))), "device": case.get("device", "cpu"),
                "quantization": case.get("quantization", "none"), "task": case.get("task", "causal-lm"),
            },
            "data": {"train": str(rows[case.get("rows", "answers")]), "eval": "none"},
            "strategies": json.loads(text), "train": train, "output": str(output),
        }
    )  # fmt: skip


def make_bases(root: Path, hidden: int, inner: int, layers: int, vocabulary: int) -> None:
    """Save two Llamas, a BERT and a T5 of random weights."""
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    for seed, part in enumerate(("base", "teacher")):
        make_base(root / part, hidden, inner, layers, vocabulary, seed)
    folder = tiny_encoder(root / "encoder", ["question answers"])  # for its tokenizer
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 1024}), encoding="utf-8")
    bert = BertConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=1024, pad_token_id=0,
    )  # fmt: skip
    BertForMaskedLM(bert).save_pretrained(folder)
    save_tokenizer(root / "t5")
    t5 = T5Config(
        vocab_size=vocabulary, d_model=hidden, d_kv=hidden // 4, d_ff=inner, num_layers=layers // 2, num_heads=4,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(t5).save_pretrained(root / "t5")


def make_base(
    folder: Path, hidden: int, inner: int, layers: int, vocabulary: int, seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Save a random Llama whose tokenizer has one token per byte."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)


def write_rows(folder: Path, words: int) -> dict[str, Path]:
    """Write rows of every kind of data; answers have `words` words of 8 tokens and up to four times as many."""
    prompt, word = "question " * words, "answers "
    kinds: dict[str, list[dict[str, Any]]] = {
        "answers": [{"prompt": prompt, "completion": word * (words + n % (3 * words))} for n in range(60)],
        "pairs": [
            {
                "prompt": prompt,
                "chosen": word * (words + n % (2 * words)),
                "rejected": word * (words + n % words) + "not",
            }
            for n in range(60)
        ],
        "judged": [
            {"prompt": prompt, "completion": word * (words + n % words), "label": n % 2 == 0} for n in range(60)
        ],
        "prompts": [{"prompt": prompt}] * 40,
        "tags": [
            {"tokens": word.split() * (words + n % words), "tags": ["OX"[n % 2]] * (words + n % words)}
            for n in range(60)
        ],
        "scores": [{"text": word * (words + n % (3 * words)), "score": n % 7} for n in range(60)],
        "texts": [{"text": word * (9 * words + n % (9 * words))} for n in range(60)],
        "related": [{"anchor": f"{n} {prompt}", "positive": f"{n} {word * (words + n % words)}"} for n in range(60)],
        "classes": [{"text": word * (words + n % (3 * words)), "label": "abc"[n % 3]} for n in range(60)],
    }
    for name, rows in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in kinds}


def write(results: dict[str, dict[str, Any]]) -> None:
    """Write the JSON file and the table of docs/planning.md, with earlier results of the same machine and versions."""
    from importlib import metadata

    versions = {name: metadata.version(name) for name in ("torch", "transformers", "bitsandbytes", "peft")}
    threads = f"torch threads: {torch.get_num_threads()}, Python {platform.python_version()}"
    machine = f"{platform.machine()} {platform.system()}, {threads}"
    path = DOCS / "benchmarks" / "plan.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if (before.get("machine"), before.get("versions")) == (machine, versions):
        results = {**before["recipes"], **results}
    results = {name: results[name] for name in RECIPES if name in results}
    record = {"machine": machine, "versions": versions, "recipes": results}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    lines = ["| recipe | planned | actual | difference | peak in | planned in |", "|---|--:|--:|--:|---|--:|"]
    lines += [
        f"| {name} | {row['planned'] / 1e6:.2f} MB | {row['actual'] / 1e6:.2f} MB | {row['difference']:+.2%} | "
        f"{row['where']} | {row['seconds']:.1f} s |"
        for name, row in results.items()
    ]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    table = "\n".join(lines)
    replace_between(DOCS / "planning.md", MARKS, f"\n{table}\n\nOn {machine}; {listed}.\n")


def replace_between(path: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between two marks in a file."""
    before, rest = path.read_text(encoding="utf-8").split(marks[0])
    after = rest.split(marks[1])[1]
    path.write_text(f"{before}{marks[0]}{text}{marks[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
