"""The `budwood` command and its subcommands. An error prints one line on stderr and sets the exit code."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer
import typer.main

import budwood
from budwood.cli import (
    adapter,
    chat,
    check,
    compare,
    data,
    demo,
    generate,
    new,
    plan,
    plugins,
    recipe,
    serve,
    sweep,
    tune,
)
from budwood.cli import streams as _streams  # noqa: F401 - registers "budwood"
from budwood.cli.doctor.command import doctor
from budwood.cli.streams import echo, one_line
from budwood.contract.calls import noted
from budwood.errors import BUG, BudwoodError, Interrupted, is_out_of_memory
from budwood.model.allocator import use_expandable_segments
from budwood.model.quiet import silence_libraries
from budwood.parallel.processes import Processes
from budwood.parallel.refusals import refuse_command
from budwood.parallel.together import together
from budwood.untrusted.redaction import RedactedStream

app = typer.Typer(
    name="budwood",
    help="Fine-tune large models on one small machine, with plugins.",
    epilog="Exit codes: 0 done, 2 invalid input, 3 environment, 4 corrupt artifact, 5 diverged, 130/143 signal.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_USAGE_ERROR = typer.BadParameter.__bases__[0]
"""Base class of all usage errors; typer does not export it."""


app.command("demo", short_help="Run a demo, on a base and data that ship with Budwood.")(demo.demo)
app.command("plugins", short_help="List installed plugins, or describe one.")(plugins.plugins)
app.command("plan", short_help="Show what a recipe will do and need, and its problems.")(plan.plan)
app.command("check", short_help="Check all of a run before it starts: go or no.")(check.check)
app.command("data", short_help="Show what training will see.")(data.data)
app.command("tune", short_help="Fine-tune with a recipe, or a data file and a base.")(tune.tune)
app.command("sweep", short_help="Search the best values of a recipe's fields.")(sweep.sweep)
app.command("eval", short_help="Evaluate an adapter on data.")(tune.eval_)
app.command("compare", short_help="Compare runs: metrics, curves, recipes, versions.")(compare.compare)
app.command("generate", short_help="Answer a prompt with a base and its adapters.")(generate.generate)
app.command("chat", short_help="Talk with a base and its adapters in the terminal.")(chat.chat)
app.command("serve", short_help="Serve a base and its adapters over HTTP.")(serve.serve)
app.command("token", short_help="Make a token for `budwood serve`.")(serve.token)
app.command("doctor", short_help="Check whether this machine can fine-tune.")(doctor)
app.add_typer(new.app, name="new", short_help="Create a package for your own plugin.")
app.add_typer(recipe.app, name="recipe", short_help="Show what a recipe may contain.")
app.add_typer(adapter.app, name="adapter", short_help="Inspect, verify, merge and export adapters.")


def _show_version(requested: bool) -> None:
    if requested:
        echo(f"budwood {budwood.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and library messages; allowed in any position.")
    ] = False,
) -> None:
    refuse_command(context.invoked_subcommand or "", Processes.from_environment())


def main() -> NoReturn:
    """Run the command line and end the process."""
    code = run(sys.argv[1:])
    if code and "RANK" in os.environ:  # leaving a broken group may abort the process, or wait for others
        os._exit(code)
    gc.freeze()  # the last collections would take seconds with the libraries' objects, whose memory is freed anyway
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; errors are printed, not raised."""
    debug = "--debug" in arguments or os.environ.get("BUDWOOD_DEBUG", "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    if debug:
        os.environ["BUDWOOD_DEBUG"] = "1"
    silence_libraries(debug)
    # Waiting threads spin for microseconds, then sleep; by default they spin longer, at the cost of other processes.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    use_expandable_segments()
    signal.signal(signal.SIGTERM, _terminate)
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="budwood")  # type: ignore[union-attr]  # a terminal without UTF-8 is not an error
    try:
        with contextlib.redirect_stderr(RedactedStream(sys.stderr)):
            return _run(arguments, debug)
    finally:
        _flush_streams()


def _run(arguments: list[str], debug: bool) -> int:
    try:
        command = typer.main.get_command(app)
        several = together(lambda line: echo(line, err=True)) if arguments[0] == "tune" else contextlib.nullcontext()
        with command.make_context("budwood", arguments) as context, several:  # what one process refuses ends all
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as done:
        return done.exit_code
    except BrokenPipeError:  # the reader has closed the pipe, as in `budwood plugins | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a group without a command; its message is the help
            print(error, file=sys.stderr)
            return 2
        if debug:
            traceback.print_exception(error)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what ends is not ended again
        code, text = explain(error)
        if getattr(error, "reported", False):  # by the first process
            return code
        with contextlib.suppress(OSError, ValueError):  # stderr is closed
            print(f"error: {one_line(text)}", file=sys.stderr)
        return code


def _open_streams() -> None:
    """Replace closed standard streams with the null device, so that no other file gets their descriptors."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


def _flush_streams() -> None:
    """Flush the streams, a broken one to the null device; otherwise Python replaces the exit code at shutdown."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def explain(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the message of an error."""
    if isinstance(error, BudwoodError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return 130, "interrupted."
    if isinstance(error, _USAGE_ERROR):
        usage: Any = error
        path = usage.ctx.command_path if usage.ctx else "budwood"
        message = usage.format_message()
        return 2, f"{message}{'' if message.endswith(('.', '?')) else '.'} See `{path} --help`."
    if is_out_of_memory(error):
        remedy = "lower train.micro_tokens or data.max_length, or turn on train.gradient_checkpointing."
        return 3, f"out of memory{noted(error)}: {remedy}"
    if isinstance(error, OSError):
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        reason = f"{' → '.join(names) or 'system error'}: {error.strerror or error}"
        return 3, f"{reason}{noted(error)}."
    summary = f"{type(error).__name__}: {error}".strip().removesuffix(":")
    return 1, f"unexpected {summary}. {BUG}"


def _terminate(*_: Any) -> None:
    raise Interrupted("terminated.", 143)
