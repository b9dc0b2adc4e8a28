"""`budwood generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from budwood.cli.imports import uncollected
from budwood.cli.streams import echo, echo_json

if TYPE_CHECKING:
    from budwood.adapters.store import SavedAdapter
    from budwood.serving.pool import AdapterPool, Prompt


def generate(
    base: Annotated[str, typer.Argument(help="A base: folder or hub name.")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME=DIR", help="An adapter; may be repeated.")
    ] = None,
    use: Annotated[str | None, typer.Option("--use", metavar="NAME", help="The adapter to use.")] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="The prompt; - reads it from stdin.")] = "-",
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Apply the chat template to the prompt. Default: as in training."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy decoding.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Sample from the top tokens of this total probability.")
    ] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Sampling seed.")] = 0,
    quantization: Annotated[
        str | None, typer.Option(help="none, int8, nf4 or fp4. Default: as the adapter was trained.")
    ] = None,
    precision: Annotated[str, typer.Option(help="bf16, fp16, fp32 or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Accept adapters trained on another base.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a prompt with a base, one adapter, or several side by side."""
    directories = _parse_adapters(adapter or [])
    saved = _read_adapters(directories, base, allow_other_base, quantization)
    _check_options(use, directories, top_p)
    text = _read_prompt(prompt)
    with uncollected():
        from budwood.serving.pool import AdapterPool

    manifests = [item.manifest for item in saved.values() if item.manifest]
    first = manifests[0] if manifests else None
    pool = AdapterPool(
        base,
        quantization or (first.base.quantization if first else "none"),
        task=first.task if first else "causal-lm",
        labels=first.labels if first else (),
        task_options=first.task_options if first else None,
        precision=precision,
        device=device,
        double_quantization=first.base.double_quantization if first else True,
    )
    for name, directory in directories.items():
        for note in pool.load(name, directory, allow_other_base=allow_other_base).notes:
            echo(f"note: adapter '{name}': {note}", err=True)
    names: list[str | None] = (
        [use] if use else [None, *directories] if len(directories) > 1 else [*directories] or [None]
    )
    if pool.task_plugin.responds():
        _respond(pool, text, names, as_json)
        return
    requests = [_request(text, name, saved, chat) for name in names]
    streaming = len(names) == 1 and not as_json
    answers = pool.generate(
        requests,
        names,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=stop or [],
        seed=seed,
        stream=_print_piece if streaming else None,
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


def _parse_adapters(arguments: list[str]) -> dict[str, Path]:
    from budwood.errors import InputError
    from budwood.untrusted.files import check_name

    directories: dict[str, Path] = {}
    for text in arguments:
        name, equals, directory = text.partition("=")
        if not equals or not directory:
            raise InputError(f"--adapter {text[:80]!r}: write NAME=DIR.")
        if check_name(name) in directories:
            raise InputError(f"--adapter: the name '{name}' is used twice; give each adapter its own name.")
        directories[name] = Path(directory)
    return directories


def _read_adapters(
    directories: dict[str, Path], base: str, allow_other_base: bool, quantization: str | None
) -> dict[str, SavedAdapter]:
    """Read the adapters; refuse invalid ones, and those of another base, before the base is loaded."""
    from budwood.adapters.store import read_adapter
    from budwood.errors import InputError
    from budwood.model.base import check_base, fingerprint

    adapters = {name: read_adapter(directory) for name, directory in directories.items()}
    info = check_base(base, quantization)
    base_fingerprint = fingerprint(info.path) if adapters else None
    for directory in directories.values():
        read_adapter(
            directory,
            base_name=base,
            base_fingerprint=base_fingerprint,
            allow_other_base=allow_other_base,
            hashes=False,
        )
    tasks = sorted({adapter.manifest.task for adapter in adapters.values() if adapter.manifest})
    if len(tasks) > 1:
        raise InputError(f"the adapters are for different tasks ({', '.join(tasks)}): use adapters for one task.")
    return adapters


def _check_options(use: str | None, directories: dict[str, Path], top_p: float) -> None:
    from budwood.errors import InputError, did_you_mean

    if top_p <= 0:
        raise InputError("--top-p: must be above 0.")

    if use is not None and use not in directories:
        raise InputError(f"--use {use[:64]!r}: no --adapter has this name.{did_you_mean(use, directories)}")


def _request(text: str, name: str | None, saved: dict[str, SavedAdapter], chat: bool | None) -> Prompt:
    """Return the prompt to an adapter, or to the base: as messages or as text; a warning says if training differed.

    Without `chat`, an adapter gets what it was trained on, and the base beside adapters what any of them gets.
    """
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
    return [{"role": "user", "content": text}] if given else text


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


def _respond(pool: AdapterPool, text: str, names: list[str | None], as_json: bool) -> None:
    """Print the answers of a task that does not generate text."""
    answers = []
    for name in names:
        pool.use(name)
        answers.append(pool.respond([text])[0])
    if as_json:
        echo_json({"answers": [{"adapter": n, **answer} for n, answer in zip(names, answers, strict=True)]})
        return
    for name, answer in zip(names, answers, strict=True):
        echo(f"{name or 'base'}: {pool.task_plugin.show_response(answer)}")


def _print_piece(index: int, piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
