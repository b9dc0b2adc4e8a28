"""What a recipe says about turning data into tokens: the tokenizer, its chat template, and the options."""

from __future__ import annotations

from typing import Any

from budwood.contract.calls import attribute_errors
from budwood.contract.loading import build_task
from budwood.data.chat_formats import PromptCompletion
from budwood.data.examples import Examples
from budwood.data.preference import JudgedAnswer, Preference, SharedPrompt
from budwood.data.prompts import Prompts
from budwood.errors import InputError, unreadable
from budwood.model.checkpoint import read_tensors, resolve
from budwood.model.checks import check_base, find_quantizer, load_tokenizer, skeleton
from budwood.model.described import describe_base
from budwood.model.embeddings import resize, vocabulary_of
from budwood.model.stated_sizes import check_experts, check_sizes
from budwood.model.task import Task
from budwood.recipe.schema import Recipe

PROMPTS = (PromptCompletion.name, Prompts.name, Preference.name, SharedPrompt.name, JudgedAnswer.name)
"""Formats of prompts and answers, which may be texts."""
LARGEST = 1 << 20
"""Maximum size of a chat template, in bytes."""


def recipe_task(recipe: Recipe) -> Task:
    """Build the recipe's task with its options.

    Raises:
        InputError: an option is unknown or out of range.
        PluginError: see `load`.
    """
    where = f"{recipe.where('base', 'task_options')}: base.task_options: "
    task: Task = build_task(recipe.base.task, recipe.base.task_options, where)
    return task


def read_task_base(task: Task, recipe: Recipe) -> None:
    """Let a task read its settings from the recipe's base.

    Raises:
        InputError: the task cannot use this base; or see `resolve`.
    """
    with attribute_errors(task, "read_base"):
        task.read_base(resolve(recipe.base.model, weights=False))


def recipe_tokenizer(recipe: Recipe) -> Any:
    """Load the base's tokenizer, with the chat template of `data.chat_template` if the recipe names one.

    Raises:
        InputError: the base has no tokenizer, or the template cannot be read.
        CorruptError: the tokenizer's files are damaged.
    """
    tokenizer = load_tokenizer(recipe.base.model)
    path = recipe.data.chat_template
    if path is None:
        return tokenizer
    where = f"{recipe.where('data', 'chat_template')}: data.chat_template: {path}"
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise InputError(f"{where} is not a file of at most 1 MiB. Name a jinja file.")
        template = path.read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(where, error) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8. Save it as UTF-8.") from error
    if not template.strip():
        raise InputError(f"{where} is empty.")
    tokenizer.chat_template = template
    return tokenizer


def recipe_skeleton(recipe: Recipe, auto_class: str, tokenizer: Any, **model_kwargs: Any) -> Any:
    """Build the base's modules on the meta device, with embeddings for the tokenizer's tokens if the recipe says so.

    Args:
        tokenizer: None if the task needs none.
        model_kwargs: see `skeleton`.

    Raises:
        InputError: see `skeleton` and `resize`; or the task has no tokens.
        CorruptError: see `skeleton`.
    """
    base = recipe.base
    model = skeleton(base.model, auto_class, base.trust_remote_code, **model_kwargs)
    if base.resize_embeddings:
        resize(model, embeddings_wanted(recipe, tokenizer), base.model)
    return model


def recipe_limits(recipe: Recipe, auto_class: str, tokenizer: Any) -> Any:
    """Return what tells the limits of the recipe's base: its description from files, or else its skeleton.

    Raises:
        InputError, CorruptError: see `recipe_skeleton`.
    """
    base = recipe.base
    found = None if base.resize_embeddings else describe_base(base.model, auto_class, base.trust_remote_code)
    return found or recipe_skeleton(recipe, auto_class, tokenizer)


def check_quantized(model: Any, recipe: Recipe) -> None:
    """Mark what of a model without weights the base has quantised, and compare it with the tensors of the base's files.

    Raises:
        InputError, CorruptError: they contradict the configuration.
    """
    from budwood.model.experts import mark_quantized  # imports torch, as the next does
    from budwood.model.quantizers.stored import check_linears, packed_linears

    info = check_base(recipe.base.model, recipe.base.quantization, recipe.base.trust_remote_code)
    quantizer = find_quantizer(info.quantization)
    tensors = read_tensors(info.path) if any(info.path.glob("*.safetensors")) else {}  # not downloaded yet
    check_experts(model, tensors)
    if not info.prequantized and not recipe.base.resize_embeddings and tensors:
        body = f"{model.base_model_prefix}." if model.get_output_embeddings() is None else ""
        check_sizes(recipe.base.model, model, tensors, body if model.base_model is not model else "")
    mark_quantized(model, quantizer)
    if info.prequantized and tensors:
        check = packed_linears if quantizer.own_modules else check_linears
        check(model, quantizer, info.config["quantization_config"], tensors)


def embeddings_wanted(recipe: Recipe, tokenizer: Any) -> int:
    """Return the least number of embeddings that a recipe asks for; 0: as many as the base has.

    Raises:
        InputError: `base.resize_embeddings` is set, but the task has no tokenizer.
    """
    if not recipe.base.resize_embeddings:
        return 0
    if tokenizer is None:
        where = recipe.where("base", "resize_embeddings")
        raise InputError(f"{where}: base.resize_embeddings: {recipe.base.task} has no tokens: leave it out.")
    return vocabulary_of(tokenizer)


def encoding_options(recipe: Recipe) -> dict[str, Any]:
    """Return the options for `build_examples` of a recipe whose `max_length` is known."""
    data = recipe.data
    return {
        "max_length": data.max_length,
        "loss_on": data.loss_on,
        "as_chat": data.as_chat,
        "template_options": data.template_options,
        "skip_bad_rows": data.on_bad_row == "skip",
        "group_by": data.group_by,
    }


def chat_note(recipe: Recipe, examples: Examples, tokenizer: Any) -> str:
    """Return a note if prompts are trained on as plain text although the base has a chat template; else "".

    Raises:
        InputError: `data.as_chat` is set, but the data holds no prompts to render.
    """
    prompts = examples.format in PROMPTS
    if recipe.data.as_chat and not prompts:
        raise InputError(
            f"{recipe.where('data', 'as_chat')}: data.as_chat: renders prompts and their answers, but "
            f"{examples.path} was read as {' + '.join(examples.columns)}. Remove it."
        )
    if recipe.data.as_chat or examples.rendered or not prompts or not getattr(tokenizer, "chat_template", None):
        return ""
    return (
        "note: the base has a chat template, but prompts and answers are trained on as plain text; "
        "data.as_chat: true renders them with it, as chat applications do"
    )
