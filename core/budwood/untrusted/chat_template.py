"""Chat templates are programs of the base's author: they run in jinja's sandbox, in a process with little room.

The sandbox keeps a template from the machine. It does not keep it from looping for ever or from asking for all memory,
often within one call that nothing in the same process can interrupt; the limits of a process of its own do.
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
"""Processor time for one conversation; a template of a real model takes about a ten-thousandth of it."""
MEMORY = 1 << 30
"""Bytes for one conversation."""
KEPT = 4
"""Templates whose processes are kept."""
GROUP = 1 << 17
"""Characters that are sent at once: to ask for each conversation alone would cost more than to render it."""

Conversation = tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]
"""Messages of plain JSON values (what is none is given as text), and variables for the template."""

_processes: dict[tuple[int, str], _Process] = {}
_lock = threading.Lock()


def render(template: str, conversations: Iterable[Conversation]) -> Iterator[str | InputError]:
    """Render conversations by a chat template, each as transformers' `apply_chat_template` does.

    Args:
        template: jinja source.
        conversations: messages and variables, `add_generation_prompt` and special tokens among them.

    Yields:
        For each its text, or the error "the chat template …": it refuses the conversation, does what the sandbox
        forbids, or needs more than 5 s of processor time, 1 GiB or 16 Mi characters.

    Raises:
        ResourceError: its process cannot be started.
    """
    for group in _groups(conversations):
        while group:
            answers = _ask(template, group)
            yield from answers
            group = group[len(answers) :]


def _groups(conversations: Iterable[Conversation]) -> Iterator[list[str]]:
    """Conversations as JSON, as many together as are sent at once."""
    group: list[str] = []
    size = 0
    for messages, variables in conversations:
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        group.append(json.dumps([plain, dict(variables)], default=str))
        size += len(group[-1])
        if size >= GROUP:
            yield group
            group, size = [], 0
    yield group


def _ask(template: str, group: list[str]) -> list[str | InputError]:
    """Answers to the conversations of a group, at least one; the first that ends the process is the last of them."""
    key = (os.getpid(), template)  # a forked process must not talk into its parent's pipes
    answers: list[str | InputError] = []
    with _lock:
        process = _processes.pop(key, None) or _Process(template)
        try:
            process.send(group)
            while len(answers) < len(group):
                answers.append(process.receive())
        except EOFError:
            answers.append(process.end())
        except BaseException:  # Ctrl-C too: what it would still answer belongs to no question
            process.end()
            raise
        else:
            _processes[key] = process
            while len(_processes) > KEPT:
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
            said = self._errors.read().decode(errors="replace").strip().splitlines() or [str(error)]
            raise ResourceError(f"the process that renders chat templates did not start: {said[-1]}") from error

    def send(self, values: list[str]) -> None:
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(f"[{', '.join(values)}]\n".encode())
            self._popen.stdin.flush()
        except BrokenPipeError as error:
            raise EOFError("it ended") from error

    def receive(self) -> str | InputError:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError("it ended")
        reply = json.loads(line)
        if "text" in reply:
            return str(reply["text"])
        if "limit" in reply:
            return InputError(f"the chat template {reply['limit']}.")
        return InputError(f"the chat template refuses the conversation: {reply['error'].splitlines()[0][:300]}")

    def end(self) -> InputError:
        """End it, if it has not ended; what to say of a conversation during which it did."""
        self._popen.kill()
        self._popen.communicate()
        self._errors.close()
        if self._popen.returncode == -signal.SIGPROF:
            return InputError(
                f"the chat template takes more than {SECONDS:g} s for one conversation: does it never end?"
            )
        return InputError("the chat template nests too deep or needs too much memory.")
