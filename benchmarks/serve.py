"""`python -m benchmarks.serve`: switching, loading, mixed batches and a mixed load, beside stock PEFT and transformers.

All cases run in turns in one process with one thread, and the processor time of the process counts, so that the ratios
hold on a busy machine too. The base is random: 42 million parameters, 8 layers, a vocabulary of 32,000.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from budwood import AdapterPool
from budwood.serving.requests import Sampling

HIDDEN, INNER, LAYERS, VOCABULARY = 512, 1408, 8, 32000
LINEARS = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (HIDDEN, HIDDEN)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (INNER, HIDDEN)),
    "mlp.down_proj": (HIDDEN, INNER),
}
ROWS, NEW, PROMPT = 8, 32, 64


def make_base(folder: Path) -> Path:
    """Save a random base and a tokenizer."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=True,
        initializer_range=0.05, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_adapter(folder: Path, rank: int, seed: int) -> Path:
    """Save a random LoRA in PEFT's layout."""
    folder.mkdir(parents=True)
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(LAYERS):
        for name, (outputs, inputs) in LINEARS.items():
            key = f"base_model.model.model.layers.{layer}.{name}.lora_"
            tensors[f"{key}A.weight"] = torch.randn(rank, inputs, generator=draw) / inputs**0.5
            tensors[f"{key}B.weight"] = torch.randn(outputs, rank, generator=draw) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in LINEARS})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def seconds(function: Callable[[], object]) -> float:
    """Return the processor time of one call, of all threads."""
    started = time.process_time()
    function()
    return time.process_time() - started


def in_turns(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median processor time of each case, measured in turns after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            spent = seconds(case)
            if number:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def switching(pool: AdapterPool, small: Path, most: int) -> None:
    """Time `use` with more and more adapters loaded."""
    for count in (1, 10, most):
        while len(pool.names) < count:
            pool.load(f"s{len(pool.names)}", small)
        names = pool.names

        def switch(names: list[str] = names) -> None:
            for number in range(1000):
                pool.use(names[number % len(names)] if number % 2 else None)

        spent = in_turns({"switch": switch}, 3)["switch"]
        loading = in_turns({"load": lambda: (pool.load("more", small), pool.unload("more"))}, 5)["load"]
        print(f"switch at {count:3} adapters: {spent * 1e3:6.1f} µs; load + unload of another: {loading * 1e3:.1f} ms")
    pool.use(None)
    for name in pool.names:
        pool.unload(name)


def loading(pool: AdapterPool, large: Path, base: Path) -> None:
    """Time loading of a large adapter beside what reading, checking and copying its file costs, and stock PEFT."""
    from peft import PeftModel

    file = large / "adapter_model.safetensors"
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), large, adapter_name="first")

    def floor() -> None:
        data = file.read_bytes()
        hashlib.sha256(data).hexdigest()
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())

    def peft() -> None:
        stock.load_adapter(large, "more")
        stock.delete_adapter("more")

    cases = {"budwood": lambda: (pool.load("a", large), pool.unload("a")), "floor": floor, "peft": peft}
    found = in_turns(cases, 5)
    size = file.stat().st_size / 1e6
    over = (found["budwood"] - found["floor"]) * 1e3
    print(
        f"load + unload of {size:.1f} MB: {found['budwood'] * 1e3:.1f} ms; reading twice, hashing and checking alone "
        f"{found['floor'] * 1e3:.1f} ms (over that: {over:.1f} ms, goal 12); stock PEFT {found['peft'] * 1e3:.0f} ms"
    )


def cycles(pool: AdapterPool, small: Path, count: int) -> None:
    """Print the memory before and after many loads."""
    process = psutil.Process()

    def some(number: int) -> None:
        for _ in range(number):
            pool.load("a", small)
            pool.generate([[1, 5, 9]], ["a"], max_new_tokens=1)
            pool.unload("a")

    some(50)
    before = process.memory_info().rss
    some(count)
    print(f"memory after {count} more loads and unloads: {(process.memory_info().rss - before) / 1e6:+.1f} MB")


