"""The live engine: any adapters in one batch, any threads, rows that join and leave; each answer is that of its own."""

from __future__ import annotations

import gc
import importlib
import threading
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import make_tokenizer
from tests.core.serving.conftest import make_adalora, make_adapter

from budwood import AdapterPool, InputError
from budwood.errors import BudwoodError, ResourceError
from budwood.model.base import load_base
from budwood.serving import prefix, requests, scheduler
from budwood.serving.engine import Engine
from budwood.serving.requests import QueueFullError, Sampling

LONG = [[1, *((7 * i + 3 * j) % 290 + 5 for i in range(70 + 9 * j))] for j in range(4)]
SHORT = [[1, 40, 50, 60, 70], [1, 99, 7], [9], [1, 200, 201, 202, 203, 204, 205], [1, 30, 31], [1, 8, 9, 10]]


def open_engine(base: Path, **options) -> Engine:
    return Engine(load_base(base, "none", "AutoModelForCausalLM", torch.float32), **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Adapters of every first-party method and kind."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "lora": make_adapter(root / "lora", 1),
        "wide": make_adapter(root / "wide", 2, rank=24, use_rslora=True, names=("self_attn.q_proj", "mlp.up_proj")),
        "twin": make_adapter(root / "twin", 3),
        "dora": make_adapter(root / "dora", 4, use_dora=True),
        "adalora": make_adalora(root / "adalora", 5),
        "head": make_adapter(root / "head", 6, modules_to_save=["lm_head"]),
        "rows": make_adapter(root / "rows", 7, trainable_token_indices=[5, 40, 99]),
    }


def load_all(engine: Engine, folders: dict[str, Path]) -> list[str | None]:
    for name, folder in folders.items():
        engine.load(name, folder)
    return [None, *folders]


def logits_of(engine: Engine, names: list[str | None], tokens: list[list[int]]) -> torch.Tensor:
    """Return the logits after rows that are computed in one batch: first all but the last token, then that one."""

    def compute() -> torch.Tensor:
        forward, loaded = engine.scheduler.forward, [None if n is None else engine.names[n].live for n in names]
        slots = list(range(len(tokens)))
        with torch.no_grad():
            forward.logits([row[:-1] for row in tokens], slots, [0] * len(tokens), forward.plan(loaded, False))
            starts = [len(row) - 1 for row in tokens]
            found = forward.logits([row[-1:] for row in tokens], slots, starts, forward.plan(loaded, True))
        forward.cache.free()
        return found

    return engine.call(compute)


def alone(engine: Engine, name: str | None, tokens: list[int]) -> torch.Tensor:
    """Return the logits of the model's own forward, without a cache, with one adapter in use."""
    return engine.with_adapter(
        name, lambda: engine.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].detach()
    )


def test_adapters_of_every_method_share_a_batch_and_each_row_is_its_own(tiny_base, folders, scale):
    """LoRA of several ranks, rsLoRA, DoRA, AdaLoRA, a whole head, rows of embeddings, a third party's method."""
    engine = open_engine(tiny_base)
    names = load_all(engine, {**folders, "scale": scale, "lora-again": folders["lora"]})
    tokens = [LONG[0][:9], LONG[1][:9], LONG[2][:6], [1, 40, 99, 5, 7, 8], *[LONG[3][:7]] * 6]
    untouched = open_engine(tiny_base)
    mixed = logits_of(engine, [*names], tokens)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], alone(engine, name, tokens[i]), atol=2e-5, rtol=0)
    others = [alone(engine, name, tokens[4]) for name in names]
    assert all(not torch.allclose(others[0], other, atol=1e-2) for other in others[1:])
    assert others[1].equal(others[-1]) and names[1] == "lora"
    # The base's rows are bitwise those of a base that never had an adapter, in the same batch.
    alike = [None, "lora", "dora", None]
    part = logits_of(engine, alike, tokens[5:9])
    assert part[[0, 3]].equal(logits_of(untouched, [None] * 4, tokens[5:9])[[0, 3]])


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


