"""`budwood plugins` and `budwood recipe schema`: describe installed plugins, even if some are broken."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from budwood import InputError, PluginError
from budwood.cli.plugins import plugins
from budwood.cli.recipe import schema

ROOT = Path(__file__).parents[3]
NOISE = """
class Noise(Strategy):
    '''Noise on the gradients (Someone, 2015).

    More words.
    '''

    class Options(Options):
        eta: float = Field(0.01, gt=0, description="variance at step 0")
        kind: str = Field(min_length=1)
    after = ("adapter",)
    requires = ("adapter",)

    @hookimpl
    def before_optimizer_step(self, run): ...

    @hookimpl(wrapper=True)
    def backward(self, step):
        return (yield)
"""


def test_the_list_shows_version_and_summary(distribution, capsys):
    distribution("sprout", NOISE, {"noise": "Noise"}, version="1.2")
    distribution("broken", "raise RuntimeError('imported')", {"broken": "Broken"})
    plugins()
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line.split(maxsplit=3) for line in out.splitlines() if line.startswith(" ")}
    assert rows["noise"] == ["noise", "sprout", "1.2", "Noise on the gradients (Someone, 2015)."]
    assert rows["broken"] == ["broken", "broken", "1.0"]
    assert rows["lora"][1] == "budwood"
    assert {"causal-lm", "sequence-classification", "prompt-completion", "messages", "text", "text-label"} < set(rows)
    assert {"none", "int8", "nf4", "fp4"} < set(rows)
    assert "budwood plugins NAME" in err


def test_every_first_party_plugin_has_a_summary(capsys):
    plugins(as_json=True)
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == ["strategies", "tasks", "formats", "quantizers", "attacks", "rewards"]
    first_party = [entry for entries in listed.values() for entry in entries if entry["distribution"] == "budwood"]
    assert len(first_party) >= 11
    assert all(entry["summary"] for entry in first_party)


def test_duplicate_names_are_marked(distribution, capsys):
    for name in ("sprout", "twig"):
        distribution(name, NOISE, {"noise": "Noise"})
    plugins()
    assert capsys.readouterr().out.count("(installed twice: uninstall one)") == 2
    with pytest.raises(InputError, match="is provided by"):
        plugins("noise")


def test_a_strategy_is_described_as_text(distribution, capsys):
    distribution("sprout", NOISE, {"noise": "Noise"})
    plugins("noise")
    assert capsys.readouterr().out == (
        "noise: Noise on the gradients (Someone, 2015).\n"
        "  sprout 1.0, sprout:Noise\n"
        "  requires: adapter\n"
        "  after: adapter\n"
        "  hooks: backward (wraps), before_optimizer_step\n"
        "  eta: number, > 0; default 0.01\n"
        "      variance at step 0\n"
        "  kind: text, length ≥ 1; required\n"
    )


def test_a_strategy_is_described_as_json(distribution, capsys):
    distribution("sprout", NOISE, {"noise": "Noise"})
    plugins("noise", as_json=True)
    record = json.loads(capsys.readouterr().out)
    assert record["hooks"] == [{"name": "backward", "wraps": True}, {"name": "before_optimizer_step", "wraps": False}]
    assert record["options"][0] == {
        "name": "eta",
        "type": "number",
        "default": 0.01,
        "required": False,
        "constraint": "> 0",
        "description": "variance at step 0",
    }


def test_broken_and_unknown_plugins_are_refused(distribution):
    distribution("broken", "raise RuntimeError('imported')", {"broken": "Broken"})
    with pytest.raises(
        PluginError, match="plugin 'broken' of broken 1.0 .* cannot be imported: RuntimeError: imported"
    ):
        plugins("broken")
    with pytest.raises(InputError, match="no plugin is called 'brokn'. Did you mean 'broken'?"):
        plugins("brokn")


def test_the_schema_includes_the_options_of_installed_strategies(distribution, capsys):
    distribution("sprout", NOISE, {"noise": "Noise"})
    distribution("broken", "raise RuntimeError('imported')", {"broken": "Broken"})
    schema()
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert printed["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert printed["required"] == ["base", "data", "strategies"]
    names, mapping = printed["properties"]["strategies"]["items"]["anyOf"]
    assert {"lora", "noise"} <= set(names["enum"])
    assert "broken" not in names["enum"]
    options = mapping["properties"]["noise"]["anyOf"][0]
    assert options["properties"]["eta"] == {
        "default": 0.01,
        "description": "variance at step 0",
        "exclusiveMinimum": 0,
        "title": "Eta",
        "type": "number",
    }
    assert options["additionalProperties"] is False
    assert "nf4" in printed["$defs"]["BaseSection"]["properties"]["quantization"]["enum"]
    assert err == (
        "warning: left out: plugin 'broken' of broken 1.0 (broken:Broken) cannot be imported: RuntimeError: imported. "
        "Repair or update it (pip install -U broken), or leave it out of the recipe.\n"
    )


def test_the_reference_page_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs" / "make_recipe_page.py"))["page"]()
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == page, "run `make docs`"
