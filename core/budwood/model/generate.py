"""Batched generation, greedy or sampled, with streaming and stop strings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor, nn
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
from budwood.model.limits import check_tokens, positions_of
from budwood.model.streaming import release_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generated:
    """The result of generation for one prompt.

    Attributes:
        tokens: generated tokens without the end-of-sequence token, but with those of a stop string.
        text: decoded text without special tokens; ends before the stop string or an incomplete character.
        finish_reason: "eos": an end-of-sequence token; "stop": a stop string; "length": the limit or the context.
        end_token: the token that ended generation; None if a stop string in the text or a limit did.
        log_probs: those of `tokens`, then that of `end_token` if there is one; empty unless requested.
    """

    tokens: list[int]
    text: str
    finish_reason: Literal["eos", "stop", "length"]
    end_token: int | None = None
    log_probs: list[float] = field(default_factory=list)


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
    ends, stop = _end_tokens(model, tokenizer, stop)
    limits = [min(max_new_tokens, (context or len(p) + max_new_tokens) - len(p)) for p in prompts]
    own: list[dict[int, Literal["eos", "stop"]]] = [
        ends | dict.fromkeys(stop_ids[i] if stop_ids else (), "eos") for i in range(len(prompts))
    ]

    def writer(i: int) -> _Writer:
        return _Writer(tokenizer, limits[i], own[i], stop, i, on_token)

    writers = [writer(i) for i in range(len(prompts))]
    if temperature > 0 and seed is None and keys is None:
        seed = int(torch.randint(2**62, ()).item())
    keys = [(seed, i) for i in range(len(prompts))] if keys is None else keys
    with _answering(model):
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


def _end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]
) -> tuple[dict[int, Literal["eos", "stop"]], list[str]]:
    """Return the tokens that end a text, each with its reason, and the stop strings that are not a token.

    A stop string that is an added token, such as `<|im_end|>`, would not appear in the text.
    """
    ends: dict[int, Literal["eos", "stop"]] = {}
    added = tokenizer.get_added_vocab()
    strings = []
    for string in filter(None, stop):
        if string in added:
            ends[added[string]] = "stop"
        else:
            strings.append(string)
    for owner in (tokenizer, model.config, getattr(model, "generation_config", None)):
        tokens = getattr(owner, "eos_token_id", None)
        for token in tokens if isinstance(tokens, list | tuple) else [tokens]:
            if isinstance(token, int):
                ends[token] = "eos"
    return ends, strings


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


class _Writer:
    """Decodes the tokens of one prompt to text as they are generated."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        limit: int,
        ends: dict[int, Literal["eos", "stop"]],
        stop: list[str],
        index: int,
        on_token: Callable[[int, str], None] | None,
    ) -> None:
        self.tokenizer, self.limit, self.ends, self.stop = tokenizer, limit, ends, stop
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.end_token: int | None = None
        self.reason: Literal["eos", "stop", "length"] | None = None
        self.text = ""
        self.sent = 0
        self.send = None if on_token is None else lambda piece: on_token(index, piece)
        # Without stop strings and `on_token`, the text is decoded once, at the end.
        self.stream = DecodeStream(skip_special_tokens=True) if stop or on_token else None

    def add(self, token: int, log_prob: float | None = None) -> None:
        """Add the next token, unless the text has ended."""
        if self.reason is not None:
            return
        if log_prob is not None:
            self.log_probs.append(log_prob)
        if token in self.ends:
            self.reason, self.end_token = self.ends[token], token
        else:
            self.tokens.append(token)
            if self.stream is not None:
                self.text += self.stream.step(self.tokenizer.backend_tokenizer, token) or ""
                self._find_stop()
            if self.reason is None and len(self.tokens) >= self.limit:
                self.reason = "length"
        if self.reason is not None:
            self._finish()
        elif self.send is not None:
            self._send(len(self.text) - self._count_held())

    def _find_stop(self) -> None:
        """End the text before the first stop string in it; sent text cannot contain the start of one."""
        starts = [at for at in (self.text.find(string, self.sent) for string in self.stop) if at >= 0]
        if starts:
            self.text = self.text[: min(starts)]
            self.reason = "stop"

    def _count_held(self) -> int:
        """Return how many characters at the end of the text may be the start of a stop string."""
        longest = max((len(string) for string in self.stop), default=1) - 1
        for count in range(min(longest, len(self.text)), 0, -1):
            if any(string.startswith(self.text[-count:]) for string in self.stop):
                return count
        return 0

    def _send(self, end: int) -> None:
        if self.send is not None and end > self.sent:
            self.send(self.text[self.sent : end])
            self.sent = end

    def _finish(self) -> None:
        if self.reason != "stop" or self.stream is None:
            # Remove an incomplete character, whose other bytes will not be generated.
            text = str(self.tokenizer.decode(self.tokens, skip_special_tokens=True)).rstrip("\ufffd")
            if text.startswith(self.text):
                self.text = text
        self._send(len(self.text))

    def result(self) -> Generated:
        """Return the generated tokens and text."""
        assert self.reason is not None
        return Generated(self.tokens, self.text, self.reason, self.end_token, self.log_probs)


class _Collector(StoppingCriteria):
    """Passes each row's last token to its writer, with its log-probability if requested; returns which rows ended."""

    def __init__(self, writers: list[_Writer], temperature: float, log_probs: LogProbs | None) -> None:
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
        processors.append(_Gumbel(keys))
    return processors


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise, so that the largest logit is an exact sample; each row has a separate generator."""

    def __init__(self, keys: list[object]) -> None:
        digests = [hashlib.sha256(repr(key).encode()).digest() for key in keys]
        self.generators = [torch.Generator().manual_seed(int.from_bytes(d[:8], "little") >> 1) for d in digests]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=g, dtype=torch.float64) for g in self.generators])
        noise = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        return scores.double() + noise.to(scores.device)


@contextmanager
def _answering(model: PreTrainedModel) -> Iterator[None]:
    """Set eval mode, neutral generation settings and the base's precision; restore the previous state on exit."""
    modes = [(module, module.training) for module in model.modules()]
    settings = model.generation_config
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, nn.Parameter | Tensor)
    half = weight.dtype in (torch.bfloat16, torch.float16)
    precision = torch.autocast(weight.device.type, weight.dtype if half else torch.bfloat16, enabled=half)
    # The head's input is a slice, the last position, for which torch would copy the head's weight once per row.
    head = model.get_output_embeddings()
    dense = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:])) if head else None
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        with torch.no_grad(), precision:
            yield
    finally:
        if dense is not None:
            dense.remove()
        model.generation_config = settings
        for module, training in modes:
            module.training = training