def test_a_blend_is_the_weighted_sum_of_the_updates(tiny_base, folders, scale):
    """LoRA, AdaLoRA, DoRA (against its definition in float64) and a third party's method, also beside other rows."""
    engine = open_engine(tiny_base)
    load_all(engine, {**folders, "scale": scale})
    weights = {"lora": 0.7, "twin": -0.3, "adalora": 0.5, "dora": 0.6, "scale": 0.4}
    model = load_base(tiny_base, "none", "AutoModelForCausalLM", torch.float32).model.double()
    vectors, dora = (
        load_file(scale / "adapter_model.safetensors"),
        load_file(folders["dora"] / "adapter_model.safetensors"),
    )
    with torch.no_grad():
        base = {path: model.get_submodule(path).weight.clone() for path in engine.names["lora"].live.updates}
        for name, weight in weights.items():
            for path, update in engine.names[name].live.updates.items():
                own = base[path]
                if name == "scale":
                    changed = vectors[path].double()[:, None] * own
                else:
                    changed = own + update.scaling * (update.b.double() @ update.a.double())
                if name == "dora":
                    magnitude = dora[f"base_model.model.{path}.lora_magnitude_vector"].double()
                    changed = (magnitude / changed.norm(dim=1))[:, None] * changed
                model.get_submodule(path).weight += weight * (changed - own)
        scores = model(torch.tensor([SHORT[0]])).logits[0, -1].log_softmax(-1)
    asked = [engine.submit(SHORT[0], a, Sampling(8, log_probs=True)) for a in (weights, "lora", None, "dora", weights)]
    together = [answer.result() for answer in asked]
    for answer in (together[0], together[4], engine.submit(SHORT[0], weights, Sampling(8, log_probs=True)).result()):
        assert answer.tokens == together[0].tokens and answer.tokens[0] == int(scores.argmax())
        assert abs(answer.log_probs[0] - float(scores.max())) < 1e-4
    assert together[0].tokens != together[1].tokens
    for name in ("dora", "scale"):  # with weight 1, one adapter is itself
        own = engine.submit(SHORT[0], name, Sampling(8, log_probs=True)).result()
        answer = engine.submit(SHORT[0], {name: 1}, Sampling(8, log_probs=True)).result()
        assert answer.tokens == own.tokens and answer.log_probs == pytest.approx(own.log_probs, abs=1e-4)
    for bad, message in (
        (
            {"lora": 1.0, "head": 1.0},
            "'head' of type 'lora' replaces whole modules or rows of embeddings, so it cannot be blended",
        ),
        ({"rows": 1.0}, "'rows' of type 'lora' replaces whole modules"),
        ({"lroa": 1.0}, "Did you mean 'lora'"),
        ({}, "names no adapter"),
        ({"lora": float("nan")}, "not a finite weight"),
    ):
        with pytest.raises(InputError, match=message):
            engine.submit(SHORT[0], bad)


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


def test_loading_and_unloading_leaves_nothing(tiny_base, folders):
    """The modules, their attributes and the tensors in memory are the base's own again."""
    engine = open_engine(tiny_base)
    state = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    attributes = [(path, id(m), sorted(vars(m))) for path, m in engine.model.named_modules()]

    def cycle() -> None:
        names = load_all(engine, folders)
        answers = [engine.submit(SHORT[1], name, Sampling(2), stream=False) for name in names]
        assert all(answer.result().tokens for answer in answers)
        engine.submit(SHORT[1], {"lora": 0.5, "twin": 0.5}, Sampling(1)).result()
        for name in folders:
            engine.unload(name)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())

    cycle()
    before = tensors()
    for _ in range(3):
        cycle()
    assert tensors() <= before
    assert engine.call(lambda: (engine.residents.uses, engine.residents.blends, engine.table.stacks.bytes)) == (
        {},
        {},
        0,
    )
    assert [(path, id(m), sorted(vars(m))) for path, m in engine.model.named_modules()] == attributes
    assert all(tensor.equal(state[name]) for name, tensor in engine.model.state_dict().items())


