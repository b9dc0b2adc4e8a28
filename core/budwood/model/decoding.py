"""What decoding has for each row: its end tokens, its random numbers, and its text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import LogitsProcessor

from budwood.model.embeddings import plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generated:
    """The result of generation for one prompt.

    Attributes:
        tokens: generated tokens without the end-of-sequence token, but with those of a stop string.
        text: decoded text without special tokens; ends before the stop string or an incomplete character.
        finish_reason: "eos": an end-of-sequence token; "stop": a stop string; "length": the limit or the context;
            "cancelled": ended by its requester.
        end_token: the token that ended generation; None if a stop string in the text or a limit did.
        log_probs: those of `tokens`, then that of `end_token` if there is one; empty unless requested.
        top_log_probs: at each of these, those of the most probable tokens, by token; empty unless requested.
    """

    tokens: list[int]
    text: str
    finish_reason: Literal["eos", "stop", "length", "cancelled"]
    end_token: int | None = None
    log_probs: list[float] = field(default_factory=list)
    top_log_probs: list[dict[int, float]] = field(default_factory=list)


def end_tokens(
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


class TextWriter:
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
        self.send = None if on_token is None else lambda piece: on_token(index, piece)
        self.sent = 0
        self.restart()

    def restart(self) -> None:
        """Begin again; text that was sent cannot be taken back."""
        assert not self.sent
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.top_log_probs: list[dict[int, float]] = []
        self.end_token: int | None = None
        self.reason: Literal["eos", "stop", "length", "cancelled"] | None = None
        self.text = ""
        # Without stop strings and `on_token`, the text is decoded once, at the end.
        self.stream = DecodeStream(skip_special_tokens=True) if self.stop or self.send else None

    def add(self, token: int, log_prob: float | None = None, top: dict[int, float] | None = None) -> None:
        """Add the next token, unless the text has ended."""
        if self.reason is not None:
            return
        if log_prob is not None:
            self.log_probs.append(log_prob)
        if top is not None:
            self.top_log_probs.append(top)
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

    def cancel(self) -> None:
        """End the text where it is."""
        self.reason = "cancelled"
        self._finish()

    def result(self) -> Generated:
        """Return the generated tokens and text."""
        assert self.reason is not None
        return Generated(self.tokens, self.text, self.reason, self.end_token, self.log_probs, self.top_log_probs)


class Gumbel(LogitsProcessor):
    """Adds Gumbel noise, so that the largest logit is an exact sample; each row has a separate generator."""

    def __init__(self, keys: list[object]) -> None:
        digests = [hashlib.sha256(repr(key).encode()).digest() for key in keys]
        self.generators = [torch.Generator().manual_seed(int.from_bytes(d[:8], "little") >> 1) for d in digests]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=g, dtype=torch.float64) for g in self.generators])
        noise = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        if scores.device.type == "cuda":  # drawn while the GPU computes the logits, and copied without a wait for them
            noise = noise.pin_memory()
        return scores.double() + noise.to(scores.device, non_blocking=True)


@contextmanager
def answering(model: PreTrainedModel) -> Iterator[None]:
    """Set eval mode, neutral generation settings and the base's precision; restore the previous state on exit."""
    modes = [(module, module.training) for module in model.modules()]
    settings = model.generation_config
    weight = plain(model.get_input_embeddings()).weight  # a table that trains whole is in fp32
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
