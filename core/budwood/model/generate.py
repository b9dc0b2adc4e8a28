"""Generation in fixed batches, greedy or sampled, with streaming and stop strings.

`generate` answers a list of prompts, for a run in training and its evaluation. It shares `continue_rows` with the live
engine, which answers in fixed batches where rows cannot join and leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from budwood.errors import is_out_of_memory
from budwood.model.decoding import Generated, Gumbel, TextWriter, answering, end_tokens
from budwood.model.limits import answer_limit, check_tokens, embeddings_of, positions_of
from budwood.model.sampling import Sampling, Scores
from budwood.model.streaming import release_memory
from budwood.parallel.sharding import processes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


LogProbs = Callable[[Tensor, Tensor, float], Tensor]
"""Maps logits [n, V], tokens [n] and the temperature to log-probabilities [n]; for example, `Task.log_probs`."""
BATCH_TOKENS = 16384


@dataclass(eq=False)
class Continuation:
    """A prompt and where its answer goes.

    Attributes:
        ids: the prompt's tokens.
        writer: gets the answer's tokens, and knows when it ends.
        key: seed of the samples.
        score: gets the logits [V] before each token, and the token; returns its log-probability, and those of the most
            probable tokens; None: not requested.
        cancelled: asked before each token, whether the answer ends there.
        failed: gets an exception of the writer, which then ends the answer alone; None: it ends the batch.
    """

    ids: Sequence[int]
    writer: TextWriter
    key: object
    score: Callable[[Tensor, int], Scores] | None = None
    cancelled: Callable[[], bool] | None = None
    failed: Callable[[Exception], None] | None = None


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
    batch_tokens: int = BATCH_TOKENS,
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
        keys: seed of each prompt's samples, replacing `seed` and its index.
        log_probs: computes the log-probability of each token at the temperature (1 if greedy), over all tokens
            regardless of `top_p` and `top_k`; None: log-probabilities are not computed.

    Returns:
        One result per prompt, in the order of `prompts`.

    Raises:
        InputError: a prompt is empty or fills the model's context, or an option is out of range.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, stop=tuple(stop))
    sampling.check(embeddings_of(model) or 0)
    context, count, limits = positions_of(model), embeddings_of(model), []
    for index, prompt in enumerate(prompts, 1):
        limits.append(answer_limit(len(prompt), max_new_tokens, context, f"prompt {index}"))
        check_tokens(prompt, count, tokenizer, str(model.config.name_or_path), f"prompt {index}")
    ends, strings = end_tokens(model, tokenizer, stop)
    if temperature > 0 and seed is None and keys is None:
        seed = int(torch.randint(2**62, ()).item())
    rows = []
    for i, prompt in enumerate(prompts):
        own = ends | dict.fromkeys(stop_ids[i] if stop_ids else (), "eos")
        writer = TextWriter(tokenizer, limits[i], own, strings, i, on_token)
        rows.append(Continuation(prompt, writer, (seed, i) if keys is None else keys[i]))
    continue_rows(model, tokenizer, rows, sampling, batch_tokens, log_probs)
    return [row.writer.result() for row in rows]


def continue_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Continuation],
    sampling: Sampling,
    batch_tokens: int = BATCH_TOKENS,
    log_probs: LogProbs | None = None,
) -> None:
    """Continue prompts that share their settings, in batches of similar length, until each has ended.

    Which rows share a batch depends on their lengths and limits alone, so that equal calls are bitwise equal.
    """
    world = processes_of(model)
    with answering(model):
        lengths, limits = [len(row.ids) for row in rows], [row.writer.limit for row in rows]
        todo = list(_batches(lengths, limits, batch_tokens))
        others = 0 if world is None else max(world.gather(len(todo))) - len(todo)
        while todo:
            numbers = todo.pop(0)
            batch = [rows[i] for i in numbers]
            collector = _Collector(batch, 1.0 if sampling.greedy else sampling.temperature, log_probs)
            noise = Gumbel([row.key for row in batch]) if not sampling.greedy else None
            processors = LogitsProcessorList(collector.first + sampling.processors(noise))
            try:
                _run(model, tokenizer, batch, processors, collector)
                continue
            except Exception as error:
                done = len(batch) == 1 or any(row.writer.sent for row in batch)
                if not is_out_of_memory(error) or done or world is not None:
                    raise
            release_memory()
            half = (len(numbers) + 1) // 2
            for row in batch:
                row.writer.restart()
            del batch, collector, processors
            todo = [part for other in (numbers, *todo) for part in (other[:half], other[half:]) if part]
        for _ in range(others):  # so that a sharded model's layers are gathered for the other processes
            row = Continuation([0], TextWriter(tokenizer, 1, {}, [], 0, None), 0)
            _run(model, tokenizer, [row], LogitsProcessorList(), _Collector([row], 1.0, None))


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
    rows: list[Continuation],
    processors: LogitsProcessorList,
    collector: _Collector,
) -> None:
    """Generate one batch, padded on the left, into the writers of its rows."""
    width = max(len(row.ids) for row in rows)
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, width - len(row.ids) :] = torch.as_tensor(row.ids, dtype=torch.long)
        mask[number, width - len(row.ids) :] = 1
    most = max(row.writer.limit for row in rows)
    config = GenerationConfig(max_new_tokens=most, do_sample=False, pad_token_id=pad, use_cache=True)
    model.generate(  # type: ignore[operator]
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([collector]),
        synced_gpus=processes_of(model) is not None,  # all take as many steps
    )


class _Collector(StoppingCriteria):
    """Passes each row's last token to its writer, with its log-probability if requested; returns which rows ended."""

    def __init__(self, rows: list[Continuation], temperature: float, log_probs: LogProbs | None) -> None:
        self.rows, self.temperature, self.log_probs = rows, temperature, log_probs
        self.raw = _RawLogits()
        wanted = log_probs is not None or any(row.score is not None for row in rows)
        self.first = LogitsProcessorList([self.raw] if wanted else [])

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        last, logits = input_ids[:, -1], self.raw.logits
        values: list[Scores] = [(None, None)] * len(self.rows)
        if self.log_probs is None:
            tokens = last.tolist()
        else:
            assert logits is not None
            scored = self.log_probs(logits, last, self.temperature)
            # Both in one read: the device waits for the host once a token. Tokens are exact in fp64.
            numbers, found = torch.stack((last.double(), scored.double())).tolist()
            tokens, values = [int(number) for number in numbers], [(value, None) for value in found]
        for i, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if row.writer.reason is not None:
                continue
            if row.score is not None and logits is not None:
                values[i] = row.score(logits[i], token)
            try:
                if row.cancelled is not None and row.cancelled():
                    row.writer.cancel()
                row.writer.add(token, *values[i])
            except Exception as problem:
                if row.failed is None:
                    raise
                row.writer.reason = "cancelled"
                row.failed(problem)
        return torch.tensor([row.writer.reason is not None for row in self.rows], device=input_ids.device)


class _RawLogits(LogitsProcessor):
    """Stores the model's logits [rows, V] fp32 until their tokens are sampled; must precede other processors."""

    logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits = scores
        return scores
