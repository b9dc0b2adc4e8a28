"""The workload of all arms: the same model, data, order of examples, and optimizer settings.

The base has random weights and the text consists of words w0, w1, …, one token each, since speed and memory do not
depend on the content. Words follow a Zipf distribution, so that losses decrease.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MAX_LENGTH = 1024
EXAMPLES_PER_STEP = 16
PROMPT_SHARE = 0.6
LEARNING_RATE = 1e-3
CLIP = 1.0
RANK, ALPHA = 8, 16
SEED = 0
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


@dataclass(frozen=True)
class Size:
    """The shape of a Llama, or with `experts` of a Mixtral, and its training settings."""

    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int
    quantization: str = "none"
    gradient_checkpointing: bool = False
    whole_steps: bool = False
    """Whether an optimizer step is one micro-batch for Budwood and packed rows, which fits a large GPU."""
    experts: int = 0
    chosen: int = 1
    """Experts of each layer, and how many of them a token uses."""


SIZES = {
    "41m": Size(8, 512, 1376, 8, 8, 32_000),
    "160m": Size(16, 768, 2048, 12, 4, 32_000),
    "mixture": Size(7, 512, 512, 8, 8, 32_000, experts=32, chosen=4),
    "1b": Size(16, 2048, 8192, 32, 8, 128_256, "nf4", whole_steps=True),
    "8b": Size(32, 4096, 14_336, 32, 8, 128_256, "nf4", gradient_checkpointing=True, whole_steps=True),
}
"""Sizes by name: two dense models, of which the deeper one shares keys among three heads, a mixture of 200 million
parameters, and two models that need a GPU, with the shapes of Llama 3.2 1B and Llama 3 8B."""


@dataclass(frozen=True)
class Workload:
    """A folder with `base/` and `train.jsonl`."""

    folder: Path
    size: Size = SIZES["41m"]
    precision: str = "bf16"
    """Compute dtype, bf16 or fp32; the base is stored in bf16 in either case."""
    examples: int = field(default_factory=lambda: EXAMPLES_PER_STEP)
    """Examples of an optimizer step."""
    kept: Path | None = None
    """Folder of the base, if other workloads share it."""

    @property
    def base(self) -> Path:
        """Folder of the base model and its tokenizer."""
        return self.kept or self.folder / "base"

    @property
    def data(self) -> Path:
        """JSONL file of prompts and completions."""
        return self.folder / "train.jsonl"

    def tokens(self) -> list[tuple[list[int], int]]:
        """Return, for each example in training order, its token ids and the length of its prompt."""
        examples: list[tuple[list[int], int]] = json.loads((self.folder / "tokens.json").read_text(encoding="utf-8"))
        return examples

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each example [n], in training order."""
        return np.array([len(ids) for ids, _ in self.tokens()])

    def step_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the real tokens and FLOPs of each optimizer step."""
        tokens, flops = [], []
        examples = self.tokens()
        for start in range(0, len(examples), self.examples):
            step = examples[start : start + self.examples]
            tokens.append(sum(len(ids) for ids, _ in step))
            flops.append(sum(example_flops(self.size, len(ids), len(ids) - prompt) for ids, prompt in step))
        return np.array(tokens), np.array(flops, dtype=float)


def example_flops(size: Size, length: int, labels: int) -> float:
    """Return the FLOPs of a training step on one example: per token 4P + 6Pₐ + 6·L·T·d, and the head only at labels.

    P are the frozen weights of the layers (forward, and the gradient of their input), Pₐ the adapter's. Recomputation
    by gradient checkpointing is not counted.
    """
    keys = size.width * size.key_heads // size.heads
    linears = [(size.width, size.width)] * 2 + [(size.width, keys)] * 2
    linears += [(size.width, size.inner)] * 3 * size.chosen
    frozen = size.layers * sum(inputs * outputs for inputs, outputs in linears)
    adapter = size.layers * RANK * sum(inputs + outputs for inputs, outputs in linears)
    attention = 6 * size.layers * length * size.width
    return length * (4.0 * frozen + 6.0 * adapter + attention) + labels * 4.0 * size.width * size.vocabulary


def build(
    folder: Path, steps: int, size: Size = SIZES["41m"], precision: str = "bf16", examples: int | None = None,
    kept: Path | None = None,
) -> Workload:  # fmt: skip
    """Write base, tokenizer and the data of `steps` optimizer steps into `folder`.

    Args:
        examples: of an optimizer step.
        kept: folder of the base instead, which is written unless it is there: it takes 15 GB at 8B.
    """
    workload = Workload(folder, size, precision, examples or EXAMPLES_PER_STEP, kept)
    folder.mkdir(parents=True, exist_ok=True)
    if not workload.base.exists():
        partial = workload.base.with_name(f"{workload.base.name}.partial")
        _write_base(partial, size)
        partial.rename(workload.base)
    _write_data(workload, steps)
    return workload


def _write_base(folder: Path, size: Size) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast

    from budwood.model.streaming import release_memory

    words = {word: i for i, word in enumerate(SPECIAL)}
    words |= {f"w{i}": i for i in range(len(SPECIAL), size.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, bos, eos, unk = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk
    ).save_pretrained(folder)
    mixture = {"num_local_experts": size.experts, "num_experts_per_tok": size.chosen}
    config = (MixtralConfig if size.experts else LlamaConfig)(
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **(mixture if size.experts else {}),
    )
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    release_memory()


def _write_data(workload: Workload, steps: int) -> None:
    from budwood.data.packing import plan_epoch

    random = np.random.default_rng(SEED)
    count = steps * workload.examples
    # exp(5.0 + 0.7 z) has mean 190; an example has at least two tokens and the end of the sequence.
    lengths = np.clip(np.exp(random.normal(5.0, 0.7, count)), 8, MAX_LENGTH).astype(int)
    words = np.minimum(random.zipf(1.2, int(lengths.sum())) + len(SPECIAL) - 1, workload.size.vocabulary - 1)
    examples, at = [], 0
    for length in lengths:
        ids = words[at : at + length - 1].tolist() + [SPECIAL.index("</s>")]
        examples.append((ids, max(1, round(length * PROMPT_SHARE))))
        at += length - 1
    with workload.data.open("w", encoding="utf-8") as file:
        for ids, prompt in examples:
            row = {"prompt": _text(ids[:prompt]), "completion": _text(ids[prompt:-1])}
            file.write(json.dumps(row) + "\n")
    # The peers use the example order of Budwood's first epoch.
    order = np.concatenate(plan_epoch(lengths, SEED, 0, None, workload.examples))
    in_order = [examples[int(i)] for i in order]
    (workload.folder / "tokens.json").write_text(json.dumps(in_order), encoding="utf-8")


def _text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)
