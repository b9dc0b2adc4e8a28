"""docs/data.md: every example shows what training makes of it, and the page is up to date."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from budwood.contract.discovery import find, installed
from budwood.contract.loading import create
from budwood.data.chat_formats import UNSUPPORTED
from budwood.data.formats import GROUP

DOCS = Path(__file__).parents[3] / "docs"
PAGE = SimpleNamespace(**runpy.run_path(str(DOCS / "data_examples.py")))
SHOWN = [*PAGE.FORMATS, *PAGE.CHOICES, *PAGE.REFUSED]


@pytest.mark.parametrize("shown", SHOWN, ids=lambda shown: shown.title or str(shown.sees)[:40])
def test_an_example_is_what_training_makes_of_it(shown, tmp_path):
    sees, line = PAGE.see(shown, tmp_path)
    assert sees == shown.sees
    for said in shown.says:
        assert said in line
    assert ("ignored" in line, "dropped" in line, "skipped" in line) == tuple(
        any(word in said for said in shown.says) for word in ("ignored", "dropped", "skipped")
    )


@pytest.mark.parametrize("found", PAGE.FILES, ids=lambda found: f"{found.source} {len(found.files)}")
def test_a_source_names_these_files(found, tmp_path):
    assert PAGE.find(found, tmp_path) == found.found


def test_every_format_has_an_example():
    formats = [create(name, GROUP) for name in installed(GROUP) if find(name, GROUP).distribution == "budwood"]
    shown = [set(row) for example in PAGE.FORMATS for row in example.rows]
    lacking = [each.name for each in formats if not any(set(each.columns) <= columns for columns in shown)]
    assert lacking == ["conversation"]  # named in the note on messages
    refused = [set(example.rows[0]) for example in PAGE.REFUSED]
    assert any(set(each.columns) in refused for each in UNSUPPORTED)


def test_the_page_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    page = runpy.run_path(str(DOCS / "make_data_page.py"))["page"]()
    sys.modules.pop("data_examples")
    assert (DOCS / "data.md").read_text(encoding="utf-8") == page, "run `make docs`"