def test_stacks_stay_under_their_budget(tiny_base, folders):
    """Adapters that do not fit are computed from their own tensors."""
    names = ["lora", "twin", "head", "rows"]
    large, small = open_engine(tiny_base), open_engine(tiny_base, stack_bytes=200_000)
    for engine in (large, small):
        load_all(engine, {name: folders[name] for name in names})
    tokens = [[1, 8, 9, 10]] * 4
    torch.testing.assert_close(logits_of(large, names, tokens), logits_of(small, names, tokens), atol=1e-5, rtol=0)
    assert 0 < small.table.stacks.bytes <= 200_000 < large.table.stacks.bytes


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


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "head", "rows"])
def test_the_gradient_by_the_input_is_that_of_the_attached_adapter(tiny_base, folders, name):
    """An attack in an evaluation differentiates through the adapter in use."""
    gradients = []
    for table in (True, False):
        engine = open_engine(tiny_base)
        engine.loader.table_first = table
        engine.load("a", folders[name])
        engine.use("a")
        embeddings = engine.model.get_input_embeddings()(torch.tensor([SHORT[3], SHORT[3]])).detach().requires_grad_()
        logits = engine.model(inputs_embeds=embeddings).logits
        logits.float().log_softmax(-1)[..., 7].sum().backward()
        gradients.append(embeddings.grad)
    assert float(gradients[0].abs().max()) > 1e-3
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def save_model(folder: Path, model) -> Path:
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", ["Mistral", "Gemma2", "Gemma3"])
def test_rows_of_a_base_with_sliding_windows_share_batches(tmp_path, kind):
    """In all layers, or in some, beyond the window: the tokens of transformers' generate, and those of a row alone."""
    text = "Text" if kind == "Gemma3" else ""
    module = importlib.import_module(f"transformers.models.{kind.lower()}")
    torch.manual_seed(0)
    options = {} if kind == "Mistral" else {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
    config = getattr(module, f"{kind}{text}Config")(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, sliding_window=6, initializer_range=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    engine = open_engine(save_model(tmp_path / "base", getattr(module, f"{kind}ForCausalLM")(config)), step_tokens=40)
    engine.load("a", make_adapter(tmp_path / "a", 1))
    names, prompts = ["a", None, "a", None, "a"], [LONG[0], LONG[1][:20], SHORT[0], SHORT[3], LONG[2][:33]]
    asked = [(p, name, Sampling(6 + 3 * i)) for i, (p, name) in enumerate(zip(prompts, names, strict=True))]
    together = [answer.result() for answer in [engine.submit(*request) for request in asked]]
    assert engine.scheduler.unsupported is None and engine.model.config.sliding_window == 6
    for (prompt, name, sampling), answer in zip(asked, together, strict=True):
        assert engine.submit(prompt, name, sampling).result() == answer
        ids, most = torch.tensor([prompt]), sampling.max_new_tokens
        run = partial(engine.model.generate, ids, max_new_tokens=most, do_sample=False)
        assert answer.tokens == [t for t in engine.with_adapter(name, run)[0, len(prompt) :].tolist() if t != 2]
    mixed = logits_of(engine, names, [prompt[:30] for prompt in prompts])
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], alone(engine, name, prompts[i][:30]), atol=2e-5, rtol=0)


