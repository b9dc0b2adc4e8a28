"""Checks of a teacher before any weights are loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budwood import (
    BudwoodError,
    InputError,
    Plan,
    check_base,
    fingerprint,
    load_tokenizer,
    read_adapter,
    skeleton,
)
from budwood_distillation.options import DistillationOptions


@dataclass(frozen=True)
class TeacherInfo:
    """A teacher that passed the checks.

    Attributes:
        quantization: storage of its weights.
        labels: classes of a classifier, in order; empty if there are none, or if its files do not name them.
        vocabulary: number of logits in use; 0 for a classifier.
        adapter: SHA-256 of the adapter's weights; "" without an adapter.
        positions: maximum sequence length of a separate model; 0 if not in its config.
    """

    quantization: str
    labels: tuple[str, ...]
    vocabulary: int
    adapter: str
    positions: int = 0


def check_teacher(options: DistillationOptions, plan: Plan) -> TeacherInfo:
    """Check the teacher from its files alone.

    Raises:
        InputError: the teacher cannot be used; the message names the option.
        ResourceError, CorruptError: the teacher's files are unreadable or corrupt.
    """
    recipe = plan.recipe.base
    student = check_base(recipe.model, recipe.quantization, recipe.trust_remote_code)
    _outside_output("cache", options.cache, plan.recipe.output)
    if options.hidden_weight > 0 and plan.task.pools_examples(plan.model):
        raise InputError("hidden_weight: the base pools by row and has no hidden states at the labels: remove it.")
    if options.own_model:
        return _own_model(options, plan, student)
    owner = next((s for s in plan.strategies if "adapter" in s.slots), None)
    if owner is None or not hasattr(owner, "use_adapters"):
        raise InputError(f"teacher: {options.teacher} needs a strategy that owns an adapter: add one such as lora.")
    size = _vocabulary(plan.tokenizer, plan.model)
    heads = plan.task.head_modules(plan.model)
    if options.adapter is None:
        if heads and not _is_trained(student, plan.task):
            raise InputError(
                f"teacher: the base '{recipe.model}' has no trained '{heads[0]}', so alone it cannot teach "
                f"{plan.task.name}: use the folder of a trained model, or base+DIR."
            )
        return TeacherInfo(student.quantization, _classes(student) if heads else (), 0 if heads else size, "")
    _outside_output("teacher", options.adapter, plan.recipe.output)
    with _named("teacher"):
        saved = read_adapter(options.adapter)
    if saved.adapter_type != owner.name:
        raise InputError(
            f"teacher: the adapter in {options.adapter} is of type '{saved.adapter_type}' and the run's of type "
            f"'{owner.name}', but a base supports only one: `budwood adapter merge` it, and use the merged folder."
        )
    manifest = saved.manifest
    if manifest is not None:
        if manifest.task != plan.task.name:
            raise InputError(f"teacher: the adapter in {options.adapter} is for {manifest.task}, not {plan.task.name}.")
        if Path(recipe.model).expanduser().is_dir() and manifest.base.fingerprint != fingerprint(student.path):
            raise InputError(
                f"teacher: the adapter in {options.adapter} was trained on the base '{manifest.base.name}', not on "
                f"'{recipe.model}': merge it into that base, and use the merged folder."
            )
    labels = tuple(manifest.labels) if manifest is not None else ()
    digest = manifest.files["adapter_model.safetensors"] if manifest is not None else _sha256(saved.directory)
    return TeacherInfo(student.quantization, labels, 0 if heads else size, digest)


def check_labels(teacher: str, theirs: Sequence[str], ours: Sequence[str]) -> None:
    """Check that a classifier has the same classes in the same order.

    Raises:
        InputError: they differ; the message lists both.
    """
    if list(theirs) != list(ours):
        raise InputError(
            f"teacher: the classes of '{teacher}' are {', '.join(theirs) or 'not named'}, and the data's are "
            f"{', '.join(ours)}: they must be the same, in the same order."
        )


def _own_model(options: DistillationOptions, plan: Plan, student: Any) -> TeacherInfo:
    name = options.teacher
    if Path(name).expanduser().is_dir():
        _outside_output("teacher", name, plan.recipe.output)
    with _named("teacher"):
        try:
            info = check_base(name, options.quantization)
        except InputError as error:
            if "trust_remote_code" in str(error):  # the recipe allows it only for the base
                raise InputError(f"'{name}' needs custom Python code, which a teacher may not run.") from error
            raise
        same = info.path.resolve() == student.path.resolve() or (info.config == student.config and _same(info, student))
        if same and info.quantization == student.quantization:
            raise InputError(
                f"'{name}' in {info.quantization} is the base itself: write `teacher: base` to avoid a second copy."
            )
        if plan.tokenizer is not None:
            _check_tokenizer(name, load_tokenizer(name), plan)
        elif other := plan.task.reads_otherwise(info.path):
            raise InputError(f"'{name}' {other}: use a teacher that reads the same inputs as the base.")
        frame = skeleton(name, plan.task.auto_class)
        pools = ["row" if plan.task.pools_examples(model) else "token" for model in (frame, plan.model)]
        if pools[0] != pools[1]:
            raise InputError(
                f"'{name}' pools by {pools[0]} and the base by {pools[1]}: use a teacher that pools like the base."
            )
        heads = plan.task.head_modules(frame)
        if heads and not _is_trained(info, plan.task):
            raise InputError(f"'{name}' has no trained '{heads[0]}': use a model trained for {plan.task.name}.")
    if options.hidden_weight > 0:
        _check_width(name, frame, plan.model)
    ours, theirs = _vocabulary(plan.tokenizer, plan.model), _vocabulary(plan.tokenizer, frame)
    if theirs < ours:
        raise InputError(
            f"teacher: '{name}' has {theirs:,} embeddings, but the base has {ours:,} tokens: resize the teacher with "
            "model.resize_token_embeddings(len(tokenizer)), and save it."
        )
    size = 0 if heads else ours
    positions = getattr(frame.config.get_text_config(), "max_position_embeddings", None) or 0
    return TeacherInfo(info.quantization, _classes(info) if heads else (), size, "", positions)


def _is_trained(info: Any, task: Any) -> bool:
    """Whether the config declares a model of the task, including its head."""
    suffix = task.auto_class.removeprefix("AutoModel")
    return any(str(name).endswith(suffix) for name in info.config.get("architectures") or ())


def _classes(info: Any) -> tuple[str, ...]:
    """Return the names of a classifier's classes in order; those of transformers if its config has none."""
    named = info.config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(str(named[key]) for key in sorted(named, key=int))


