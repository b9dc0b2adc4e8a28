"""Clients that vanish, do not read, or send garbage: each is told what is wrong, and the others get their answers."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from tests.serve.server import Server, wait_for


def connect(server: Server, receive: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", server.port))
    return connection


def request(body: bytes | dict, path: str = "/v1/completions", **headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(data))}
    fields |= {key.replace("_", "-"): value for key, value in headers.items()}
    head = "".join(f"{key}: {value}\r\n" for key, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data


def reply(connection: socket.socket) -> tuple[int, bytes]:
    """Read until the server closes or a whole response with a length is there; return its status and body."""
    data = b""
    while True:
        head, end, body = data.partition(b"\r\n\r\n")
        length = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if end and length and len(body) >= int(length[0]):
            break
        try:
            part = connection.recv(1 << 16)
        except ConnectionResetError:
            part = b""
        if not part:
            break
        data += part
    return (int(data.split(b" ")[1]) if data.startswith(b"HTTP/1.1 ") else 0), body


LONG = {"model": "lora-32", "prompt": "x", "max_tokens": 480, "stream": True}


@pytest.mark.parametrize("streamed", [True, False])
def test_the_rows_of_clients_that_vanish_are_freed(server, reference, streamed):
    (case,) = reference.cases("dora-8", 1, 8)
    before = server.cancelled("disconnect")
    gone = []
    for number in range(6):
        connection = connect(server)
        connection.sendall(request({**LONG, "stream": streamed, "n": 4, "seed": number, "temperature": 1}))
        if streamed:
            assert b"200 OK" in connection.recv(1 << 12)
        gone.append(connection)
    wait_for(lambda: server.rows() > 4)
    for connection in gone:
        connection.close()
    wait_for(lambda: server.rows() == 0 and server.cancelled("disconnect") - before == 6, 10)
    assert server.ask("dora-8", case.prompt, 8) == case.text


def test_a_client_that_does_not_read_holds_up_nobody_and_is_ended(server, reference):
    cases = [c for c in reference.cases("adalora", 8, 8) if not c.chat]
    before = server.cancelled("slow_reader")
    connection = connect(server, receive=4096)
    more = {"prompt": ["x", "y", "z"], "n": 8, "logprobs": 20, "temperature": 1, "seed": 1}  # than buffers hold
    connection.sendall(request({**LONG, **more}))
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    for _ in range(3):
        for case in cases:
            start = time.monotonic()
            assert server.ask("adalora", case.prompt, 8) == case.text
            assert time.monotonic() - start < 20, "long before the slow reader is ended"
    wait_for(lambda: server.rows() == 0 and server.cancelled("slow_reader") - before == 1, 90)
    connection.close()


DEEP = b'{"model":"tiny","prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BODIES: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "no JSON": (b"hello", 400),
    "cut": (b'{"model":"tiny","prompt":"x"', 400),
    "a list": (b"[1, 2]", 400),
    "deep lists": (DEEP, 400),
    "deep objects": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400),
    "not UTF-8": (b'{"model":"tiny","prompt":"caf\xe9"}', 400),
    "UTF-16": ('{"model":"tiny","prompt":"x"}'.encode("utf-16"), 400),
    "half a surrogate pair": (rb'{"model":"tiny","prompt":"\ud800"}', 400),
    "half of one in a key": (rb'{"model":"tiny","prompt":"x","\udfff":1}', 400),
    "a control character": (b'{"model":"tiny","prompt":"\x00"}', 400),
    "NaN": (b'{"model":"tiny","prompt":"x","temperature":NaN}', 400),
    "infinity": (b'{"model":"tiny","prompt":"x","temperature":1e999}', 400),
    "a huge number": (b'{"model":"tiny","prompt":"x","max_tokens":' + b"9" * 5000 + b"}", 400),
    "no token id": (b'{"model":"tiny","prompt":[1,-1]}', 400),
    "an unknown token id": (b'{"model":"tiny","prompt":[1,99999]}', 400),
    "a fraction for a token": (b'{"model":"tiny","prompt":[1,2.5]}', 400),
    "an empty prompt": (b'{"model":"tiny","prompt":""}', 400),
    "a long prompt": (json.dumps({"model": "tiny", "prompt": "word " * 5000}).encode(), 400),
    "an unknown field": (b'{"model":"tiny","prompt":"x","promt":"y"}', 400),
    "a wrong type": (b'{"model":["tiny"],"prompt":"x"}', 400),
    "a name that is a path": (b'{"model":"../../etc/passwd","prompt":"x"}', 404),
    "too many answers": (b'{"model":"tiny","prompt":"x","n":1000000}', 400),
    "a long stop": (json.dumps({"model": "tiny", "prompt": "x", "stop": "y" * 1000}).encode(), 400),
    "many prompts": (json.dumps({"model": "tiny", "prompt": ["x"] * 10_000}).encode(), 400),
    "ten megabytes": (b'{"model":"tiny","prompt":"' + b"x" * 10_000_000 + b'"}', 413),
    "a megabyte of spaces": (b'{"model":"tiny","prompt":"x"' + b" " * 2_000_000 + b"}", 413),
}


@pytest.fixture
def unharmed(server, reference) -> Iterator[None]:
    """The server answers as before, holds nothing, and has logged no traceback."""
    logged = len(server.log.read_text())
    yield
    assert server.ask("lora-4", "games section", 6) == reference.answer("lora-4", "games section", 6)[0]
    wait_for(lambda: server.rows() == 0)
    assert "Traceback" not in server.log.read_text()[logged:]


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_wrong_is_a_clear_refusal(server, unharmed, name):
    body, status = BODIES[name]
    for path in ("/v1/completions", "/v1/chat/completions"):
        connection = connect(server)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before it was sent
            connection.sendall(request(body, path))
        found, data = reply(connection)
        connection.close()
        if not found:
            assert status == 413, "cut off while it was still sending"
            continue
        assert found in (status, 400)
        error = json.loads(data)["error"]
        assert len(error["message"]) > 10 and "\n" not in error["message"] and len(error["message"]) < 1000
        assert "Traceback" not in error["message"] and "pydantic" not in error["message"]


RAW: dict[str, bytes] = {
    "noise": bytes(range(256)) * 20,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
    "a request of another protocol": b"SSH-2.0-OpenSSH_9.0\r\n\r\n",
    "many headers": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"a: b\r\n" * 50_000 + b"\r\n",
    "a long header": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\na: " + b"b" * 1_000_000 + b"\r\n\r\n",
    "a long path": b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a negative length": request(b"{}", Content_Length="-1"),
    "no number as length": request(b"{}", Content_Length="ten"),
    "a huge length": request(b"{}", Content_Length="9" * 30),
    "two lengths": request(b"{}").replace(b"\r\n\r\n", b"\r\nContent-Length: 7\r\n\r\n"),
    "a broken chunk": request(b"zz\r\nhello\r\n", Transfer_Encoding="chunked").replace(b"Content-Length: 11\r\n", b""),
    "another type": request(b"a=b", Content_Type="application/x-www-form-urlencoded"),
    "no type": request({"model": "tiny", "prompt": "x"}).replace(b"Content-Type: application/json\r\n", b""),
    "a path upwards": b"GET /../../../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "an encoded path upwards": b"GET /%2e%2e%2f%2e%2e%2fetc%2fpasswd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a null in the path": b"GET /page.js%00.html HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "another method": b"TRACE /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "another host": b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "an upgrade": b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_request_is_refused(server, unharmed, name):
    connection = connect(server)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(RAW[name])
    status, body = reply(connection)
    connection.close()
    assert status == 0 or 400 <= status < 500, (status, body[:200])
    assert b"root:" not in body and b"Traceback" not in body
    if status == 0:
        assert name in ("many headers", "a long header", "a long path"), "cut off while it was still sending"


def test_a_hundred_clients_that_send_nothing_or_half_hold_up_nobody(server, reference, unharmed):
    half = request({"model": "tiny", "prompt": "x", "max_tokens": 2})
    silent = [connect(server) for _ in range(100)]
    for number, connection in enumerate(silent):
        connection.sendall(half[: number % len(half)])
    assert server.ask("lora-8", "games", 2) == reference.answer("lora-8", "games", 2)[0]
    late = connect(server)
    late.sendall(half[:-1])
    status, body = reply(late)
    assert status == 408 and "did not arrive" in json.loads(body)["error"]["message"]
    for connection in [*silent, late]:
        connection.close()


def test_more_requests_than_the_queue_holds_are_told_when_to_come_back(tiny_base, root, reference, tmp_path):
    with Server(tiny_base, root, tmp_path, "--rows", 2, "--waiting", 4) as server:
        answers: list[httpx.Response] = []

        def ask(number: int) -> None:
            body = {"model": "lora-4", "prompt": f"{number}", "max_tokens": 100}
            answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=120))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = {answer.status_code for answer in answers}
        assert codes == {200, 429}
        refused = [answer for answer in answers if answer.status_code == 429]
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert server.ask("lora-4", "after", 2) == reference.answer("lora-4", "after", 2)[0]
