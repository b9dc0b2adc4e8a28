"""On a port: clients that leave, read slowly or flood, engines that end, and a shutdown in order."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable

import pytest
from openai import APIError, APIStatusError
from tests.core.serving.http.conftest import HELLO, open_service, running

from budwood.errors import ResourceError
from budwood.serving.http.server import run
from budwood.serving.http.sockets import bound


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:  # the first chat starts a process
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


def post(port: int, **fields: object) -> socket.socket:
    """Send a chat request over a socket of its own, with a small window, and return the socket."""
    body = json.dumps({"model": "tiny", "messages": HELLO, "temperature": 0, **fields}).encode()
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect(("127.0.0.1", port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" \
        f"Content-Length: {len(body)}\r\n\r\n"  # fmt: skip
    made.sendall(head.encode() + body)
    return made


@pytest.fixture
def slowed(monkeypatch):
    """Function that makes steps of an engine take some milliseconds, so that answers last."""

    def slow(service, seconds: float = 0.02):
        step = service.engine.scheduler.step

        def slowly() -> bool:
            time.sleep(seconds)
            return step()

        monkeypatch.setattr(service.engine.scheduler, "step", slowly)
        return service

    return slow


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(tiny_base, slowed, stream):
    service = slowed(open_service(tiny_base))
    with running(service) as (asked, port):
        made = post(port, stream=stream, max_tokens=400)
        wait_for(lambda: service.engine.scheduler.rows)
        made.close()
        wait_for(lambda: not service.engine.scheduler.rows, 2)
        wait_for(lambda: not service.calls and not service.admission.rows)
        assert asked.completions.create(model="tiny", prompt="a", max_tokens=2).choices
        metrics = service.metrics.text().decode()
        assert 'budwood_cancelled_total{adapter="base",reason="disconnect",tenant=""} 1.0' in metrics


def test_a_slow_reader_stalls_only_itself_and_is_cut_off(tiny_base):
    service = open_service(tiny_base, limits={"slow_reader": 0.5})
    with running(service) as (asked, port):
        made = post(port, stream=True, n=8, max_tokens=400, logprobs=True, top_logprobs=20, seed=1, temperature=1)
        wait_for(lambda: service.calls)
        started = time.monotonic()
        assert asked.completions.create(model="tiny", prompt="a", max_tokens=2).choices
        wait_for(lambda: 'reason="slow_reader"' in service.metrics.text().decode(), 20)
        assert time.monotonic() - started > 0.4 and not service.calls
        made.close()


def test_floods_and_fragments_are_refused_and_the_server_stays(tiny_base):
    service = open_service(tiny_base, limits={"body_seconds": 0.3})
    with running(service) as (asked, port):

        def answer(data: bytes) -> bytes:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as made:
                with contextlib.suppress(OSError):
                    made.sendall(data)
                found = b""
                with contextlib.suppress(OSError):
                    while part := made.recv(4096):
                        found += part
                        if b"\r\n\r\n" in found:
                            break
                return found

        assert b" 400 " in answer(b"GET / HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(4000)))
        assert b" 400 " in answer(b"\x16\x03\x01 not http\r\n\r\n")
        slow = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" \
            b"Content-Length: 100\r\n\r\n{"  # fmt: skip
        assert b" 408 " in answer(slow)
        assert answer(b"") == answer(b"GET / HTTP/1.1\r\nHost: lo") == b""  # nothing, or half of a head
        with socket.create_connection(("127.0.0.1", port), timeout=5) as made:
            made.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_for(lambda: b"ok" in made.recv(4096))
            made.sendall(b"GET /hea")
            assert made.recv(4096) == b""
        large = slow.replace(b"100", b"10000000")
        assert b" 413 " in answer(large + b"x" * 100_000)
        chunked = large.replace(b"Content-Length: 10000000", b"Transfer-Encoding: chunked")[:-1]
        assert b" 413 " in answer(
            chunked + b"10000\r\n" + b"x" * 65536 + b"\r\n" + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 16
        )
        assert asked.completions.create(model="tiny", prompt="a", max_tokens=2).choices


def test_a_request_has_a_deadline_and_the_queue_an_end(tiny_base, slowed):
    service = slowed(open_service(tiny_base, max_rows=1, limits={"deadline": 0.5, "waiting": 1}))
    with running(service) as (asked, port):
        waiting = [post(port, max_tokens=400) for _ in range(2)]
        wait_for(lambda: service.admission.rows == 2)
        with pytest.raises(APIStatusError) as caught:
            asked.completions.create(model="tiny", prompt="a")
        assert caught.value.status_code == 429 and caught.value.code == "queue_full"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for made in waiting:
            assert made.recv(4096).startswith(b"HTTP/1.1 504")
            made.close()
        wait_for(lambda: not service.engine.scheduler.rows)
        with pytest.raises(APIError, match="took longer than 0.5 s"):
            list(
                asked.chat.completions.create(model="tiny", messages=HELLO, max_tokens=400, temperature=0, stream=True)
            )


@pytest.mark.parametrize("drain", [20.0, 0.3])
def test_a_shutdown_lets_requests_end_or_says_why_not(tiny_base, slowed, drain):
    """New requests get 503 on the same port; a stream that takes too long ends with an error."""
    service = slowed(open_service(tiny_base, limits={"drain": drain}), 0.01)
    with running(service) as (asked, port):
        stream = asked.completions.create(model="tiny", prompt="a", max_tokens=90, temperature=0, stream=True)
        got = [next(stream)]
        service.ending = True
        link = http.client.HTTPConnection("localhost", port, timeout=5)
        link.request("GET", "/ready")
        ready = link.getresponse()
        assert ready.status == 503 and b"shutting down" in ready.read()
        with pytest.raises(APIStatusError) as caught:
            asked.models.list()
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
        if drain > 1:
            got += list(stream)
            assert got[-1].choices[0].finish_reason == "length"
        else:
            with pytest.raises(APIError, match="shutting down"):
                list(stream)


def test_the_server_ends_with_its_engine(tiny_base):
    service = open_service(tiny_base)
    failed: list[BaseException] = []
    ready = threading.Event()

    def serve() -> None:
        try:
            with bound(service.settings) as sockets:
                run(service, sockets, ready.set)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(10)
    service.engine.call(lambda: None)
    assert service.alive
    service.engine.thread._commands.put(None)  # its thread ends, as it would at an error beyond all that it catches
    thread.join(10)
    assert not thread.is_alive() and isinstance(failed[0], ResourceError) and failed[0].exit_code == 3
    assert "the engine has ended" in service.problem


def test_many_streams_of_several_adapters_at_once(tiny_base, adapters):
    """Each gets its own adapter's text; the log has a line for each, without a word of it."""
    service = open_service(tiny_base, adapters, max_rows=8)
    names = ["tiny", "one", "two", "run"]
    with running(service) as (asked, _):
        options = {"prompt": "secret words", "max_tokens": 12, "temperature": 0}
        expected = {name: asked.completions.create(model=name, **options).choices[0].text for name in names}
        found: list[tuple[str, str]] = []

        def one(name: str) -> None:
            stream = asked.completions.create(model=name, stream=True, **options)
            found.append((name, "".join(chunk.choices[0].text for chunk in stream)))

        threads = [threading.Thread(target=one, args=(names[i % 4],)) for i in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 24 and all(text == expected[name] for name, text in found)
    assert len(set(expected.values())) == 4
