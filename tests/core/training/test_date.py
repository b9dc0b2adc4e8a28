"""A chat template that writes the date: one date per run, in training, the cache, evaluation and generation."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from budwood.data.encoder import encode_chat
from budwood.recipe.schema import Recipe
from budwood.serving.pool import AdapterPool
from budwood.training.evaluate import evaluate_adapter
from budwood.training.loop import tune
from budwood.untrusted import chat_template

Make = Callable[..., Recipe]
TEMPLATE = (
    "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %B %Y') %}{% endif %}"
    "Today: {{ date_string }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ROWS = [
    {"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Hello"}]} for i in range(8)
]


@pytest.fixture
def dated_base(tiny_base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "dated"
    shutil.copytree(tiny_base, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE.replace("</s>", tokenizer.eos_token)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def zone() -> Iterator[Callable[[str], None]]:
    """Function that sets the time zone; it is never the same day in Kiritimati and Pago Pago."""
    before = os.environ.get("TZ")

    def change(name: str | None) -> None:
        os.environ.pop("TZ", None)
        if name is not None:
            os.environ["TZ"] = name
        time.tzset()

    yield change
    change(before)


def trained_prompt(run: Any) -> list[int]:
    return run.task.prompt(run.examples[0]).tolist()


def test_another_day_has_other_tokens_and_each_run_its_own_date(
    make_recipe: Make, dated_base: Path, write: Any, zone: Callable[[str], None], said: list[str]
) -> None:
    train = str(write(ROWS, "chat.jsonl"))
    runs = []
    for name in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):
        zone(name)
        recipe = make_recipe(name[-4:], base={"model": str(dated_base)}, data={"train": train, "eval": train})
        runs.append(tune(recipe))
    dates = [json.loads((run.directory / "manifest.json").read_text())["date"] for run in runs]
    assert dates[0] != dates[1] and not runs[1].examples.from_cache
    assert trained_prompt(runs[0]) != trained_prompt(runs[1])
    for run, date in zip(runs, dates, strict=True):
        adapter = json.loads((run.directory / "adapter" / "budwood.json").read_text())
        assert adapter["chat"]["date"] == date == run.eval_examples.date
        assert any(f"the chat template writes the date {date}" in line for line in said)
        # Evaluation and generation are made on the second run's day.
        again = evaluate_adapter(run.directory / "adapter", Path(train), quiet=True).adapter
        assert again["eval_loss"] == run.metrics["eval_loss"]
    pool = AdapterPool(dated_base, precision="fp32", device="cpu")
    pool.load("first", runs[0].directory / "adapter")
    pool.load("second", runs[1].directory / "adapter")
    messages = ROWS[0]["messages"][:1]
    assert pool._encode(messages, "first") == trained_prompt(runs[0])
    assert pool._encode(messages, "second") == trained_prompt(runs[1])
    assert pool._encode(messages, None) == trained_prompt(runs[1]), "the base alone has today's date"


def test_a_resume_keeps_the_date_of_its_run(
    make_recipe: Make, dated_base: Path, write: Any, zone: Callable[[str], None]
) -> None:
    train = str(write(ROWS, "chat.jsonl"))
    recipe = make_recipe(base={"model": str(dated_base)}, data={"train": train}, train={"steps": 2, "save_every": 1})
    zone("Pacific/Kiritimati")
    first = tune(recipe, quiet=True)
    zone("Pacific/Pago_Pago")
    longer = make_recipe(base={"model": str(dated_base)}, data={"train": train}, train={"steps": 3, "save_every": 1})
    resumed = tune(longer, quiet=True, resume=True, accept_changes=True)
    assert resumed.step == 3 and resumed.examples.date == first.examples.date != chat_template.today()
    assert json.loads((resumed.directory / "manifest.json").read_text())["date"] == first.examples.date


def test_without_a_date_in_the_template_none_is_recorded(make_recipe: Make, zone: Callable[[str], None]) -> None:
    """On another day, the tokens come from the cache."""
    zone("Pacific/Kiritimati")
    first = tune(make_recipe("one"), quiet=True)
    zone("Pacific/Pago_Pago")
    assert tune(make_recipe("two"), quiet=True).examples.from_cache
    assert first.examples.date is None
    assert json.loads((first.directory / "adapter" / "budwood.json").read_text())["chat"] is None


def test_the_date_is_written_in_the_templates_format(byte_level: Any) -> None:
    tokenizer = byte_level(template=TEMPLATE)
    ids = encode_chat(tokenizer, ROWS[0]["messages"][:1], date="2025-03-01")
    assert tokenizer.decode(ids).startswith("Today: 01 March 2025\nuser: Hi 0")
