"""OpenAI's API, by its own client: each answer is that of its adapter alone, whole or streamed; nothing is ignored."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from openai import APIStatusError
from safetensors.torch import load_file, save_file
from tests.core.serving.http.conftest import HELLO, ask, client, open_service, running

from budwood.data.encoder import encode_chat, encode_prompt
from budwood.serving.requests import Sampling


@pytest.fixture(scope="module")
def asked(service):
    """The openai client of a running server."""
    with running(service) as (asked, _):
        yield asked


def alone(service, model: str | None, text: str | list[dict], **options):
    """Return what the engine itself answers."""
    tokenizer = service.engine.tokenizer
    ids = encode_prompt(tokenizer, text) if isinstance(text, str) else encode_chat(tokenizer, text)
    key = service.catalog._table[model].key if model else None
    return service.engine.submit(ids, key, Sampling(stop_ids=(4,), **options)).result()


def test_models_are_the_base_and_the_adapters(asked):
    models = {model.id: model for model in asked.models.list()}
    assert list(models) == ["tiny", "one", "run", "two"]
    assert [(models[n].type, models[n].rank) for n in models] == [
        ("base", None), ("lora", 4), ("adalora", 4), ("lora", 8),
    ]  # fmt: skip
    exact = f"two@{models['two'].identity[:12]}"
    assert asked.models.retrieve("two").identity == asked.models.retrieve(exact).identity
    for name in ("three", "two@", "two@" + "0" * 12, exact + "0", "tiny@1", "", "a/b"):
        with pytest.raises(APIStatusError) as caught:
            asked.chat.completions.create(model=name or "x", messages=HELLO)
        assert caught.value.status_code == 404 and caught.value.code == "model_not_found"


def test_chat_whole_and_streamed_are_the_engines_answer(service, asked):
    """Text, usage, finish reason, log-probabilities; several answers in one stream."""
    expected = alone(service, "two", HELLO, max_new_tokens=12, log_probs=True, top_log_probs=2)
    options = {"model": "two", "messages": HELLO, "max_tokens": 12, "temperature": 0, "logprobs": True}
    whole = asked.chat.completions.create(**options, top_logprobs=2)
    [choice] = whole.choices
    assert choice.message.content == expected.text and choice.finish_reason == "length"
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(expected.log_probs)
    assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * 12
    assert (
        b"".join(bytes(e.bytes) for e in choice.logprobs.content)
        .decode(errors="replace")
        .startswith(expected.text.rstrip("�"))
    )
    assert whole.usage.completion_tokens == 12 and whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    assert whole.system_fingerprint == asked.models.retrieve("two").identity[:12]

    stream = asked.chat.completions.create(**options, n=2, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == "length"
        assert "".join(c.delta.content or "" for c in mine) == expected.text
        log_probs = [entry.logprob for c in mine if c.logprobs for entry in c.logprobs.content]
        assert log_probs == pytest.approx(expected.log_probs)
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_of_several_prompts(service, asked):
    texts = ["quick brown", "lazy"]
    found = asked.completions.create(model="run", prompt=texts, n=2, max_tokens=6, temperature=0, logprobs=1)
    expected = [alone(service, "run", text, max_new_tokens=6, log_probs=True) for text in texts for _ in range(2)]
    assert [choice.text for choice in found.choices] == [answer.text for answer in expected]
    for choice, answer in zip(found.choices, expected, strict=True):
        assert choice.logprobs.token_logprobs == pytest.approx(answer.log_probs)
        assert choice.logprobs.text_offset[0] == 0 and len(choice.logprobs.top_logprobs) == 6
    stream = asked.completions.create(model="run", prompt=[1, 40, 50], max_tokens=6, temperature=0, stream=True)
    whole = asked.completions.create(model="run", prompt=[1, 40, 50], max_tokens=6, temperature=0)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    assert len(asked.completions.create(model="tiny", prompt="a", temperature=0).choices[0].text) > 0


def test_seeds_stop_strings_and_blends(service, asked):
    def text(**options):
        fields = {"model": "tiny", "prompt": "games:", "max_tokens": 8, **options}
        return [choice.text for choice in asked.completions.create(**fields).choices]

    assert text(seed=3, n=2) == text(seed=3, n=2) and len(set(text(seed=3, n=2))) == 2
    assert text(seed=3) != text(seed=4)
    whole = text(temperature=0, model="one", max_tokens=12)[0]
    cut = next(c for c in whole[2:] if c not in whole[:2] and c != "�")
    found = asked.completions.create(
        model="one", prompt="games:", max_tokens=12, temperature=0, stop=[cut], logprobs=0
    ).choices[0]
    assert (found.text, found.finish_reason) == (whole[: whole.index(cut)], "stop")
    assert found.logprobs.text_offset[-1] < len(found.text)
    weights = {"one": 0.7, "run": 0.3}
    keys = {service.catalog._table[name].key: weight for name, weight in weights.items()}
    blend = service.engine.submit([1, 40, 50], keys, Sampling(8)).result().text
    assert text(prompt=[1, 40, 50], temperature=0, extra_body={"adapters": weights})[0] == blend
    with pytest.raises(APIStatusError, match="must be the base, 'tiny'"):
        text(model="one", extra_body={"adapters": weights})
    with pytest.raises(APIStatusError, match="does not exist"):
        text(extra_body={"adapters": {"one": 1.0, "three": 1.0}})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"top_P": 1, "colour": 2}, r"top_P: is no field of this request. Did you mean 'top_p'\? colour: is no field"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: is not supported by this server; leave it out or send 0."),
        ({"response_format": {"type": "json_object"}}, "response_format: is not supported"),
        ({"best_of": True}, "best_of: is no field|best_of: is not supported"),
        ({"temperature": 3}, "temperature: .*2"),
        ({"temperature": True}, "temperature: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 5000}, "max_tokens: 5,000 is more than this server's limit of 4,096."),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens and max_completion_tokens differ"),
        ({"n": 9}, "n: 9 is more than this server's limit of 8."),
        ({"stop": ["a"] * 9}, "stop: 9 is more"),
        ({"stop": [""]}, "stop: each must have 1 to 64 characters."),
        ({"stop": ["a", 1]}, r"stop\.1: |stop: "),
        ({"top_logprobs": 2}, "top_logprobs: needs logprobs: true."),
        ({"stream_options": {"include_usage": True}}, "stream_options: needs stream: true."),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage: is no field here."),
        ({"messages": []}, "messages: "),
        ({"messages": HELLO * 300}, "messages: 300 is more"),
        ({"messages": [{"role": "user", "content": "a", "audio": 1}]}, "message 1: 'audio' is no field of a message."),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "only text is read"),
        ({"messages": [{"role": "user", "content": "a " * 600}]}, "tokens; the base's context holds 512"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "chat template does not take tools"),
        ({"tool_choice": "required"}, "tool_choice: "),
        ({"chat_template_kwargs": {"thinking": 1}}, "'thinking' is no variable of the chat template"),
        ({"adapters": {"one": "1"}}, "adapters.one: "),
        ({"model": None}, "model: "),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_out_is_named(service, fields, says):
    response = ask(client(service), **fields)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error", error
    assert re.search(says, error["message"]), error
    assert error["param"]
    assert not service.calls and not service.admission.rows


def test_fields_that_ask_for_nothing_are_accepted(service):
    response = ask(
        client(service), frequency_penalty=0, presence_penalty=0.0, logit_bias={}, response_format={"type": "text"},
        user="me", metadata={"a": "b"}, store=False, parallel_tool_calls=True, top_p=None, stop=None, seed=None,
        tools=None, logprobs=False, max_completion_tokens=4,
    )  # fmt: skip
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{" * 100_000, 400, "nested too deeply|not valid JSON"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, 400, "nested more than 32 levels"),
        (b"[1]", 400, "not a JSON object"),
        (b'{"model": "\xff"}', 400, "not valid JSON"),
        (b'{"model": "\\ud800"}', 400, "surrogate"),
        (b'{"model": "one", "model": "two"}', 400, "duplicate key"),
        (b'{"seed": NaN}', 400, "not a finite number"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "not valid JSON"),
        (b" " * ((1 << 20) + 1), 413, "larger than 1,048,576 bytes"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(service, body, status, says):
    response = client(service).post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert any(part in response.json()["error"]["message"] for part in says.split("|"))
    plain = client(service).post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert plain.status_code == 415


def test_paths_health_and_headers(service, monkeypatch):
    asked = client(service)
    assert asked.get("/health").status_code == asked.get("/ready").status_code == 200
    unknown = asked.get("/v2/models")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "path"
    assert asked.get("/v1/chat/completions").status_code == 405
    for path in ("/../pyproject.toml", "/..%2f..%2fapp.py", "/admin/adapters", "/docs", "/openapi.json"):
        assert asked.get(path).status_code == 404
    evil = asked.get("/v1/models", headers={"host": "evil.example:8000"})
    assert evil.status_code == 403 and evil.headers["x-request-id"].startswith("req-")
    assert "frame-ancestors 'none'" in evil.headers["content-security-policy"]
    metrics = asked.get("/metrics").text
    assert 'budwood_requests_total{adapter="",route="/v1/models",status="403",tenant=""}' in metrics
    assert "budwood_prefix_hits_total" in metrics and "budwood_waiting 0.0" in metrics
    response = asked.post("/v1/embeddings", json={"model": "one", "input": "a"})
    assert response.status_code == 400 and "embeddings" in response.json()["error"]["message"]


def test_a_base_without_a_chat_template_answers_texts_alone(tiny_base, tmp_path):
    plain = shutil.copytree(tiny_base, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    service = open_service(plain)
    response = ask(client(service), model="tiny")
    assert response.status_code == 400 and "no chat template" in response.json()["error"]["message"]
    done = client(service).post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 2})
    assert done.status_code == 200


def test_embeddings_are_those_of_the_task_with_the_models_adapter(tiny_base, adapters, tmp_path):
    """The client asks for base64, and reads numbers. An adapter of a text model becomes one of its body."""
    shutil.copytree(adapters / "one", tmp_path / "root" / "one")
    weights = tmp_path / "root" / "one" / "adapter_model.safetensors"
    save_file({key.replace(".model.model.", ".model."): t for key, t in load_file(weights).items()}, weights)
    service = open_service(tiny_base, tmp_path / "root", task="embedding")
    texts = ["a", "bcd", *["e"] * 20]
    with running(service) as (asked, _):
        found = {name: asked.embeddings.create(model=name, input=texts) for name in ("tiny", "one")}
        again = asked.embeddings.create(model="one", input="a", encoding_format="float")
        with pytest.raises(APIStatusError, match="the server's task is embedding, which generates no text"):
            asked.completions.create(model="one", prompt="a")
    base, one = ([entry.embedding for entry in found[name].data] for name in ("tiny", "one"))
    assert found["one"].usage.prompt_tokens == 2 * 2 + 4 + 19 * 2
    assert again.data[0].embedding == pytest.approx(one[0], abs=1e-6)
    assert sum(x * y for x, y in zip(one[0], base[0], strict=True)) < 0.99
    engine, key = service.engine, service.catalog._table["one"].key
    for name, vectors in ((None, base), (key, one)):
        own = engine.with_adapter(name, lambda: service.task.embed(engine.model, engine.tokenizer, texts))
        torch.testing.assert_close(torch.tensor(vectors), own, atol=1e-5, rtol=0)
    service.ending = False
    for fields in ({"input": []}, {"input": " "}, {"input": [1, 2]}, {"input": "a " * 600}, {"dimensions": 3}):
        response = client(service).post("/v1/embeddings", json={"model": "one", "input": "a", **fields})
        assert response.status_code == 400 and response.json()["error"]["param"] == next(iter(fields)), response.text
    assert not service.admission.rows and not service.catalog._uses
