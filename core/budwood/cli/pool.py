"""A base with adapters that a command is given by --adapter: checked before the base is loaded, then opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budwood.cli.streams import echo
from budwood.garbage import uncollected

if TYPE_CHECKING:
    from budwood.adapters.store import SavedAdapter
    from budwood.serving.pool import AdapterPool


def parse_adapters(arguments: list[str]) -> dict[str, Path]:
    """Return the folders of --adapter NAME=DIR by name.

    Raises:
        InputError: one is written otherwise, or a name is invalid or used twice.
    """
    from budwood.errors import InputError
    from budwood.untrusted.files import check_name

    directories: dict[str, Path] = {}
    for text in arguments:
        name, equals, directory = text.partition("=")
        if not equals or not directory:
            raise InputError(f"--adapter {text[:80]!r}: write NAME=DIR.")
        if check_name(name) in directories:
            raise InputError(f"--adapter: the name '{name}' is used twice; give each adapter its own name.")
        directories[name] = Path(directory)
    return directories


def read_adapters(
    directories: dict[str, Path], base: str, allow_other_base: bool, quantization: str | None
) -> dict[str, SavedAdapter]:
    """Read the adapters before the base is loaded.

    Raises:
        InputError, CorruptError: one is invalid, or of another base, or they are for different tasks.
    """
    from budwood.adapters.store import read_adapter
    from budwood.errors import InputError
    from budwood.model.checkpoint import fingerprint
    from budwood.model.checks import check_base

    adapters = {name: read_adapter(directory) for name, directory in directories.items()}
    info = check_base(base, quantization)
    base_fingerprint = fingerprint(info.path) if adapters else None
    for directory in directories.values():
        read_adapter(
            directory,
            base_name=base,
            base_fingerprint=base_fingerprint,
            allow_other_base=allow_other_base,
            hashes=False,
        )
    tasks = sorted({adapter.manifest.task for adapter in adapters.values() if adapter.manifest})
    if len(tasks) > 1:
        raise InputError(f"the adapters are for different tasks ({', '.join(tasks)}): use adapters for one task.")
    return adapters


def check_choice(use: str | None, directories: Mapping[str, Path], top_p: float) -> None:
    """Check --use and --top-p.

    Raises:
        InputError: no adapter has that name, or the probability is 0.
    """
    from budwood.errors import InputError, did_you_mean

    if top_p <= 0:
        raise InputError("--top-p: must be above 0.")
    if use is not None and use not in directories:
        raise InputError(f"--use {use[:64]!r}: no --adapter has this name.{did_you_mean(use, directories)}")


def open_pool(
    base: str,
    directories: Mapping[str, Path],
    saved: Mapping[str, SavedAdapter],
    quantization: str | None,
    *,
    allow_other_base: bool,
    **options: Any,
) -> AdapterPool:
    """Load the base and the adapters.

    Unless `quantization` says otherwise, the base is quantised as the first adapter's was, or, without one, as stored.
    """
    with uncollected():
        from budwood.serving.pool import AdapterPool

    manifests = [item.manifest for item in saved.values() if item.manifest]
    first = manifests[0] if manifests else None
    pool = AdapterPool(
        base,
        quantization or (first.base.quantization if first else None),
        task=first.task if first else "causal-lm",
        labels=first.labels if first else (),
        task_options=first.task_options if first else None,
        double_quantization=first.base.double_quantization if first else True,
        **options,
    )
    for name, directory in directories.items():
        for note in pool.load(name, directory, allow_other_base=allow_other_base).notes:
            echo(f"note: adapter '{name}': {note}", err=True)
    return pool
