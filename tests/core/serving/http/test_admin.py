"""The administrator: adapters come and go below requests in flight; what fails leaves everything as it was."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from tests.core.serving.conftest import make_adapter
from tests.core.serving.http.conftest import admin, ask, client, open_service, running

from budwood.errors import InputError
from budwood.serving.http.catalog import Root
from budwood.serving.http.tokens import add_token


@pytest.fixture
def managed(tiny_base, adapters, tmp_path):
    """A server with an administrator, its root, and the clients of both."""
    root = shutil.copytree(adapters, tmp_path / "root")
    token = add_token(tmp_path / "tokens.json", None)
    service = open_service(tiny_base, root, tmp_path / "tokens.json")
    return service, root, client(service), admin(service, token)


def text(client, model: str) -> str:
    response = ask(client, model=model, temperature=0, max_tokens=6)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_load_alias_reload_unload(managed):
    service, root, user, boss = managed
    first, second = text(user, "one"), text(user, "two")
    assert first != second
    # An alias moves; the name that it stood for goes, and the adapter stays with the alias.
    assert boss.put("/admin/adapters/prod", json={"target": "one"}).status_code == 200
    assert text(user, "prod") == first
    assert boss.put("/admin/adapters/prod", json={"target": "two"}).status_code == 200
    assert boss.delete("/admin/adapters/two").status_code == 200
    assert text(user, "prod") == second and ask(user, model="two").status_code == 404
    # Reload finds what changed on disk, what is new, and what is broken, which stays as it was.
    exact = service.catalog._table["one"].identity[:12]
    shutil.rmtree(root / "one")
    make_adapter(root / "one", 9)
    make_adapter(root / "new", 10)
    (root / "run" / "adapter" / "adapter_config.json").write_text("{")
    third = text(user, "run")
    done = boss.post("/admin/reload", json={})
    found = done.json()["adapters"]
    assert done.status_code == 422 and "not valid JSON" in found["run"]["error"]
    assert found["one"]["result"] == "holds no golden logits" and "new" in found
    assert text(user, "run") == third and text(user, "one") != first and text(user, "new")
    assert ask(user, model=f"one@{exact}").status_code == 404 and text(user, "prod") == second
    assert boss.post("/admin/reload", json={}).json()["adapters"]["one"]["result"] == "unchanged"
    # Names in the engine are only those that are served.
    assert (
        len(service.engine.names) == len(service.catalog.all()) == len(boss.get("/admin/adapters").json()["adapters"])
    )
    assert boss.post("/admin/adapters", json={"name": "x", "path": "new"}).status_code == 200
    assert text(user, "x") == text(user, "new")
    # A name is reloaded from the folder that it was loaded from.
    assert boss.post("/admin/adapters", json={"name": "one", "path": "new", "replace": True}).status_code == 200
    shutil.rmtree(root / "new")
    gone = boss.post("/admin/reload", json={}).json()["adapters"]
    assert "no such folder" in gone["one"]["error"] and text(user, "one") == text(user, "new")


REFUSED = [
    ({"name": "x", "path": "../root/one"}, "below the adapters' root"),
    ({"name": "x", "path": "/etc"}, "below the adapters' root"),
    ({"name": "x", "path": "one/../two"}, "below the adapters' root"),
    ({"name": "x", "path": "link"}, "or a link"),
    ({"name": "x", "path": "inner/link"}, "or a link"),
    ({"name": "x", "path": "nowhere"}, "no such folder"),
    ({"name": "x", "path": "file"}, "leads out of its folder"),
    ({"name": "x", "path": "pickle"}, "pickled weights run code"),
    ({"name": "x", "path": "rank"}, "rank 1000000000"),
    ({"name": "one"}, "loaded already"),
    ({"name": "tiny", "path": "one"}, "is that of the base"),
    ({"name": "a/b", "path": "one"}, "adapter name"),
    ({"name": "x" * 60, "path": "one"}, "at most 48"),
    ({"name": "x", "path": "one", "verify": "golden"}, "holds no golden logits"),
    ({"name": "x", "file": "a"}, "file: is no field"),
]  # fmt: skip


def test_what_cannot_be_loaded_leaves_everything_as_it_was(managed, tmp_path):
    service, root, user, boss = managed
    outside = make_adapter(tmp_path / "outside", 20)
    (root / "inner").mkdir()
    for link in ("link", "inner/link"):
        (root / link).symlink_to(outside)
    for name in ("file", "pickle", "rank"):
        make_adapter(root / name, 21)
    weights = root / "file" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(outside / "adapter_model.safetensors")
    (root / "pickle" / "adapter_model.safetensors").rename(root / "pickle" / "adapter_model.bin")
    config = root / "rank" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 10**9}))
    before = text(user, "one"), dict(service.engine.names), service.catalog.all()
    for body, says in REFUSED:
        response = boss.post("/admin/adapters", json=body)
        assert response.status_code in (400, 409, 422) and says in response.json()["error"]["message"], response.text
    assert (text(user, "one"), dict(service.engine.names), service.catalog.all()) == before
    assert set(Root(root).all()) == {"one", "two", "run", "file", "pickle", "rank"}  # links are not followed


def test_an_adapter_that_left_the_memory_and_is_gone_is_no_news_of_the_servers_paths(tiny_base, adapters, tmp_path):
    root = shutil.copytree(adapters, tmp_path / "root")
    service = open_service(tiny_base, root, adapter_bytes=70_000)  # for one of these two
    user = client(service)
    first = text(user, "one")
    assert text(user, "two") and not service.engine.names[service.catalog._table["one"].key].memory
    assert text(user, "one") == first and text(user, "two")
    shutil.rmtree(root / "one")
    gone = ask(user, model="one")
    assert gone.status_code == 503 and "cannot be read any more" in gone.json()["error"]["message"]
    assert str(tmp_path) not in gone.text and text(user, "two")


def test_golden_logits_are_compared_on_the_live_engine_before_a_name_moves(managed, with_golden):
    service, root, user, boss = managed
    with_golden(root / "good", 30)
    with_golden(root / "bad", 31, wrong=1e-3)
    before = text(user, "one")
    refused = boss.post("/admin/adapters", json={"name": "one", "path": "bad", "replace": True})
    assert refused.status_code == 422 and "golden logits differ" in refused.json()["error"]["message"]
    assert text(user, "one") == before and len(service.engine.names) == 3
    taken = boss.post("/admin/adapters", json={"name": "one", "path": "good", "replace": True, "verify": "golden"})
    assert taken.status_code == 200 and "as recorded" in taken.json()["golden"], taken.text
    assert text(user, "one") != before
    skipped = boss.post("/admin/adapters", json={"name": "bad", "verify": "hash"})
    assert skipped.status_code == 200 and skipped.json()["golden"] == "not compared"
    moved = boss.put("/admin/adapters/two", json={"target": "bad"})  # which was not compared yet
    assert moved.status_code == 422 and service.catalog._table["two"].path == "two"
    assert boss.put("/admin/adapters/two", json={"target": "bad", "verify": "hash"}).status_code == 200


def test_requests_in_flight_end_on_what_they_began_with(managed):
    """One that was resolved and not yet submitted, and one that streams, while the name moves and goes."""
    service, root, user, boss = managed
    expected = service.engine.submit([1, 40, 50], service.catalog._table["one"].key).result().text
    with running(service) as (asked, _):
        stream = asked.completions.create(
            model="one", prompt=[1, 40, 50], max_tokens=128, temperature=0, stream=True, stop=None
        )
        got = [next(stream).choices[0].text]
        held, go = threading.Event(), threading.Event()
        original = service.prompts.text

        def slow(prompt, adapters):
            held.set()
            assert go.wait(10)
            return original(prompt, adapters)

        service.prompts.text = slow
        found: list[str] = []

        def late() -> None:
            options = {"model": "one", "prompt": [1, 40, 50], "max_tokens": 128, "temperature": 0}
            found.append(asked.completions.create(**options).choices[0].text)

        thread = threading.Thread(target=late)
        thread.start()
        assert held.wait(10)
        assert boss.put("/admin/adapters/one", json={"target": "two"}).status_code == 200
        assert boss.delete("/admin/adapters/one").status_code == 200
        go.set()
        thread.join()
        got += [chunk.choices[0].text for chunk in stream]
        assert "".join(got) == expected == found[0]
        service.prompts.text = original
        assert ask(user, model="one").status_code == 404
    assert service.engine.call(lambda: len(service.engine.names)) == 2 and not service.catalog._retired


def test_a_socket_of_its_own(tmp_path):
    """Only this user can connect; one that is left over is replaced, and what is no socket is not."""
    from budwood.serving.http.settings import Address, Limits
    from budwood.serving.http.sockets import bind

    path = tmp_path / "admin.sock"
    first = bind(Address(path=str(path)), Limits())
    first.listen()
    assert os.stat(path).st_mode & 0o077 == 0
    with pytest.raises(InputError, match="another server listens there"):
        bind(Address(path=str(path)), Limits())
    first.close()
    bind(Address(path=str(path)), Limits()).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a socket"):
        bind(Address(path=str(tmp_path / "file")), Limits())
    with pytest.raises(InputError, match="cannot listen at"):
        bind(Address("192.0.2.1", 1), Limits())
    assert not Path(tmp_path / "file").read_text()
