"""Redacts secrets in everything that is printed, logged or written.

Secrets are the values of environment variables and recipe fields with names such as "password", credentials in URLs
and headers, and anything that looks like a token of a well-known service.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

MASK = "[redacted]"
SHORTEST = 6
"""Minimum length of a secret, in characters. A shorter value is probably a flag or a number; replacing it everywhere
would garble messages."""

_WORDS = r"password|passwd|passphrase|secret|api_?key|access_?key|private_?key|credentials?"
_VARIABLE = re.compile(rf"(?i)(^|_)({_WORDS}|token|auth)$")
# In a recipe, a token may also be a tokenizer token: mask_token, stop_token.
_TOKENS = r"(?:access|api|auth|bearer|github|hf|hub|refresh|session|wandb)_?token"
_FIELD = rf"(?:\w*_)?(?:{_WORDS})|token|\w*{_TOKENS}"
_NAMES_SECRET = re.compile(rf"(?i)({_FIELD})$")
_URL_PATTERNS = (
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]{1,20}://)[^\s/'\"]*@"), rf"\1{MASK}@"),
    (re.compile(r"(?i)([?&][\w-]{0,40}(?:token|key|secret|password|signature|sig)=)[^&\s'\"]+"), rf"\1{MASK}"),
)
_PATTERNS = (
    *_URL_PATTERNS,
    (re.compile(rf"(?i)((?<!\w)(?:{_FIELD})=)[^\s,;&'\"]+"), rf"\1{MASK}"),
    (re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?\w+\s+)[^\s'\"]+"), rf"\1{MASK}"),
    (re.compile(r"\b(hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_-]{12,}"), MASK),
)
# A path with at least one slash. "host.example/…" may be an address, whose components may be secrets.
_PATH = re.compile(r"(?![\w-]+(\.[\w-]+)+/)[\w.~+-]*(/[\w.~+-]*)+")

_remembered: set[str] = set()


def redact(text: str) -> str:
    """Return `text` with every secret in it replaced."""
    return _redact(text, _secrets())


def _redact(text: str, secrets: set[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, MASK)
    for pattern, mask in _PATTERNS:
        text = pattern.sub(mask, text)
    return text


def shorten(text: str, limit: int = 60) -> str:
    """Cut `text` to one line of at most `limit` characters."""
    line = redact(" ".join(text.split()))  # before truncation: half a secret would not be recognised
    return line if len(line) <= limit else line[: limit - 1] + "…"


def redact_url(text: str) -> str:
    """Return `text`, a path, a model name or a URL, with only the credentials in a URL replaced."""
    for pattern, mask in _URL_PATTERNS:
        text = pattern.sub(mask, text)
    return text


def redact_values(value: Any) -> Any:
    """Return plain values (mappings, lists, strings, numbers) with every secret in them replaced.

    A string that is a path or a model name is kept, even if a folder has the name of a secret: with a word replaced,
    it would name another file.
    """
    return _redact_values(value, _secrets())


def _redact_values(value: Any, secrets: set[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: MASK if _is_secret(key, item) else _redact_values(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact_values(item, secrets) for item in value]
    if not isinstance(value, str):
        return value
    return value if _PATH.fullmatch(value) and value not in secrets else _redact(value, secrets)


def remember(value: Any) -> None:
    """Register the secrets in plain values, such as a recipe, so that they are redacted from now on."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if _is_secret(key, item) and len(item) >= SHORTEST:
                _remembered.add(item)
            remember(item)
    elif isinstance(value, list | tuple):
        for item in value:
            remember(item)
    elif isinstance(value, str):
        _remembered.update(_password(value))


class RedactedStream:
    """A text stream that redacts what is written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` redacted; return the length of the original."""
        self._stream.write(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _is_secret(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, str) and bool(value) and bool(_NAMES_SECRET.match(key))


def _secrets() -> set[str]:
    secrets = set(_remembered)
    for name, value in os.environ.items():
        if _VARIABLE.search(name):
            secrets.update([value.strip(), *(line.strip() for line in value.splitlines())])
        elif "://" in value:
            secrets.update(_password(value))
    secrets |= {quote(secret, safe="") for secret in secrets}
    return {secret for secret in secrets if len(secret) >= SHORTEST}


def _password(text: str) -> set[str]:
    """Return the password in a URL, both as written and unquoted."""
    try:
        password = urlsplit(text).password
    except ValueError:  # not a URL after all
        return set()
    return {password, unquote(password)} if password else set()