def test_a_base_whose_rows_cannot_join_is_answered_in_fixed_batches(tiny_base, folders, monkeypatch):
    """With the same answers, pieces, log-probabilities and seeds; cancelled, and failing, by row."""
    asked = [
        (prompt, name, Sampling(9 + i, temperature=i % 2, seed=i, log_probs=i > 1, top_log_probs=i // 3, stop=stop))
        for i, (prompt, name, stop) in enumerate(
            zip(SHORT, ["lora", None, "lora", "dora", None, None], [()] * 5 + [("e",)], strict=True)
        )
    ]
    free = open_engine(tiny_base)
    load_all(free, {n: folders[n] for n in ("lora", "dora")})
    expected = [free.submit(*request).result() for request in asked]
    monkeypatch.setattr(scheduler.Forward, "unsupported", lambda self: "as told")
    engine = open_engine(tiny_base)
    load_all(engine, {n: folders[n] for n in ("lora", "dora")})
    answers = [engine.submit(*request) for request in asked]
    texts = ["".join(answer) for answer in answers]
    for text, answer, own in zip(texts, answers, expected, strict=True):
        found = answer.result()
        assert (found.tokens, found.text, found.finish_reason) == (own.tokens, own.text, own.finish_reason)
        assert text == own.text and found.log_probs == pytest.approx(own.log_probs, abs=1e-5)
        assert [list(top) for top in found.top_log_probs] == [list(top) for top in own.top_log_probs]
    heard: list[str | None] = []

    def listen(piece: str | None) -> None:
        heard.append(piece)
        if len(heard) == 2:
            long.cancel()
            raise OSError("nobody there")

    engine.submit(SHORT[2], None, Sampling(1)).result()
    fine, long = (engine.submit(SHORT[0], "lora", Sampling(count)) for count in (9, 400))
    unheard = engine.submit(SHORT[1], "lora", Sampling(30), listener=listen)
    with pytest.raises(BudwoodError, match="the request failed: OSError: nobody there"):
        unheard.result()
    assert fine.result().tokens == free.submit(SHORT[0], "lora", Sampling(9)).result().tokens
    assert long.result().finish_reason == "cancelled" and len(long.result().tokens) < 300
    stats = engine.stats()
    assert stats.rows == stats.waiting == 0 and stats.tokens["", ""][0] == sum(len(SHORT[i]) for i in (1, 4, 5, 2))
    assert engine.call(lambda: sum(engine.residents.requests.values())) == 0


def test_biases_and_transposed_linears_by_row(tmp_path):
    """GPT-2: LayerNorms, biases that train, DoRA on transposed weights, learned positions."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    base = save_model(tmp_path / "base", GPT2LMHeadModel(config))
    engine = open_engine(base)
    for name, fields in (("all", {"bias": "all"}), ("own", {"bias": "lora_only", "use_dora": True}), ("plain", {})):
        options = {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, **fields}
        model = get_peft_model(GPT2LMHeadModel.from_pretrained(base), LoraConfig(**options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(tmp_path / name)
        engine.load(name, tmp_path / name)
    names = [None, "all", "own", "plain", None]
    tokens = [LONG[i % 4][: 5 + i] for i in range(5)]
    mixed = logits_of(engine, names, tokens)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], alone(engine, name, tokens[i]), atol=5e-5, rtol=1e-5)
        assert name is None or not torch.allclose(mixed[i], alone(engine, None, tokens[i]), atol=1e-2)
    engine.submit(tokens[0], "all", Sampling(3)).result()
    assert engine.scheduler.unsupported is None
    # Of blends, biases count by their differences from the base's; with weight 1, an adapter is itself.
    for name in ("all", "own"):
        whole, half = (
            engine.submit(tokens[0], {name: weight}, Sampling(4, log_probs=True)).result() for weight in (1, 0.5)
        )
        own = engine.submit(tokens[0], name, Sampling(4, log_probs=True)).result()
        assert whole.tokens == own.tokens and whole.log_probs == pytest.approx(own.log_probs, abs=1e-4)
        assert half.log_probs != pytest.approx(own.log_probs, abs=1e-2)
    parts = [(engine.names[name], 0.5) for name in ("all", "own")]
    live, bias = engine.call(lambda: engine.loader.blend(parts).live), engine.model.transformer.h[0].attn.c_attn.bias
    shifts = [0.5 * (loaded.live.biases["transformer.h.0.attn.c_attn"] - bias) for loaded, _ in parts]
    torch.testing.assert_close(live.biases["transformer.h.0.attn.c_attn"], bias + sum(shifts))


@pytest.mark.parametrize(
    ("quantization", "dtype", "bound"), [("nf4", torch.float32, 2e-5), ("none", torch.bfloat16, 0.2)]
)
def test_quantised_and_16_bit_bases_mix_too(tiny_base, folders, quantization, dtype, bound):
    engine = Engine(load_base(tiny_base, quantization, "AutoModelForCausalLM", dtype))
    names = load_all(engine, {n: folders[n] for n in ("lora", "wide", "dora", "adalora", "twin")})
    tokens = [LONG[i % 4][:7] for i in range(len(names))]

    def narrow(function):
        with torch.autocast("cpu", dtype if dtype is torch.bfloat16 else None, dtype is torch.bfloat16):
            return function()

    mixed = engine.call(lambda: narrow(lambda: logits_of(engine, names, tokens)))
    for i, name in enumerate(names):
        own = engine.call(lambda i=i, name=name: narrow(lambda: alone(engine, name, tokens[i]))).float()
        assert float((mixed[i] - own).abs().max()) < bound
    base = engine.call(lambda: narrow(lambda: logits_of(engine, [None] * len(names), tokens)))
    assert mixed[0].equal(base[0]), "the base's row is bitwise the base's in the same batch"
