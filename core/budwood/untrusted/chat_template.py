"""Runs chat templates, which are untrusted programs, in jinja's sandbox inside a process with tight limits.

The sandbox cuts a template off from the machine. It does not stop it from looping forever or allocating all memory,
often inside one call that nothing in the same process can interrupt. The limits of a separate process do.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from budwood.errors import InputError, ResourceError

SECONDS = 5.0
"""CPU time limit per conversation; the template of a real model needs about a ten-thousandth of it."""
MEMORY = 1 << 30
"""Memory limit per conversation, in bytes."""
MAX_PROCESSES = 4
"""Processes kept alive, one per template."""
GROUP = 1 << 17
"""Characters sent per batch: a round trip per conversation would cost more than rendering it."""

Conversation = tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]
"""Messages of plain JSON values (anything else is sent as text), and variables for the template."""


class Rendered(str):
    """The text of a conversation.

    Attributes:
        marks: (start, stop) in characters of what the template's `{% generation %}` blocks wrote; None if it has none.
    """

    marks: list[tuple[int, int]] | None

    def __new__(cls, text: str, marks: Sequence[Sequence[int]] | None = None) -> Rendered:
        """Create a text with its marks."""
        self = super().__new__(cls, text)
        self.marks = None if marks is None else [(start, stop) for start, stop in marks]
        return self


_processes: dict[tuple[int, str], _Process] = {}
_lock = threading.Lock()


def render(template: str, conversations: Iterable[Conversation]) -> Iterator[Rendered | InputError]:
    """Render conversations with a chat template, as transformers' `apply_chat_template` does.

    Args:
        template: jinja source.
        conversations: messages and variables, including `add_generation_prompt` and special tokens.

    Yields:
        The text of each conversation, or an error "the chat template …" if the template rejects the conversation,
        violates the sandbox, or exceeds 5 s of CPU time, 1 GiB or 16 Mi characters.

    Raises:
        ResourceError: the process cannot be started.
    """
    for group in _groups(conversations):
        while group:
            answers = _ask(template, group)
            yield from answers
            group = group[len(answers) :]


def _groups(conversations: Iterable[Conversation]) -> Iterator[list[str]]:
    """Serialize conversations to JSON, and group them into batches."""
    group: list[str] = []
    size = 0
    for messages, variables in conversations:
        plain = [
            {key: value for key, value in message.items() if value is not None or key == "content"}
            for message in messages
        ]
        group.append(json.dumps([plain, dict(variables)], default=str))
        size += len(group[-1])
        if size >= GROUP:
            yield group
            group, size = [], 0
    yield group


def _ask(template: str, group: list[str]) -> list[Rendered | InputError]:
    """Return the answers to the first conversations of a group, at least one: up to one that ends the process."""
    key = (os.getpid(), template)  # a forked process may not write to its parent's pipes
    answers: list[Rendered | InputError] = []
    with _lock:
        process = _processes.pop(key, None) or _Process(template)
        try:
            process.send(group)
            while len(answers) < len(group):
                answers.append(process.receive())
        except EOFError:
            answers.append(process.end())
        except BaseException:  # also on Ctrl-C: a late answer would be mistaken for that of the next conversation
            process.end()
            raise
        else:
            _processes[key] = process
            while len(_processes) > MAX_PROCESSES:
                _processes.pop(next(iter(_processes))).end()
    return answers


class _Process:
    """A process that renders one template."""

    def __init__(self, template: str) -> None:
        script = Path(__file__).with_name("template_process.py")
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - until `end`
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", str(script), str(SECONDS), str(MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=os.environ | quiet,
            )
            self.send([json.dumps(template)])
            self.receive()
        except (OSError, EOFError) as error:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines() or [str(error)]
            raise ResourceError(f"the process that renders chat templates did not start: {lines[-1]}") from error

    def send(self, values: list[str]) -> None:
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(f"[{', '.join(values)}]\n".encode())
            self._popen.stdin.flush()
        except BrokenPipeError as error:
            raise EOFError("the process ended") from error

    def receive(self) -> Rendered | InputError:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the process ended")
        reply = json.loads(line)
        if "text" in reply:
            return Rendered(reply["text"], reply.get("marks"))
        if "limit" in reply:
            return InputError(f"the chat template {reply['limit']}.")
        return InputError(f"the chat template rejects the conversation: {reply['error'].splitlines()[0][:300]}")

    def end(self) -> InputError:
        """Kill the process if it is still running; return the error for the conversation during which it ended."""
        self._popen.kill()
        self._popen.communicate()
        self._errors.close()
        if self._popen.returncode == -signal.SIGPROF:
            return InputError(
                f"the chat template takes more than {SECONDS:g} s for one conversation: check it for an endless loop."
            )
        return InputError("the chat template nests too deeply or needs too much memory.")
