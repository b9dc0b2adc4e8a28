"""A checkpoint's state in all processes of a run, of which only the first need see its folder."""

from __future__ import annotations

from typing import Any

from budwood.parallel.processes import Processes
from budwood.training.durability.reading import Checkpoint
from budwood.training.durability.state import unpack


def load_state(checkpoint: Checkpoint, world: Processes) -> dict[str, Any]:
    """Read a checkpoint's state in the first process, and send it to the others.

    Raises:
        CorruptError: a file changed since it was validated.
    """
    if world.size == 1:
        return checkpoint.load()
    tree, tensors = checkpoint.read() if world.first else (None, {})
    tree = world.broadcast(tree)
    state: dict[str, Any] = unpack(tree, world.broadcast_tensors(tensors))
    return state
