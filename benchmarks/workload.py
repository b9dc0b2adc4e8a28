"""What every arm trains: one model, one data file, one order of the examples, one optimizer.

The base has random weights and the text is made of words w0, w1, …, one token each: speed and memory do not depend on
what a text says. Words are drawn by a Zipf law, so that there is something to learn and losses move.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VOCABULARY = 32_000
MAX_LENGTH = 1024
EXAMPLES_PER_STEP = 16
PROMPT_SHARE = 0.6
LEARNING_RATE = 1e-3
CLIP = 1.0
RANK, ALPHA = 8, 16
SEED = 0
LAYERS, WIDTH, INNER, HEADS = 8, 512, 1376, 8
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


@dataclass(frozen=True)
class Workload:
    """A folder with `base/` and `train.jsonl`, and what is known of them."""

    folder: Path

    @property
    def base(self) -> Path:
        """Folder of the base model and its tokenizer."""
        return self.folder / "base"

    @property
    def data(self) -> Path:
        """JSONL file of prompts and completions."""
        return self.folder / "train.jsonl"

    def tokens(self) -> list[tuple[list[int], int]]:
        """For each example in the order of training: its token ids, and how many of them are the prompt."""
        made: list[tuple[list[int], int]] = json.loads((self.folder / "tokens.json").read_text(encoding="utf-8"))
        return made

    def lengths(self) -> np.ndarray:
        """Tokens of each example [n], in the order of training."""
        return np.array([len(ids) for ids, _ in self.tokens()])

    def step_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Real tokens and FLOPs of each optimizer step."""
        tokens, flops = [], []
        examples = self.tokens()
        for start in range(0, len(examples), EXAMPLES_PER_STEP):
            step = examples[start : start + EXAMPLES_PER_STEP]
            tokens.append(sum(len(ids) for ids, _ in step))
            flops.append(sum(example_flops(len(ids), len(ids) - prompt) for ids, prompt in step))
        return np.array(tokens), np.array(flops, dtype=float)


def example_flops(length: int, labels: int) -> float:
    """FLOPs of a training step on one example: per token 4P + 6Pₐ + 6·L·T·d, and the head only at labels.

    P are the frozen weights of the layers (forward, and the gradient of their input), Pₐ the adapter's.
    """
    frozen = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    adapter = LAYERS * RANK * (4 * 2 * WIDTH + 3 * (WIDTH + INNER))
    attention = 6 * LAYERS * length * WIDTH
    return length * (4.0 * frozen + 6.0 * adapter + attention) + labels * 4.0 * WIDTH * VOCABULARY


def build(folder: Path, steps: int) -> Workload:
    """Write base, tokenizer and the data of `steps` optimizer steps into `folder`."""
    workload = Workload(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_base(workload.base)
    _write_data(workload, steps)
    return workload


def _write_base(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(SPECIAL)}
    words |= {f"w{i}": i for i in range(len(SPECIAL), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, bos, eos, unk = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk
    ).save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(SEED)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def _write_data(workload: Workload, steps: int) -> None:
    from budwood.data.packing import plan_epoch

    random = np.random.default_rng(SEED)
    count = steps * EXAMPLES_PER_STEP
    # exp(5.0 + 0.7 z) has mean 190; an example holds at least two tokens and the end of the sequence.
    lengths = np.clip(np.exp(random.normal(5.0, 0.7, count)), 8, MAX_LENGTH).astype(int)
    words = np.minimum(random.zipf(1.2, int(lengths.sum())) + len(SPECIAL) - 1, VOCABULARY - 1)
    examples, at = [], 0
    for length in lengths:
        ids = words[at : at + length - 1].tolist() + [SPECIAL.index("</s>")]
        examples.append((ids, max(1, round(length * PROMPT_SHARE))))
        at += length - 1
    with workload.data.open("w", encoding="utf-8") as file:
        for ids, prompt in examples:
            row = {"prompt": _text(ids[:prompt]), "completion": _text(ids[prompt:-1])}
            file.write(json.dumps(row) + "\n")
    # The peers take the examples in the order in which Budwood's first epoch does.
    order = np.concatenate(plan_epoch(lengths, SEED, 0, None, EXAMPLES_PER_STEP))
    in_order = [examples[int(i)] for i in order]
    (workload.folder / "tokens.json").write_text(json.dumps(in_order), encoding="utf-8")


def _text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)
