"""The key-value store of a run's processes: torchrun's agent serves it, or else the first process."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from budwood.errors import InputError, ResourceError
from budwood.parallel.failures import reason

if TYPE_CHECKING:
    from torch.distributed import Store

JOIN = 600.0
"""Seconds that a process tries to reach the store."""


def serves(rank: int) -> bool:
    """Whether this process serves the store."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def restarts() -> int:
    """Return how often torchrun has restarted the processes, as `--max-restarts` allows."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isdecimal() else 0


def open_store(rank: int, name: str) -> Store:
    """Return a new connection to the store, for keys of `name` that no restart shares with the processes before it.

    A call that waits blocks all others on the same connection.

    Raises:
        InputError: the environment does not say where the store is.
        ResourceError: it cannot be served or reached.
    """
    from torch.distributed import DistError, PrefixStore, TCPStore

    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal():
        raise InputError(
            f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, but MASTER_ADDR and MASTER_PORT do not say where the first "
            "process is: start the run with torchrun, or unset WORLD_SIZE."
        )
    if not serves(rank):
        _check_address(address)
    try:
        store = TCPStore(
            address, int(port), None, serves(rank), timedelta(seconds=JOIN), wait_for_workers=False, multi_tenant=True
        )
    except (DistError, RuntimeError, ValueError) as error:
        here = socket.gethostname()
        if serves(rank):
            text = f"port {port} of {here} is in use or closed ({reason(error)}): choose another with --master-port."
        else:
            text = (
                f"the first process at {address}:{port} cannot be reached from {here} ({reason(error)}): is it "
                "started, and does a firewall let the port through?"
            )
        raise ResourceError(text) from error
    return PrefixStore(f"budwood/{restarts()}/{name}", store)


def _check_address(address: str) -> None:
    """Refuse an address that is none, which the store would try to reach for `JOIN` seconds.

    Raises:
        ResourceError: it has no number in the network.
    """
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        raise ResourceError(
            f"MASTER_ADDR '{address}' is not known on {socket.gethostname()} ({reason(error)}): give the address of "
            "the first machine with --master-addr."
        ) from error
