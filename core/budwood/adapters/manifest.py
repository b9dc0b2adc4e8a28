"""budwood.json, which lies beside an adapter: what it says, field by field."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

FORMAT = 3
"""2: budwood.json carries its own hash. 3: `adapter_type` was `kind`."""


class _Record(BaseModel):
    """Part of budwood.json. Fields of a later minor version are let through; wrong types are refused."""

    model_config = ConfigDict(extra="ignore", strict=True)


class BaseRecord(_Record):
    """The base that an adapter was trained on; `fingerprint` is that of its unquantised weights on disk.

    `revision` is the hub's commit, None for a folder.
    """

    name: str
    fingerprint: str
    revision: str | None = None
    quantization: str = "none"
    double_quantization: bool = True
    dtype: str = "float32"


class EvaluationRecord(_Record):
    """How the run measured the metrics: with the base's record and the golden's threads, all that decides their digits.

    Attributes:
        max_length: tokens at which rows were cut.
        tokens: at most so many at once, which decides what stands in a batch.
        packed: whether examples shared a row.
        attention: the attention implementation of the model.
        generate: at most so many prompts were answered.
        loss_on: which tokens of the data have a loss.
    """

    max_length: int = Field(ge=1)
    tokens: int = Field(ge=1)
    packed: bool
    attention: str
    generate: int = Field(ge=0)
    loss_on: str = "assistant"


class ChatRecord(_Record):
    """How messages to the adapter are rendered, as in its run.

    Attributes:
        template: the chat template that the run used instead of the base's; None: the base's.
        options: variables for the chat template.
    """

    template: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class GoldenRecord(_Record):
    """Where the golden logits were computed: what `verify` needs to know whether it may expect the same numbers."""

    device: str
    dtype: str
    quantization: str
    threads: int
    torch: str


class Manifest(_Record):
    """budwood.json: what an adapter is, of whom, and the hash of every file beside it."""

    format: int = FORMAT
    adapter_type: str = Field(pattern=r"^[\w.-]+$")
    """Name of the strategy that attaches it."""
    distribution: str = Field(pattern=r"^([\w.-]+ [\w.+!-]+)?$")
    """Distribution and version of that strategy, "budwood 0.1.0"."""
    base: BaseRecord
    task: str = "causal-lm"
    labels: list[str] = Field(default_factory=list)
    stop_ids: list[int] = Field(default_factory=list)
    """Tokens that end an answer, beside the end-of-sequence token: ends of turn of the chat template."""
    tokenizer: str = ""
    template: str = ""
    chat: ChatRecord | None = None
    metrics: dict[str, float | None] = Field(default_factory=dict)
    evaluation: EvaluationRecord | None = None
    strategies: list[dict[str, Any]] = Field(default_factory=list)
    """Name, distribution and options of every strategy of the run."""
    golden: GoldenRecord | None = None
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of every other file in the folder; filled when it is written."""
    created_by: str = ""
