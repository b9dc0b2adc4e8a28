"""Train the tiny base model of the demo from plain text, on a CPU.

    python -m budwood_demo.make_base --minutes 55

Steps:

1. gathers the corpus: the docstrings of the Python standard library and of the installed packages
   in ``corpus.INSTALLED``, the project descriptions of the PyPI releases pinned in ``base/sources.tsv``
   (fetched once from ``--index`` and stored in ``--cache``), and the ``text`` field of
   ``data/sections/train.jsonl``, without its labels;
2. trains a byte-level BPE tokenizer of 4,096 tokens;
3. trains a small Llama-style causal language model for ``--minutes`` of wall clock;
4. computes held-out bits per byte, and writes the model, the tokenizer and the list of sources
   to ``--out``.

Only permissively licensed text is read (``corpus.PERMISSIVE``), and each source is listed with its
version, licence and bytes in ``sources.tsv``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from budwood_demo.corpus import SECTIONS, gather

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads yield the CPU

HERE = Path(__file__).resolve().parent

VOCAB_SIZE = 4096
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]  # reserved, not in the training text
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "intermediate_size": 768,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
SECTION_EPOCHS = 6  # repetitions of the section descriptions in one pass over all text
SUMMARY_EPOCHS = 2  # likewise for the one-line summaries of the PyPI projects

# ----------------------------------------------------------------------------------- tokenizer


def train_tokenizer(corpus: dict) -> Any:
    """Train a byte-level BPE tokenizer (no unknown tokens), digits in groups of up to three, BOS at the start."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, EOS, *ROLES]
    tokenizer = Tokenizer(models.BPE())
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = corpus["documents"] + corpus["summaries"] * 3 + corpus["sections"] * 10
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS}:1 $B:1",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=ROLES,
        model_max_length=ARCHITECTURE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


# --------------------------------------------------------------------------------------- model


def new_model(tokenizer: Any) -> Any:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        **ARCHITECTURE,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(max_new_tokens=64, do_sample=False, **ids)
    return model


def embeddings_of(corpus: dict, tokenizer: Any, size: int, reach: int = 12, scale: float = 0.06) -> Any:
    """Return initial token embeddings: a truncated SVD of the positive PMI of neighbouring tokens.

    It takes seconds, and gives the model from the start what it would need many tokens to learn:
    which words belong together.
    """
    import numpy as np
    import torch

    texts = corpus["documents"] + corpus["summaries"] + corpus["sections"]
    stream = [tokenizer.pad_token_id] * reach
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        stream += ids + [tokenizer.pad_token_id] * reach
    tokens = np.array(stream, dtype=np.int64)
    flat = np.zeros(VOCAB_SIZE * VOCAB_SIZE, dtype=np.float32)
    for step in range(1, reach + 1):
        weight = 1.0 if step < 3 else (reach + 1 - step) / (reach - 1)
        pairs = tokens[:-step] * VOCAB_SIZE + tokens[step:]
        flat += weight * np.bincount(pairs, minlength=flat.size).astype(np.float32)
    counts = flat.reshape(VOCAB_SIZE, VOCAB_SIZE)
    counts = counts + counts.T
    counts[tokenizer.pad_token_id] = counts[:, tokenizer.pad_token_id] = 0
    rows = np.maximum(counts.sum(1), 1e-9)
    context = rows**0.75 / (rows**0.75).sum()
    pmi = np.log(np.maximum(counts, 1e-12) / rows[:, None] / context[None, :])
    positive = torch.from_numpy(np.maximum(pmi, 0))
    left, values, _ = torch.svd_lowrank((positive + positive.T) / 2, q=size + 40, niter=3)
    vectors = (left * values.sqrt())[:, :size]
    # A random rotation, so that no coordinate carries most of the variance.
    turn, _ = torch.linalg.qr(torch.randn(size, size))
    vectors = vectors @ turn
    return vectors * (scale / vectors.square().mean().sqrt()) + 0.01 * torch.randn_like(vectors)


