"""Adapters under a budget of memory: the longest unused leave, and come back from their folders; none that is used."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from tests.core.serving.conftest import make_adapter
from tests.core.serving.engines import open_engine

from budwood import AdapterPool, InputError
from budwood.errors import BudwoodError, CorruptError, ResourceError
from budwood.serving.engine import Engine
from budwood.serving.requests import Sampling

PROMPT = [1, 40, 50, 60, 70]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Four adapters of one size."""
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(root / name, number) for number, name in enumerate("abcd")}


@pytest.fixture(scope="module")
def size(tiny_base, folders) -> int:
    engine = open_engine(tiny_base)
    engine.load("a", folders["a"])
    return engine.stats().adapter_bytes


def test_the_bytes_of_an_adapter_are_its_own(tiny_base, folders, scale, tmp_path):
    """Not the base's embeddings, of which it replaces rows; a third party's tensors count as in the file."""
    engine = open_engine(tiny_base)
    rows = make_adapter(tmp_path / "rows", 7, trainable_token_indices=[5, 40, 99])
    for name, folder in (("a", folders["a"]), ("rows", rows), ("scale", scale)):
        assert engine.load(name, folder).bytes == engine.find(name).bytes > 0
    assert engine.stats().adapter_bytes == sum(adapter.bytes for adapter in engine.stats().adapters)


def resident(engine: Engine) -> set[str]:
    return {name for adapter in engine.stats().adapters if adapter.resident for name in adapter.names}


def ask(engine: Engine, adapter, count: int = 6) -> list[int]:
    return engine.submit(PROMPT, adapter, Sampling(count)).result(60).tokens


def test_the_longest_unused_leaves_and_comes_back_as_it_was(tiny_base, folders, size):
    free = open_engine(tiny_base)
    for name, folder in folders.items():
        free.load(name, folder)
    expected = {name: ask(free, name) for name in (*folders, None)}
    assert len({tuple(tokens) for tokens in expected.values()}) == 5

    engine = open_engine(tiny_base, adapter_bytes=2 * size)
    for name in "abc":
        engine.load(name, folders[name], pinned=name == "b")
    assert resident(engine) == {"b", "c"}
    for name in ("a", "c", None, "b", "a", "c"):
        assert ask(engine, name) == expected[name]
        stats = engine.stats()
        assert stats.adapter_bytes <= 2 * size and "b" in resident(engine)
        assert name in resident(engine) or name is None
    assert (stats.evictions, stats.loads) == (5, 7)
    # The adapter of calls outside of requests stays while it is selected.
    pool = AdapterPool(free.base)
    pool.engine = engine
    pool.use("a")
    logits = pool.logits([PROMPT])
    with pytest.raises(ResourceError, match="adapter 'c': no room in adapter_bytes"):
        ask(engine, "c")
    pool.use(None)
    assert ask(engine, "c") == expected["c"] and resident(engine) == {"b", "c"}
    pool.use("a")
    assert pool.logits([PROMPT]).equal(logits) and resident(engine) == {"a", "b"}
    pool.use(None)
    # A blend needs its parts and as much room again.
    with pytest.raises(ResourceError, match="adapter 'a', 'c': no room"):
        ask(engine, {"a": 0.5, "c": 0.5})
    assert engine.stats().waiting == 0 and ask(engine, "a") == expected["a"]
    for name in "abc":
        engine.unload(name)
    assert engine.stats().adapter_bytes == 0 and engine.residents.uses == {}
    with pytest.raises(ResourceError, match="adapter 'd': no room"):
        open_engine(tiny_base, adapter_bytes=size - 1).load("d", folders["d"])


def test_no_adapter_leaves_while_a_request_uses_it_and_none_waits_for_ever(tiny_base, folders, size):
    engine = open_engine(tiny_base, adapter_bytes=size)
    for name in "abc":
        engine.load(name, folders[name])
    engine.load("again", folders["c"])
    alone = {name: ask(engine, name) for name in "abc"}
    long = engine.submit(PROMPT, "a", Sampling(300))
    assert long.next_piece(60) is not None
    second = engine.submit(PROMPT, "b", Sampling(6))
    third = engine.submit(PROMPT, "a", Sampling(6))  # in memory, but behind the second
    base = engine.submit(PROMPT, None, Sampling(6))
    gone = engine.submit(PROMPT, "c", Sampling(6))
    gone.cancel()
    assert gone.result(60).tokens == [] and base.result(60).tokens
    assert resident(engine) == {"a"} and engine.stats().waiting == 2
    engine.unload("b")  # a request that waits has it still
    long.cancel()
    assert second.result(60).tokens == alone["b"] and third.result(60).tokens == alone["a"]
    many = [(name, engine.submit(PROMPT, name, Sampling(6))) for name in "acacaaccca"]
    assert all(answer.result(60).tokens == alone[name] for name, answer in many)
    assert engine.stats().adapter_bytes <= size


