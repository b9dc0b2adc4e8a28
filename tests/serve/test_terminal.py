"""`budwood chat` in a terminal: Ctrl-C stops an answer and keeps the session, Ctrl-D ends it."""

from __future__ import annotations

import os
import pty
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.conftest import make_base
from tests.serve.server import BUDWOOD, START


class Terminal:
    """A process with a terminal of its own."""

    def __init__(self, *words: object) -> None:
        self.process, self._end = pty.fork()
        if not self.process:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background
            os.execve(BUDWOOD, [str(BUDWOOD), *map(str, words)], {**os.environ, "OMP_NUM_THREADS": "1"})
        self.seen, self.at = "", 0

    def read(self, until: str = "", seconds: float = START) -> str:
        """Return what it shows up to a text, from where the last call ended; without a text, until anything comes."""
        end, start = time.monotonic() + seconds, self.at
        while len(self.seen) == start or (found := self.seen.find(until, start)) < 0:
            assert time.monotonic() < end, self.seen
            if select.select([self._end], [], [], 0.2)[0]:
                self.seen += os.read(self._end, 4096).decode(errors="replace")
        self.at = found + len(until)
        return self.seen[start : self.at]

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def close(self, seconds: float = START) -> int:
        """Return the exit code; a process that does not end is killed."""
        end, status = time.monotonic() + seconds, None
        while status is None:
            if time.monotonic() > end:
                os.kill(self.process, signal.SIGKILL)
            process, found = os.waitpid(self.process, os.WNOHANG)
            status = found if process else None
            time.sleep(0.05)
        os.close(self._end)
        return os.waitstatus_to_exitcode(status)


@pytest.fixture
def talker(tmp_path) -> Path:
    """The tiny base with a longer context and logits of 0 for what ends an answer, so that it talks for seconds."""
    folder = make_base(tmp_path / "talker", max_position_embeddings=8192)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][[2, 4]] = 0  # <eos> and <|im_end|>
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def terminal(talker, root) -> Iterator[Terminal]:
    adapters = [word for name in ("lora-4", "head") for word in ("--adapter", f"{name}={root / name}")]
    opened = Terminal("chat", talker, *adapters, "--precision", "fp32", "--max-new-tokens", 6000)
    yield opened
    assert opened.close() == 0, opened.seen


def test_a_session_survives_ctrl_c_and_errors_and_ends_with_ctrl_d(terminal):
    terminal.read("lora-4> ")
    terminal.type("hello\n")
    terminal.read("hello\r\n")
    terminal.read()  # until the answer begins, however slow the machine is
    terminal.type("\x03")
    assert "(stopped)" in terminal.read("lora-4> ")
    terminal.type("/adapter haed\n")
    assert "error: no adapter 'haed' is loaded. Did you mean 'head'?" in terminal.read("lora-4> ")
    terminal.type("/adapter head\n")
    terminal.read("head> ")
    time.sleep(0.3)  # Python's input holds a Ctrl-C back that comes while it prepares the terminal
    terminal.type("\x03")
    assert "/quit or Ctrl-D ends." in terminal.read("head> ")
    terminal.type("/reset\nagain\n")
    assert "tokens" in terminal.read("first after")
    terminal.read("head> ")
    terminal.type("\x04")
