"""The fields of budwood.json, the manifest in an adapter's folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from budwood.errors import CorruptError
from budwood.untrusted.formats import read_json

if TYPE_CHECKING:
    from budwood.model.base import Base

MERGED = "budwood-merge.json"
"""File of a merged model that says how it was made."""
FORMAT = 3
"""2: budwood.json carries its own hash. 3: `adapter_type` was `kind`."""


class _Record(BaseModel):
    """Part of budwood.json. Unknown fields of a later minor version are ignored; wrong types are rejected."""

    model_config = ConfigDict(extra="ignore", strict=True)


class ParentRecord(_Record):
    """An adapter that something came from: the SHA-256 of its adapter_model.safetensors and adapter_config.json."""

    weights: str = Field(pattern=r"^[0-9a-f]{64}$")
    config: str = Field(pattern=r"^[0-9a-f]{64}$")


class BaseRecord(_Record):
    """The base that an adapter was trained on.

    `fingerprint` identifies its unquantised weights on disk. `revision` is the hub's commit, None for a folder.
    `embeddings` is the number of token embeddings if the run resized them, 0 if not. `merged` are the adapters that
    were merged into it, in order.
    """

    name: str
    fingerprint: str
    revision: str | None = None
    quantization: str = "none"
    double_quantization: bool = True
    dtype: str = "float32"
    embeddings: int = Field(0, ge=0)
    merged: list[ParentRecord] = Field(default_factory=list)

    def __str__(self) -> str:
        inside = f" with adapter {self.merged[-1].weights[:12]} merged into it" if self.merged else ""
        return f"'{self.name}'{inside} ({self.fingerprint[:12]})"

    @classmethod
    def of(cls, base: Base) -> BaseRecord:
        """Record a loaded base."""
        return cls(
            name=base.name,
            fingerprint=base.fingerprint,
            revision=base.revision,
            quantization=base.quantization,
            double_quantization=base.double_quantization,
            dtype=str(base.dtype).removeprefix("torch."),
            embeddings=base.added.stop if base.added else 0,
            merged=merged_into(base.path),
        )


def merged_into(folder: Path) -> list[ParentRecord]:
    """Return the adapters that were merged into a base, oldest first, as `adapter merge` recorded them in its folder.

    Raises:
        CorruptError: the record is damaged.
    """
    path = folder / MERGED
    if not path.is_file():
        return []
    try:
        return [ParentRecord.model_validate(entry) for entry in read_json(path).get("merged", [])]
    except (ValidationError, TypeError) as error:
        raise CorruptError(f"{path}: 'merged': must list the SHA-256 of weights and config of adapters.") from error


class HeldOutRecord(_Record):
    """The data that the run evaluated on: what it held out of its training data, or `data.eval` of its recipe.

    Attributes:
        data: the data as the recipe names it: a path, or sources.
        sha256: hash of that data.
        rows: the rows held out, counted from 0; None: all rows of data that the run did not train on.
        skip_bad_rows: whether rows that cannot be used are skipped.
    """

    data: str | list[dict[str, Any]]
    sha256: str
    rows: list[int] | None = Field(min_length=1)
    skip_bad_rows: bool = False


class EvaluationRecord(_Record):
    """How the run evaluated. With the base's record and the golden's threads, it determines the metrics' digits.

    Attributes:
        max_length: tokens at which rows were truncated.
        tokens: largest number of tokens per batch, which determines the batches' contents.
        packed: whether examples shared a row.
        attention: the attention implementation of the model.
        generate: largest number of prompts answered.
        loss_on: which tokens of the data have a loss.
        as_chat: whether prompts and completions were rendered as messages.
        held_out: the rows on which the run evaluated; None: it evaluated nothing.
    """

    max_length: int = Field(ge=1)
    tokens: int = Field(ge=1)
    packed: bool
    attention: str
    generate: int = Field(ge=0)
    loss_on: str = "assistant"
    as_chat: bool = False
    held_out: HeldOutRecord | None = None


class ChatRecord(_Record):
    """How messages to the adapter are rendered, as in its run.

    Attributes:
        template: the chat template that the run used instead of the base's; None: the base's.
        options: variables for the chat template.
        date: the date that the chat template writes, as 2026-11-28; None if it writes none.
    """

    template: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    date: str | None = Field(None, pattern=r"^\d{4}-\d{2}-\d{2}$")


class PartRecord(ParentRecord):
    """An adapter that another was made from, and its weight."""

    weight: float = 1.0


class MadeRecord(_Record):
    """How an adapter was made from others without training.

    Attributes:
        how: combine or shrink.
        method: linear, svd, ties, dare or magnitude.
    """

    how: str
    method: str
    parts: list[PartRecord] = Field(min_length=1)


class GoldenRecord(_Record):
    """The setting in which the golden logits were computed, by which `verify` decides whether they must agree."""

    device: str
    dtype: str
    quantization: str
    threads: int
    torch: str


class Manifest(_Record):
    """budwood.json: an adapter's type, owner and origin, and the hash of every other file in its folder."""

    format: int = FORMAT
    adapter_type: str = Field(pattern=r"^[\w.-]+$")
    """Name of the strategy that attaches it."""
    distribution: str = Field(pattern=r"^([\w.-]+ [\w.+!-]+)?$")
    """Distribution and version of that strategy, such as "budwood 0.1.0"."""
    base: BaseRecord
    task: str = "causal-lm"
    task_options: dict[str, Any] = Field(default_factory=dict)
    labels: list[str] = Field(default_factory=list)
    stop_ids: list[int] = Field(default_factory=list)
    """Tokens that end an answer in addition to the end-of-sequence token: the chat template's end-of-turn tokens."""
    tokenizer: str = ""
    template: str = ""
    chat: ChatRecord | None = None
    on_messages: bool | None = None
    """Whether it was trained on messages, rendered with the chat template; None: unknown."""
    metrics: dict[str, float | None] = Field(default_factory=dict)
    evaluation: EvaluationRecord | None = None
    strategies: list[dict[str, Any]] = Field(default_factory=list)
    """Name, distribution and options of every strategy of the run."""
    needs_quantization: bool = False
    """Whether it makes up for the error of the base as quantised in training, so that it is right on no other."""
    parent: ParentRecord | None = None
    """The adapter that its run continued, if any."""
    grown_from: list[int] | None = Field(None, min_length=2, max_length=2)
    """The lowest and highest rank of that adapter's updates, if the run raised them."""
    made: MadeRecord | None = None
    """The adapters that it was made from, if it was not trained."""
    golden: GoldenRecord | None = None
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of every other file in the folder."""
    created_by: str = ""


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's definition; "" if there is no tokenizer.

    Truncation and padding do not count: a call with other ones changes what its definition says of them.
    """
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and (backend.truncation or backend.padding):
        backend = type(backend).from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def template_hash(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's chat template; "" if there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else ""
