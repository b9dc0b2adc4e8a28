"""Secrets from the environment and the recipe: detection, and a complete run that writes none of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from ruamel import yaml

from budwood import InputError
from budwood.cli import app as cli
from budwood.recipe.schema import Recipe
from budwood.untrusted import redaction
from budwood.untrusted.redaction import MASK, RedactedStream, redact, redact_values

HUB = "hub-0123456789abcdef"
PROXY = "pr0xy-p4ss"
KEY = "key/of+the recipe"
URL = "url-p4ssword"
TYPED = "typed-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Set secrets in the environment, and clear those of other tests."""
    monkeypatch.setattr(redaction, "_remembered", set())
    monkeypatch.setenv("HF_TOKEN", HUB)
    monkeypatch.setenv("HTTPS_PROXY", f"http://someone:{PROXY}@proxy.example:3128")
    monkeypatch.setenv("BATCH_TOKENS", "4096000")
    monkeypatch.setenv("DEBUG_TOKEN", "no")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"401 for {HUB}.", f"401 for {MASK}."),
        ("hub%2D0123456789abcdef", "hub%2D0123456789abcdef"),
        (f"proxy: {PROXY}", f"proxy: {MASK}"),
        ("https://me:pw@host/x and ftp://token@host", f"https://{MASK}@host/x and ftp://{MASK}@host"),
        ("https://me:p@ss@host/@x", f"https://{MASK}@host/@x"),
        ("http://host/x?a=1&token=abc&sig=d", f"http://host/x?a=1&token={MASK}&sig={MASK}"),
        ("Authorization: Basic bWU6cHc=", f"Authorization: Basic {MASK}"),
        ("{'authorization': 'Bearer abc.def'}", f"{{'authorization': 'Bearer {MASK}'}}"),
        ("-o tracker.api_key=abc,b", f"-o tracker.api_key={MASK},b"),
        ("hf_abcdefghijklmnopqrst, sk-abcdefghijkl123", f"{MASK}, {MASK}"),
    ],
)
def test_secrets_are_masked(text, kept):
    assert redact(text) == kept


@pytest.mark.parametrize(
    "text",
    [
        "stop_token=</s> mask_token=[MASK] 4096000 tokens; no token",
        "a/b@c, someone@example.org, train.jsonl:3: field 'token' must be text",
        "https://huggingface.co/a/b@main",
        "hf_transfer sk-learn password: must be text",
        "x" * 100_000 + "://" + "a.b-c+" * 10_000,
    ],
)
def test_other_text_is_unchanged(text):
    assert redact(text) == text


def test_values_are_masked_by_their_names_and_by_their_content():
    values = {"a": {"api_key": KEY, "token": "abc", "mask_token": "[MASK]", "n": 1}, "b": [f"x {HUB}", None, True]}
    assert redact_values(values) == {
        "a": {"api_key": MASK, "token": MASK, "mask_token": "[MASK]", "n": 1},
        "b": [f"x {MASK}", None, True],
    }


def test_a_stream_redacts_and_is_otherwise_the_stream():
    inner = io.StringIO()
    stream = RedactedStream(inner)
    assert stream.write(f"a {HUB}\n") == len(HUB) + 3
    assert stream.getvalue() == f"a {MASK}\n"
    assert stream.isatty() is False


SPY = f"""
class Spy(Strategy):
    '''Knows secrets and talks.'''

    class Options(Options):
        api_key: str = "none"
        endpoint: str = "none"
        talk: bool = False

    @hookimpl
    def prepare_batch(self, run, batch):
        import warnings
        assert self.options.api_key == {KEY!r} and {URL!r} in self.options.endpoint
        run.say("calling " + self.options.endpoint + " with " + self.options.api_key)
        if self.options.talk:
            raise RuntimeError("refused: " + self.options.api_key + " and {HUB} at " + self.options.endpoint)
        return batch
"""


