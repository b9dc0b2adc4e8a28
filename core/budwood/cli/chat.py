"""`budwood chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from budwood.cli.options import (
    Adapters,
    AdaptersQuantization,
    AnyBase,
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
from budwood.cli.streams import echo, one_line, print_piece
from budwood.errors import plural

if TYPE_CHECKING:
    from budwood.serving.chat import Chat, Reply

PREFIX_BYTES = 1 << 28
"""Memory for the keys and values of the conversation, so that a turn computes only what is new."""
QUOTES = '"""'
HELP = f"""\
/adapter NAME        the adapter that answers from now on; /adapter none: the base alone
/adapters            the loaded adapters
/blend A=0.7 B=0.3   the weighted sum of several adapters answers
/system TEXT         set the system prompt; without a text: remove it
/reset               forget the conversation
/help                this list
/quit                end, as Ctrl-D does
Ctrl-C stops an answer. {QUOTES} begins and ends a text of several lines. Write // at the start of a text that begins
with /."""


def chat(
    base: AnyBase,
    adapter: Adapters = None,
    use: Annotated[
        str | None, typer.Option("--use", metavar="NAME", help="The adapter that answers first. Default: the first.")
    ] = None,
    system: Annotated[str, typer.Option("--system", help="The system prompt.")] = "",
    as_messages: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Apply the chat template to the conversation. Default: as in training."),
    ] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    quantization: AdaptersQuantization = None,
    precision: Precision = "auto",
    device: Device = "auto",
    allow_other_base: OtherBases = False,
) -> None:
    """Talk with a base and its adapters; /help lists what can be done meanwhile.

    Answers go to standard output, everything else to standard error. Input may be piped in, one text a line.
    """
    from budwood.errors import InputError

    directories = parse_adapters(adapter or [])
    if "none" in directories:
        raise InputError("--adapter none=…: this name stands for the base; choose another one.")
    saved = read_adapters(directories, base, allow_other_base, quantization)
    check_choice(use, directories, top_p)
    pool = open_pool(
        base, directories, saved, quantization, precision=precision, device=device, allow_other_base=allow_other_base,
        prefix_bytes=PREFIX_BYTES,
    )  # fmt: skip
    if not pool.base.model.can_generate():
        raise InputError(f"the adapters' task is {pool.task}, which generates no text.")
    from budwood.serving.chat import Chat

    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "stop": stop or []}
    conversation = Chat(pool, as_messages=as_messages, system=system, seed=seed, **options)
    Session(conversation).switch(use or next(iter(directories), None)).run()


