"""A `budwood serve` process of its own, and what the tests ask it."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

BUDWOOD = Path(sys.executable).with_name("budwood")
START = 120.0
"""Seconds that a server may take to start on a busy machine."""


class Server:
    """A server in its own process, with an administrator's socket; a context manager that ends it."""

    def __init__(self, base: Path, root: Path, folder: Path, *options: object, tokens: Path | None = None) -> None:
        """Describe the server: `folder` is for its log, socket and tokens; with `tokens`, clients need one."""
        self.base, self.root, self.folder, self.options = base, root, folder, options
        self.tokens = tokens or folder / "tokens.json"
        self.admin_token = make_token(self.tokens, "--admin")
        self.log = folder / "log"
        self.process: subprocess.Popen[str]
        self.url = ""

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def start(self) -> None:
        """Start it, and wait until it listens."""
        socket = self.folder / "admin"
        command = [
            BUDWOOD, "serve", self.base, "--adapters", self.root, "--name", "tiny", "--port", 0, "--precision", "fp32",
            "--tokens", self.tokens, "--admin", socket, *self.options,
        ]  # fmt: skip
        with self.log.open("a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START)
        line = self.process.stdout.readline() if ready else ""
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, f"{line}\n{self.log.read_text()}"
        self.url, self.port = found[0], int(found[1])

    def client(self, token: str = "none", **options: Any) -> openai.OpenAI:
        """Return a client of the `openai` package, which repeats nothing by itself."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=120, **options)

    def ask(self, model: str, prompt: str, tokens: int = 8, **options: Any) -> str:
        """Return the continuation of a text, by default that of the most probable tokens."""
        options.setdefault("temperature", 0)
        with self.client() as client:
            answer = client.completions.create(model=model, prompt=prompt, max_tokens=tokens, **options)
        return answer.choices[0].text

    def admin(self, method: str, path: str, json: Any = None, token: str | None = None) -> httpx.Response:
        """Send a request as the administrator."""
        headers = {"authorization": f"Bearer {token or self.admin_token}"}
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.folder / "admin")), timeout=120) as client:
            return client.request(method, f"http://admin/admin/{path}", json=json, headers=headers)

    def metrics(self) -> dict[str, float]:
        """Return the metrics, by name with labels."""
        headers = {"authorization": f"Bearer {self.admin_token}"}
        text = httpx.get(f"{self.url}/metrics", headers=headers, timeout=60).text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def rows(self) -> float:
        """Return how many answers are computed or waited for."""
        found = self.metrics()
        return found["budwood_rows"] + found["budwood_waiting"]

    def cancelled(self, reason: str) -> float:
        """Return how many requests ended for a reason of their own."""
        return sum(value for name, value in self.metrics().items()
                   if name.startswith("budwood_cancelled_total") and f'reason="{reason}"' in name)  # fmt: skip

    def memory(self) -> int:
        """Return the resident bytes of the process."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def end(self, signals: int = 1) -> int:
        """Send SIGTERM, and return the exit code."""
        for _ in range(signals):
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(START)


def make_token(file: Path, *words: object) -> str:
    """Add a token to a file with `budwood token`, and return it."""
    command = [str(BUDWOOD), "token", str(file), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.05)
