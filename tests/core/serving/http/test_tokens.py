"""Tokens: who may ask what, how often, and that a foreign adapter looks like none."""

from __future__ import annotations

import hashlib
import json
import re
import socket

import pytest
from tests.core.serving.http.conftest import admin, ask, client, open_service

from budwood.cli.app import run
from budwood.errors import InputError
from budwood.serving.http.errors import ApiError
from budwood.serving.http.limits import Admission
from budwood.serving.http.settings import Limits
from budwood.serving.http.tokens import Tenant, Tokens, add_token


@pytest.fixture(scope="module")
def tenants(tiny_base, adapters, tmp_path_factory):
    """A server with a tenant for each of two adapters, and their tokens."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.json"
    tokens = {
        "a": add_token(path, "a", adapters=["one"], rows=2),
        "b": add_token(path, "b", adapters=["two", "run"]),
        "rare": add_token(path, "rare", adapters=["one"], requests_per_minute=3),
        "admin": add_token(path, None),
    }
    return open_service(tiny_base, adapters, path), tokens


def test_a_foreign_adapter_looks_like_none(tenants):
    service, tokens = tenants
    mine = client(service, tokens["a"])
    assert [model["id"] for model in mine.get("/v1/models").json()["data"]] == ["tiny", "one"]
    assert ask(mine).status_code == 200
    identity = service.catalog._table["two"].identity[:12]
    for foreign, unknown in (("two", "six"), (f"two@{identity}", f"six@{identity}")):
        theirs, none = ask(mine, model=foreign), ask(mine, model=unknown)
        assert (theirs.status_code, theirs.text.replace("two", "six")) == (404, none.text)
        theirs, none = mine.get(f"/v1/models/{foreign}"), mine.get(f"/v1/models/{unknown}")
        assert (theirs.status_code, theirs.text.replace("two", "six")) == (404, none.text)
    blends = [ask(mine, model="tiny", adapters={"one": 0.5, name: 0.5}) for name in ("two", "six")]
    assert blends[0].status_code == 404 and blends[0].text.replace("two", "six") == blends[1].text
    close = ask(mine, model="tw", temperature="x").text + ask(mine, model="twoo").text
    assert "'two'" not in close and "run" not in close  # no hint names what others have
    assert ask(client(service, tokens["b"]), model="two").status_code == 200
    # The metrics name all tenants and adapters, so they are the administrator's.
    assert mine.get("/metrics").status_code == 401
    text = client(service, tokens["admin"]).get("/metrics").text
    assert 'adapter="two",tenant="b"' in text and 'budwood_generated_tokens_total{adapter="one",tenant="a"}' in text
    assert 'adapter="two",tenant="a"' not in text


def test_tenants_share_no_cached_prompts(tiny_base, tmp_path):
    """The same prompt is found again for the tenant that sent it, and computed anew for another one."""
    tokens = [add_token(tmp_path / "tokens.json", tenant) for tenant in ("a", "b")]
    service = open_service(tiny_base, None, tmp_path / "tokens.json", prefix_bytes=1 << 20)
    hits = []
    for token in (tokens[0], tokens[1], tokens[0]):
        done = client(service, token).post("/v1/completions", json={"model": "tiny", "prompt": "word " * 90})
        assert done.status_code == 200
        hits.append(service.engine.prefixes.hits)
    assert hits[0] == hits[1] == 0 < hits[2]


def test_without_its_token_nothing_is_answered(tenants):
    service, tokens = tenants
    for token in ("", "none", tokens["a"] + "x", tokens["a"][:-1], tokens["admin"], "é"):
        response = client(service, "none").get("/v1/models", headers={"authorization": f"Bearer {token}".encode()})
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key", token
    assert client(service, "none").get("/v1/models", headers={"authorization": tokens["a"]}).status_code == 401
    assert client(service, "none").get("/health").status_code == 200
    for token in ("none", tokens["a"]):
        assert admin(service, token).get("/admin/adapters").status_code == 401
    assert admin(service, tokens["admin"]).get("/admin/adapters").status_code == 200
    assert client(service, tokens["admin"]).get("/admin/adapters").status_code == 404


def test_rates_and_rows_of_a_tenant(tenants):
    service, tokens = tenants
    rare = client(service, tokens["rare"])
    statuses = [rare.get("/v1/models").status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    again = rare.get("/v1/models")
    assert 0 < int(again.headers["retry-after"]) <= 20 and again.json()["error"]["type"] == "rate_limit_error"
    many = ask(client(service, tokens["a"]), n=3)
    assert many.status_code == 429 and "2 answers at a time" in many.json()["error"]["message"]
    assert ask(client(service, tokens["a"]), n=2).status_code == 200


def test_admission_counts_what_is_in_flight():
    """Rates fill up again with time; a full queue says when a row should be free."""
    now = [0.0]
    admission = Admission(Limits(waiting=2), 2, lambda: now[0])
    tenant = Tenant("a", None, 2, 3, "key")
    admission.count_request(tenant)
    admission.count_request(tenant)
    with pytest.raises(ApiError) as caught:
        admission.count_request(tenant)
    assert caught.value.retry_after == 30
    now[0] = 30.5
    admission.count_request(tenant)
    with admission.hold(tenant, 2), admission.hold(Tenant("b"), 2):
        with pytest.raises(ApiError, match="3 answers at a time"), admission.hold(tenant, 2):
            pass
        with pytest.raises(ApiError, match="2 requests wait already") as caught, admission.hold(Tenant("b"), 1):
            pass
        assert caught.value.status == 429 and caught.value.retry_after >= 1
        now[0] += 100
    assert admission.rows == 0 and admission.retry_after > 1
    with admission.hold(Tenant("b"), 50):  # of a single request, however large, the first is taken
        pass


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"tokens": [{"sha256": "12", "tenant": "a"}]}, "tokens.0.sha256"),
        ({"tokens": [{"sha256": "0" * 64, "tenant": "a", "adapter": ["x"]}]}, "tokens.0.adapter"),
        ({"tokens": [{"sha256": "0" * 64, "tenant": "a b"}]}, "tenant name 'a b'"),
        ({"tokens": [{"sha256": "0" * 64, "tenant": "a"}] * 2}, "two entries have the same sha256"),
        ({"tokens": [{"sha256": hashlib.sha256(b"").hexdigest(), "tenant": "a"}]}, "hash of an empty token"),
        ({"admin": ["secret"]}, "SHA-256"),
        ([], "not a JSON object"),
    ],
)  # fmt: skip
def test_a_file_of_tokens_that_is_not_valid_is_refused(tmp_path, content, says):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(content))
    with pytest.raises(Exception, match=re.escape(says)):
        Tokens(path)


def test_a_file_that_is_damaged_leaves_the_tokens_as_they_were(tmp_path):
    path = tmp_path / "tokens.json"
    token = add_token(path, "a")
    tokens = Tokens(path)
    path.write_text("{}}")
    with pytest.raises(Exception, match="not valid JSON"):
        tokens.reload()
    assert tokens.tenant(f"bearer {token}").name == "a"


def test_the_command_makes_tokens(tmp_path, capsys):
    path = tmp_path / "tokens.json"
    assert run(["token", str(path), "acme", "--adapter", "one", "--per-minute", "60", "--rows", "4"]) == 0
    token = capsys.readouterr().out.strip()
    assert run(["token", str(path), "--admin"]) == 0
    text = path.read_text()
    assert token not in text and path.stat().st_mode & 0o077 == 0
    assert json.loads(text)["tokens"][0]["adapters"] == ["one"]
    assert run(["token", str(path), "all", "--adapter", "*"]) == 0
    everything = Tokens(path).tenant(f"Bearer {capsys.readouterr().out.split()[-1]}")
    assert everything.allows("one") and everything.allows("two")
    text = path.read_text()
    tenant = Tokens(path).tenant(f"Bearer {token}")
    assert tenant.allows("one") and not tenant.allows("two") and (tenant.requests_per_minute, tenant.rows) == (60, 4)
    assert run(["token", str(path)]) == run(["token", str(path), "a", "--admin"]) == 2
    assert run(["token", str(path), "a b"]) == 2 and path.read_text() == text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host", "0.0.0.0"], "other machines could ask without a token"),
        (["--host", "example.org"], "other machines could ask without a token"),
        (["--admin", "admin.sock"], "needs an administrator's token"),
        (["--admin", "localhost:99999"], "write HOST:PORT"),
        (["--admin", "0.0.0.0:8001"], "from this machine alone"),
        (["--adapters", "nowhere"], "no such folder"),
        (["--tokens", "nowhere.json"], "no such file"),
        (["--name", "a@b"], "name"),
    ],
)
def test_the_command_refuses_what_is_unsafe_before_the_base_loads(tiny_base, options, says, capsys, monkeypatch):
    monkeypatch.setattr("budwood.serving.http.start.load_for_task", lambda *a, **k: pytest.fail("loaded"))
    assert run(["serve", str(tiny_base), *options]) == 2
    assert says in capsys.readouterr().err


def test_an_address_that_is_taken_is_known_before_the_base_loads(tiny_base, capsys, monkeypatch):
    monkeypatch.setattr("budwood.serving.http.start.load_for_task", lambda *a, **k: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["serve", str(tiny_base), "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen at http://127.0.0.1:" in capsys.readouterr().err


def test_without_the_extra_the_command_says_what_to_install(tiny_base, capsys, monkeypatch):
    monkeypatch.setattr("budwood.cli.serve.find_spec", lambda name: None)
    assert run(["serve", str(tiny_base)]) == 3
    assert "pip install 'budwood[serve]'" in capsys.readouterr().err


def test_input_error_is_what_add_token_raises(tmp_path):
    with pytest.raises(InputError, match="tenant"):
        add_token(tmp_path / "t.json", "a/b")
