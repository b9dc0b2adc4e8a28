"""What `budwood serve` can be told: where it listens, and its limits."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """Limits of one request and of all together.

    Attributes:
        max_tokens: largest number of tokens of an answer; a request that asks for more is refused.
        n: largest number of answers to a prompt; prompts: of prompts in a request; rows: of both multiplied.
        inputs: largest number of texts in a request for embeddings.
        waiting: requests that wait for a row of the engine, beyond which further ones are refused.
        deadline: seconds after which a request is ended.
        slow_reader: seconds that a client may leave the next piece of a stream unread.
        body_seconds: seconds that a client may take to send the headers of a request, and again its body.
        drain: seconds that requests in flight may take after SIGTERM.
        body: bytes of a request; header: of its headers; depth: of nested JSON; messages, tools, stop: of lists.
        stop_length: characters of a stop string.
        connections: connections at a time, idle ones included.
    """

    max_tokens: int = 4096
    n: int = 8
    prompts: int = 16
    rows: int = 32
    inputs: int = 256
    waiting: int = 256
    deadline: float = 600.0
    slow_reader: float = 30.0
    body_seconds: float = 15.0
    drain: float = 30.0
    body: int = 1 << 20
    header: int = 1 << 14
    depth: int = 32
    messages: int = 256
    tools: int = 64
    stop: int = 8
    stop_length: int = 64
    connections: int = 1024


@dataclass(frozen=True)
class Address:
    """Where a server listens: a host and a port, or the path of a Unix socket."""

    host: str = "127.0.0.1"
    port: int = 8000
    path: str = ""

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name, which may stand for any address
            return False

    def __str__(self) -> str:
        if self.path:
            return self.path
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True)
class Settings:
    """What a server is told.

    Attributes:
        address: where clients connect; admin: where the administrator does, None: nowhere.
        base_name: what clients call the base.
        limits: see `Limits`.
    """

    base_name: str
    address: Address = field(default_factory=Address)
    admin: Address | None = None
    limits: Limits = field(default_factory=Limits)
