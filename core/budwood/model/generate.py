"""Batched generation, greedy or sampled, with streaming and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from budwood.errors import InputError, is_out_of_memory
from budwood.model.decoding import Generated, Gumbel, TextWriter, answering, end_tokens
from budwood.model.limits import check_tokens, positions_of
from budwood.model.streaming import release_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


LogProbs = Callable[[Tensor, Tensor, float], Tensor]
"""Maps logits [n, V], tokens [n] and the temperature to log-probabilities [n]; for example, `Task.log_probs`."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    stop_ids: Sequence[Sequence[int]] | None = None,
    on_token: Callable[[int, str], None] | None = None,
    batch_tokens: int = 16384,
    before_batch: Callable[[list[int]], None] | None = None,
    keys: Sequence[object] | None = None,
    log_probs: LogProbs | None = None,
) -> list[Generated]:
    """Continue each of `prompts`, in batches of similar length. The result for a prompt does not depend on the others.

    Of the model's generation settings, only the end-of-sequence tokens are used: others, such as penalties and forced
    tokens, would change the meaning of "greedy".

    Args:
        prompts: token ids of each prompt, not empty.
        max_new_tokens: maximum number of generated tokens per prompt.
        temperature: 0: greedy decoding.
        top_p: sample from the most likely tokens with this total probability.
        top_k: sample from this number of most likely tokens; 0: from all.
        seed: seed of the samples, combined with a prompt's index; None: a random seed.
        stop: strings that end the text, and are removed from it.
        stop_ids: for each prompt, tokens that end its text in addition to the end-of-sequence tokens.
        on_token: called with a prompt's index and the next piece of its text (complete characters) once it is final.
        batch_tokens: maximum number of tokens per batch: prompts, generated tokens and padding; reduced if memory runs
            out.
        before_batch: called before each batch with the indices of its prompts, in the order of its rows.
        keys: seed of each prompt's samples, replacing `seed` and its index.
        log_probs: computes the log-probability of each token at the temperature (1 if greedy), over all tokens
            regardless of `top_p` and `top_k`; None: log-probabilities are not computed.

    Returns:
        One result per prompt, in the order of `prompts`.

    Raises:
        InputError: a prompt is empty or fills the model's context, or an option is out of range.
    """
    _check_options(max_new_tokens, temperature, top_p, top_k)
    context = positions_of(model)
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {index + 1} is empty.")
        if context is not None and len(prompt) >= context:
            raise InputError(
                f"prompt {index + 1} has {len(prompt)} tokens; the base's context holds {context} with the answer."
            )
        check_tokens(prompt, model, tokenizer, f"prompt {index + 1}")
    ends, stop = end_tokens(model, tokenizer, stop)
    limits = [min(max_new_tokens, (context or len(p) + max_new_tokens) - len(p)) for p in prompts]
    own: list[dict[int, Literal["eos", "stop"]]] = [
        ends | dict.fromkeys(stop_ids[i] if stop_ids else (), "eos") for i in range(len(prompts))
    ]

    def writer(i: int) -> TextWriter:
        return TextWriter(tokenizer, limits[i], own[i], stop, i, on_token)

    writers = [writer(i) for i in range(len(prompts))]
    if temperature > 0 and seed is None and keys is None:
        seed = int(torch.randint(2**62, ()).item())
    keys = [(seed, i) for i in range(len(prompts))] if keys is None else keys
    with answering(model):
        todo = list(_batches([len(p) for p in prompts], limits, batch_tokens))
        while todo:
            rows = todo.pop(0)
            if before_batch is not None:
                before_batch(rows)
            batch = [writers[i] for i in rows]
            collector = _Collector(batch, temperature or 1.0, log_probs)
            processors = _processors(temperature, top_p, top_k, [keys[i] for i in rows], collector)
            try:
                _run(model, tokenizer, [prompts[i] for i in rows], max(limits[i] for i in rows), processors, collector)
                continue
            except Exception as error:
                if not is_out_of_memory(error) or len(rows) == 1 or on_token is not None:  # text was already emitted
                    raise
            release_memory()
            half = (len(rows) + 1) // 2
            for i in rows:
                writers[i] = writer(i)
            del batch, collector, processors
            todo = [part for other in (rows, *todo) for part in (other[:half], other[half:]) if part]
    return [writer.result() for writer in writers]


def _check_options(max_new_tokens: int, temperature: float, top_p: float, top_k: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: {max_new_tokens} is less than 1.")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature: {temperature} is not finite and at least 0.")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p: {top_p} is not above 0 and at most 1.")
    if top_k < 0:
        raise InputError(f"top_k: {top_k} is negative; use 0 for all tokens.")


def _batches(lengths: list[int], limits: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of prompt indices, the longest first, so that most memory is allocated at the start."""
    rows: list[int] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        wider = max(width, lengths[index] + limits[index])
        if rows and wider * (len(rows) + 1) > batch_tokens:
            yield rows
            rows, wider = [], lengths[index] + limits[index]
        rows.append(index)
        width = wider
    if rows:
        yield rows


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    processors: LogitsProcessorList,
    collector: _Collector,
) -> None:
    """Generate one batch, padded on the left, into the collector's writers."""
    width = max(len(prompt) for prompt in prompts)
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.long)
        mask[row, width - len(prompt) :] = 1
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, use_cache=True)
    model.generate(  # type: ignore[operator]
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([collector]),
    )


class _Collector(StoppingCriteria):
    """Passes each row's last token to its writer, with its log-probability if requested; returns which rows ended."""

    def __init__(self, writers: list[TextWriter], temperature: float, log_probs: LogProbs | None) -> None:
        self.writers, self.temperature, self.log_probs = writers, temperature, log_probs
        self.raw_logits = _RawLogits()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tokens = input_ids[:, -1]
        values: list[float] | list[None] = [None] * len(self.writers)
        if self.log_probs is not None:
            assert self.raw_logits.logits is not None
            values = self.log_probs(self.raw_logits.logits, tokens, self.temperature).tolist()
        for writer, token, value in zip(self.writers, tokens.tolist(), values, strict=True):
            writer.add(token, value)
        return torch.tensor([writer.reason is not None for writer in self.writers], device=input_ids.device)


class _RawLogits(LogitsProcessor):
    """Stores the model's logits [rows, V] fp32 until their tokens are sampled; must precede other processors."""

    logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits = scores
        return scores


def _processors(
    temperature: float, top_p: float, top_k: int, keys: list[object], collector: _Collector
) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if collector.log_probs is not None:
        processors.append(collector.raw_logits)
    if temperature > 0:
        processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        processors.append(Gumbel(keys))
    return processors
