"""What a base and each of its adapters answer by themselves, one request at a time, in the process of the tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budwood import AdapterPool
from budwood.data.encoder import encode_chat, encode_prompt
from budwood.serving.requests import Sampling

CLEAR = 1e-3
"""Least difference of the log-probabilities of the two most probable tokens, which rounding does not exchange."""
WORDS = "games section library terminal description runtime shared files data model tokens small headers fox".split()  # noqa: SIM905


@dataclass(frozen=True)
class Case:
    """A prompt and its answer alone. `chat`: it is a user's message; otherwise a text."""

    adapter: str | None
    chat: bool
    prompt: str
    text: str

    def request(self, model: str, tokens: int) -> dict[str, Any]:
        """Return the arguments of a client's call."""
        what = {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else {"prompt": self.prompt}
        return {"model": model, "max_tokens": tokens, "temperature": 0, **what}


class Reference:
    """A pool of its own."""

    def __init__(self, base: Path, root: Path) -> None:
        self.pool = AdapterPool(base, precision="fp32")
        for folder in sorted(root.iterdir()):
            self.pool.load(folder.name, folder)
        self.names: list[str] = list(self.pool.names)

    def answer(self, adapter: Any, prompt: str, tokens: int, chat: bool = False) -> tuple[str, float]:
        """Return an answer, and how clear its least clear token was."""
        tokenizer = self.pool.tokenizer
        ids = (
            encode_chat(tokenizer, [{"role": "user", "content": prompt}]) if chat else encode_prompt(tokenizer, prompt)
        )
        end = (tokenizer.convert_tokens_to_ids("<|im_end|>"),) if chat else ()
        sampling = Sampling(tokens, stop_ids=end, top_log_probs=2)
        found = self.pool.engine.submit(ids, adapter, sampling).result()
        gaps = [max(top.values()) - min(top.values()) for top in found.top_log_probs]
        return found.text, min(gaps)

    def cases(self, adapter: str | None, count: int, tokens: int) -> list[Case]:
        """Return prompts, every second one a message, with answers that rounding does not change."""
        found: list[Case] = []
        number = 0
        while len(found) < count:
            number += 1
            prompt = " ".join(WORDS[(number * k + k * k) % len(WORDS)] for k in range(1, 3 + number % 9)) + f" {number}"
            chat = len(found) % 2 == 1
            text, clear = self.answer(adapter, prompt, tokens, chat)
            if clear > CLEAR and text:
                found.append(Case(adapter, chat, prompt, text))
        return found
