"""AdamW with 8-bit states: its arithmetic in float64, parameters that shrink, and what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from budwood import Run, tune
from budwood.recipe.schema import Recipe
from budwood_optimizers.blockwise import BLOCK, BlockwiseAdamW

EPS = torch.finfo(torch.float32).eps
BETAS = (0.9, 0.999)


def moments(state: dict[str, Any], shape: torch.Size) -> list[Tensor]:
    """Return both moments in float64, dequantised by the definition: code[index] · scale of the block."""
    values = []
    for number in "12":
        stored = state[f"state{number}"]
        if stored.dtype == torch.uint8:
            scales = state[f"absmax{number}"].double().repeat_interleave(BLOCK)[: stored.numel()]
            stored = state[f"qmap{number}"].double()[stored.flatten().long()] * scales
        values.append(stored.double().view(shape))
    return values


def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, lr: float, decay: float) -> tuple[Tensor, ...]:
    """Return the parameter and both moments after a step (Loshchilov & Hutter, 2019, algorithm 2), in float64."""
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
    update = m / (1 - BETAS[0] ** step) / ((v / (1 - BETAS[1] ** step)).sqrt() + 1e-8)
    return p * (1 - lr * decay) - lr * update, m, v


def assert_nearest(state: dict[str, Any], number: str, exact: Tensor) -> None:
    """Check that each stored element is the nearest of its map, up to the rounding of the quotient to fp32.

    A second moment is never stored as 0, the first element of its map.
    """
    code = state[f"qmap{number}"].double()
    code[0] = code[0] if number == "1" else math.inf
    blocks = exact.flatten().split(BLOCK)
    scales = torch.stack([block.abs().max() for block in blocks])
    torch.testing.assert_close(state[f"absmax{number}"].double(), scales, rtol=8 * EPS, atol=0)
    quotient = exact.flatten() / scales.repeat_interleave(BLOCK)[: exact.numel()]
    off = (code[state[f"state{number}"].flatten().long()] - quotient).abs()
    nearest = (code - quotient[:, None]).abs().min(1).values
    assert (off <= nearest + 16 * EPS).all()


def test_the_update_is_adamws_and_its_moments_the_nearest_of_the_map():
    """Two groups of different learning rates and decays; 12,000 elements are 46 blocks and a part of one."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(300, 40)), nn.Parameter(torch.randn(17, 9)), nn.Parameter(torch.randn(5))]
    groups = [
        {"params": parameters[:2], "lr": 1e-2, "weight_decay": 0.1, "name": "a"},
        {"params": parameters[2:], "lr": 1e-3, "weight_decay": 0.0, "name": "b"},
    ]
    optimizer = BlockwiseAdamW(groups, min_elements=150)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(1, 5):
        before = []
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * 10 ** torch.empty_like(parameter).uniform_(-6, 0)
            zeros = [torch.zeros_like(parameter).double()] * 2
            state = optimizer.state[parameter]
            before.append((parameter.detach().double(), moments(state, parameter.shape) if state else zeros))
        optimizer.step()
        for parameter, (p, (m, v)) in zip(parameters, before, strict=True):
            assert parameter.grad is not None
            lr, decay = (1e-2, 0.1) if parameter is not parameters[2] else (1e-3, 0.0)
            p, m, v = adamw(p, parameter.grad.double(), m, v, step, lr / step, decay)
            torch.testing.assert_close(parameter.detach().double(), p, rtol=8 * EPS, atol=64 * EPS * lr)
            state = optimizer.state[parameter]
            if parameter.numel() < 150:
                assert {state["state1"].dtype, state["state2"].dtype} == {torch.float32} and "absmax1" not in state
                continue
            assert state["state1"].dtype == state["state2"].dtype == torch.uint8
            assert_nearest(state, "1", m)
            assert_nearest(state, "2", v)
        schedule.step()
    sizes = [t.nbytes for key, t in optimizer.state[parameters[0]].items() if key.startswith(("state", "absmax"))]
    assert sum(sizes) == 2 * (12000 + 4 * math.ceil(12000 / BLOCK))  # AdamW in fp32: 96,000


