"""The auxiliary loss of a mixture against transformers', and the load of its experts."""

from __future__ import annotations

import json

import pytest
import torch
from tests.core.model.test_experts import make_family
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from budwood.model.experts import trains
from budwood.planning.check import check
from budwood.serving.merge import merge
from budwood.serving.pool import AdapterPool
from budwood.training.loop import tune
from budwood.training.mixture import describe_loads, load_balance, routing_sums


def test_the_loss_is_that_of_transformers():
    logits = list(torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(0)).requires_grad_())
    real = torch.arange(40) < 33
    for chosen in (1, 2):
        mine = load_balance(routing_sums(logits, chosen, real))
        theirs = load_balancing_loss_func(tuple(logits), 6, chosen, real[None])
        assert torch.allclose(mine, theirs, atol=1e-6)
        for a, b in zip(torch.autograd.grad(mine, logits), torch.autograd.grad(theirs, logits), strict=True):
            assert torch.allclose(a, b, atol=1e-7)


def test_a_run_adds_it_where_the_base_asks_for_it_and_reports_the_load(tmp_path, make_recipe, said):
    make_family("Olmoe", tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config |= {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    base, train = {"model": str(tmp_path / "base")}, {"steps": 2, "gradient_checkpointing": True}
    rows = "".join(json.dumps({"prompt": "a" * n, "completion": " b"}) + "\n" for n in (1, 9, 30))
    (tmp_path / "eval.jsonl").write_text(rows, encoding="utf-8")
    run = tune(make_recipe(base=base, train=train, data={"eval": str(tmp_path / "eval.jsonl")}))
    steps = recorded(run)
    assert len(steps) == 2 and all(2.9 < step["load_balance"] < 6 for step in steps)  # 3 of 6 experts: 3 if even
    (line,) = [line for line in said if line.startswith("load of the experts: ")]
    assert "times an even share of their layer's tokens" in line
    shares = json.loads((run.directory / "manifest.json").read_text())["experts"]
    assert len(shares) == 2 and all(abs(sum(layer) - 1) < 1e-5 and len(layer) == 6 for layer in shares.values())

    split = tune(make_recipe("split", base=base, train=train | {"micro_tokens": 100}))
    for one, other in zip(steps, recorded(split), strict=True):
        for name in ("loss", "load_balance", "gradient_norm"):
            assert abs(one[name] - other[name]) < 1e-4 * one[name], name


@pytest.mark.parametrize("asked", [{"output_router_logits": True, "router_aux_loss_coef": 0.5}, {"return_dict": False}])
def test_what_a_base_asks_transformers_to_return_changes_nothing_else(asked, tmp_path, make_recipe):
    make_family("Olmoe", tmp_path / "base")
    plain = answers(tmp_path / "base")
    path = tmp_path / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    assert answers(tmp_path / "base") == plain
    recipe = make_recipe(base={"model": str(tmp_path / "base"), "quantization": "none"})
    assert "not planned" not in str(check(recipe).rows)
    run = tune(recipe, quiet=True)
    merge(run.directory / "adapter", tmp_path / "merged")
    assert asked.items() <= json.loads((tmp_path / "merged/config.json").read_text()).items()


def answers(base):
    """Return a base's answers to prompts of different lengths, in one batch."""
    pool = AdapterPool(str(base), quantization="none", precision="fp32")
    return [answer.tokens for answer in pool.generate(["a", "a longer prompt"], max_new_tokens=4)]


def recorded(run):
    """Return the records of the steps of a run."""
    records = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "step"]


def test_experts_without_tokens_are_said_to_be_untrained_only_where_they_have_adapters():
    shares = {"a": [0.0, 0.5, 0.5, 0.0], "b": [0.25, 0.75, 0.0, 0.0]}
    assert describe_loads(shares, ()).endswith("; 4 of 8 got none")
    assert describe_loads(shares, ("a", "b")).endswith("; 4 of 8 got none, and their adapters did not train")
    assert describe_loads(shares, ("b",)).endswith("; 4 of 8 got none, and the adapters of 2 did not train")
    assert describe_loads({"a": [0.5, 0.5]}, ("a",)).endswith(
        "1.00 to 1.00 times an even share of their layer's tokens"
    )
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2).requires_grad_(False)})
    assert [trains(model, path) for path in shares] == [True, False]
