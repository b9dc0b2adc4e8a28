"""Requests to the live engine, from any threads: each gets the answer that it gets alone, or fails alone."""

from __future__ import annotations

import gc
import importlib
import threading
import weakref

import pytest
import torch
from tests.core.serving.engines import LONG, SHORT, alone, load_all, open_engine

from budwood import AdapterPool, InputError
from budwood.errors import BudwoodError, ResourceError
from budwood.serving import prefix, requests, scheduler
from budwood.serving.engine import Engine
from budwood.serving.requests import QueueFullError, Sampling


def test_requests_in_flight_together_get_the_tokens_that_they_get_alone(tiny_base, folders):
    """Different adapters, lengths and limits; the prompts of some are longer than what a step computes."""
    engine = open_engine(tiny_base, max_rows=6, step_tokens=48)
    names = load_all(engine, folders)
    prompts = [*LONG, *SHORT, *SHORT, LONG[1]]
    asked = [(p, names[i % len(names)], Sampling(3 + 5 * i % 17)) for i, p in enumerate(prompts)]
    together = [a.result() for a in [engine.submit(*request, stream=False) for request in asked]]
    assert max(len(answer.tokens) for answer in together) > 10
    for request, answer in zip(asked, together, strict=True):
        assert engine.submit(*request).result() == answer
    pool = AdapterPool(tiny_base, precision="fp32", device="cpu")
    fixed = pool.generate(SHORT, max_new_tokens=9)
    model = pool.base.model
    for prompt, answer in zip(SHORT, fixed, strict=True):
        own = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=2)[
            0, len(prompt) :
        ]
        assert answer.tokens == [t for t in own.tolist() if t != 2]


