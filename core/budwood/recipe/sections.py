"""The sections of a recipe, base, data and train, with their defaults."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from budwood.contract.validation import dotted, find_problems
from budwood.data.sources import Data, Source


def _path(value: Any) -> Any:
    if not isinstance(value, str) or not value:
        return value
    if "\0" in value or len(value) > 4096:
        raise ValueError("not a valid path")
    path = Path(os.path.expanduser(value))
    return path.absolute() if path == Path("none") else path  # in a saved recipe, `eval: none` is not a file


Count = Annotated[int, Field(strict=True, gt=0)]
Number = Annotated[float, Field(strict=True)]
AutoCount = Annotated[
    Count | None,
    BeforeValidator(
        lambda value: None if value == "auto" else value, json_schema_input_type=Count | Literal["auto"] | None
    ),
]
File = Annotated[Path, BeforeValidator(_path, json_schema_input_type=str)]


def _layers(value: Any) -> Any:
    if isinstance(value, bool) or value == "auto" or (isinstance(value, int) and value > 0):
        return value
    raise ValueError("must be true, false, auto, or the number of layers to recompute")


Layers = Annotated[
    bool | int | Literal["auto"],
    BeforeValidator(_layers, json_schema_input_type=bool | Count | Literal["auto"]),
]


def _sources(value: Any) -> Any:
    """Read data as a path, or as sources: a list of paths and mappings, or one mapping."""
    if value is None or isinstance(value, str | Path):
        return _path(value)
    if not isinstance(value, dict | list | tuple) or not value:
        raise ValueError("must be a path, or a list of paths or of mappings with path, split, config, revision, weight")
    items = value if isinstance(value, list | tuple) else [value]
    sources = []
    for number, item in enumerate(items, 1):
        if isinstance(item, str | Path):
            item = {"path": str(_path(str(item)))}
        elif isinstance(item, dict) and isinstance(item.get("path"), str):
            item = {**item, "path": str(_path(item["path"]))}
        try:
            sources.append(Source.model_validate(item))
        except ValidationError as error:
            place, text = find_problems(error, Source)[0]
            name = f"{dotted(place)}: " if place else ""
            raise ValueError(f"source {number}: {name}{text}") from None
    return tuple(sources)


_SOURCE = Source.model_json_schema()
_STRING_OR_SOURCE = {"anyOf": [{"type": "string"}, _SOURCE]}

Sources = Annotated[
    Path | tuple[Source, ...],
    BeforeValidator(_sources),
    WithJsonSchema({"anyOf": [{"type": "string"}, _SOURCE, {"type": "array", "items": _STRING_OR_SOURCE}]}),
]


Evaluated = Annotated[
    Literal["none"] | Path | tuple[Source, ...],
    BeforeValidator(lambda value: value if value == "none" else _sources(value)),
    WithJsonSchema({"anyOf": [{"type": "string"}, _SOURCE, {"type": "array", "items": _STRING_OR_SOURCE}]}),
]
"""Data, or "none"; a file of this name is written ./none."""


class Section(BaseModel):
    """A mapping of a recipe; unknown keys are refused, and an empty section has the defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, data: Any) -> Any:
        return {} if data is None else data


class BaseSection(Section):
    """The frozen base model."""

    model: str = Field(min_length=1, description="a folder with safetensors, or a hub name")
    revision: str | None = Field(
        None, min_length=1, max_length=255, description="branch, tag or commit on the hub; default: main"
    )
    quantization: str = Field("nf4", description="none, int8, nf4, fp4, or another installed quantiser")
    double_quantization: bool = Field(True, description="also quantise the constants of nf4 and fp4")
    keep_dequantized: bool = Field(
        True,
        description="on a CPU, dequantise weights once instead of in every pass, in a quarter of the memory that the "
        "plan leaves free",
    )
    resize_embeddings: bool = Field(
        False,
        description="add embeddings for tokens that only the tokenizer has: these rows of the embeddings and of the "
        "head are trained and saved with the adapter",
    )
    task: str = Field(
        "causal-lm", description="causal-lm, sequence-classification, reward-model, or another installed task"
    )
    task_options: dict[str, Any] = Field({}, description="options of the task, such as `{pooling: mean}` of embedding")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda, or one GPU such as cuda:1"
    )


class DataSection(Section):
    """The training and evaluation data; the format is detected from the columns."""

    train: Sources = Field(
        description="a file (JSONL, JSON, CSV, Parquet), a folder, a pattern such as data/*.jsonl, or the hub name of "
        "a dataset; or a list of these or of mappings with path, split, config (a subfolder), revision (of a hub "
        "name) and weight: how often each row occurs in an epoch (2: twice; 0.25: a fixed quarter of the rows)"
    )
    eval: Evaluated | None = Field(
        None,
        description="evaluation data, named in the same ways; none: no evaluation. By default, 5 % of the training "
        "data (at least 10 and at most 500 examples; nothing if there are fewer than 100) is held out and never "
        "trained on; the seed determines the rows",
    )
    group_by: str | None = Field(
        None,
        min_length=1,
        description="a column, such as `conversation_id`: rows with the same value are all held out or all trained on",
    )
    max_length: Count | None = Field(
        None,
        description="maximum tokens per example; truncation is counted and reported. By default 1024, or the "
        "number of the base's positions if that is less",
    )

    loss_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="answers with a loss: all of the assistant's, only the last, or prompts and answers"
    )
    as_chat: bool = Field(
        False,
        description="render `prompt` and `completion` with the base's chat template, as the user's and the "
        "assistant's message, without surrounding white space",
    )
    chat_template: File | None = Field(
        None, description="a jinja file to use instead of the chat template that comes with the base"
    )
    template_options: dict[str, Any] = Field(
        {}, description="variables for the chat template, such as `enable_thinking: false`"
    )
    on_bad_row: Literal["refuse", "skip"] = Field(
        "refuse",
        description="a row that cannot be read or used: refuse the file, or skip the row, count it and write it to "
        "skipped.jsonl in the output folder",
    )

    @property
    def evaluated(self) -> Data | None:
        """The evaluation data that the recipe names, if any."""
        return None if isinstance(self.eval, str) else self.eval

    @property
    def holds_out(self) -> bool:
        """Whether a part of the training data is held out."""
        return self.eval is None


