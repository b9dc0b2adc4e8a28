"""The process in which chat templates run. `chat_template.py` starts it as a script; nothing imports it.

Usage: template_process.py SECONDS BYTES. The first line of stdin is the template as JSON; each further line is a list
of conversations. The reply to each conversation is one line of JSON: its text and what `{% generation %}` marks in
it, or the reason for the failure.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

MAX_TEXT = 16 << 20
"""Size limit of a rendered conversation, in characters."""


def main() -> None:
    """Render conversations until stdin ends."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, whose exit ends this process
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment, modifies_known_mutable

    chat_template_utils = _chat_template_utils()
    chat_template_utils.datetime = _Clock  # for `strftime_now`

    SandboxedEnvironment.unsafe_undefined = _refuse  # type: ignore[method-assign,assignment]
    is_safe = ImmutableSandboxedEnvironment.is_safe_attribute

    def may_use(environment: Any, value: Any, attribute: str, found: Any) -> bool:
        own = type(value) in (list, dict) and id(value) not in _given and modifies_known_mutable(value, attribute)
        return own or is_safe(environment, value, attribute, found)

    ImmutableSandboxedEnvironment.is_safe_attribute = may_use  # type: ignore[method-assign,assignment]
    new_context = Template.new_context

    def context(template: Any, vars: Any = None, *arguments: Any, **named: Any) -> Any:
        _given.update(_containers(vars))
        return new_context(template, vars, *arguments, **named)

    Template.new_context = context  # type: ignore[method-assign,assignment]
    (template,) = json.loads(requests.readline())
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies.write(b'{"text": "ready"}\n')
    replies.flush()
    for line in requests:
        for messages, variables in json.loads(line):
            # CPU time, so that a busy machine causes no failure; the signal ends the process at any point.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            reply = _render(chat_template_utils.render_jinja_template, template, messages, variables)
            signal.setitimer(signal.ITIMER_PROF, 0)
            replies.write(reply + b"\n")
            replies.flush()


def _chat_template_utils() -> Any:
    """Import the module of transformers that renders templates, without the two packages around it if it can do so.

    Their own code takes four times as long as the module with all that it needs.
    """
    name, packages = "transformers.utils.chat_template_utils", ("transformers", "transformers.utils")
    spec = find_spec(packages[0])
    folder = Path(*spec.submodule_search_locations or ()) if spec else Path()
    for package, path in zip(packages, (folder, folder / "utils"), strict=True):
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(path)]
    try:
        return import_module(name)
    except (ImportError, AttributeError):  # in another version it may need what a package defines
        for module in [module for module in sys.modules if module.split(".")[0] == packages[0]]:
            del sys.modules[module]
        return import_module(name)


_given: set[int] = set()
"""Identities of the lists and objects in a conversation's input. A template may change a list or object of its own
(Kimi K2 appends to one and pops from it), which lives no longer than the rendering and within its limits; not these."""


def _containers(value: Any) -> Iterator[int]:
    """Yield the identities of the lists and objects in a value of JSON."""
    if isinstance(value, list | dict):
        yield id(value)
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _containers(inner)


class _Clock:
    """Stands for `datetime` in transformers: the date of the run, at midnight."""

    date: datetime

    @classmethod
    def now(cls) -> datetime:
        return cls.date


def _refuse(environment: Any, value: Any, attribute: str) -> Any:
    """Raise instead of returning jinja's undefined value, which would print as nothing."""
    from jinja2.exceptions import SecurityError

    raise SecurityError(f"access to attribute {attribute!r} of a {type(value).__name__} is unsafe.")


def _render(render: Any, template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> bytes:
    marked = re.search(r"\{%[-+]?\s*generation\b", template) is not None
    try:
        _given.clear()
        _Clock.date = datetime.fromisoformat(variables.pop("date_of_run"))
        (text,), marks = render([messages], chat_template=template, return_assistant_tokens_mask=marked, **variables)
        if len(text) > MAX_TEXT:
            return json.dumps({"limit": f"writes {len(text):,} characters; the limit is {MAX_TEXT:,}"}).encode()
        return json.dumps({"text": text, "marks": marks[0] if marked else None}).encode()
    except MemoryError:
        return json.dumps({"limit": "needs too much memory"}).encode()
    except Exception as error:  # a template may raise any exception
        return json.dumps({"error": str(error).strip()[:1000] or type(error).__name__}).encode()


if __name__ == "__main__":
    main()