def test_threads_get_their_own_adapters_answers_while_others_load(tiny_base, folders):
    """Twelve threads ask five adapters and the base; one loads, moves an alias, and unloads."""
    engine = open_engine(tiny_base)
    names = load_all(engine, {n: folders[n] for n in ("lora", "wide", "dora", "adalora", "head")})
    expected = {(n, i): engine.submit(p, n, Sampling(6)).result().tokens for n in names for i, p in enumerate(SHORT)}
    wrong: list[object] = []
    checked = []

    def ask(number: int) -> None:
        try:
            for i, prompt in enumerate(SHORT):
                name = names[(number + i) % len(names)]
                found = engine.submit(prompt, name, Sampling(6)).result().tokens
                checked.append(found)
                if found != expected[name, i]:
                    wrong.append((name, i))
        except Exception as error:
            wrong.append(error)

    def change() -> None:
        for number in range(6):
            engine.load("more", folders["twin"])
            engine.alias("moved", "more" if number % 2 else "lora")
            engine.unload("more")

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)] + [threading.Thread(target=change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(checked) == 72
    assert engine.submit(SHORT[0], "moved", Sampling(6)).result().tokens != expected["lora", 0]


def test_a_request_ends_on_the_adapter_that_it_began_with(tiny_base, folders):
    engine = open_engine(tiny_base)
    engine.load("a", folders["lora"])
    engine.load("b", folders["twin"])
    old, new = (engine.submit(LONG[0], name, Sampling(40)).result().tokens for name in "ab")
    assert old != new
    running = engine.submit(LONG[0], "a", Sampling(40))
    engine.alias("a", "b")
    engine.unload("b")
    assert running.result().tokens == old
    assert engine.submit(LONG[0], "a", Sampling(40)).result().tokens == new
    engine.unload("a")
    assert engine.call(lambda: engine.residents.uses) == {}


def test_each_request_has_its_own_settings(tiny_base, folders):
    engine = open_engine(tiny_base)
    engine.load("a", folders["lora"])
    greedy = engine.submit(SHORT[0], "a", Sampling(12)).result()
    stop = greedy.tokens[4]
    asked = [
        Sampling(12, temperature=1.0, seed=3), Sampling(12), Sampling(12, stop_ids=(stop,)),
        Sampling(12, temperature=0.8, top_p=0.9, seed=(3, 1)), Sampling(2, log_probs=True, top_log_probs=3),
        Sampling(12, temperature=1.0, top_k=5, seed=4), Sampling(12, temperature=1.0, seed=3),
    ]  # fmt: skip
    together = [a.result() for a in [engine.submit(SHORT[0], "a", sampling) for sampling in asked]]
    for sampling, answer in zip(asked, together, strict=True):
        own = engine.submit(SHORT[0], "a", sampling).result()
        assert (own.tokens, own.text, own.finish_reason) == (answer.tokens, answer.text, answer.finish_reason)
        assert own.log_probs == pytest.approx(answer.log_probs, abs=1e-5)
    assert together[0] == together[6] != together[5]
    several = [a.result() for a in engine.samples(3, SHORT[0], Sampling(12, temperature=1.0, seed=8), adapter="a")]
    assert len({tuple(answer.tokens) for answer in several}) == 3
    assert engine.submit(SHORT[0], "a", Sampling(12, temperature=1.0, seed=(8, 2))).result().tokens == several[2].tokens
    assert together[1] == greedy and together[0].tokens != greedy.tokens
    assert (together[2].tokens, together[2].finish_reason) == (greedy.tokens[: greedy.tokens.index(stop)], "eos")
    assert together[2].end_token == stop
    assert (together[4].tokens, together[4].finish_reason) == (greedy.tokens[:2], "length")
    scores = alone(engine, "a", SHORT[0]).log_softmax(-1)
    top = scores.topk(3)
    assert together[4].top_log_probs[0] == pytest.approx(
        dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    )
    assert together[4].log_probs[0] == pytest.approx(float(top.values[0]), abs=1e-5)
    pieces = list(engine.submit(SHORT[0], "a", Sampling(12)))
    assert "".join(pieces) == greedy.text
    stopped = engine.submit(SHORT[0], "a", Sampling(12, stop=(greedy.text[3:5],))).result()
    assert (stopped.text, stopped.finish_reason) == (greedy.text[: greedy.text.index(greedy.text[3:5])], "stop")


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([1, -1], {}, "prompt: -1 is not a token id of the base .*, which are 0 to 299"),
        ([1, 99999], {}, "prompt uses token 99999"),
        ([1, 2.5], {}, "2.5 is not a token id"),
        ([], {}, "prompt is empty"),
        ([1] * 512, {}, "prompt has 512 tokens; the base's context holds 512"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens: 0"),
        ([1], {"temperature": float("nan")}, "temperature: nan"),
        ([1], {"top_p": 0}, "top_p: 0"),
        ([1], {"top_k": -1}, "top_k: -1"),
        ([1], {"top_log_probs": 301}, "top_log_probs: 301"),
        ([1], {"stop": "no list"}, "stop: must be a list"),
    ],
)
def test_bad_requests_are_refused_at_the_door(shared, prompt, sampling, message):
    with pytest.raises(InputError, match=message):
        shared.submit(prompt, None, Sampling(**sampling))


@pytest.fixture(scope="module")
def shared(tiny_base) -> Engine:
    return open_engine(tiny_base)


def test_bad_prompts_of_a_pool_are_refused_too(tiny_base):
    pool = AdapterPool(tiny_base, precision="fp32", device="cpu")
    for prompts, message in (([[1, 2.5]], "prompt 1: 2.5"), ("abc", "is one text"), ([[1], [1, -1]], "prompt 2: -1")):
        with pytest.raises(InputError, match=message):
            pool.generate(prompts, max_new_tokens=2)


def test_samples_of_one_prompt_share_its_computation(tiny_base, folders, monkeypatch):
    """Each gets its answer alone, although others end, are cancelled, wait for a row, or are computed again."""
    run, computed = scheduler.Forward.run, []

    def counting(self, rows, slots, count):
        if count > 1:
            computed.append(sum(min(count, row.todo) for row in rows))
        return run(self, rows, slots, count)

    monkeypatch.setattr(scheduler.Forward, "run", counting)
    prompt, hot = LONG[2], Sampling(9, temperature=1.0, seed=8, log_probs=True)

    def seed(number: int) -> Sampling:
        return Sampling(9, temperature=1.0, seed=(8, number), log_probs=True)

    for options in ({}, {"max_rows": 3}, {"step_tokens": 40}, {"prefix_bytes": 1 << 20}):
        engine = open_engine(tiny_base, **options)
        load_all(engine, {"lora": folders["lora"], "dora": folders["dora"]})
        alone = [engine.submit(prompt, "lora", seed(number)).result() for number in range(6)]
        assert len({tuple(answer.tokens) for answer in alone}) > 3
        computed.clear()
        heard: list[tuple[int, str | None]] = []
        answers = engine.samples(6, prompt, hot, adapter="lora", listener=lambda *event, to=heard: to.append(event))
        found = [answer.result() for answer in answers]
        for one, other in zip(alone, found, strict=True):
            assert one.tokens == other.tokens and one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
        assert {n for n, piece in heard if piece is None} == set(range(6))
        assert "".join(piece for n, piece in heard if n == 5 and piece) == alone[5].text
        prompts = 2 if "max_rows" in options else 1  # the last rows join when the first have ended
        assert sum(computed) <= prompts * len(prompt)
    # The one that computes the prompt is cancelled while it does.
    engine = open_engine(tiny_base, step_tokens=8)
    engine.load("lora", folders["lora"])
    answers = engine.samples(4, prompt, hot, adapter="lora")
    answers[0].cancel()
    assert [answer.result().tokens for answer in answers[1:]] == [answer.tokens for answer in alone[1:4]]
    # Rows that make room are computed again.
    engine = open_engine(tiny_base)
    expected = [engine.submit(SHORT[0], None, Sampling(120, temperature=1.0, seed=(3, i))).result() for i in range(5)]
    engine.scheduler.forward.cache.budget = 3 * 128 * 2 * 2 * 2 * 16 * 4
    answers = engine.samples(5, SHORT[0], Sampling(120, temperature=1.0, seed=3))
    assert [answer.result().tokens for answer in answers] == [answer.tokens for answer in expected]
    assert engine.scheduler.preempted > 0
    # The first ends with its first token, and a name moves between two of them.
    greedy = engine.submit(prompt, None, Sampling(4)).result().tokens
    twins = requests.Twins()
    answers = [engine.submit(prompt, None, Sampling(n), twins=twins) for n in (1, 4, 1, 4)]
    assert [answer.result().tokens for answer in answers] == [greedy[:1], greedy, greedy[:1], greedy]
    engine.load("x", folders["lora"])
    engine.load("y", folders["twin"])
    want = [engine.submit(prompt, name, Sampling(6)).result().tokens for name in "xy"]
    twins = requests.Twins()
    first = engine.submit(prompt, "x", Sampling(6), twins=twins)
    assert [first.result().tokens, engine.submit(prompt, "y", Sampling(6), twins=twins).result().tokens] == want


def test_a_cancelled_request_frees_its_row_within_a_step(tiny_base):
    engine = open_engine(tiny_base, max_rows=1)
    first, second = engine.submit(SHORT[0], None, Sampling(400)), engine.submit(SHORT[1], None, Sampling(2))
    assert first.next_piece() is not None
    first.cancel()
    left = engine.call(lambda: [len(row.ids) for row in engine.scheduler.rows])
    assert len(left) <= 1 and max(left, default=0) <= len(SHORT[1]) + 1
    assert second.result().finish_reason == "length"
    assert first.result().finish_reason == "cancelled" and 0 < len(first.result().tokens) < 400
    first.cancel()  # without effect
    waiting = engine.submit(SHORT[0], None, Sampling(400))
    never = engine.submit(SHORT[1], None, Sampling(3))
    never.cancel()
    assert never.result().tokens == []
    waiting.cancel()
    waiting.result()


def test_a_second_adapter_never_sees_the_prefix_of_the_first(tiny_base, folders, monkeypatch):
    """It would if prefixes were stored under their tokens alone."""
    own = {}
    for name in ("lora", "twin", None):
        engine = open_engine(tiny_base)
        load_all(engine, {n: folders[n] for n in ("lora", "twin")})
        own[name] = engine.submit(LONG[3], name, Sampling(10, log_probs=True)).result()

    def ask(engine: Engine, name: str | None, **options) -> tuple[list[int], list[float]]:
        answer = engine.submit(LONG[3], name, Sampling(10, log_probs=True), **options).result()
        return answer.tokens, answer.log_probs

    def right(engine: Engine, name: str | None, **options) -> bool:
        tokens, scores = ask(engine, name, **options)
        return tokens == own[name].tokens and scores == pytest.approx(own[name].log_probs, abs=1e-4)

    engine = open_engine(tiny_base, prefix_bytes=1 << 20)
    load_all(engine, {n: folders[n] for n in ("lora", "twin")})
    assert all(right(engine, name) for name in ("lora", "twin", None)) and engine.prefixes.hits == 0
    assert right(engine, "lora") and engine.prefixes.hits == 1, "the same adapter reuses its own"
    engine.alias("again", "lora")
    assert right(engine, "lora") and ask(engine, "again")[0] == own["lora"].tokens and engine.prefixes.hits == 3
    assert right(engine, "lora", tenant="x") and right(engine, "lora", template="y") and engine.prefixes.hits == 3
    engine.unload("lora")
    engine.load("lora", folders["twin"])  # another content under the same name
    assert ask(engine, "lora")[0] == own["twin"].tokens
    monkeypatch.setattr("budwood.serving.engine.namespace", lambda *parts: b"the same for all")
    broken = open_engine(tiny_base, prefix_bytes=1 << 20)
    load_all(broken, {n: folders[n] for n in ("lora", "twin")})
    assert right(broken, "lora") and not right(broken, "twin")
    small = prefix.PrefixCache(100)
    small.add(b"a", [(torch.zeros(20), torch.zeros(5))])
    small.add(b"b", [(torch.zeros(20), torch.zeros(4))])
    assert small.bytes == 96, "the oldest leaves"


def test_rows_wait_for_memory_and_are_computed_again(tiny_base, folders):
    """With room for two rows of full length, six are admitted as far as they fit; the youngest makes room."""
    engine = open_engine(tiny_base)
    names = load_all(engine, {n: folders[n] for n in ("lora", "dora")})
    asked = [(SHORT[i], names[i % 3], Sampling(120, temperature=0.5 * (i % 2), seed=i)) for i in range(6)]
    expected = [engine.submit(*request).result() for request in asked]
    per_position = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, d, bytes
    engine.scheduler.forward.cache.budget = 4 * 128 * per_position
    found = [a.result() for a in [engine.submit(*request) for request in asked]]
    assert found == expected
    assert engine.scheduler.preempted > 0


def test_a_row_that_raises_fails_alone(tiny_base, folders, scale):
    engine = open_engine(tiny_base)
    names = load_all(engine, {"lora": folders["lora"], "scale": scale})
    expected = {name: engine.submit(SHORT[0], name, Sampling(5)).result() for name in names}
    module = importlib.import_module("budwood_scale")
    module.FAIL.append(True)
    answers = {name: engine.submit(SHORT[0], name, Sampling(5)) for name in (*names, "lora")}
    with pytest.raises(BudwoodError, match="adapter 'scale': the request failed: ValueError: as told"):
        answers["scale"].result()
    assert all(answers[name].result() == expected[name] for name in (None, "lora"))
    module.FAIL.clear()

    def listen(piece: str | None) -> None:
        raise OSError("nobody there")

    unheard, fine = engine.submit(SHORT[1], "lora", listener=listen), engine.submit(SHORT[0], "lora", Sampling(5))
    with pytest.raises(BudwoodError, match="the request failed: OSError: nobody there"):
        unheard.result()
    assert fine.result() == expected["lora"]
    assert engine.submit(SHORT[0], "scale", Sampling(5)).result() == expected["scale"]


def test_an_adapter_that_computes_nan_is_quarantined(tiny_base, folders):
    engine = open_engine(tiny_base)
    load_all(engine, {n: folders[n] for n in ("lora", "twin")})
    engine.call(lambda: engine.names["twin"].live.updates["model.layers.1.mlp.up_proj"].b.fill_(float("inf")))
    answers = [engine.submit(SHORT[0], name, Sampling(5)) for name in ("twin", "lora", None)]
    with pytest.raises(InputError, match="adapter 'twin' computes logits that are not finite"):
        answers[0].result()
    assert all(len(answer.result().tokens) for answer in answers[1:])
    with pytest.raises(InputError, match="adapter 'twin' computes logits"):
        engine.submit(SHORT[0], "twin").result()
    engine.unload("twin")
    engine.load("twin", folders["twin"])
    assert engine.submit(SHORT[0], "twin", Sampling(3)).result().tokens


def test_out_of_memory_makes_the_youngest_row_wait(tiny_base, monkeypatch):
    engine = open_engine(tiny_base)
    expected = [engine.submit(prompt, None, Sampling(6)).result() for prompt in SHORT[:4]]
    run, seen = scheduler.Forward.run, []

    def short_of_memory(self, rows, slots, count):
        seen.append(len(rows))
        if len(rows) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return run(self, rows, slots, count)

    monkeypatch.setattr(scheduler.Forward, "run", short_of_memory)
    found = [a.result() for a in [engine.submit(prompt, None, Sampling(6)) for prompt in SHORT[:4]]]
    assert found == expected and max(seen) > 2 and engine.scheduler.preempted > 0
    monkeypatch.setattr(
        scheduler.Forward, "run", lambda *arguments: short_of_memory(*[[]] * 3) or torch.zeros(0, 1) / []
    )
    with pytest.raises(BudwoodError, match="the request failed"):
        engine.submit(SHORT[0], None, Sampling(2)).result()


def test_a_full_queue_refuses(tiny_base):
    engine = open_engine(tiny_base, max_rows=1, max_waiting=2)
    answers = []
    with pytest.raises(QueueFullError, match="2 requests wait already") as raised:
        for _ in range(50):
            answers.append(engine.submit(SHORT[0], None, Sampling(100)))
    assert isinstance(raised.value, BudwoodError) and not isinstance(raised.value, ResourceError)
    for answer in answers:
        answer.cancel()
    assert {answer.result().finish_reason for answer in answers} <= {"cancelled", "length"}


def test_an_engine_ends_with_its_last_reference(tiny_base):
    engine = open_engine(tiny_base)
    engine.submit(SHORT[0], None, Sampling(2)).result()
    thread, model = engine.thread.current, weakref.ref(engine.model)
    assert thread is not None and thread.is_alive()
    gc.disable()
    try:
        del engine  # without a collection of cycles, since a base may fill the memory
        thread.join(timeout=20)
        assert not thread.is_alive() and model() is None
    finally:
        gc.enable()
