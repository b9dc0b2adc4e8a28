"""Two hundred streams over eight adapters at once, with the `openai` client: each text is that of its adapter alone."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from tests.core.serving.conftest import make_adapter
from tests.serve.reference import Case, Reference
from tests.serve.server import Server, wait_for

EACH, TOKENS = 25, 16


async def stream(client: openai.AsyncOpenAI, case: Case) -> tuple[str, str | None, int]:
    """Return a streamed answer's text, why it ended, and its number of pieces."""
    make: Any = client.chat.completions.create if case.chat else client.completions.create
    text, reason, pieces = "", None, 0
    async for chunk in await make(**case.request(case.adapter or "tiny", TOKENS), stream=True):
        for choice in chunk.choices:
            piece = (choice.delta.content if case.chat else choice.text) or ""
            text, pieces, reason = text + piece, pieces + bool(piece), choice.finish_reason or reason
    return text, reason, pieces


def test_two_hundred_streams_over_eight_adapters_are_those_of_each_alone(server, reference):
    cases = [case for name in reference.names for case in reference.cases(name, EACH, TOKENS)]
    assert len(cases) == 200 and len(reference.names) == 8
    order = [cases[(i * 37) % len(cases)] for i in range(len(cases))]  # neighbours are of different adapters

    async def run() -> list[tuple[str, str | None, int]]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300
        ) as client:
            return await asyncio.gather(*(stream(client, case) for case in order))

    before = server.metrics()["budwood_steps_total"]
    results = asyncio.run(run())
    wrong = [(case, text) for case, (text, _, _) in zip(order, results, strict=True) if text != case.text]
    assert not wrong
    assert all(reason in ("stop", "length") for _, reason, _ in results)
    assert sum(pieces for _, _, pieces in results) > 4 * len(results), "they were streamed"
    steps = server.metrics()["budwood_steps_total"] - before
    assert steps < 200 * TOKENS / 4, "rows of different adapters shared steps"
    assert server.rows() == 0


def test_blends_hashes_and_the_base_are_answered_as_alone(server: Server, reference):
    blend = {"lora-4": 0.7, "rslora-16": 0.3}
    text, _ = reference.answer(blend, "games section", TOKENS)
    assert server.ask("tiny", "games section", TOKENS, extra_body={"adapters": blend}) == text
    (case,) = reference.cases(None, 1, TOKENS)
    with server.client() as client:
        models = {model.id: model.model_dump() for model in client.models.list()}
        assert models.keys() == {"tiny", *reference.names}
        named = f"lora-8@{models['lora-8']['identity'][:12]}"
        answer = client.completions.create(model=named, prompt=case.prompt, max_tokens=TOKENS, temperature=0)
        assert answer.choices[0].text == reference.answer("lora-8", case.prompt, TOKENS)[0]
        several = client.completions.create(model="tiny", prompt=case.prompt, max_tokens=4, n=3, temperature=1, seed=5)
        again = client.completions.create(model="tiny", prompt=case.prompt, max_tokens=4, n=3, temperature=1, seed=5)
    assert [c.text for c in several.choices] == [c.text for c in again.choices]
    assert len({c.text for c in several.choices}) > 1
    assert server.ask("tiny", case.prompt, TOKENS) == case.text


def test_streams_that_are_broken_off_do_not_change_the_others(server, reference):
    whole = [case for name in reference.names for case in reference.cases(name, 8, TOKENS)]

    async def break_off(client: openai.AsyncOpenAI, number: int) -> None:
        name = reference.names[number % len(reference.names)]
        async with await client.completions.create(
            model=name, prompt=f"file {number}", max_tokens=400, stream=True, seed=number
        ) as chunks:
            read = 0
            async for _ in chunks:
                read += 1
                if read > number % 7:
                    return

    async def run() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300
        ) as client:
            tasks: list[Any] = []
            for number, case in enumerate(whole):
                tasks += [stream(client, case), break_off(client, number)]
            return (await asyncio.gather(*tasks))[::2]

    results = asyncio.run(run())
    assert [text for text, _, _ in results] == [case.text for case in whole]
    wait_for(lambda: server.rows() == 0)


def test_adapters_that_do_not_fit_into_memory_together_are_answered_as_alone(tiny_base, tmp_path):
    for number in range(6):
        make_adapter(tmp_path / "root" / f"a{number}", 40 + number, rank=64)
    size = sum(path.stat().st_size for path in (tmp_path / "root" / "a0").iterdir())
    assert 2 * size < 1.5 * 2**20 < 6 * size, "a few of them fit into 1 MiB, all do not"
    own = Reference(tiny_base, tmp_path / "root")
    cases = [case for name in own.names for case in own.cases(name, 12, TOKENS)]
    order = [cases[(i * 31) % len(cases)] for i in range(len(cases))]
    with Server(tiny_base, tmp_path / "root", tmp_path, "--adapter-mib", 1) as server:

        async def run() -> list[tuple[str, str | None, int]]:
            async with openai.AsyncOpenAI(
                base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300
            ) as client:
                return await asyncio.gather(*(stream(client, case) for case in order))

        assert [text for text, _, _ in asyncio.run(run())] == [case.text for case in order]
