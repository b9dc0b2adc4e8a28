"""Tenants that probe: an adapter of another tenant is like one that does not exist, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.serve.server import Server, make_token

OWN, FOREIGN, UNKNOWN = "lora-4", "dora-4", "none-4"


@pytest.fixture(scope="module")
def guarded(tiny_base, root, tmp_path_factory) -> Iterator[tuple[Server, str]]:
    """A server with tokens, and that of a tenant who may use one adapter."""
    folder = tmp_path_factory.mktemp("tenants")
    token = make_token(folder / "tokens.json", "acme", "--adapter", OWN)
    make_token(folder / "tokens.json", "other", "--adapter", FOREIGN)
    with Server(tiny_base, root, folder) as server:
        yield server, token


def send(server: Server, token: str | None, method: str, path: str, body: Any = None) -> httpx.Response:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    return httpx.request(method, server.url + path, json=body, headers=headers, timeout=60)


def seen(answer: httpx.Response, name: str) -> tuple[int, bytes, dict[str, str]]:
    """Return everything that a client sees but the time, the request's number and the name that it sent itself."""
    headers = {key: value for key, value in answer.headers.items() if key not in ("date", "x-request-id")}
    return answer.status_code, answer.content.replace(name.encode(), b"NAME"), headers


PROBES: list[tuple[str, str, Any]] = [
    ("POST", "/v1/completions", {"model": "?", "prompt": "x", "max_tokens": 1}),
    ("POST", "/v1/completions", {"model": "?", "prompt": "x", "max_tokens": 1, "stream": True}),
    ("POST", "/v1/completions", {"model": "?@{hash}", "prompt": "x", "max_tokens": 1}),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 1, "adapters": {"?": 1.0}}),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 1, "adapters": {OWN: 0.5, "?": 0.5}}),
    ("POST", "/v1/chat/completions", {"model": "?", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
    ("POST", "/v1/chat/completions", {"model": "?", "messages": "wrong"}),
    ("POST", "/v1/embeddings", {"model": "?", "input": "x"}),
    ("GET", "/v1/models/?", None),
    ("GET", "/v1/models/?@{hash}", None),
]


@pytest.mark.parametrize("probe", range(len(PROBES)))
def test_a_foreign_adapter_is_an_unknown_one(guarded, probe):
    server, token = guarded
    adapters = server.admin("GET", "adapters").json()["adapters"]
    digest = next(one["identity"] for one in adapters if one["id"] == FOREIGN)[:12]
    method, path, body = PROBES[probe]

    def asked(name: str) -> httpx.Response:
        def put(value: Any) -> Any:
            if isinstance(value, dict):
                return {put(key): put(item) for key, item in value.items()}
            return value.replace("?", name).replace("{hash}", digest) if isinstance(value, str) else value

        return send(server, token, method, put(path), put(body))

    foreign, unknown = asked(FOREIGN), asked(UNKNOWN)
    assert 400 <= foreign.status_code < 500
    assert seen(foreign, FOREIGN) == seen(unknown, UNKNOWN)
    if "messages" not in str(body) or "wrong" not in str(body):
        assert foreign.status_code == 404 or path == "/v1/embeddings"


def test_a_tenant_sees_its_own_adapters_and_no_other_name(guarded, reference):
    server, token = guarded
    listed = send(server, token, "GET", "/v1/models")
    assert [model["id"] for model in listed.json()["data"]] == ["tiny", OWN]
    (case,) = reference.cases(OWN, 1, 8)
    answer = send(server, token, "POST", "/v1/completions", case.request(OWN, 8))
    assert answer.json()["choices"][0]["text"] == case.text
    wrong = send(server, token, "POST", "/v1/completions", {"model": "lora-5", "prompt": "x"})
    assert FOREIGN not in wrong.text and "dora" not in wrong.text


@pytest.mark.parametrize(
    "sent", [None, b"Bearer", b"Basic YTpi", b"Bearer bw-wrong", "Bearer caf\u00e9".encode(), b"Bearer " + b"x" * 5000]
)
def test_without_a_token_nothing_is_answered_but_the_page_and_health(guarded, sent):
    server, _ = guarded
    for path in ("/v1/models", "/v1/models/tiny", "/metrics"):
        headers = {} if sent is None else {"authorization": sent}
        answer = httpx.get(server.url + path, headers=headers)
        assert answer.status_code == 401
        assert "tiny" not in answer.text and "lora" not in answer.text
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert "<title>Budwood</title>" in httpx.get(server.url).text


def test_a_clients_token_is_not_the_administrators(guarded):
    server, token = guarded
    answer = server.admin("GET", "adapters", token=token)
    assert answer.status_code == 401 and OWN not in answer.text
    assert send(server, server.admin_token, "GET", "/v1/models").status_code == 401
    assert send(server, token, "GET", "/admin/adapters").status_code == 404
    assert server.tokens.stat().st_mode & 0o077 == 0
    assert token not in server.tokens.read_text() and token not in server.log.read_text()
