"""The corpus of the tiny base: its sources, their licences, and the filters applied.

The docstrings of the Python standard library and of the installed packages in ``INSTALLED``, the project descriptions
of the PyPI releases that ``base/sources.tsv`` pins, and the descriptions of ``data/sections/train.jsonl``, without
labels.
"""

from __future__ import annotations

import ast
import hashlib
import http.client
import importlib.metadata
import inspect
import json
import platform
import re
import ssl
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SECTIONS = Path(__file__).resolve().parent / "data" / "sections"

# Installed packages whose docstrings are read; at most this many bytes of each.
INSTALLED = [
    "matplotlib", "scipy", "scikit-learn", "numpy", "pandas", "networkx", "sympy", "torch",
    "pillow", "fonttools", "Pygments", "pytest", "rich", "pydantic", "fsspec",
    "setuptools", "huggingface_hub", "transformers", "datasets", "narwhals", "mpmath", "Jinja2",
]  # fmt: skip
INSTALLED_LIMIT = 150_000
STDLIB_LIMIT = 1_000_000
README_LIMIT = 2_500  # characters of a project's description

# ------------------------------------------------------------------------------------ licences

PERMISSIVE = {
    "MIT", "MIT-0", "MIT-CMU", "HPND", "ISC", "0BSD", "BSD", "BSD-2-Clause", "BSD-3-Clause",
    "Apache-2.0", "PSF-2.0", "Python-2.0",
}  # fmt: skip
CLASSIFIERS = {
    "MIT License": "MIT",
    "MIT No Attribution License (MIT-0)": "MIT-0",
    "BSD License": "BSD",
    "Apache Software License": "Apache-2.0",
    "ISC License (ISCL)": "ISC",
    "Python Software Foundation License": "PSF-2.0",
    "Historical Permission Notice and Disclaimer (HPND)": "HPND",
    "CMU License (MIT-CMU)": "MIT-CMU",
}
FREE_FORM = [
    (r"(the )?mit( licen[sc]e)?( \(mit\))?", "MIT"),
    (r"(new |modified |simplified )?bsd( licen[sc]e)?", "BSD"),
    (r"bsd[- ]?3([- ]clause)?( licen[sc]e)?|3-clause bsd", "BSD-3-Clause"),
    (r"bsd[- ]?2([- ]clause)?( licen[sc]e)?|2-clause bsd", "BSD-2-Clause"),
    (r"apache( software)?( licen[sc]e)?,?( version)?[- ]?v?2(\.0)?( licen[sc]e)?", "Apache-2.0"),
    (r"isc( licen[sc]e)?", "ISC"),
]


def licence_of(info: dict) -> str | None:
    """Return the SPDX-like name of a permissive licence, or None for any other or an unclear one."""
    expression = info.get("license_expression")
    if expression:
        names = re.split(r"\s+(?:AND|OR)\s+|[()]", expression)
        return expression if all(n.strip() in PERMISSIVE for n in names if n.strip()) else None
    classifiers = [c.split(" :: ")[-1] for c in info.get("classifiers") or []]
    classifiers = [c for c in classifiers if c not in ("License", "OSI Approved")]
    if classifiers:
        names = [CLASSIFIERS.get(c) for c in classifiers]
        return " OR ".join(sorted(names)) if all(names) else None  # type: ignore[arg-type]
    text = re.sub(r"\s+", " ", (info.get("license") or "").strip().lower())
    for pattern, name in FREE_FORM:
        if re.fullmatch(pattern, text):
            return name
    if text.startswith("mit license") and "permission is hereby granted" in text:
        return "MIT"
    return None


# ------------------------------------------------------------------------------------ cleaning

SKIPPED_HEADINGS = re.compile(
    r"(installation|install|installing|licen[sc]e|contribut|change ?log|development|developing|"
    r"testing|tests|release|history|table of contents|contents|author|credits|support|badges|"
    r"building|requirements|acknowledg|citation|citing|copyright|sponsor|links|quick ?start|"
    r"getting started)",
    re.I,
)


