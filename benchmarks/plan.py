"""`python -m benchmarks.plan`: planned against actual peak memory of optimizer steps on this CPU.

Each recipe is planned on fake tensors, and then run for two steps, in which torch's profiler records every allocation.
The base is a random Llama, so that nothing is downloaded; its size does not matter for the comparison of bytes.
Target: within 5 % or 30 MB. Writes docs/benchmarks/plan.json and the table in docs/planning.md.
"""

from __future__ import annotations

import json
import logging
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from budwood.model.quiet import silence_libraries
from budwood.planning.devices import Device
from budwood.planning.estimate import estimate
from budwood.recipe.schema import Recipe
from budwood.testing.allocations import measured_peak
from budwood.testing.files import save_tokenizer

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
    "lora, nf4, bf16": {"strategies": [{"lora": {}}], "quantization": "nf4", "train": {"precision": "bf16"}},
    "lora with DoRA": {"strategies": [{"lora": {"dora": True}}]},
    "lora and a whole head": {"strategies": [{"lora": {"modules_to_save": ["lm_head"]}}]},
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
    "lora, distillation": {"strategies": [{"lora": {}}, {"distillation": {"teacher": "{base}"}}]},
    "lora, ema, kl-start": {"strategies": [{"lora": {}}, {"ema": {}}, {"kl-start": {}}]},
    "lora, sequence-classification": {
        "strategies": [{"lora": {}}], "task": "sequence-classification", "rows": "classes",
    },
    "lora, reward-model": {"strategies": [{"lora": {}}], "task": "reward-model", "rows": "pairs"},
}  # fmt: skip
"""Recipes by name: strategies, task and quantiser, kind of rows, and changes to `train`."""


def main() -> None:
    """Compare all recipes, or those whose names are given, and write the table if all were compared."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    silence_libraries()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_base(root / "base", hidden=256, inner=688, layers=4, vocabulary=4000)
        rows = write_rows(root, words=5)
        for name in sys.argv[1:] or RECIPES:
            results[name] = compare(build(RECIPES[name], root / "base", rows, root / "run"))
            row = results[name]
            print(f"{name:45} {row['planned'] / 1e6:9.2f} {row['actual'] / 1e6:9.2f} MB {row['difference']:+7.2%}")
    failed = [name for name, row in results.items() if not is_close(row["planned"], row["actual"])]
    if not sys.argv[1:]:
        write(results)
    if failed:
        sys.exit(f"further apart than {SHARE:.0%} and {BYTES / 1e6:.0f} MB: {', '.join(failed)}")


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
    """Build the recipe of an entry of `RECIPES`."""
    text = json.dumps(case["strategies"]).replace("{base}", str(base))
    train = {"steps": steps, "precision": "fp32", "learning_rate": 1e-3, **case.get("train", {})}
    if "batch_examples" not in train:
        train["batch_tokens"] = 3000
    return Recipe.from_dict(
        {
            "base": {
                "model": str(base), "quantization": case.get("quantization", "none"), "device": "cpu",
                "task": case.get("task", "causal-lm"),
            },
            "data": {"train": str(rows[case.get("rows", "answers")]), "eval": "none"},
            "strategies": json.loads(text), "train": train, "output": str(output),
        }
    )  # fmt: skip


def make_base(folder: Path, hidden: int, inner: int, layers: int, vocabulary: int) -> None:
    """Save a random Llama whose tokenizer has one token per byte."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)


def write_rows(folder: Path, words: int) -> dict[str, Path]:
    """Write rows of every kind of data; answers have `words` words of 8 tokens and up to four times as many."""
    prompt, word = "question " * words, "answers "
    kinds: dict[str, list[dict[str, Any]]] = {
        "answers": [{"prompt": prompt, "completion": word * (words + n % (3 * words))} for n in range(60)],
        "pairs": [
            {"prompt": prompt, "chosen": word * (words + n % (2 * words)), "rejected": word * (words + n % words)}
            for n in range(60)
        ],
        "judged": [
            {"prompt": prompt, "completion": word * (words + n % words), "label": n % 2 == 0} for n in range(60)
        ],
        "prompts": [{"prompt": prompt}] * 40,
        "classes": [{"text": word * (words + n % (3 * words)), "label": "abc"[n % 3]} for n in range(60)],
    }
    for name, rows in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in kinds}


def write(results: dict[str, dict[str, Any]]) -> None:
    """Write the JSON file and the table of docs/planning.md."""
    from importlib import metadata

    versions = {name: metadata.version(name) for name in ("torch", "transformers", "bitsandbytes", "peft")}
    threads = f"{torch.get_num_threads()} threads, Python {platform.python_version()}"
    machine = f"{platform.machine()} {platform.system()}, {threads}"
    record = {"machine": machine, "versions": versions, "recipes": results}
    (DOCS / "benchmarks" / "plan.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    lines = ["| recipe | planned | actual | difference | peak in | planned in |", "|---|--:|--:|--:|---|--:|"]
    lines += [
        f"| {name} | {row['planned'] / 1e6:.2f} MB | {row['actual'] / 1e6:.2f} MB | {row['difference']:+.2%} | "
        f"{row['where']} | {row['seconds']:.1f} s |"
        for name, row in results.items()
    ]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    path = DOCS / "planning.md"
    before, rest = path.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    table = "\n".join(lines)
    path.write_text(f"{before}{MARKS[0]}\n{table}\n\nOn {machine}; {listed}.\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
