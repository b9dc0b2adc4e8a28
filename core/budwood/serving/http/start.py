"""Opens the base and the adapters for a server."""

from __future__ import annotations

from collections.abc import Callable

from budwood.adapters.store import SavedAdapter, read_adapter
from budwood.contract.loading import build_task
from budwood.errors import BudwoodError, InputError
from budwood.model.base import check_base, fingerprint
from budwood.model.quiet import silence_libraries
from budwood.model.task import Task
from budwood.serving.engine import Engine
from budwood.serving.http.catalog import Root
from budwood.serving.http.service import Service
from budwood.serving.http.settings import Settings
from budwood.serving.http.tokens import Tokens
from budwood.serving.pool import load_for_task


def open_service(
    base: str,
    settings: Settings,
    tokens: Tokens,
    root: Root | None,
    say: Callable[[str], None],
    *,
    task: str | None = None,
    quantization: str | None = None,
    precision: str = "auto",
    device: str = "auto",
    max_rows: int = 32,
    prefix_bytes: int = 0,
    adapter_bytes: int | None = None,
) -> Service:
    """Load a base and the adapters below the root; those that cannot be loaded are named, and left out.

    Raises:
        InputError: there is no such base or quantization, or the adapters are for several tasks, or one on images.
        ResourceError: the machine cannot load it.
        CorruptError: the base is damaged.
    """
    found = _read_all(root, say)
    info = check_base(base, quantization)
    base_fingerprint = fingerprint(info.path)
    manifests = [
        saved.manifest
        for saved in found.values()
        if saved.manifest is not None and saved.manifest.base.fingerprint == base_fingerprint
    ]
    tasks = sorted({manifest.task for manifest in manifests} | ({task} if task else set())) or ["causal-lm"]
    if len(tasks) > 1:
        raise InputError(f"there are different tasks ({', '.join(tasks)}): serve the adapters of each from a folder.")
    first = manifests[0].base if manifests else None
    quantization = quantization or (first.quantization if first else None)
    silence_libraries()
    plugin: Task = build_task(tasks[0], manifests[0].task_options if manifests else {})
    if plugin.answers != "texts":
        raise InputError(f"the server takes texts, and task '{plugin.name}' answers {plugin.answers}: use generate.")
    loaded = load_for_task(
        base, quantization, plugin, [], precision=precision, device=device,
        double_quantization=first.double_quantization if first else True,
    )  # fmt: skip
    engine = Engine(loaded, tasks[0], max_rows=max_rows, prefix_bytes=prefix_bytes, adapter_bytes=adapter_bytes)
    engine.loader.task_plugin = plugin
    service = Service(engine, settings, tokens, root, plugin)
    for name, saved in found.items():
        try:
            served, _ = service.catalog.load(name, str(saved.directory.relative_to(root.folder)), "hash")  # type: ignore[union-attr]
        except BudwoodError as error:
            say(f"adapter '{name}' is left out: {error}")
        else:
            for note in served.saved.notes:
                say(f"note: adapter '{name}': {note}")
    return service


def _read_all(root: Root | None, say: Callable[[str], None]) -> dict[str, SavedAdapter]:
    found: dict[str, SavedAdapter] = {}
    for name, path in (root.all() if root is not None else {}).items():
        try:
            found[name] = read_adapter(root.find(path), hashes=False)  # type: ignore[union-attr]
        except BudwoodError as error:
            say(f"adapter '{name}' is left out: {error}")
    return found