def test_names_that_move_while_adapters_are_read(tiny_base, folders, size, monkeypatch):
    """A request gets what its names stood for when it was made; a selection, what its name stands for then."""
    free = open_engine(tiny_base)
    for name in "abc":
        free.load(name, folders[name])
    blend = {"a": 0.5, "b": 1.0}
    expected = [ask(free, blend), ask(free, "a")]
    engine = open_engine(tiny_base, adapter_bytes=4 * size)
    for name in "abc":
        engine.load(name, folders[name])
    engine.residents.budget = size
    assert ask(engine, "c") and resident(engine) == {"c"}
    engine.residents.budget = 4 * size
    held, read = threading.Event(), engine.loader.read

    def slow(directory, allow):
        assert held.wait(60)
        return read(directory, allow)

    monkeypatch.setattr(engine.loader, "read", slow)
    answers = [engine.submit(PROMPT, adapter, Sampling(6)) for adapter in (blend, "a")]
    selected: list[object] = []

    def select() -> None:
        try:
            engine.use("a")
        except InputError as error:
            selected.append(error)

    thread = threading.Thread(target=select)
    thread.start()
    while engine.stats().waiting < 3:
        pass
    assert ask(engine, "c") and ask(engine, None), "others do not wait for what is read"
    engine.alias("b", "c")
    engine.unload("a")
    held.set()
    assert [answer.result(60).tokens for answer in answers] == expected
    thread.join(60)
    assert "no adapter 'a' is loaded" in str(selected[0]) and engine.default is None
    for name in "bc":
        engine.unload(name)
    assert engine.stats().adapter_bytes == 0


def test_an_adapter_whose_folder_changed_is_not_used(tiny_base, folders, size, tmp_path):
    engine = open_engine(tiny_base, adapter_bytes=size)
    for name in "ab":
        shutil.copytree(folders[name], tmp_path / name)
        engine.load(name, tmp_path / name)
    shutil.copytree(folders["c"], tmp_path / "a", dirs_exist_ok=True)
    for _ in range(2):
        with pytest.raises(CorruptError, match="a: has changed since it was loaded: load it again"):
            ask(engine, "a")
    with pytest.raises(CorruptError, match="a: has changed since it was loaded"):
        engine.use("a")
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(BudwoodError, match=str(tmp_path / "a")):
        ask(engine, "a")
    assert ask(engine, "b") and engine.stats().waiting == 0
    with pytest.raises(InputError, match="no adapter 'x' is loaded"):
        engine.submit(PROMPT, {"x": 1})


def test_many_threads_share_little_room(tiny_base, folders, size):
    """Twelve threads ask four adapters and blends, with room for five; names come and go."""
    free = open_engine(tiny_base)
    for name, folder in folders.items():
        free.load(name, folder)
    asked = [*"abcd", None, {"a": 0.5, "b": 0.5}, {"c": 2.0}]
    expected = [ask(free, adapter) for adapter in asked]
    engine = open_engine(tiny_base, adapter_bytes=5 * size, max_rows=4)
    for name, folder in folders.items():
        engine.load(name, folder)
    wrong: list[object] = []

    def run(number: int) -> None:
        try:
            for i in range(7):
                which = (number + i) % 7
                if ask(engine, asked[which]) != expected[which]:
                    wrong.append(asked[which])
        except BaseException as error:
            wrong.append(error)

    def change() -> None:
        for number in range(8):
            engine.load("more", folders["abcd"[number % 4]])
            engine.use("abcd"[number % 4])
            engine.unload("more")
            engine.use(None)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(12)] + [threading.Thread(target=change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    stats = engine.stats()
    assert stats.evictions > 0 and stats.waiting == stats.rows == 0 and stats.adapter_bytes <= 5 * size
    for name in folders:
        engine.unload(name)
    assert engine.call(lambda: (engine.residents.uses, engine.residents.requests, engine.residents.waits)) == (
        {},
        {},
        [],
    )
