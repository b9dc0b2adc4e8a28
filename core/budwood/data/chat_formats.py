"""Data formats that become chat messages, and those that are recognised but that nothing here can train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from budwood.data.fields import read_weight, string
from budwood.data.formats import CAUSAL_LM, SEQ2SEQ, Completion, DataFormat, Dropped, weighted
from budwood.data.messages import Conversation, read_conversation, read_messages, with_columns
from budwood.data.rows import Row
from budwood.errors import InputError

BESIDE = ("weight", "system", "tools", "functions", "chat_template_kwargs")
"""Optional columns beside messages."""


class Messages(DataFormat):
    """A conversation; the loss is on the assistant's turns and the end token of each.

    A row's weight multiplies the weights of its messages.
    """

    api = 2
    name = "messages"
    columns: ClassVar[tuple[str, ...]] = ("messages",)
    optional = BESIDE
    tasks = (CAUSAL_LM,)

    def item(self, row: Row, where: str) -> Conversation | Dropped:
        """See `DataFormat.item`."""
        return _usable(read_conversation(row, self.columns[0], where), row, where)

    def reference(self, row: Row) -> str | None:
        """The assistant's first turn."""
        messages = read_conversation(row, self.columns[0], "").messages
        return next((str(m["content"]) for m in messages if m["role"] == "assistant"), None)


class ShareGPT(Messages):
    """A conversation as ShareGPT writes it: a list of from and value, or of role and content."""

    api = 2
    name = "sharegpt"
    columns = ("conversations",)


class SingleConversation(Messages):
    """A conversation in the column `conversation`."""

    api = 2
    name = "conversation"
    columns = ("conversation",)


class Instruction(DataFormat):
    """An instruction, perhaps with an input to it, and the answer (Alpaca): one user turn and one assistant turn.

    `history` holds earlier pairs of instruction and answer, which have a loss too.
    """

    api = 2
    name = "alpaca"
    columns: ClassVar[tuple[str, ...]] = ("instruction", "output")
    optional: ClassVar[tuple[str, ...]] = ("input", "history", *BESIDE)
    tasks = (CAUSAL_LM,)

    def item(self, row: Row, where: str) -> Conversation | Dropped:
        """See `DataFormat.item`."""
        instruction, answer = self.columns
        asked, extra = string(row, instruction, where), row.get(self.optional[0])
        if extra is not None:
            extra = string(row, self.optional[0], where)
        if not asked.strip() and not (extra or "").strip():
            return Dropped(f"empty {instruction}")
        if not string(row, answer, where).strip():
            return Dropped(f"empty {answer}")
        pairs = [
            *_history(row, where),
            ("\n\n".join(text for text in (asked, extra or "") if text.strip()), row[answer]),
        ]
        value = [
            {"role": r, "content": text} for pair in pairs for r, text in zip(("user", "assistant"), pair, strict=True)
        ]
        messages, weights, ignored = read_messages(value, "", True, where)
        return _usable(with_columns(row, messages, weights, ignored, where), row, where)

    def reference(self, row: Row) -> str | None:
        """The answer."""
        return str(row[self.columns[1]])


class Response(Instruction):
    """An instruction, perhaps with a context, and the response (Dolly), as one user turn and one assistant turn."""

    api = 2
    name = "dolly"
    columns = ("instruction", "response")
    optional = ("context", *BESIDE)


class PromptCompletion(DataFormat):
    """A prompt and its completion, texts or messages; the loss is on the completion and its end token."""

    api = 2
    name = "prompt-completion"
    columns = ("prompt", "completion")
    optional = BESIDE
    tasks = (CAUSAL_LM, SEQ2SEQ)

    def item(self, row: Row, where: str) -> Completion | Conversation | Dropped:
        """See `DataFormat.item`."""
        prompt = row.get("prompt")
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            return _usable(self._conversation(row, where), row, where)
        blank = [name for name in self.columns if not string(row, name, where).strip()]
        for name in BESIDE[1:]:
            if row.get(name):
                raise InputError(
                    f"{where}: field '{name}' needs a chat template, but 'prompt' is text: give 'prompt' and "
                    f"'completion' as lists of messages, or remove '{name}'."
                )
        if blank:
            return Dropped(f"empty {blank[-1]}")
        return weighted(Completion(row["prompt"], row["completion"], read_weight(row, where)))

    def _conversation(self, row: Row, where: str) -> Conversation:
        prompt, _, ignored = read_messages(row["prompt"], "field 'prompt'", True, where)
        completion = row.get("completion")
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        answers, weights, more = read_messages(completion, "field 'completion'", "completion" in row, where)
        return with_columns(row, prompt + answers, [0.0] * len(prompt) + weights, ignored | more, where)

    def reference(self, row: Row) -> str | None:
        """The completion."""
        if isinstance(row["completion"], str):
            return row["completion"]
        messages, _, _ = read_messages(row["completion"], "field 'completion'", True, "")
        return next((str(m["content"]) for m in messages if m["role"] == "assistant"), None)


class Unsupported(DataFormat):
    """Columns that are recognised so that a file is refused with the reason instead of being misread."""

    name = "unsupported"
    tasks = ()

    def __init__(self, columns: Sequence[str], reason: str) -> None:
        self.columns: tuple[str, ...] = tuple(columns)  # type: ignore[misc]
        self.reason = reason


UNSUPPORTED = (
    Unsupported(("text", "role"), "one message a row: join the messages of each conversation into a list 'messages' of "
                "objects with role and content."),
    *(
        Unsupported(("tokens", tags), f"a tag for each token: rename '{tags}' to 'tags', and set base.task: "
                    "token-classification.")
        for tags in ("ner_tags", "pos_tags", "labels")
    ),
)  # fmt: skip


def _history(row: Row, where: str) -> list[tuple[str, str]]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise InputError(f"{where}: field 'history' must be a list of pairs of texts, instruction and answer.")
    return [(pair[0], pair[1]) for pair in history]


def _usable(conversation: Conversation, row: Row, where: str) -> Conversation | Dropped:
    """Return the conversation with the row's weight, or the reason why nothing can be learned from it."""
    messages, factor = conversation.messages, read_weight(row, where)
    if not any(message["role"] == "assistant" for message in messages):
        return Dropped("no assistant turn")
    if messages[0]["role"] == "assistant":
        return Dropped("begins with the assistant")
    weights = [read_weight({"weight": weight * factor}, where) for weight in conversation.weights]
    for message, weight in zip(messages, weights, strict=True):
        if weight and not message["content"].strip() and not message.get("tool_calls"):
            return Dropped("empty assistant turn")
    if not any(weights):
        return Dropped("weight 0")
    return Conversation(messages, weights, conversation.tools, conversation.options, conversation.ignored)