def everything(folder: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


def leaks(text: str) -> list[str]:
    return [secret for secret in (HUB, PROXY, KEY, URL, TYPED) if secret in text]


def test_a_run_writes_no_secret_anywhere(distribution, make_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "silence_libraries", lambda debug: None)
    distribution("spy", SPY, {"spy": "Spy"})
    options = {"api_key": KEY, "endpoint": f"https://me:{URL}@api.example/v1"}
    recipe = make_recipe(strategies=[{"lora": {"rank": 2}}, {"spy": options}], train={"steps": 2}).model_dump(
        mode="json"
    )
    recipe["strategies"] = [{choice["name"]: choice["options"]} for choice in recipe["strategies"]]
    recipe["train"].pop("epochs"), recipe["train"].pop("batch_tokens")
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))

    assert cli.run(["tune", str(path)]) == 0, capsys.readouterr().err
    run = tmp_path / "run"
    out, err = capsys.readouterr()
    assert f"calling https://{MASK}@api.example/v1 with {MASK}" in err
    assert leaks(out + err + everything(run)) == []
    for name in ("manifest.json", "adapter/budwood.json"):
        written = json.loads((run / name).read_text())["strategies"][1]["options"]
        assert written == {"api_key": MASK, "endpoint": f"https://{MASK}@api.example/v1", "talk": False}

    assert cli.run(["tune", str(run / "recipe.yaml"), "-o", f"output={tmp_path / 'again'}"]) == 2
    err = capsys.readouterr().err
    assert "options.api_key: [redacted] replaces a secret" in err
    assert "recipe.yaml:" in err

    talk = ["-o", "spy.talk=true", "-o", f"output={tmp_path / 'talks'}"]
    assert cli.run(["tune", str(path), "--debug", *talk]) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert f"refused: {MASK} and {MASK} at https://{MASK}@api.example/v1" in err
    assert leaks(err) == []

    long = f"https://me:{URL}{'x' * 80}@api.example/v1"
    for override in (
        f"spy.api_key={TYPED}",
        f"sky.api_key={TYPED}",
        f"train.steps={HUB}",
        f"spy.talk={long}",
        f"x={long}",
    ):
        assert cli.run(["tune", str(path), "-o", override, "-o", "train.warmup=-1"]) in (2, 3)
        out, err = capsys.readouterr()
        assert leaks(out + err) == [], override


def test_a_recipe_masks_its_secrets():
    data = {"base": {"model": "b"}, "data": {"train": "x.jsonl"}, "strategies": [{"lora": {"password": KEY}}]}
    recipe = Recipe.from_dict(data)
    assert recipe.strategies[0].options == {"password": KEY}
    assert KEY not in recipe.to_yaml()
    with pytest.raises(InputError, match=r"strategies\[0\].options.password: \[redacted\] replaces"):
        Recipe.from_dict(recipe.to_dict())
    assert KEY not in str(InputError(f"got '{KEY}'"))


def test_paths_and_model_names_are_not_masked(monkeypatch):
    """A folder may be named like a secret, and a model like a token."""
    monkeypatch.setenv("MY_TOKEN", "data123")
    data = {
        "base": {"model": "/data123/base"},
        "data": {"train": "data123/hf_internal_testing_tiny.jsonl", "eval": "/mnt/my data123/token=a b.jsonl"},
        "strategies": [
            {"distillation": {"teacher": "data123/teacher", "cache": "../data123/cache", "note": "it is data123"}},
            {"lora": {"key": "data123", "at": "hooks.example.com/data123", "url": "https://me:pw@host/data123"}},
        ],
        "output": "data123",
    }
    recipe = Recipe.from_dict(data)
    again = recipe.to_dict()
    assert again["base"]["model"] == "/data123/base"
    assert again["data"]["train"] == data["data"]["train"] and again["data"]["eval"] == data["data"]["eval"]
    assert again["output"] == "data123"
    distillation, lora = again["strategies"]
    teacher = {"teacher": "data123/teacher", "cache": "../data123/cache", "note": f"it is {MASK}"}
    assert distillation == {"distillation": teacher}
    assert lora == {"lora": {"key": MASK, "at": f"hooks.example.com/{MASK}", "url": f"https://{MASK}@host/{MASK}"}}
    read = yaml.YAML(typ="safe").load(recipe.to_yaml())
    assert (read["base"]["model"], read["data"]["train"]) == ("/data123/base", data["data"]["train"])
    named = Recipe.from_dict({**data, "base": {"model": "data123"}})
    assert named.to_dict()["base"]["model"] == "data123"
    bucket = Recipe.from_dict({**data, "base": {"model": "https://me:pw@host/data123?token=abc"}})
    assert bucket.to_dict()["base"]["model"] == f"https://{MASK}@host/data123?token={MASK}"
