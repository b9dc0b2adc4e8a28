"""A server's life: killed, told to end in mid-stream, reloaded under load, and reloaded a thousand times."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import shutil
import signal
import threading
from pathlib import Path

import httpx
import openai
import pytest
from tests.core.serving.conftest import make_adapter
from tests.serve.server import START, Server, wait_for

LONG = 300
"""Tokens of an answer that takes a while."""


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files}


@pytest.fixture
def own(tmp_path, tiny_base) -> tuple[Path, Server]:
    """A root of one adapter, and its server, not started."""
    make_adapter(tmp_path / "root" / "live", 11)
    (tmp_path / "server").mkdir()
    return tmp_path / "root", Server(tiny_base, tmp_path / "root", tmp_path / "server")


class Streams:
    """Streams that are read by threads."""

    def __init__(self, server: Server, count: int, model: str = "live", tokens: int = LONG) -> None:
        self.begun = [threading.Event() for _ in range(count)]
        self._pool = concurrent.futures.ThreadPoolExecutor(count)
        self.results = [self._pool.submit(self._read, server, model, tokens, i) for i in range(count)]
        for event in self.begun:
            assert event.wait(60)

    def _read(self, server: Server, model: str, tokens: int, number: int) -> str | openai.APIError | httpx.HTTPError:
        text = ""
        try:
            with server.client() as client:
                for chunk in client.completions.create(
                    model=model, prompt=f"file {number}", max_tokens=tokens, stream=True, temperature=1, seed=number
                ):
                    text += chunk.choices[0].text if chunk.choices else ""
                    self.begun[number].set()
        except (openai.APIError, httpx.HTTPError) as error:
            return error
        finally:
            self.begun[number].set()
        return text

    @property
    def texts(self) -> list[str | openai.APIError | httpx.HTTPError]:
        return [result.result(120) for result in self.results]


def sampled(server: Server, count: int, tokens: int = LONG) -> list[str]:
    return [server.ask("live", f"file {i}", tokens, temperature=1, seed=i) for i in range(count)]


def test_a_killed_server_has_changed_nothing_and_starts_again(own):
    root, server = own
    before = contents(root)
    with server:
        expected, whole = server.ask("live", "games"), sampled(server, 4)
        streams = Streams(server, 4)
        os.kill(server.process.pid, signal.SIGKILL)
        assert server.process.wait() == -signal.SIGKILL
        cut = [text for text, answer in zip(streams.texts, whole, strict=True) if text != answer]
        assert cut and all(isinstance(text, Exception) for text in cut), "no cut answer looks whole"
        assert contents(root) == before
        server.start()
        assert server.ask("live", "games") == expected


def test_sigterm_lets_answers_end_and_takes_no_new_ones(own):
    _, server = own
    with server:
        expected = sampled(server, 4)
        streams = Streams(server, 4)
        server.process.send_signal(signal.SIGTERM)
        refused = []

        def ending() -> bool:
            try:
                answer = httpx.post(f"{server.url}/v1/completions", json={"model": "live", "prompt": "x"})
            except httpx.HTTPError:
                return True  # it no longer listens
            refused.append(answer)
            return answer.status_code == 503

        wait_for(ending)
        assert streams.texts == expected
        assert server.process.wait(START) == 0
    if refused[-1:] and refused[-1].status_code == 503:
        assert refused[-1].headers["retry-after"]
        assert "shutting down" in refused[-1].json()["error"]["message"]


def test_without_time_to_drain_sigterm_ends_streams_with_an_error(tmp_path, tiny_base):
    make_adapter(tmp_path / "root" / "live", 11)
    with Server(tiny_base, tmp_path / "root", tmp_path, "--drain", 0) as server:
        streams = Streams(server, 4, tokens=480)
        assert server.end() == 0
    texts = streams.texts
    assert any(isinstance(text, Exception) for text in texts), "they were in mid-stream"
    assert all("shutting down" in str(text) for text in texts if isinstance(text, Exception))


def test_a_reload_under_load_ends_old_answers_on_the_old_adapter(own):
    root, server = own
    with server:
        old = sampled(server, 8)
        identity = server.admin("GET", "adapters").json()["adapters"][0]["identity"]
        streams = Streams(server, 8)
        make_adapter(root / "next", 12, rank=24)
        (root / "live").rename(root.parent / "gone")
        (root / "next").rename(root / "live")
        done = server.admin("POST", "adapters", {"name": "live", "replace": True})
        assert done.status_code == 200, done.text
        assert done.json()["identity"] != identity
        in_flight = sum(not result.done() for result in streams.results)
        new = sampled(server, 8)
        assert streams.texts == old, "to the end"
        assert in_flight, "the reload came in mid-stream"
        assert new != old and all(a != b for a, b in zip(new, old, strict=True))
        gone = server.client().completions.with_raw_response
        with pytest.raises(openai.NotFoundError):
            gone.create(model=f"live@{identity[:12]}", prompt="x")
        with Server(server.base, root, _made(root.parent / "fresh")) as fresh:
            assert sampled(fresh, 8) == new


def test_beside_reloads_each_answer_is_that_of_one_version(own):
    root, server = own
    make_adapter(root / "v1", 12, rank=24)
    make_adapter(root / "v2", 13, use_dora=True)
    with server:
        versions = {server.ask(name, "games", 24) for name in ("v1", "v2")}
        assert len(versions) == 2
        server.admin("POST", "adapters", {"name": "live", "path": "v1", "replace": True})
        ended = threading.Event()

        def reload() -> int:
            count = 0
            while not ended.is_set():
                path = f"v{1 + count % 2}"
                assert server.admin("POST", "adapters", {"name": "live", "path": path, "replace": True}).is_success
                count += 1
            return count

        with concurrent.futures.ThreadPoolExecutor(13) as threads:
            reloads = threads.submit(reload)
            texts = list(threads.map(lambda _: server.ask("live", "games", 24), range(300)))
            ended.set()
            assert reloads.result() > 10
        assert set(texts) == versions, "the one or the other, never a mixture"
        wait_for(lambda: server.rows() == 0)
        assert server.metrics()["budwood_adapters"] == 3


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_thousand_reloads_leave_the_memory_where_it_was(own):
    root, server = own
    shutil.rmtree(root / "live")
    for number in (1, 2):
        make_adapter(root / f"v{number}", number, rank=64)
    size = sum(path.stat().st_size for path in (root / "v1").iterdir())
    with server:
        load = {"name": "live", "replace": True, "verify": "hash"}

        def reload(number: int) -> None:
            done = server.admin("POST", "adapters", {**load, "path": f"v{1 + number % 2}"})
            assert done.status_code == 200, done.text

        for number in range(100):
            reload(number)
        before, texts = server.memory(), {}
        for number in range(100, 1000):
            reload(number)
            if number % 100 < 2:
                texts.setdefault(number % 2, set()).add(server.ask("live", "games", 6))
        assert [len(found) for found in texts.values()] == [1, 1] and texts[0] != texts[1]
        assert server.memory() - before < 900 * size / 10, "of what a leak of every adapter would take"
        assert server.metrics()["budwood_adapters"] == 3