def batches(pool: AdapterPool, names: list[str], rounds: int) -> None:
    """Time decoding and prefill of eight rows: of the base, of one adapter, of eight."""
    draw = random.Random(0)
    prompts = [[draw.randrange(10, VOCABULARY) for _ in range(PROMPT)] for _ in range(ROWS)]
    chosen = {"base": [None] * ROWS, "one": [names[0]] * ROWS, "eight": names}

    def run(adapters: list[str | None], new: int) -> Callable[[], object]:
        return lambda: pool.generate(prompts, adapters, max_new_tokens=new)

    times = in_turns(
        {f"{name} {new}": run(adapters, new) for name, adapters in chosen.items() for new in (1, NEW + 1)}, rounds
    )
    decode = {name: times[f"{name} {NEW + 1}"] - times[f"{name} 1"] for name in chosen}
    prefill = {name: times[f"{name} 1"] for name in chosen}
    for what, spent, goal in (("decode", decode, 0.95), ("prefill", prefill, 0.9)):
        print(
            f"{what} of 8 rows: base {spent['base'] * 1e3:.0f} ms, one adapter {spent['one'] * 1e3:.0f} ms, eight "
            f"{spent['eight'] * 1e3:.0f} ms: eight at {spent['one'] / spent['eight']:.2f} of one (goal {goal}), one at "
            f"{spent['base'] / spent['one']:.2f} of the base (goal 0.85)"
        )


def mixed_load(pool: AdapterPool, base: Path, rounds: int) -> None:
    """Time 32 requests of different lengths beside transformers' generate in batches of 8 and of 32."""
    draw = random.Random(1)
    prompts = [[draw.randrange(10, VOCABULARY) for _ in range(draw.randrange(4, 96))] for _ in range(32)]
    limits = [draw.choice((4, 8, 16, 32, 64, 96)) for _ in prompts]
    stock = AutoModelForCausalLM.from_pretrained(base).eval()
    theirs: dict[int, list[int]] = {}

    def ours() -> list[list[int]]:
        answers = [
            pool.engine.submit(prompt, None, Sampling(limit), stream=False)
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        return [answer.result().tokens for answer in answers]

    def static(size: int) -> None:
        for start in range(0, len(prompts), size):
            rows = range(start, min(start + size, len(prompts)))
            width = max(len(prompts[i]) for i in rows)
            ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in rows])
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
            out = stock.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max(limits[i] for i in rows), do_sample=False
            )
            for i, row in zip(rows, out[:, width:].tolist(), strict=True):
                theirs[i] = row[: limits[i]]

    times = in_turns({"budwood": ours, "by 8": lambda: static(8), "by 32": lambda: static(32)}, rounds)
    tokens = sum(limits)
    same = sum(a == [t for t in theirs[i] if t != 2][: len(a)] for i, a in enumerate(ours()))
    rates = {name: tokens / spent for name, spent in times.items()}
    best = max(rates["by 8"], rates["by 32"])
    print(
        f"32 requests of different lengths: {rates['budwood']:.0f} tokens/s; transformers {rates['by 8']:.0f} in "
        f"batches of 8, {rates['by 32']:.0f} in one of 32: {rates['budwood'] / best:.2f} times (goal 1.5); "
        f"the same tokens in {same} of 32"
    )


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters that share a batch")
    parser.add_argument("--only", nargs="*", default=["switch", "load", "cycles", "batches", "mixed"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = make_base(folder / "base")
        small, large = make_adapter(folder / "small", 2, 0), make_adapter(folder / "large", 58, 1)
        pool = AdapterPool(base, options.quantization, precision="fp32", device="cpu")
        if "switch" in options.only:
            switching(pool, small, 100)
        if "load" in options.only:
            loading(pool, large, base)
        if "cycles" in options.only:
            cycles(pool, small, options.cycles)
        if "mixed" in options.only:
            mixed_load(pool, base, min(options.rounds, 3))
        if "batches" in options.only:
            names = [f"a{number}" for number in range(ROWS)]
            for number, name in enumerate(names):
                pool.load(name, make_adapter(folder / name, options.rank, number))
            batches(pool, names, options.rounds)


if __name__ == "__main__":
    main()
