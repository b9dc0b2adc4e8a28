"""Exact match of generated answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from budwood.contract.examples import Example
from budwood.contract.types import Run
from budwood.errors import plural
from budwood.model.evaluation import autocast

LIMIT = 64
"""Mean tokens of answers up to which exact match is informative."""
MORE = 4
"""Tokens that an answer may be longer than the longest reference."""

SHOWN = 8
"""Answers that `run.answers` keeps."""


def exact_match(run: Run, task: Any) -> float | None:
    """Return the fraction of evaluation prompts whose greedy answer equals the completion, or the assistant's message.

    At most `train.eval_generate` prompts are used, evenly spread, and of conversations those with one answer; each
    process answers its share. Returns None if the data has no completions, if all of these conversations have several
    turns, or if the mean length exceeds 64 tokens, for which exact match is not informative. `run.answers` then holds
    the first few answers.
    """
    from budwood.model.generate import generate

    examples, limit = run.eval_examples, run.recipe.train.eval_generate
    assert examples is not None
    if limit == 0 or not (examples.format == "prompt-completion" or examples.rendered):
        return None
    chosen = np.unique(np.linspace(0, len(examples) - 1, min(limit, len(examples))).astype(int)).tolist()
    used = [i for i in chosen if not examples.rendered or _is_one(examples[i])]
    if not used or np.mean([len(examples[i].labels) for i in used]) > LIMIT:
        return None
    references = {i: (examples.reference(i) or "").strip() for i in used}
    if examples.rendered:
        used = [i for i in used if _is_answer(examples[i], references[i], run.tokenizer)]
    if not used:
        return None
    if len(used) < len(chosen) and not run.answers:  # not said yet
        run.say(
            f"note: exact match is measured on {len(used):,} of {plural(len(chosen), 'prompt')}: the other "
            "conversations have more than one answer, or the chat template adds words"
        )
    prompts = [task.probe(examples[i]).inputs["input_ids"].tolist() for i in used]
    longest = max(len(examples[i].labels) for i in used)
    with torch.no_grad(), autocast(run):
        own = run.world.share(prompts)
        ends = [examples.stop_ids] * len(own)
        answers = generate(run.model, run.tokenizer, own, max_new_tokens=longest + MORE, stop_ids=ends)
    texts = run.world.together([answer.text.strip() for answer in answers])
    expected = [references[i] for i in used]
    run.answers = [
        {"prompt": str(run.tokenizer.decode(p, skip_special_tokens=True)), "answer": text, "reference": r}
        for p, text, r in list(zip(prompts, texts, expected, strict=True))[:SHOWN]
    ]
    return float(np.mean([text == r for text, r in zip(texts, expected, strict=True)]))


def _is_one(example: Example) -> bool:
    """Return whether the labels of an example are one piece of it."""
    at = example.label_positions
    return len(at) > 0 and len(at) == at[-1] - at[0] + 1


def _is_answer(example: Example, reference: str, tokenizer: Any) -> bool:
    """Return whether the labels of an example are the text `reference`, and its end token."""
    text: str = tokenizer.decode(example.labels.tolist(), skip_special_tokens=True)
    return bool(reference) and text.strip() == reference
