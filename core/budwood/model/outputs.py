"""What a base's configuration asks its forward to return beside its output, which Budwood's own forwards do not want.

With `output_router_logits`, transformers computes an auxiliary loss in every forward: also in evaluation and
generation, where the mask does not fit the positions that have a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_WANTED = {
    "output_router_logits": False,
    "output_hidden_states": False,
    "_output_attentions": False,
    "return_dict": True,
}
"""Entries of a configuration, under their attributes' names, and the values with which a model computes here."""
_ASKED = "budwood_asked"


def take_outputs(config: Any) -> None:
    """Have a model's forward return its output alone; `asks_for` says later what its base asked for."""
    for part in _parts(config):
        asked = {
            name: part.__dict__[name] for name, value in _WANTED.items() if part.__dict__.get(name, value) != value
        }
        if asked:
            part.__dict__.update({_ASKED: asked} | {name: _WANTED[name] for name in asked})


def give_back_outputs(config: Any) -> None:
    """Put back what a base asked for, as in its config.json."""
    for part in _parts(config):
        part.__dict__.update(part.__dict__.pop(_ASKED, {}))


def asks_for(config: Any, name: str) -> bool:
    """Return whether a base's configuration asked for an output."""
    return bool(getattr(config, _ASKED, {}).get(name, False))


def _parts(config: Any) -> Iterator[Any]:
    """Yield a configuration and those within it, such as that of the text."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part)