class Session:
    """Lines of a terminal or a pipe, sent to a conversation or carried out as commands."""

    def __init__(self, chat: Chat) -> None:
        self.chat, self.terminal = chat, sys.stdin.isatty()
        if self.terminal and sys.stdout.isatty():
            with contextlib.suppress(ImportError):  # there is none on some systems
                import readline  # noqa: F401 - `input` edits lines and remembers them with it

    def run(self) -> None:
        """Read and answer until the end of the input.

        Raises:
            BudwoodError: the first error, if the input is no terminal.
        """
        from budwood.errors import BudwoodError

        if self.terminal:
            echo("/help lists the commands; Ctrl-C stops an answer; Ctrl-D ends.", err=True)
        while True:
            asked = False
            try:
                text = self._read()
                asked = True
                if text.startswith("/") and not text.startswith("//"):
                    if not self._command(*text[1:].partition(" ")[::2]):
                        return
                elif text.strip():
                    self._ask(text.removeprefix("/"))
            except EOFError:
                if self.terminal:
                    echo(err=True)
                return
            except BudwoodError as error:
                if not self.terminal:
                    raise
                echo(f"error: {one_line(str(error))}", err=True)
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
                echo("\n(stopped)" if asked else "\n/quit or Ctrl-D ends.", err=True)

    def switch(self, adapter: str | Mapping[str, float] | None) -> Session:
        """Let an adapter, several, or the base answer; a note says what it is sent, if that is not the conversation."""
        from budwood.serving.pool import leading

        chat = self.chat
        chat.use(adapter)
        name = leading(adapter)
        manifest = chat.pool.adapter(name).manifest if name is not None else None
        on_messages = None if manifest is None else manifest.on_messages
        if not chat.sends_messages(adapter):
            why = "no chat template is used" if on_messages is None else f"adapter '{name}' was trained on plain text"
            if on_messages:
                why = f"adapter '{name}' was trained on messages, but --no-chat sends it plain text"
            echo(f"note: {why}: each text is sent as it is, without the conversation and the system prompt.", err=True)
        elif on_messages is False:
            echo(f"warning: adapter '{name}' was trained on plain text, but --chat sends it messages.", err=True)
        return self

    def _read(self) -> str:
        text = self._line(f"{self._name()}> ")
        if not text.startswith(QUOTES):
            return text
        lines = [text.removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES) or (len(lines) == 1 and not lines[0]):
            lines.append(self._line("... "))
        return "\n".join(lines).rstrip().removesuffix(QUOTES).strip("\n")

    def _line(self, prompt: str) -> str:
        from budwood.errors import InputError

        try:
            if self.terminal:
                if not sys.stdout.isatty():  # answers alone go there
                    print(prompt, end="", file=sys.stderr, flush=True)
                    prompt = ""
                text = input(prompt)
            elif not (text := sys.stdin.readline()):
                raise EOFError
            text.encode()
        except UnicodeError as error:
            raise InputError(f"the input is not UTF-8: {error}.") from error
        return text.rstrip("\r\n")

    def _command(self, name: str, rest: str) -> bool:
        """Carry out a command; return whether the session goes on."""
        from budwood.errors import InputError, did_you_mean

        commands = {
            "adapter": self._adapter, "adapters": self._adapters, "blend": self._blend, "system": self._system,
            "reset": self._reset, "help": lambda _: echo(HELP, err=True),
        }  # fmt: skip
        if name in ("quit", "exit", "bye"):
            return False
        if name not in commands:
            raise InputError(f"/{name[:64]}: no such command.{did_you_mean(name, commands)} /help lists them.")
        commands[name](rest.strip())
        return True

    def _adapter(self, name: str) -> None:
        if not name:
            self._adapters(name)
            return
        self.switch(None if name == "none" else name)
        echo(f"{self._name()} answers.", err=True)

    def _adapters(self, _: str) -> None:
        current = self.chat.adapter
        for name in [None, *self.chat.pool.names]:
            mark = "*" if name == current or (isinstance(current, Mapping) and name in current) else " "
            saved = None if name is None else self.chat.pool.adapter(name)
            kind = "the base alone" if saved is None else f"{saved.adapter_type}, {saved.directory}"
            echo(f"{mark} {name or 'none'}: {kind}", err=True)

    def _blend(self, text: str) -> None:
        from budwood.errors import InputError

        weights: dict[str, float] = {}
        for part in text.split():
            name, _, weight = part.partition("=")
            try:
                weights[name] = float(weight)
            except ValueError:
                raise InputError(f"/blend {part[:64]}: write NAME=WEIGHT, as in /blend a=0.7 b=0.3.") from None
        if not weights:
            raise InputError("/blend: write NAME=WEIGHT …, as in /blend a=0.7 b=0.3.")
        self.switch(weights)
        echo(f"{self._name()} answers.", err=True)

    def _system(self, text: str) -> None:
        self.chat.system = text
        echo("The system prompt is set." if text else "There is no system prompt now.", err=True)

    def _reset(self, _: str) -> None:
        self.chat.reset()
        echo("A new conversation begins.", err=True)

    def _ask(self, text: str) -> None:
        reply = self.chat.ask(text, print_piece)
        echo()
        if reply.finish_reason == "context":
            echo("note: the answer ends where the base's context does; /reset begins a new conversation.", err=True)
        elif reply.finish_reason == "length":
            echo(f"note: the answer was cut after {plural(reply.tokens, 'token')}; see --max-new-tokens.", err=True)
        if self.terminal:
            echo(_speed(reply), err=True)

    def _name(self) -> str:
        adapter = self.chat.adapter
        if isinstance(adapter, Mapping):
            return " ".join(f"{name}={weight:g}" for name, weight in adapter.items())
        return adapter or "base"


def _speed(reply: Reply) -> str:
    seconds = reply.seconds - reply.first
    rate = f", {(reply.tokens - 1) / seconds:.1f} tokens/s" if reply.tokens > 1 and seconds > 0 else ""
    return f"({plural(reply.tokens, 'token')}{rate}, first after {reply.first:.2f} s)"
