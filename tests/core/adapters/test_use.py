"""Selection of adapters: rows, segments, owners of either contract version; and invalidation of cached factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from budwood import Strategy, hookimpl
from budwood.adapters.peft_layers import LowRankUpdate, live_adapters
from budwood.adapters.use import use_adapters
from budwood.contract.loading import load_strategy, start
from budwood.errors import InputError
from budwood.model.ops.linear import low_rank_linear
from budwood_lora.layers import add_adapter

SIZE = 32


class Old(Strategy):
    """Contract version 1."""

    received: Any = None

    @hookimpl
    def use_adapters(self, model: nn.Module, names: list[str | None]) -> None:
        self.received = list(names)


class New(Strategy):
    """Contract version 2."""

    api = 2
    received: Any = None

    @hookimpl
    def use_adapters(self, model: nn.Module, names: list[str], index: list[int]) -> None:
        self.received = (list(names), list(index))


@pytest.mark.parametrize(
    ("names", "index", "old", "new"),
    [
        ([], [], [], ([], [])),
        (["a"], [], ["a"], (["a"], [])),
        (["a"], [0, 0, 0], ["a"], (["a"], [])),
        (["a", "b"], [1, 1], ["b"], (["b"], [])),
        (["a", "b"], [-1, -1], [], ([], [])),
        (["a", "b"], [1, -1, 1], ["b", None, "b"], (["b"], [0, -1, 0])),
        (["a", "b", "c"], [2, -1, 0, 2], ["c", None, "a", "c"], (["a", "c"], [1, -1, 0, 1])),
    ],
)
def test_owners_receive_the_arguments_of_their_contract_version(names, index, old, new) -> None:
    first, second = Old(name="old"), New(name="new")
    for owner in (first, second):
        use_adapters(owner, nn.Identity(), names, index)
    assert first.received == old
    assert second.received == new


def test_segments_become_positions_and_version_1_cannot_mix_them() -> None:
    owner = New(name="new")
    use_adapters(owner, nn.Identity(), ["a", "b"], [1, -1, 0], lengths=[2, 1, 3])
    assert owner.received == (["a", "b"], [1, 1, -1, 0, 0, 0])
    use_adapters(owner, nn.Identity(), ["a", "b"], [1, 1], lengths=[2, 1])
    assert owner.received == (["b"], [])
    with pytest.raises(InputError, match="strategy 'old' cannot mix adapters within packed rows"):
        use_adapters(Old(name="old"), nn.Identity(), ["a", "b"], [0, 1], lengths=[2, 1])
    use_adapters(Old(name="old"), nn.Identity(), ["a", "b"], [1, 1], lengths=[2, 1])


@pytest.mark.parametrize(
    ("names", "index", "lengths"), [(["a", "b"], [], []), (["a"], [1], []), (["a"], [-2], []), (["a"], [0, -1], [3])]
)
def test_an_invalid_index_is_rejected(names, index, lengths) -> None:
    with pytest.raises(ValueError, match="adapters|segments"):
        use_adapters(New(name="new"), nn.Identity(), names, index, lengths)


# --- on a model


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def adapted(request: pytest.FixtureRequest) -> tuple[Any, nn.Module]:
    """A strategy, and a linear with adapters a (rank 2) and b (rank 4)."""
    from peft import LoraConfig

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE)).requires_grad_(False)
    for name, rank in (("a", 2), ("b", 4)):
        add_adapter(model, LoraConfig(r=rank, target_modules=["0"], use_dora=request.param), name)
        nn.init.normal_(model[0].lora_B[name].weight)
    return start(*load_strategy("lora")), model.eval()


@torch.no_grad()
def test_each_segment_of_a_packed_row_uses_its_adapter(adapted) -> None:
    owner, model = adapted
    x = torch.randn(2, 5, SIZE)
    lengths, index = [3, 4, 3], [1, -1, 0]
    flat, expected, start = x.reshape(-1, SIZE), [], 0
    for length, i in zip(lengths, index, strict=True):
        use_adapters(owner, model, ["a", "b"], [i])
        expected.append(model(flat[None, start : start + length])[0])
        start += length
    use_adapters(owner, model, ["a", "b"], index, lengths)
    result = model(x)
    assert result.shape == x.shape
    torch.testing.assert_close(result.reshape(-1, SIZE), torch.cat(expected), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"selected for 10 rows, but the input is \[3, 5, 32\]"):
        model(torch.randn(3, 5, SIZE))


@pytest.mark.parametrize("change", ["step", "data", "replaced", "scaling"])
def test_cached_factors_are_invalidated_when_an_adapter_changes(change: str) -> None:
    """Training changes parameters in place between two generations with the same selection."""
    from peft import LoraConfig

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE)).requires_grad_(False)
    for name in "ab":
        add_adapter(model, LoraConfig(r=2, target_modules=["0"]), name)
        nn.init.normal_(model[0].lora_B[name].weight)
    layer, owner = model[0], start(*load_strategy("lora"))
    use_adapters(owner, model, ["a", "b"], [0, 1])
    x = torch.randn(2, 3, SIZE)

    def expected() -> Tensor:
        parts = [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in "ab"]
        return torch.stack([low_rank_linear(row, layer.base_layer, *part) for row, part in zip(x, parts, strict=True)])

    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(before, expected(), atol=1e-5, rtol=1e-5)
        assert torch.equal(model(x), before)
    weight = layer.lora_A["a"].weight
    if change == "step":
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        model(x).square().sum().backward()  # a forward pass with a graph uses no cache
        optimizer.step()
    elif change == "data":
        weight.data = weight.data * 2
    elif change == "replaced":
        layer.lora_A["a"].weight = nn.Parameter(weight.detach() * 2)
    else:
        layer.scaling["a"] *= 2
    with torch.no_grad():
        after = model(x)
        torch.testing.assert_close(after, expected(), atol=1e-5, rtol=1e-5)
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_the_cache_is_used_and_cleared_with_the_selection(monkeypatch) -> None:
    from peft import LoraConfig

    from budwood_lora.layers import LoRAUpdate

    model = nn.Sequential(nn.Linear(SIZE, SIZE)).requires_grad_(False)
    for name in "ab":
        add_adapter(model, LoraConfig(r=2, target_modules=["0"]), name)
    calls: list[str] = []
    weights = LoRAUpdate.weights
    monkeypatch.setattr(LoRAUpdate, "weights", lambda self: calls.append(self.name) or weights(self))
    owner = start(*load_strategy("lora"))
    use_adapters(owner, model, ["a", "b"], [0, 1])
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, SIZE))
    assert calls == ["a", "b"]
    use_adapters(owner, model, ["a", "b"], [1, -1])
    state = live_adapters(model)
    assert state is not None
    assert not any(forward.factors for forward in state.forwards.values())
    assert LowRankUpdate.sources(next(iter(state.forwards.values())).updates["a"]) == ()  # the default: no caching
