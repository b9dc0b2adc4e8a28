"""Who may ask what: a file with the hash of each client's token, its tenant, adapters and rates."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from budwood.errors import InputError
from budwood.untrusted.files import check_name, complete_file
from budwood.untrusted.formats import read_json

PREFIX = "bw-"
SHA256 = r"^[0-9a-f]{64}$"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Client(_Entry):
    """A token's entry in the file."""

    sha256: str = Field(pattern=SHA256)
    tenant: str = Field(min_length=1)
    adapters: list[str] | Literal["*"] = "*"
    requests_per_minute: int | None = Field(None, ge=1)
    rows: int | None = Field(None, ge=1)


class TokensFile(_Entry):
    """The file: clients, and the hashes of the administrator's tokens."""

    tokens: list[Client] = Field(default_factory=list)
    admin: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class Tenant:
    """Whom a token belongs to.

    Attributes:
        name: shown in metrics and in the log; "" if the server has no tokens.
        adapters: names that it may use; None: all.
        requests_per_minute, rows: largest rate of requests, and number of answers at a time; None: no limit.
        key: distinguishes tokens of one tenant, each of which has its own rate.
    """

    name: str = ""
    adapters: frozenset[str] | None = None
    requests_per_minute: int | None = None
    rows: int | None = None
    key: str = ""

    def allows(self, adapter: str) -> bool:
        """Return whether it may use an adapter."""
        return self.adapters is None or adapter in self.adapters


ANYONE = Tenant()
"""The client of a server without tokens."""


class Tokens:
    """The tokens that a server accepts; without any for clients, everyone who can connect is one."""

    def __init__(self, path: Path | None = None) -> None:
        """Read the file.

        Raises:
            InputError: the file is not valid; the message names the field.
        """
        self.path = path
        self._clients: list[tuple[bytes, Tenant]] = []
        self._admins: list[bytes] = []
        if path is not None:
            self.reload()

    def reload(self) -> None:
        """Read the file again; on an error, the tokens stay as they are."""
        assert self.path is not None
        file = read_file(self.path)
        clients = []
        for entry in file.tokens:
            adapters = None if entry.adapters == "*" else frozenset(entry.adapters)
            tenant = Tenant(entry.tenant, adapters, entry.requests_per_minute, entry.rows, entry.sha256[:12])
            clients.append((bytes.fromhex(entry.sha256), tenant))
        self._clients, self._admins = clients, [bytes.fromhex(text) for text in file.admin]

    @property
    def needed(self) -> bool:
        """Whether clients need a token."""
        return bool(self._clients)

    @property
    def has_admin(self) -> bool:
        """Whether there is a token for the administrator."""
        return bool(self._admins)

    def tenant(self, authorization: str) -> Tenant | None:
        """Return whose token the header `Authorization` has; None: nobody's."""
        if not self._clients:
            return ANYONE
        digest, found = _digest(authorization), None
        for known, tenant in self._clients:  # all of them, so that the time does not depend on which
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def is_admin(self, authorization: str) -> bool:
        """Return whether the header `Authorization` has a token of the administrator."""
        digest = _digest(authorization)
        return any([hmac.compare_digest(known, digest) for known in self._admins])


def _digest(authorization: str) -> bytes:
    scheme, _, token = authorization.partition(" ")
    return hashlib.sha256(token.strip().encode() if scheme.lower() == "bearer" else b"").digest()


def read_file(path: Path) -> TokensFile:
    """Read a file of tokens.

    Raises:
        InputError: it is not valid; the message names the field.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file. Make one with: budwood token {path} TENANT")
    try:
        file = TokensFile.model_validate(read_json(path))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise InputError(f"{path}: field '{'.'.join(map(str, problem['loc']))}': {problem['msg']}.") from error
    hashes = [entry.sha256 for entry in file.tokens] + file.admin
    for text in hashes:
        if len(text) != 64 or set(text) - set("0123456789abcdef"):
            raise InputError(f"{path}: field 'admin': must hold SHA-256 hashes, 64 hexadecimal digits each.")
    if len(set(hashes)) != len(hashes):
        raise InputError(f"{path}: two entries have the same sha256: give each client its own token.")
    if hashlib.sha256(b"").hexdigest() in hashes:
        raise InputError(f"{path}: an entry has the hash of an empty token.")
    for entry in file.tokens:
        check_name(entry.tenant, "tenant")
    return file


def add_token(path: Path, tenant: str | None, **options: Any) -> str:
    """Add a new token to a file, which is made if there is none, and return the token, which is kept nowhere.

    Args:
        path: the file.
        tenant: whom the token is for; None: the administrator.
        options: further fields of its entry.

    Raises:
        InputError: the file or a name is not valid.
        ResourceError: the file cannot be written.
    """
    file = read_file(path) if path.exists() else TokensFile()
    token = PREFIX + secrets.token_urlsafe(32)
    sha256 = hashlib.sha256(token.encode()).hexdigest()
    if tenant is None:
        file.admin.append(sha256)
    else:
        file.tokens.append(Client(sha256=sha256, tenant=check_name(tenant, "tenant"), **options))
    text = json.dumps(file.model_dump(exclude_none=True), indent=2) + "\n"
    complete_file(path, text.encode())
    path.chmod(0o600)
    return token