def clean(text: str) -> str:
    """Extract prose from Markdown, reStructuredText or a docstring: no code, tables, links or badges."""
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    text = re.sub(r"```.*?(```|\Z)|~~~.*?(~~~|\Z)", "\n", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", " ", text, flags=re.S)
    text = re.sub(r"<[^>\n]{1,300}>", " ", text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", " ", text)
    text = re.sub(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", text)
    text = re.sub(r"`([^`<\n]+)\s*<[^>\n]*>`_+", r"\1", text)
    text = re.sub(r":[a-z:]+:`~?([^`\n]*)`", r"\1", text)
    text = re.sub(r"https?://\S+|www\.\S+", " ", text)
    text = re.sub(r"[`*]+|\|[^|\n]{1,40}\|_?", lambda m: "" if m[0][0] != "|" else " ", text)
    text = re.sub(r"(?<=\w)_+(?=\s|$)", "", text)
    lines, kept, skipping = text.split("\n"), [], False
    for i, line in enumerate(lines):
        bare = line.strip()
        under = lines[i + 1].strip() if i + 1 < len(lines) else ""
        heading = bare.startswith("#") or (bare and re.fullmatch(r"([=\-~^\"#+])\1{2,}", under))
        if heading:
            bare = bare.strip("# ").strip()
            skipping = bool(SKIPPED_HEADINGS.match(bare))
        if skipping or re.match(r"(\.\. |>>>|\.\.\. |\$ |:\w+|\||\+[-=]|%|@|pip |-{3}|={3})", bare):
            continue
        if re.match(r"section\s*:", bare, re.I):  # the format of the fine-tuning task
            continue
        letters = sum(c.isalpha() or c == " " for c in bare)
        if bare and (letters < 0.75 * len(bare) or len(bare) > 1500):
            continue
        kept.append(re.sub(r"\s+", " ", bare))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


STOPWORDS = {
    "the", "a", "an", "of", "for", "to", "and", "in", "is", "with", "from", "on", "by", "it",
    "this", "that", "library", "tool",
}  # fmt: skip


def is_english(text: str) -> bool:
    """A rough test: nearly all ASCII, with enough common English words."""
    words = re.findall(r"[a-z]+", text.lower())
    common = sum(w in STOPWORDS for w in words)
    return sum(map(str.isascii, text)) > 0.97 * len(text) and common > 0.08 * len(words)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


class Leaks:
    """Drops every corpus line that equals or contains a description of eval.jsonl."""

    def __init__(self, descriptions: list[str]):
        self.whole = {tuple(words_of(d)) for d in descriptions}
        self.heads: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for words in self.whole:
            if len(words) >= 4:
                self.heads.setdefault(words[:4], []).append(words)
        self.dropped = 0

    def leaks(self, line: str) -> bool:
        words = tuple(words_of(line))
        if words in self.whole:
            return True
        for i in range(len(words) - 3):
            for whole in self.heads.get(words[i : i + 4], ()):
                if words[i : i + len(whole)] == whole:
                    return True
        return False

    def filter(self, text: str) -> str:
        kept = []
        for line in text.split("\n"):
            if self.leaks(line):
                self.dropped += 1
            else:
                kept.append(line)
        return "\n".join(kept)


# ------------------------------------------------------------------------------------- sources


def fetch_pypi(wanted: list[tuple[str, str]], cache: Path, index: str) -> list[dict]:
    """Return the metadata of pinned PyPI releases; cached in one JSON-lines file under ``cache``."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / "pypi.jsonl"
    have: dict[tuple[str, str], dict] = {}
    if path.exists():
        for line in path.open(encoding="utf-8"):
            row = json.loads(line)
            have[row["name"], row["version"]] = row
    local = threading.local()
    context = ssl.create_default_context()

    def get(key: tuple[str, str]) -> dict | None:
        for _ in range(3):
            try:
                if getattr(local, "connection", None) is None:
                    local.connection = http.client.HTTPSConnection(index, timeout=30, context=context)
                local.connection.request("GET", f"/pypi/{key[0]}/{key[1]}/json")
                reply = local.connection.getresponse()
                body = reply.read()
                if reply.status != 200:
                    return None
                info = json.loads(body)["info"]
                fields = ("summary", "keywords", "description", "license", "license_expression")
                row = {field: info.get(field) for field in fields}
                row["name"], row["version"] = key
                row["classifiers"] = [c for c in info["classifiers"] if c.startswith("License")]
                return row
            except (OSError, http.client.HTTPException):
                local.connection = None
                time.sleep(1)
        return None

    missing = [key for key in wanted if key not in have]
    if missing:
        print(f"fetching {len(missing)} descriptions from {index}", flush=True)
        with ThreadPoolExecutor(16) as pool, path.open("a", encoding="utf-8") as out:
            for row in pool.map(get, missing):
                if row:
                    have[row["name"], row["version"]] = row
                    out.write(json.dumps(row) + "\n")
    return [have[key] for key in wanted if key in have]


def summary_of(row: dict) -> str:
    return re.sub(r"\s+", " ", (row.get("summary") or "")).strip().rstrip(".")


def readme_document(row: dict) -> str:
    """Return a PyPI project as a plain document: name, summary, keywords, start of its description."""
    text = f"{row['name']} - {summary_of(row)}\n"
    keywords = re.sub(r"[\s,;]+", " ", row.get("keywords") or "").strip()
    if keywords:
        text += keywords[:200] + "\n"
    body = clean((row.get("description") or "")[: 6 * README_LIMIT])[:README_LIMIT]
    body = body[: body.rfind("\n")] if len(body) == README_LIMIT and "\n" in body else body
    return (text + "\n" + body).strip()


def docstrings(path: Path) -> list[str]:
    """Return the docstrings of one Python file, in order, without their parameter lists and examples."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    texts = []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            doc = ast.get_docstring(node)
            if doc and len(doc) >= 60:
                doc = re.split(r"\n(Parameters|Args|Arguments|Returns|Examples?)\b.*\n", doc)[0]
                doc = clean(inspect.cleandoc(doc))
                if len(doc) >= 60:
                    texts.append(doc)
    return texts


def python_documents(files: list[Path], limit: int) -> list[str]:
    """Return one document per file, with its docstrings; files are ordered by a hash, up to a size limit."""
    files.sort(key=lambda p: hashlib.sha256("/".join(p.parts[-3:]).encode()).digest())
    documents: list[str] = []
    seen: set[str] = set()
    total = 0
    for path in files:
        if re.search(r"(^|/)(tests?|_vendor|vendor|site-packages/.*test)(/|_)", str(path)):
            continue
        docs = [d for d in dict.fromkeys(docstrings(path)) if d not in seen]
        seen.update(docs)
        text = "\n\n".join(docs)
        if text and is_english(text):
            documents.append(text)
            total += len(text.encode())
        if total > limit:
            break
    return documents


def installed_documents(name: str) -> tuple[list[str], str, str] | None:
    try:
        dist = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    info = {
        "license_expression": "".join(dist.metadata.get_all("License-Expression") or []),
        "classifiers": [c for c in dist.metadata.get_all("Classifier") or [] if c.startswith("License")],
        "license": "".join(dist.metadata.get_all("License") or []),
    }
    licence = licence_of(info)
    # Some wheels also list the licences of bundled libraries; their Python text is BSD.
    if licence is None and "BSD-3-Clause" in (info["license_expression"] or ""):
        licence = "BSD-3-Clause"
    if licence is None:
        print(f"omitted, licence not on the list: {name}")
        return None
    files = [Path(str(dist.locate_file(f))) for f in dist.files or [] if str(f).endswith(".py")]
    return python_documents(files, INSTALLED_LIMIT), dist.version, licence


def held_out(text: str) -> bool:
    """About 2 % of the documents, chosen by a hash of their text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 50 == 0


def gather(sources: Path, cache: Path, index: str | None) -> dict:
    """Return all text (documents, summaries, section descriptions; train and held-out) and its sources.

    Without an index, nothing from PyPI is included.
    """

    def read_texts(name: str) -> list[str]:
        return [json.loads(x)["text"] for x in (SECTIONS / name).open(encoding="utf-8")]

    leaks = Leaks(read_texts("eval.jsonl"))
    sections = [t for t in read_texts("train.jsonl") if not leaks.leaks(t)]
    documents: list[str] = []
    table: list[tuple[str, str, str, str, int]] = []

    def add(kind: str, name: str, version: str, licence: str, texts: list[str]) -> None:
        texts = [t for t in map(leaks.filter, texts) if len(t) > 40]
        documents.extend(texts)
        if texts:
            table.append((kind, name, version, licence, sum(len(t.encode()) for t in texts)))

    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [p for p in stdlib.rglob("*.py") if "site-packages" not in p.parts]
    add("python", "Python standard library", platform.python_version(), "PSF-2.0",
        python_documents(files, STDLIB_LIMIT))  # fmt: skip
    for name in INSTALLED:
        got = installed_documents(name)
        if got:
            add("installed", name, got[1], got[2], got[0])
    rows = [x.split("\t") for x in sources.read_text(encoding="utf-8").splitlines()[1:]]
    pinned = {(r[1], r[2]): r[3] for r in rows if r[0] == "pypi"}
    summaries = []
    for row in fetch_pypi(list(pinned), cache, index) if index else []:
        licence = licence_of(row)
        if licence is None:
            continue
        add("pypi", row["name"], row["version"], licence, [readme_document(row)])
        line = summary_of(row)
        if 15 < len(line) < 150 and not leaks.leaks(line) and not held_out(readme_document(row)):
            summaries.append(line)
    table.append(("data", "data/sections/train.jsonl (text)", "Debian 12",
                  "DFSG-free, each line under its package's licence",
                  sum(len(t.encode()) for t in sections)))  # fmt: skip
    documents = sorted(set(documents))
    print(f"{leaks.dropped} lines dropped that contain an eval description", flush=True)
    return {
        "documents": [d for d in documents if not held_out(d)],
        "documents_held_out": [d for d in documents if held_out(d)],
        "summaries": sorted(set(summaries)),
        "sections": [s for s in sections if not held_out(s)],
        "sections_held_out": [s for s in sections if held_out(s)],
        "sources": table,
    }
