"""A conversation with a base and its adapters: what is sent, who answers, and what was said."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from budwood.data.encoder import encode_prompt
from budwood.errors import InputError
from budwood.model.limits import ContextFullError
from budwood.serving.pool import AdapterPool, Prompt, leading


@dataclass(frozen=True)
class Reply:
    """An answer of a conversation.

    Attributes:
        finish_reason: see `Generated`; "context": the answer fills the base's context.
        tokens: number of generated tokens.
        first: seconds until its first text.
        seconds: seconds until its end.
    """

    text: str
    finish_reason: str
    tokens: int
    first: float
    seconds: float


class Chat:
    """A conversation, and the adapter that answers next, which may change at any turn.

    An adapter that was trained on messages gets the whole conversation, rendered by its chat template. One that was
    trained on plain text gets each text as it is, without the conversation: it knows no turns.

    Attributes:
        adapter: who answers next: the name of an adapter, weights of several, or None for the base.
        system: the system prompt; "": none.
        messages: what was said so far, without the system prompt.
    """

    def __init__(
        self, pool: AdapterPool, *, as_messages: bool | None = None, system: str = "", seed: int = 0, **sampling: Any
    ) -> None:
        """Begin a conversation with the base.

        Args:
            pool: the base and its adapters.
            as_messages: whether texts are sent as messages; None: as the adapter that answers was trained.
            system: the system prompt.
            seed: seed of the first answer; later ones have their own.
            sampling: options of `AdapterPool.generate`.
        """
        self.pool, self.system = pool, system
        self.adapter: str | Mapping[str, float] | None = None
        self.messages: list[dict[str, str]] = []
        self._as_messages, self._seed, self._sampling, self._turns = as_messages, seed, sampling, 0

    def use(self, adapter: str | Mapping[str, float] | None) -> None:
        """Let an adapter, several, or the base answer from now on.

        Raises:
            InputError: there is no such adapter, or messages are to be sent and there is no chat template.
        """
        for name in [adapter] if isinstance(adapter, str) else adapter or ():
            self.pool.adapter(name)
        if self.sends_messages(adapter) and not self._has_template(leading(adapter)):
            raise InputError("--chat: neither the base's tokenizer nor the adapter has a chat template.")
        self.adapter = adapter

    def sends_messages(self, adapter: str | Mapping[str, float] | None) -> bool:
        """Return whether an adapter, or the base, is sent the conversation as messages."""
        if self._as_messages is not None:
            return self._as_messages
        name = leading(adapter)
        names = self.pool.names if name is None else [name]
        manifests = [self.pool.adapter(n).manifest for n in names]
        trained = [None if manifest is None else manifest.on_messages for manifest in manifests]
        if name is not None and trained[0] is not None:
            return trained[0]
        return self._has_template(name) and (not names or any(given is not False for given in trained))

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.messages.clear()

    def ask(self, text: str, show: Callable[[str], None]) -> Reply:
        """Return the answer to a text, which both become part of the conversation.

        If it is interrupted, what was shown of the answer becomes part of the conversation.

        Args:
            text: what the user says.
            show: called with each piece of the answer.

        Raises:
            InputError: the conversation fills the context, or the chat template refuses it; it stays as it was.
        """
        as_messages = self.sends_messages(self.adapter)
        system = [{"role": "system", "content": self.system}] if self.system else []
        said = [*self.messages, {"role": "user", "content": text}]
        prompt: Prompt = [*system, *said]
        if not as_messages:  # of tokens, the pool does not warn, as the session has done
            prompt = encode_prompt(self.pool.tokenizer, text) or text
        pieces: list[str] = []
        started, first = time.perf_counter(), 0.0

        def take(_: int, piece: str) -> None:
            nonlocal first
            first = first or time.perf_counter() - started
            pieces.append(piece)
            show(piece)

        try:
            (answer,) = self.pool.generate(
                [prompt], [self.adapter], seed=self._seed + self._turns, stream=take, **self._sampling,
            )  # fmt: skip
        except ContextFullError as error:
            remedy = "/reset begins a new conversation." if self.messages and as_messages else "Send a shorter text."
            raise InputError(f"{error} {remedy}") from error
        except KeyboardInterrupt:
            if pieces and as_messages:
                self.messages = [*said, {"role": "assistant", "content": "".join(pieces)}]
            raise
        seconds = time.perf_counter() - started
        self._turns += 1
        if as_messages:
            self.messages = [*said, {"role": "assistant", "content": answer.text}]
        limit = self._sampling["max_new_tokens"]
        full = answer.finish_reason == "length" and len(answer.tokens) < limit
        return Reply(answer.text, "context" if full else answer.finish_reason, len(answer.tokens), first, seconds)

    def _has_template(self, name: str | None) -> bool:
        manifest = self.pool.adapter(name).manifest if name is not None else None
        own = manifest.chat.template if manifest is not None and manifest.chat is not None else None
        return bool(own or getattr(self.pool.tokenizer, "chat_template", None))
