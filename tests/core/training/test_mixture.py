"""The auxiliary loss of a mixture against transformers', and the load of its experts."""

from __future__ import annotations

import json

import torch
from tests.core.model.test_experts import make_family
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from budwood.training.loop import tune
from budwood.training.mixture import load_balance


def test_the_loss_is_that_of_transformers():
    logits = list(torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(0)).requires_grad_())
    for chosen in (1, 2):
        mine, theirs = load_balance(logits, chosen), load_balancing_loss_func(tuple(logits), 6, chosen)
        assert torch.allclose(mine, theirs, atol=1e-6)
        for a, b in zip(torch.autograd.grad(mine, logits), torch.autograd.grad(theirs, logits), strict=True):
            assert torch.allclose(a, b, atol=1e-7)


def test_a_run_adds_it_where_the_base_asks_for_it_and_reports_the_load(tmp_path, make_recipe, said):
    make_family("Olmoe", tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config |= {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    recipe = make_recipe(base={"model": str(tmp_path / "base")}, train={"steps": 2, "gradient_checkpointing": True})
    run = tune(recipe)
    records = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    values = [record["load_balance"] for record in records if "load_balance" in record]
    assert len(values) == 2 and all(2.9 < value < 6 for value in values)  # 3 of 6 experts: 3 if even, 6 at worst
    (line,) = [line for line in said if line.startswith("load of the experts: ")]
    assert "times an even share of their layer's tokens" in line
    shares = json.loads((run.directory / "manifest.json").read_text())["experts"]
    assert len(shares) == 2 and all(abs(sum(layer) - 1) < 1e-5 and len(layer) == 6 for layer in shares.values())
