"""Start the strategy that owns a saved adapter, with the options of its run if it requires options."""

from __future__ import annotations

from typing import Any

from budwood.adapters.store import SavedAdapter
from budwood.contract.loading import build_strategy, load_strategy
from budwood.contract.strategy import Strategy
from budwood.errors import InputError


def owner_options(saved: SavedAdapter) -> dict[str, Any]:
    """Return the options to start an adapter's owner with: none, or those of the adapter's run if any are required.

    Raises:
        InputError: an option is required, but no budwood.json records it.
        PluginError: the strategy is not installed or broken.
    """
    cls, entry = load_strategy(saved.adapter_type)
    try:
        cls.Options.model_validate({})
        return {}
    except Exception:  # whatever a validator raises
        records = saved.manifest.strategies if saved.manifest is not None else []
    for record in records:
        if record.get("name") == saved.adapter_type and isinstance(record.get("options"), dict):
            options: dict[str, Any] = record["options"]
            return options
    raise InputError(
        f"{saved.directory}: strategy '{saved.adapter_type}' of {entry.owner} has required options, but no "
        "budwood.json records them: open the folder that its run wrote."
    )


def start_owner(saved: SavedAdapter) -> Strategy:
    """Start the strategy that owns an adapter.

    Raises:
        InputError: see `owner_options`; or the options in budwood.json are invalid.
        PluginError: the strategy is not installed or broken.
    """
    return build_strategy(saved.adapter_type, owner_options(saved), f"{saved.directory / 'budwood.json'}")
