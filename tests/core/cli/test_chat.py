"""`budwood chat`: who answers, what is sent, and what goes wrong, with its input piped in."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import without_template
from tests.core.serving.conftest import make_adapter

from budwood import AdapterPool
from budwood.cli import chat as command
from budwood.cli.app import run
from budwood.serving.chat import Chat


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    """Two adapters that do not say what they were trained on."""
    root = tmp_path_factory.mktemp("chat")
    return {"a": make_adapter(root / "a", 1), "b": make_adapter(root / "b", 2, rank=8)}


@pytest.fixture
def pool(tiny_base, adapters) -> AdapterPool:
    """The base in fp32 with the adapters."""
    pool = AdapterPool(tiny_base, precision="fp32")
    for name, folder in adapters.items():
        pool.load(name, folder)
    return pool


def answers(pool: AdapterPool, adapter: object, *messages: str, system: str = "", count: int = 6) -> str:
    roles = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    first = [{"role": "system", "content": system}] if system else []
    return pool.generate([[*first, *roles]], [adapter], max_new_tokens=count)[0].text


def talk(monkeypatch, lines: str | bytes, *arguments: object) -> int:
    data = lines.encode() if isinstance(lines, str) else lines
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    return run(["chat", *map(str, arguments), "--precision", "fp32", "--max-new-tokens", "6"])


def test_each_turn_is_answered_by_its_adapter_from_the_whole_conversation(
    tiny_base, adapters, pool, monkeypatch, capfd
):
    lines = (
        "hello\n/adapter b\nand\n/adapter none\n//adapter\n/blend a=0.7 b=0.3\nmore\n\n/reset\n/system be brief\n"
        '/adapter a\n"""one\ntwo"""\n/adapters\n/quit\nnever sent\n'
    )
    options = [text for name, folder in adapters.items() for text in ("--adapter", f"{name}={folder}")]
    assert talk(monkeypatch, lines, tiny_base, *options) == 0
    said = ["hello", answers(pool, "a", "hello")]
    for adapter, text in (("b", "and"), (None, "/adapter"), ({"a": 0.7, "b": 0.3}, "more")):
        said += [text, answers(pool, adapter, *said, text)]
    expected = [*said[1::2], answers(pool, "a", "one\ntwo", system="be brief")]
    captured = capfd.readouterr()
    assert captured.out == "".join(f"{text}\n" for text in expected), "answers alone go to stdout"
    assert len(set(expected)) == 5
    assert f"* a: lora, {adapters['a']}" in captured.err
    assert "  none: the base alone" in captured.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adapter aa", "error: no adapter 'aa' is loaded. Did you mean 'a'? Loaded: a.\n"),
        ("/blend a=x", "error: /blend a=x: write NAME=WEIGHT, as in /blend a=0.7 b=0.3.\n"),
        ("/blend", "error: /blend: write NAME=WEIGHT …, as in /blend a=0.7 b=0.3.\n"),
        ("/adaptr a", "error: /adaptr: no such command. Did you mean 'adapter'? /help lists them.\n"),
        ("word " * 400, "tokens; the base's context holds 512 with the answer. Send a shorter text.\n"),
        (b"caf\xe9", "error: the input is not UTF-8"),
    ],
)
def test_what_is_piped_in_and_wrong_is_one_line(tiny_base, adapters, monkeypatch, capfd, line, message):
    data = line if isinstance(line, bytes) else line.encode()
    assert talk(monkeypatch, data + b"\nnot reached\n", tiny_base, "--adapter", f"a={adapters['a']}") == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert len([line for line in captured.err.splitlines() if not line.startswith("note: ")]) == 1
    assert not captured.out


def test_a_full_context_ends_an_answer_and_is_said(pool):
    chat = Chat(pool, max_new_tokens=600)
    chat.use("a")
    reply = chat.ask("word " * 60, lambda _: None)
    assert reply.finish_reason in ("context", "eos")
    before = list(chat.messages)
    with pytest.raises(Exception, match="/reset begins a new conversation"):
        chat.ask("word " * 150, lambda _: None)
    assert chat.messages == before, "the text that did not fit is not in it"


def test_an_interrupted_answer_stays_as_far_as_it_was_shown_and_its_row_is_freed(pool):
    chat, shown = Chat(pool, max_new_tokens=400), []
    chat.use("b")

    def show(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("hello", show)
    assert chat.messages == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "".join(shown)},
    ]
    assert pool.engine.call(lambda: len(pool.engine.scheduler.rows)) == 0
    assert chat.ask("again", lambda _: None).tokens > 0


def test_an_adapter_of_plain_text_gets_each_text_as_it_is(pool, adapters, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    saved = pool.adapter("a")
    plain = type("Plain", (), {"on_messages": False, "chat": None, "stop_ids": []})
    object.__setattr__(saved, "manifest", plain)
    chat = Chat(pool, max_new_tokens=6)
    session = command.Session(chat).switch("a")
    assert "was trained on plain text: each text is sent as it is" in capsys.readouterr().err
    reply = [chat.ask(text, lambda _: None).text for text in ("hello", "hello")]
    assert reply[0] == reply[1] == pool.generate(["hello"], ["a"], max_new_tokens=6)[0].text
    assert not chat.messages
    session.switch("b")
    assert not capsys.readouterr().err, "the other one gets messages"
    assert chat.sends_messages("b") and chat.sends_messages(None)


def test_a_base_without_a_template_continues_plain_text_and_refuses_chat(tiny_base, tmp_path, monkeypatch, capfd):
    bare = without_template(tiny_base, tmp_path / "bare")
    assert talk(monkeypatch, "hello\n", bare) == 0
    captured = capfd.readouterr()
    assert captured.err.startswith("note: no chat template is used: each text is sent as it is")
    assert captured.out.strip()
    assert talk(monkeypatch, "hello\n", bare, "--chat") == 2
    assert capfd.readouterr().err == (
        "error: --chat: neither the base's tokenizer nor the adapter has a chat template.\n"
    )


def test_a_terminal_keeps_the_session_after_errors_and_interrupts(pool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    session = command.Session(Chat(pool, max_new_tokens=4))
    session.terminal = True
    lines = iter(["/nothing", KeyboardInterrupt, "/adapter b", "hello", EOFError])

    def read(prompt: str) -> str:
        line = next(lines)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    session.run()
    captured = capsys.readouterr()
    assert captured.out == answers(pool, "b", "hello", count=4) + "\n"
    assert "/nothing: no such command" in captured.err
    assert "/quit or Ctrl-D ends." in captured.err
    assert "tokens/s, first after" in captured.err
    assert torch.get_num_threads() == 1
