"""Who a process is, and what it shares with the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from budwood.errors import InputError, ResourceError
from budwood.parallel.processes import Processes
from budwood.parallel.store import open_store


def test_the_environment_says_who_a_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    alone = Processes.from_environment()
    assert (alone.rank, alone.size, alone.first) == (0, 1, True)
    values = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    one = Processes.from_environment()
    assert (one.rank, one.size, one.local_rank, one.local_size, one.node, one.first) == (3, 4, 1, 2, 1, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "-2"), ("WORLD_SIZE", "two"), ("RANK", "2"), ("RANK", "-1"), ("LOCAL_RANK", "a"),
     ("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "0"), ("LOCAL_WORLD_SIZE", "3"), ("GROUP_RANK", "")],
)  # fmt: skip
def test_an_environment_that_contradicts_itself_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    usual = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for one, given in (usual | {name: value}).items():
        monkeypatch.setenv(one, given)
    with pytest.raises(InputError, match=rf"^{name}: .*{name}='{value}'.*start the run with torchrun"):
        Processes.from_environment()


def test_an_address_that_is_none_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "no such host", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ResourceError, match=r"^MASTER_ADDR 'no such host' is not known on .*--master-addr\.$"):
        open_store(1, "x")


def test_a_single_process_exchanges_nothing() -> None:
    alone, tensor = Processes(), torch.ones(2)
    alone.join(torch.device("cpu"))
    alone.sum([tensor])
    alone.barrier()
    alone.leave()
    assert not torch.distributed.is_initialized()
    assert alone.gather("x") == ["x"] and alone.broadcast("x") == "x" and alone.sum_of({"a": 2.0}) == {"a": 2.0}
    assert alone.together(list(alone.share([1, 2, 3]))) == [1, 2, 3] and tensor.tolist() == [1, 1]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_what_is_shared_out_comes_together_in_order(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    items = list(range(count))
    shares: list[Any] = [list(Processes(rank, 3).share(items)) for rank in range(3)]
    monkeypatch.setattr(Processes, "gather", lambda self, value: shares)
    assert Processes(1, 3).together(shares[1]) == items
