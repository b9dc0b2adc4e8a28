"""The page of the server: whole, without anything from elsewhere, and strict about what it shows."""

from __future__ import annotations

import re
from pathlib import Path

import budwood

PAGE = Path(budwood.__file__).parent / "serving" / "http" / "page"
FILES = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}
HTML, SCRIPT, STYLE = FILES["index.html"], FILES["page.js"], FILES["page.css"]


def test_the_page_needs_nothing_but_its_own_files():
    assert set(re.findall(r'(?:src|href)="([^"]*)"', HTML)) == {"data:,", "page.css", "page.js"}
    assert not [name for name, text in FILES.items() if re.search(r"https?:|//cdn|@import|url\(", text)]


def test_the_page_works_under_a_policy_without_inline_code():
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?! src=)|javascript:", HTML)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", SCRIPT)


def test_every_element_that_the_script_names_is_there_and_every_field_has_a_label():
    ids = set(re.findall(r'\bid="([^"]+)"', HTML))
    named = set(re.findall(r'\bat\("([^"]+)"\)', SCRIPT))
    fields = re.search(r"FIELDS = \[(.*?)\]", SCRIPT)[1]
    assert named | set(re.findall(r'"(\w+)"', fields)) <= ids
    labelled = re.findall(r"<label[^>]*>.*?</label>", HTML, re.DOTALL)
    for field in re.findall(r"<(?:input|textarea|select)[^>]*>", HTML):
        own = re.search(r'id="(\w+)"', field)[1]
        assert "aria-label" in field or any(field in label or f'for="{own}"' in label for label in labelled), own


def test_the_styles_cover_dark_mode_phones_and_less_motion():
    for condition in ("prefers-color-scheme: dark", "max-width: 640px", "prefers-reduced-motion"):
        assert condition in STYLE
    assert 'content="width=device-width' in HTML and '<html lang="en">' in HTML