def probe(corpus: dict, tokenizer: Any) -> dict[str, tuple[float, float]]:
    """Return the section accuracy of a probe for each embedding initialisation, mean and deviation over five folds.

    A logistic regression on the mean embedding of a description; fitted and scored on labelled train rows alone, each
    fold on rows that its fit has not seen.
    """
    import numpy as np
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = [json.loads(line) for line in (SECTIONS / "train.jsonl").open(encoding="utf-8")]
    encoded = tokenizer([row["text"] for row in rows], add_special_tokens=False)["input_ids"]
    size = ARCHITECTURE["hidden_size"]
    starts = {
        "random": new_model(tokenizer).get_input_embeddings().weight.detach(),
        "svd": embeddings_of(corpus, tokenizer, size),
    }
    found = {}
    for name, table in starts.items():
        features = torch.stack([table[torch.tensor(ids)].mean(0) for ids in encoded]).numpy()
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        scores = cross_val_score(model, features, np.array([row["label"] for row in rows]), cv=folds)
        found[name] = (float(scores.mean()), float(scores.std(ddof=1)))
    return found


def batches(corpus: dict, tokenizer: Any, length: int, size: int, seed: int) -> Iterator[Any]:
    """Yield packed sequences of ``length`` + 1 tokens indefinitely, reshuffled in every pass."""
    import torch

    def encode(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [list(map(int, ids)) for ids in encoded]

    documents = encode(corpus["documents"])
    lines = encode([t + "\n" for t in corpus["sections"]])
    more_lines = encode([t + "\n" for t in corpus["summaries"]])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rng = random.Random(seed)

    def grouped(items: list[list[int]]) -> Iterator[list[int]]:
        """Group short lines into documents of one to eight."""
        items, i = rng.sample(items, len(items)), 0
        while i < len(items):
            n = rng.randint(1, 8)
            yield [t for line in items[i : i + n] for t in line][:-1]
            i += n

    while True:
        everything = list(documents)
        for _ in range(SECTION_EPOCHS):
            everything.extend(grouped(lines))
        for _ in range(SUMMARY_EPOCHS):
            everything.extend(grouped(more_lines))
        rng.shuffle(everything)
        stream = [t for ids in everything for t in (bos, *ids, eos)]
        corpus["pass_tokens"] = len(stream)
        print(f"a pass over everything: {len(stream):,} tokens", flush=True)
        starts = list(range(0, len(stream) - length - 1, length))
        rng.shuffle(starts)
        for i in range(0, len(starts) - size + 1, size):
            yield torch.tensor([stream[s : s + length + 1] for s in starts[i : i + size]])


def bits_per_byte(model: Any, tokenizer: Any, texts: list[str], limit: int = 250_000) -> float:
    """Return the bits per byte of held-out text; each document alone, after a BOS."""
    import torch

    nll, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, truncation=True, max_length=512)["input_ids"]
            if len(ids) < 2:
                continue
            x = torch.tensor([ids])
            logits = model(input_ids=x).logits[0, :-1].float()
            nll += torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum").item()
            count += len(tokenizer.decode(ids[1:]).encode())
            if count > limit:
                break
    model.train()
    return nll / math.log(2) / max(count, 1)


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Save a bf16 copy as one safetensors file, without changing the weights in training."""
    import torch

    state = {k: v.detach().to(torch.bfloat16) for k, v in model.state_dict().items()}
    copy = new_model(tokenizer).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)


def train(corpus: dict, tokenizer: Any, args: argparse.Namespace) -> dict:
    import torch

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    model = new_model(tokenizer)
    model.get_input_embeddings().weight.data.copy_(embeddings_of(corpus, tokenizer, ARCHITECTURE["hidden_size"]))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters", flush=True)
    # Muon for the matrices of the layers, AdamW for the tied embedding and the norms.
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    peaks = [args.muon_lr, args.lr]
    budget, start, saved = args.minutes * 60, time.monotonic(), time.monotonic()
    step, tokens, average, history = 0, 0, None, []
    for batch in batches(corpus, tokenizer, args.length, args.batch, args.seed):
        elapsed = time.monotonic() - start
        if elapsed >= budget:
            break
        # The schedule follows the clock, so that it ends with the time budget.
        done = elapsed / budget
        factor = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done))
        factor *= min(1.0, (step + 1) / args.warmup)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().reshape(-1, VOCAB_SIZE), batch[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + batch[:, 1:].numel()
        value = loss.item()
        average = value if average is None else 0.97 * average + 0.03 * value
        if step % 25 == 0:
            history.append((step, tokens, round(average, 4)))
            rate = tokens / (time.monotonic() - start)
            print(f"{elapsed / 60:5.1f} min  step {step}  tokens {tokens:,}  loss {average:.3f}  "
                  f"lr x{factor:.3f}  {rate:.0f} tokens/s", flush=True)  # fmt: skip
        if time.monotonic() - saved > args.save_every * 60:
            save(model, tokenizer, args.checkpoint or args.out)
            saved = time.monotonic()
    save(model, tokenizer, args.out)
    return {
        "parameters": parameters,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "steps": step,
        "tokens_seen": tokens,
        "pass_tokens": corpus["pass_tokens"],
        "final_training_loss": round(average or 0.0, 4),
    }


# ---------------------------------------------------------------------------------------- card

CARD = """---
language: en
library_name: transformers
pipeline_tag: text-generation
---

