"""`Run.generate`: batched samples of the current model, with random numbers keyed by the call alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from budwood.contract.examples import Example
from budwood.contract.samples import Prompts, Sample
from budwood.contract.types import Run
from budwood.data.encoder import Encoder
from budwood.errors import InputError
from budwood.model.generate import Generated, generate
from budwood.training.reference import adapter_off

TIMES = 4
"""Tokens per sampling batch, as a multiple of `train.micro_tokens`: sampling stores keys and values, no activations."""


def sample(
    run: Run, prompts: Prompts, *, adapter: bool, max_new_tokens: int, temperature: float, top_p: float,
    stop: Sequence[str], samples: int,
) -> list[list[Sample]]:  # fmt: skip
    """Continue prompts with the run's model; see `Run.generate`."""
    if run.tokenizer is None or not run.model.can_generate():
        raise InputError(f"task '{run.task.name}' generates no text: run.generate needs a causal language model.")
    if not run.task.has_log_probs():
        raise InputError(f"task '{run.task.name}' has no log-probabilities, which run.generate returns with samples.")
    if samples < 1:
        raise InputError(f"samples: {samples} is less than 1.")
    ids = [_tokens(run, prompt) for prompt in prompts]
    keys = [p.key if isinstance(p, Example) else (index, ids[index]) for index, p in enumerate(prompts)]
    with nullcontext() if adapter else adapter_off(run):
        answers = generate(
            run.model, run.tokenizer, [prompt for prompt in ids for _ in range(samples)], max_new_tokens,
            temperature=temperature, top_p=top_p, stop=stop, stop_ids=[run.examples.stop_ids] * (len(ids) * samples),
            batch_tokens=TIMES * run.recipe.micro_tokens,
            keys=[(run.seed, run.step, key, number) for key in keys for number in range(samples)],
            log_probs=run.task.log_probs,
        )  # fmt: skip
    flat = [_sample(ids[index // samples], answer) for index, answer in enumerate(answers)]
    return [flat[start : start + samples] for start in range(0, len(flat), samples)]


def _tokens(run: Run, prompt: Example | str | Sequence[int]) -> list[int]:
    if isinstance(prompt, Example):
        return run.task.probe(prompt).inputs["input_ids"].tolist()
    if isinstance(prompt, str):
        return Encoder(run.tokenizer).start([prompt])[0]
    return [int(token) for token in prompt]


def _sample(prompt: list[int], answer: Generated) -> Sample:
    end = [] if answer.end_token is None else [answer.end_token]
    assert answer.finish_reason != "cancelled"
    return Sample(prompt, answer.tokens + end, answer.log_probs, answer.text, answer.finish_reason)