class TrainSection(Section):
    """Length of the run, batch sizes, optimizer. Any of the first five that is not set is chosen from the data."""

    epochs: Count | None = Field(
        None, le=10_000, description="passes over the data, at most 10,000; alternatively, or for more, set steps"
    )
    steps: Count | None = Field(None, description="optimizer steps, instead of epochs")
    batch_tokens: Count | None = Field(None, description="tokens per optimizer step, padding excluded")
    batch_examples: Count | None = Field(None, description="examples per optimizer step, instead of batch_tokens")
    micro_tokens: AutoCount = Field(
        None,
        description="maximum tokens per micro-batch; affects memory, not the result. By default, or `auto`: what fits "
        "the device by its plan, at least the longest example",
    )
    parallel: Literal["replicate", "shard"] | None = Field(
        None,
        description="with several processes: each holds the base, or its share of the base's layers, which are "
        "gathered one by one while they compute (slower, less memory); default: replicate if that fits by the plan",
    )
    learning_rate: Number | None = Field(None, gt=0, description="peak learning rate")
    weight_decay: Number = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning rate after warm-up")
    warmup: Number | None = Field(
        None, ge=0, description="below 1: fraction of the run; otherwise steps. The rate rises from peak/steps"
    )
    clip: Number = Field(1.0, ge=0, description="maximum gradient norm; 0: no clipping")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="compute dtype; auto: bf16 on devices where it is fast"
    )
    eval_every: Count | None = Field(
        None,
        description="steps between evaluations; default: an epoch, if `epochs` is chosen or `patience` is set; "
        "otherwise evaluate at the end",
    )
    eval_generate: Annotated[int, Field(strict=True, ge=0)] = Field(
        100, description="prompts answered per evaluation to measure exact match; 0: none"
    )
    patience: Count | None = Field(None, description="stop after this many evaluations without improvement")
    save_every: Count | None = Field(None, description="steps between checkpoints; default: about ten minutes apart")
    keep_checkpoints: Count = Field(2, description="number of latest checkpoints to keep, in addition to the best")
    non_finite: Literal["stop", "skip"] = Field(
        "stop", description="if a step's loss or gradient is not finite: stop the run, or skip and count the step"
    )
    gradient_checkpointing: Layers = Field(
        False,
        description="recompute activations in the backward pass: less memory, slower, the same result. true: of all "
        "layers; a number: of so many, the first ones; auto: of as few as the device's memory needs, by the plan",
    )
    activation_offloading: bool = Field(
        False,
        description="keep the inputs of recomputed layers in the host's memory, copied beside the computation (CUDA "
        "only): the same result",
    )
    compile: bool = Field(
        False,
        description="compile norms, rotary embeddings, gated activations and the cross-entropy to C++ (CPU only; needs "
        "a compiler, and a minute at the first run): faster, the same result up to rounding",
    )
    deterministic: bool = Field(
        False, description="use only bitwise reproducible kernels: slower on CUDA, no difference elsewhere"
    )
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = Field(0, description="seed of all randomness in the run")
    trackers: Sequence[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="also log to these (needs budwood[track])"
    )

    @model_validator(mode="before")
    @classmethod
    def _check_exclusive_pairs(cls, data: Any) -> Any:
        for one, other in (("epochs", "steps"), ("batch_tokens", "batch_examples")):
            if isinstance(data, dict) and data.get(one) is not None and data.get(other) is not None:
                raise ValueError(f"train.{other}: cannot be combined with train.{one}; give only one")
        return data

    @model_validator(mode="after")
    def _check_consistency(self) -> TrainSection:
        if self.warmup is not None and self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"train.warmup: a value of 1 or more counts steps and must be whole (got {self.warmup})")
        if self.patience and self.steps and not self.eval_every:  # with epochs, there is one after each
            raise ValueError("train.patience: counts evaluations during the run; set train.eval_every too")
        if self.activation_offloading and self.gradient_checkpointing is False:
            raise ValueError(
                "train.activation_offloading: is about the inputs of recomputed layers; set "
                "train.gradient_checkpointing too"
            )
        return self


class Choice(Section):
    """A strategy named in the recipe, with its options as written."""

    name: str = Field(min_length=1, description="name of an installed strategy")
    options: dict[str, Any] = Field({}, description="options of the strategy; see `budwood plugins NAME`")
