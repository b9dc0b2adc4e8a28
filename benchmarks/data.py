"""`python -m benchmarks.data`: a large data file is counted, encoded and trained from; time, cores and host memory.

A script writes a JSON Lines file of `--gb` (2) gigabytes: conversations, prompts with completions, or plain text, of
made-up words with the lengths of English ones. `budwood data` counts and encodes it, a second time from the cache, and
`budwood tune` trains `--steps` optimizer steps on it. Memory is sampled four times a second, of all processes together:
resident pages, each shared page counted once (PSS), and the largest resident set of one process, as `top` shows it. The
base is small and random: neither time nor memory of the data depends on it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.train import machine, say

KINDS = ("chat", "prompt", "text")
LIMIT = 1_500_000_000
"""Largest allowed memory of a run, in bytes."""
WORDS, VOCABULARY = 30_000, 16_000
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass
class Cost:
    """What a command took; sizes in bytes."""

    seconds: float
    processor_seconds: float
    proportional: int
    largest: int
    output: str


def words(rng: np.random.Generator) -> list[str]:
    """Return made-up words, the frequent ones shorter."""
    letters, shares = list("etaoinshrdlucmfwypvbgkjqxz"), np.linspace(12, 0.2, 26)
    lengths = np.clip(rng.poisson(np.linspace(3, 8, WORDS)), 1, None)
    pool = rng.choice(letters, size=int(lengths.sum()), p=shares / shares.sum())
    stops = np.cumsum(lengths)
    return ["".join(pool[stop - length : stop]) for stop, length in zip(stops, lengths, strict=True)]


def rows(kind: str) -> Iterator[str]:
    """Yield lines of a file without end, always the same ones."""
    rng = np.random.default_rng(0)
    known = np.array(words(rng), dtype=object)
    shares = 1 / np.arange(1, WORDS + 1)

    def texts() -> Iterator[str]:
        while True:
            drawn = known[rng.choice(WORDS, size=100_000, p=shares / shares.sum())]
            at = 0
            while at < len(drawn):
                length = int(rng.integers(10, 200))
                yield " ".join(drawn[at : at + length])
                at += length

    text = texts()
    while True:
        if kind == "chat":
            turns = int(rng.integers(1, 5))
            roles = ["user", "assistant"] * turns
            row: dict[str, object] = {"messages": [{"role": role, "content": next(text)} for role in roles]}
        elif kind == "prompt":
            row = {"prompt": next(text), "completion": next(text)}
        else:
            row = {"text": next(text)}
        yield json.dumps(row) + "\n"


def write(path: Path, kind: str, size: int) -> int:
    """Write a file of about `size` bytes; return its number of rows."""
    written = count = 0
    with path.open("w", encoding="utf-8") as file:
        for line in rows(kind):
            file.write(line)
            written, count = written + len(line), count + 1
            if written >= size:
                return count
    raise AssertionError("rows end")


def write_base(folder: Path) -> None:
    """Write a small random Llama with a byte-level BPE of `VOCABULARY` tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    lines = rows("text")
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.train_from_iterator(
        (json.loads(next(lines))["text"] for _ in range(5000)), VOCABULARY, special_tokens=special, show_progress=False
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(fast), max_position_embeddings=2048,
        )
    ).save_pretrained(folder)  # fmt: skip


def measure(command: list[str], environment: dict[str, str]) -> Cost:
    """Run a command and sample the memory of it and of its children.

    Raises:
        RuntimeError: the command fails.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peaks = [0, 0]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.25):
            sizes = [_memory(pid) for pid in _family(process.pid)]
            peaks[0] = max(peaks[0], sum(pss for pss, _ in sizes))
            peaks[1] = max([peaks[1], *(rss for _, rss in sizes)])

    sampler = threading.Thread(target=sample)
    sampler.start()
    output = process.communicate()[0]
    done.set()
    sampler.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {process.returncode}:\n{output[-2000:]}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(time.perf_counter() - started, used, *peaks, output)


def _family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    for parent in found:
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in path.read_text().split()]
            except OSError:  # it has ended
                continue
    return found


def _memory(pid: int) -> tuple[int, int]:
    """Return proportional and resident size in bytes; zeros if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return sizes.get("Pss", 0), sizes.get("Rss", 0)


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the file in gigabytes (default 2)")
    parser.add_argument("--kind", choices=KINDS, default="chat", help="what the rows are (default chat)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps to train (default 200)")
    parser.add_argument("--folder", type=Path, help="where the file and the cache are written (default: temporary)")
    parser.add_argument("--out", type=Path, help="write the figures to this file, as JSON")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        figures = run(Path(name), chosen.kind, int(chosen.gb * 1e9), chosen.steps)
    if chosen.out:
        chosen.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def run(folder: Path, kind: str, size: int, steps: int) -> dict[str, object]:
    """Measure in a folder; return the figures."""
    base, data, recipe = folder / "base", folder / "train.jsonl", folder / "recipe.json"
    write_base(base)
    count = write(data, kind, size)
    recipe.write_text(
        json.dumps(
            {
                "base": {"model": str(base), "quantization": "none"},
                "data": {"train": str(data), "eval": "none", "max_length": 2048},
                "strategies": [{"lora": {"rank": 8}}],
                "train": {"steps": steps, "batch_examples": 8},
                "output": str(folder / "run"),
            }
        ),
        encoding="utf-8",
    )
    environment = {**os.environ, "BUDWOOD_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    budwood = [sys.executable, "-m", "budwood"]
    commands = {
        "count and encode": [*budwood, "data", str(recipe), "--samples", "0"],
        "the same, cached": [*budwood, "data", str(recipe), "--samples", "0"],
        f"train {steps} steps": [*budwood, "tune", str(recipe)],
    }
    costs = {name: measure(command, environment) for name, command in commands.items()}
    cached = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())
    say(f"{data.stat().st_size / 1e9:.2f} GB of JSON Lines ({kind}), {count:,} rows; cache: {cached / 1e9:.2f} GB")
    say("| command | wall time | processor time | cores used | memory of all processes | largest process |")
    say("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, cost in costs.items():
        say(
            f"| {name} | {cost.seconds:.0f} s | {cost.processor_seconds:.0f} s "
            f"| {cost.processor_seconds / cost.seconds:.2f} | {cost.proportional / 1e9:.2f} GB "
            f"| {cost.largest / 1e9:.2f} GB |"
        )
    worst = max(cost.proportional for cost in costs.values())
    say(f"at most {worst / 1e9:.2f} GB (allowed: {LIMIT / 1e9:.1f} GB)")
    facts = machine()
    say(" · ".join(f"{key} {value}" for key, value in facts.items()))
    return {
        "bytes": data.stat().st_size, "rows": count, "kind": kind, "cache_bytes": cached, "machine": facts,
        "commands": {name: {k: v for k, v in vars(cost).items() if k != "output"} for name, cost in costs.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