# A tiny base model

A causal language model of {parameters:,} parameters, trained from scratch on a CPU by
[`make_base.py`](../make_base.py). It is the base of this demonstration: small enough to ship and
to fine-tune in minutes on a laptop, and a stock `LlamaForCausalLM` in every other respect.

| | |
| --- | --- |
| architecture | Llama: {num_hidden_layers} layers, hidden {hidden_size}, {num_attention_heads} heads of \
{head_dim}, feed-forward {intermediate_size}, tied embeddings |
| positions | {max_position_embeddings} (rope, theta 10000); trained on sequences of {length} tokens |
| tokenizer | byte-level BPE, {vocab} tokens, digits in groups of up to three, adds `<|bos|>` |
| weights | bf16, one safetensors file of {megabytes:.1f} MB |
| held-out bits per byte | **{bits_per_byte_documents:.3f}** on documentation, \
{bits_per_byte_sections:.3f} on package descriptions |

Every linear layer has sizes that are multiples of 64. The tokens `<|system|>`, `<|user|>` and
`<|assistant|>` are reserved for the chat template and do not occur in the training text.

## Training

{tokens_seen:,} tokens in {steps:,} steps and {minutes} minutes on {threads} CPU cores, shared with
other work; Muon for the matrices (peak learning rate {muon_lr:g}), AdamW for the tied embedding and
the norms ({lr:g}), both warmed up over {warmup} steps, cosine over the wall-clock budget, {batch} packed
sequences of {length} tokens per step, bf16 autocast over fp32 weights. Python {python},
torch {torch}, transformers {transformers}. The same values are in `training.json`.

The embeddings were initialised with a truncated SVD of the tokens' positive PMI in the same text (neighbours
within 12 tokens), the other weights at random. `make_base.py --probe` gives the reason: the accuracy of a linear
probe on mean embeddings, in five-fold cross-validation on the labelled train rows, is 0.626 ± 0.017 with this
initialisation and 0.478 ± 0.010 with a random one (on the text that needs no index). The choice was first made
with such a probe scored on `eval.jsonl`; the train rows alone lead to the same choice, and to the same base.

Held-out text: 2 % of the documents and of the package descriptions, selected by a hash.
Bits per byte are computed on at most 250,000 bytes of it, each document alone, truncated to 512 tokens.

## Sources

Plain text only: {total:,} bytes; one pass over all of it is {pass_tokens:,} tokens. The section
descriptions were used without their labels, and never in the format of the fine-tuning task. No text
of `eval.jsonl` was used: any line that equals one of its descriptions, or contains one of four words
or more, is dropped. In one pass the descriptions are repeated {section_epochs} times, and the one-line
summaries of the PyPI projects an additional {summary_epochs} times.

Each source, with version, licence and bytes, is in [`sources.tsv`](sources.tsv). In short:

| source | version | licence | bytes |
| --- | --- | --- | --- |
{rows}

The licence of a PyPI project is the one in its metadata.

## Limitations