def test_a_parameter_that_shrinks_keeps_its_moments():
    torch.manual_seed(0)
    old = nn.Parameter(torch.randn(64, 40))
    optimizer = BlockwiseAdamW([{"params": [old], "lr": 1e-2, "weight_decay": 0.0}], min_elements=1000)
    old.grad = torch.randn_like(old)
    optimizer.step()
    whole = moments(optimizer.state[old], old.shape)
    for index in (torch.arange(0, 64, 2), torch.arange(3)):
        state = optimizer.sliced_state(old, index)
        kept = moments(state, torch.Size([len(index), 40]))
        assert (state["state1"].dtype == torch.uint8) == (len(index) > 3) and state["step"] == 1
        for number, value, before in zip("12", kept, whole, strict=True):
            if len(index) > 3:
                assert_nearest(state, number, before[index])
            else:
                torch.testing.assert_close(value, before[index], rtol=EPS, atol=0)


def recipe(base: Path, folder: Path, strategies: list[Any], **train: Any) -> Recipe:
    rows = [json.dumps({"prompt": f"files {n}:", "completion": f" section {n % 5}"}) for n in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    steps = {
        "steps": 6, "batch_examples": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "precision": "fp32",
        "save_every": 1,
    }  # fmt: skip
    return Recipe.from_dict(
        {
            "base": {"model": str(base)}, "data": {"train": str(folder / "rows.jsonl"), "eval": "none"},
            "strategies": strategies, "train": steps | train, "output": str(folder / "run"),
        }
    )  # fmt: skip


def parameters(run: Run) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in run.trainable]


@pytest.mark.parametrize("fails_in", [3, 6])
def test_with_adalora_a_resumed_run_gives_the_same_bytes(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_in: int
):
    """AdaLoRA removes ranks after step 5: the part of the moments that stays is quantised again."""
    adalora = {"initial_rank": 6, "target_rank": 2, "initial_phase": 1, "final_phase": 1, "interval": 1}
    chosen = recipe(tiny_base, tmp_path, [{"adalora": adalora}, {"adamw-8bit": {"min_elements": 128}}])
    run = tune(chosen, quiet=True)
    large = [p for p in run.trainable if p.numel() >= 128]
    assert large and all(run.optimizer.state[p]["state1"].dtype == torch.uint8 for p in large)
    assert all(run.optimizer.state[p]["state1"].shape == p.shape for p in run.trainable)
    whole, update, sizes = parameters(run), BlockwiseAdamW.update_step, []

    def fail(self: BlockwiseAdamW, group: Any, p: nn.Parameter, *place: int) -> None:
        if self.state[p]["step"] == fails_in - 1:
            sizes.append(sum(p.numel() for each in self.param_groups for p in each["params"]))
            raise RuntimeError("killed")
        update(self, group, p, *place)

    with monkeypatch.context() as patch, pytest.raises(Exception, match="killed"):
        patch.setattr(BlockwiseAdamW, "update_step", fail)
        tune(chosen, overwrite=True, quiet=True)
    assert (sizes[0] == sum(value.numel() for value in whole)) == (fails_in == 6)
    for resumed, expected in zip(parameters(tune(chosen, resume=True, quiet=True)), whole, strict=True):
        assert torch.equal(resumed, expected)


def test_it_says_what_it_keeps_in_8_bit(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    said = {}
    for least in (1, 10**9):
        strategies = [{"lora": {"rank": 2}}, {"adamw-8bit": {"min_elements": least}}]
        tune(recipe(tiny_base, tmp_path, strategies, steps=1), overwrite=True)
        said[least] = capsys.readouterr()
    assert "adamw-8bit: the states of " in "".join(said[1])
    assert "note: adamw-8bit keeps every state in 32 bit, since no parameter has 1,000,000,000" in "".join(said[10**9])
