"""A server in the test's process: for most tests without a port, for streams that break with one."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from starlette.testclient import TestClient
from tests.core.serving.conftest import make_adalora, make_adapter

from budwood.adapters.golden import measure
from budwood.adapters.store import write_adapter
from budwood.contract.loading import build_task, create
from budwood.model.base import load_base
from budwood.model.text_tasks import as_probe
from budwood.serving.engine import Engine
from budwood.serving.http.app import admin_app, clients_app
from budwood.serving.http.catalog import Root
from budwood.serving.http.server import run
from budwood.serving.http.service import Service
from budwood.serving.http.settings import Address, Limits, Settings
from budwood.serving.http.sockets import bound
from budwood.serving.http.tokens import Tokens
from budwood.serving.pool import load_for_task

HELLO = [{"role": "user", "content": "hello"}]


def open_service(
    base: Path, adapters: Path | None = None, tokens: Path | None = None, task: str = "causal-lm", **options: Any
) -> Service:
    """Return a server's state; `limits` and options of the engine as keywords."""
    limits = Limits(**options.pop("limits", {}))
    plugin = build_task(task, {})
    loaded = load_for_task(base, "none", plugin, [], precision="fp32", device="cpu", double_quantization=True)
    engine = Engine(loaded, task, **options)
    settings = Settings("tiny", Address("127.0.0.1", 0), None, limits)
    service = Service(engine, settings, Tokens(tokens), Root(adapters) if adapters else None, plugin)
    if service.catalog.root is not None:
        for name, path in service.catalog.root.all().items():
            service.catalog.load(name, path, "hash")
    return service


def client(service: Service, token: str = "none") -> TestClient:
    """Return a client of a server without a port."""
    return TestClient(clients_app(service), "http://localhost", headers={"authorization": f"Bearer {token}"})


def admin(service: Service, token: str = "none") -> TestClient:
    """Return the administrator's."""
    return TestClient(admin_app(service), "http://localhost", headers={"authorization": f"Bearer {token}"})


def ask(client: TestClient, **fields: Any) -> Any:
    """Send a chat request, and return the response."""
    return client.post("/v1/chat/completions", json={"model": "one", "messages": HELLO, "max_tokens": 4, **fields})


@contextmanager
def running(service: Service) -> Iterator[tuple[OpenAI, int]]:
    """Serve on a port in a thread; yields a client and the port."""
    with bound(service.settings) as sockets:
        ready = threading.Event()
        thread = threading.Thread(target=run, args=(service, sockets, ready.set))
        thread.start()
        try:
            assert ready.wait(20)
            place = f"{sockets.places[0]}/v1"
            yield OpenAI(base_url=place, api_key="none", max_retries=0, timeout=30), sockets.port
        finally:
            service.ending = True
            thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with three adapters."""
    root = tmp_path_factory.mktemp("served")
    make_adapter(root / "one", 1)
    make_adapter(root / "two", 2, rank=8)
    make_adalora(root / "run" / "adapter", 3)
    return root


@pytest.fixture(scope="module")
def service(tiny_base: Path, adapters: Path) -> Service:
    """A server without tokens, shared by the tests of a file."""
    return open_service(tiny_base, adapters, prefix_bytes=1 << 20)


@pytest.fixture
def with_golden(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Function (folder, seed) -> an adapter with golden logits; `wrong` changes them."""

    def make(folder: Path, seed: int, wrong: float = 0.0) -> Path:
        plain = make_adapter(tmp_path / f"plain-{seed}-{wrong}-{folder.name}", seed)
        base = load_base(tiny_base, "none", "AutoModelForCausalLM", torch.float32)
        engine, task = Engine(base), create("causal-lm", "budwood.tasks")
        engine.load("a", plain)
        probes = [as_probe([1, 40, 50, 60]), as_probe([1, 99, 7])]
        rows = [
            engine.with_adapter(name, lambda: measure(task, base.model, base.tokenizer, probes, base.dtype))
            for name in (None, "a")
        ]
        return write_adapter(
            folder, lambda target: shutil.copytree(plain, target, dirs_exist_ok=True) and None, adapter_type="lora",
            distribution="budwood 0.1.0", base=base, task="causal-lm", tokenizer=base.tokenizer, probes=probes,
            base_logits=list(rows[0]), adapter_logits=list(rows[1] + wrong),
        ).directory  # fmt: skip

    return make