It is only for demonstrations and tests. It writes software-like English that is mostly wrong, is not a
source of facts, follows no instructions before fine-tuning, and reproduces the biases of its sources.
It was not trained on contexts beyond {length} tokens.

## Reproduction

    pip install torch transformers tokenizers matplotlib scipy scikit-learn pandas networkx sympy
    python -m budwood_demo.make_base --minutes {minutes:g} --index HOST

from the folder that holds `budwood_demo`; HOST is a package index with PyPI's JSON interface. It
fetches the pinned descriptions from there once
(a few minutes, about 60 MB). The installed packages are read if present; their versions
are in `sources.tsv`. The schedule follows the clock, so the weights differ on another machine.
"""


def write_card(report: dict, table: list[tuple], out: Path) -> None:
    """Write the README.md of the model from the training report."""
    rows = [
        f"| {name} | {version} | {licence} | {size:,} |"
        for kind, name, version, licence, size in table
        if kind != "pypi"
    ]
    by_licence: dict[str, list[int]] = {}
    for kind, _, _, licence, size in table:
        if kind == "pypi":
            by_licence.setdefault(licence, []).append(size)
    for licence, sizes in sorted(by_licence.items(), key=lambda x: -sum(x[1])):
        rows.append(f"| {len(sizes):,} PyPI project descriptions | as pinned | {licence} | {sum(sizes):,} |")
    values = {**ARCHITECTURE, **report}
    values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    text = CARD.format(
        vocab=f"{VOCAB_SIZE:,}",
        megabytes=(out / "model.safetensors").stat().st_size / 1e6,
        total=sum(row[4] for row in table),
        section_epochs=SECTION_EPOCHS,
        summary_epochs=SUMMARY_EPOCHS,
        rows="\n".join(rows),
        **values,
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=55, help="training time")
    parser.add_argument("--out", type=Path, default=HERE / "base")
    parser.add_argument("--checkpoint", type=Path, help="folder of intermediate checkpoints (default: --out)")
    parser.add_argument("--save-every", type=float, default=5, help="minutes")
    parser.add_argument("--sources", type=Path, default=HERE / "base" / "sources.tsv")
    parser.add_argument("--index", help="host of a package index with PyPI's JSON interface")
    parser.add_argument(
        "--probe", action="store_true", help="only compare embedding initialisations on train rows; needs no index"
    )
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "budwood-base")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW: embedding and norms")
    parser.add_argument("--muon-lr", type=float, default=5e-3, help="Muon: matrices")
    parser.add_argument("--warmup", type=int, default=50, help="steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.index or args.probe):
        parser.error("set --index to fetch the PyPI project descriptions")

    import torch
    import transformers

    corpus = gather(args.sources, args.cache, args.index)
    for key, value in corpus.items():
        if key != "sources":
            print(f"{key}: {len(value):,}, {sum(len(v.encode()) for v in value):,} bytes")
    if args.probe:
        torch.manual_seed(args.seed)
        for name, (mean, deviation) in probe(corpus, transformers.AutoTokenizer.from_pretrained(args.out)).items():
            print(f"start {name}: accuracy {mean:.3f} ± {deviation:.3f}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "sources.tsv").open("w", encoding="utf-8") as out:
        out.write("kind\tname\tversion\tlicence\tbytes\n")
        for source in corpus["sources"]:
            out.write("\t".join(map(str, source)) + "\n")
    tokenizer = train_tokenizer(corpus)
    report = train(corpus, tokenizer, args)

    model = transformers.AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    documents = random.Random(0).sample(corpus["documents_held_out"], len(corpus["documents_held_out"]))
    report["bits_per_byte_documents"] = round(bits_per_byte(model, tokenizer, documents), 4)
    report["bits_per_byte_sections"] = round(bits_per_byte(model, tokenizer, corpus["sections_held_out"]), 4)
    report["length"], report["batch"], report["lr"] = args.length, args.batch, args.lr
    report["muon_lr"], report["warmup"] = args.muon_lr, args.warmup
    report["threads"] = args.threads
    report["python"] = platform.python_version()
    report["torch"], report["transformers"] = torch.__version__, transformers.__version__
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    write_card(report, corpus["sources"], args.out)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