def _same(info: Any, student: Any) -> bool:
    """Whether two folders hold the same weights; False if those of a hub name are not downloaded yet."""
    try:
        same: bool = fingerprint(info.path) == fingerprint(student.path)
    except InputError:
        return False
    return same


def _check_tokenizer(name: str, theirs: Any, plan: Plan) -> None:
    """Check that every id is the same token; the tokenization itself does not matter for a teacher."""
    base = {index: token for token, index in plan.tokenizer.get_vocab().items()}
    teacher = {index: token for token, index in theirs.get_vocab().items()}
    for index in sorted(base.keys() | teacher.keys()):
        if base.get(index) != teacher.get(index):
            shown = [json.dumps(v[index], ensure_ascii=False) if index in v else "none" for v in (base, teacher)]
            raise InputError(
                f"the vocabulary of '{name}' differs from that of the base '{plan.recipe.base.model}': token {index} "
                f"is {shown[1]} there and {shown[0]} in the base. Use a teacher with the base's tokenizer."
            )


def _vocabulary(tokenizer: Any, frame: Any) -> int:
    """Return the number of logits that represent tokens of the tokenizer; the others are padding. 0: no tokens."""
    if tokenizer is None:
        return 0
    width: int = frame.config.get_text_config().vocab_size
    return min(max(tokenizer.get_vocab().values()) + 1, width)


def _check_width(name: str, frame: Any, student: Any) -> None:
    ours, theirs = (model.config.get_text_config().hidden_size for model in (student, frame))
    if ours != theirs:
        raise InputError(
            f"hidden_weight: the hidden size of the base is {ours} and that of '{name}' {theirs}; "
            "remove it, or use a teacher with the same hidden size."
        )


def _outside_output(option: str, folder: str | None, output: Path) -> None:
    """Refuse a folder that `--overwrite` would delete with the previous run."""
    if folder is not None and Path(folder).expanduser().resolve().is_relative_to(output.resolve()):
        raise InputError(f"{option}: {folder} is in the run's output folder, which --overwrite empties: move it.")


def _sha256(directory: Path) -> str:
    with (directory / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Prefix errors of core with the option's name, instead of "base"."""
    try:
        yield
    except BudwoodError as error:
        raise type(error)(f"{option}: {str(error).removeprefix('base ')}") from error
