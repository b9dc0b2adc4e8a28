"""`budwood generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from budwood.cli.options import (
    Adapters,
    AdaptersQuantization,
    AnyBase,
    AsJson,
    Device,
    MaxNewTokens,
    OtherBases,
    Precision,
    Seed,
    Stop,
    Temperature,
    TopP,
)
from budwood.cli.pool import check_choice, open_pool, parse_adapters, read_adapters
from budwood.cli.streams import echo, echo_json, print_piece

if TYPE_CHECKING:
    from budwood.adapters.store import SavedAdapter
    from budwood.serving.pool import AdapterPool, Prompt


MAX_NEW_TOKENS = 128


def generate(
    base: AnyBase,
    adapter: Adapters = None,
    use: Annotated[str | None, typer.Option("--use", metavar="NAME", help="The adapter to use.")] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="The prompt; - reads it from stdin.")] = "-",
    image: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--image", metavar="FILE", help="An image instead of a prompt; repeat it for several."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Apply the chat template to the prompt. Default: as in training."),
    ] = None,
    max_new_tokens: MaxNewTokens = MAX_NEW_TOKENS,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    quantization: AdaptersQuantization = None,
    precision: Precision = "auto",
    device: Device = "auto",
    allow_other_base: OtherBases = False,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt with a base, one adapter, or several side by side."""
    directories = parse_adapters(adapter or [])
    saved = read_adapters(directories, base, allow_other_base, quantization)
    check_choice(use, directories, top_p)
    first = next((item.manifest for item in saved.values() if item.manifest), None)
    task, options = (first.task, first.task_options) if first else ("causal-lm", None)
    asked = {
        "--chat": chat is True, "--no-chat": chat is False, "--max-new-tokens": max_new_tokens != MAX_NEW_TOKENS,
        "--temperature": temperature > 0, "--top-p": top_p < 1, "--stop": bool(stop), "--seed": seed > 0,
    }  # fmt: skip
    text = ""
    if task == "causal-lm" and not image:  # which answers prompts: one that is missing is refused before torch is there
        text = _read_prompt(prompt)
    _check_asked(
        task, dict(options or {}), image or [], prompt != "-", [name for name, given in asked.items() if given]
    )
    text = text or ("" if image else _read_prompt(prompt))
    pool = open_pool(
        base, directories, saved, quantization, precision=precision, device=device, allow_other_base=allow_other_base
    )
    names: list[str | None] = (
        [use] if use else [None, *directories] if len(directories) > 1 else [*directories] or [None]
    )
    if pool.task_plugin.responds():
        _respond(pool, [str(path) for path in image] if image else [text], names, as_json)
        return
    requests = [_request(pool, text, name, saved, chat) for name in names]
    streaming = len(names) == 1 and not as_json
    answers = pool.generate(
        requests,
        names,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=stop or [],
        seed=seed,
        stream=(lambda _, piece: print_piece(piece)) if streaming else None,
    )
    if as_json:
        records = [
            {"adapter": n, "text": a.text, "finish_reason": a.finish_reason}
            for n, a in zip(names, answers, strict=True)
        ]
        echo_json({"answers": records})
    elif streaming:
        echo()
    else:
        for adapter_name, answer in zip(names, answers, strict=True):
            echo(f"── {adapter_name or 'base'}\n{answer.text}")


def _request(
    pool: AdapterPool, text: str, name: str | None, saved: dict[str, SavedAdapter], chat: bool | None
) -> Prompt:
    """Return the prompt to an adapter, or to the base: as messages or as text; a warning says if training differed.

    Without `chat`, an adapter gets what it was trained on, and the base beside adapters what any of them gets.
    """
    from budwood.data.encoder import encode_prompt

    trained = {n: bool(a.manifest and a.manifest.on_messages) for n, a in saved.items()}
    given = chat if chat is not None else trained[name] if name is not None else any(trained.values())
    known = name is not None and (manifest := saved[name].manifest) is not None and manifest.on_messages is not None
    if name is not None and known and given != trained[name]:
        how = ("plain text, but --chat sends it messages", "messages, but --no-chat sends it plain text")[trained[name]]
        typer.echo(f"warning: adapter '{name}' was trained on {how}.", err=True)
    elif name is not None and chat is None and given:
        typer.echo(
            f"note: adapter '{name}' was trained on messages, so the prompt is sent as one; --no-chat: as it is.",
            err=True,
        )
    if given:
        return [{"role": "user", "content": text}]
    return encode_prompt(pool.tokenizer, text) or text  # of tokens, the pool does not warn again


def _read_prompt(prompt: str) -> str:
    from budwood.errors import InputError

    if prompt != "-":
        text = prompt
    elif sys.stdin.isatty():
        raise InputError("no prompt: pass --prompt TEXT, or pipe it in.")
    else:
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise InputError(f"stdin is not UTF-8: {error}.") from error
    if not text:
        raise InputError("the prompt is empty.")
    return text


def _check_asked(
    task_name: str, options: dict[str, Any], images: list[Path], prompt: bool, sampling: list[str]
) -> None:
    """Check that the task answers what is asked, images or a prompt, before the base loads.

    Args:
        sampling: the given options of generated text.

    Raises:
        InputError: it does not, both are given, an image is no file, or an option has no effect.
    """
    from budwood.contract.loading import build_task
    from budwood.errors import InputError

    if images and prompt:
        raise InputError("give --image or --prompt, not both.")
    plugin = build_task(task_name, options)
    answers = plugin.answers
    if sampling and plugin.responds():
        each = "it has" if len(sampling) == 1 else "they have"
        raise InputError(
            f"{', '.join(sampling)}: task '{task_name}' generates no text, so {each} no effect: leave "
            f"{'it' if len(sampling) == 1 else 'them'} out."
        )
    if images and answers != "images":
        raise InputError(f"--image: task '{task_name}' answers {answers}: give --prompt.")
    if not images and answers == "images":
        raise InputError(f"task '{task_name}' answers images: give --image FILE.")
    missing = next((path for path in images if not path.is_file()), None)
    if missing is not None:
        raise InputError(f"--image: no file '{missing}'.")


def _respond(pool: AdapterPool, asked: list[str], names: list[str | None], as_json: bool) -> None:
    """Print the answers of a task that does not generate text; those to images with the image."""
    answers = []
    for name in names:
        pool.use(name)
        answers += [(name, what, answer) for what, answer in zip(asked, pool.respond(asked), strict=True)]
    images = pool.task_plugin.answers == "images"
    if as_json:
        records = [{"adapter": name, **({"image": what} if images else {}), **answer} for name, what, answer in answers]
        echo_json({"answers": records})
        return
    for name, what, answer in answers:
        shown = f"{name or 'base'}: {pool.task_plugin.show_response(answer)}"
        echo(f"{what}: {shown}" if len(asked) > 1 else shown)
