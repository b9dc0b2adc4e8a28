"""Exact match of generated answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from budwood.contract.examples import Example
from budwood.contract.types import Run
from budwood.model.evaluation import autocast

LIMIT = 64
"""Mean tokens of answers up to which exact match is informative."""
MORE = 4
"""Tokens that an answer may be longer than the longest reference."""

SHOWN = 8
"""Answers that `run.answers` keeps."""


def exact_match(run: Run, task: Any) -> float | None:
    """Return the fraction of evaluation prompts whose greedy answer equals the completion, or the assistant's message.

    At most `train.eval_generate` prompts are used, evenly spread; each process answers its share. Returns None if the
    data has no completions, if a conversation has several turns, or if the mean length exceeds 64 tokens, for which
    exact match is not informative. `run.answers` then holds the first few answers.
    """
    from budwood.model.generate import generate

    examples, limit = run.eval_examples, run.recipe.train.eval_generate
    assert examples is not None
    if limit == 0 or not (examples.format == "prompt-completion" or examples.rendered):
        return None
    chosen = np.unique(np.linspace(0, len(examples) - 1, min(limit, len(examples))).astype(int))
    lengths = [len(examples[int(i)].labels) for i in chosen]
    if np.mean(lengths) > LIMIT:
        return None
    references = [(examples.reference(int(i)) or "").strip() for i in chosen]
    pairs = zip(chosen, references, strict=True)
    if examples.rendered and not all(_is_answer(examples[int(i)], text, run.tokenizer) for i, text in pairs):
        return None
    prompts = [task.probe(examples[int(i)]).inputs["input_ids"].tolist() for i in chosen]
    with torch.no_grad(), autocast(run):
        own = run.world.share(prompts)
        ends = [examples.stop_ids] * len(own)
        answers = generate(run.model, run.tokenizer, own, max_new_tokens=max(lengths) + MORE, stop_ids=ends)
    texts = run.world.together([answer.text.strip() for answer in answers])
    run.answers = [
        {"prompt": str(run.tokenizer.decode(p, skip_special_tokens=True)), "answer": text, "reference": r}
        for p, text, r in list(zip(prompts, texts, references, strict=True))[:SHOWN]
    ]
    return float(np.mean([text == r for text, r in zip(texts, references, strict=True)]))


def _is_answer(example: Example, reference: str, tokenizer: Any) -> bool:
    """Return whether the labels of an example are one answer with the text `reference`, and its end token."""
    at = example.label_positions
    text = tokenizer.decode(example.labels.tolist(), skip_special_tokens=True)
    return bool(reference) and len(at) == at[-1] - at[0] + 1 and text.strip() == reference
