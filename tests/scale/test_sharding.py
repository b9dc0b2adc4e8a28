"""A sharded base with what else saves memory, and what is gathered when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.faulty import adapter, difference, tune_with, write_recipe
from tests.processes import run_in_two_processes

ANYWHERE = (
    "from budwood.recipe import device\n"
    "from budwood.training import preflight, setup\n"
    "device.check_device = preflight.check_device = setup.check_device = lambda *given: None"
)
"""Lets inputs of layers be offloaded on the CPU, where only tests do it: the copies are made in place."""
COUNTED = (
    "import atexit, torch\n"
    "from budwood.model.halves.chain import Chain\n"
    "calls, whole = [], Chain.__call__\n"
    "Chain.__call__ = lambda self, *given: (calls.append(torch.is_grad_enabled()), whole(self, *given))[1]\n"
    "atexit.register(lambda: print('evaluations in halves:', False in calls))"
)
"""Prints whether a pass without gradients computed in halves."""
RECOMPUTED: list[dict[str, Any]] = [
    {"gradient_checkpointing": True}, {"gradient_checkpointing": 1},
    {"gradient_checkpointing": True, "activation_offloading": True},
]  # fmt: skip


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_layers_that_recompute_or_offload_are_gathered_again(folder: Path, tiny_base: Path, quantization: str) -> None:
    """To the very bytes of a sharded base whose layers keep their activations, and nearly to those of a replicated one.

    Of a replicated base, the last layer computes label positions alone, with other roundings.
    """
    changed = ["--overwrite", "-o", f"base.quantization={quantization}"]
    write_recipe(folder, tiny_base, {"steps": 3, "parallel": "replicate"})
    assert tune_with(folder, 2, arguments=changed).codes == [0, 0]
    (folder / "run").rename(folder / "replicated")
    write_recipe(folder, tiny_base, {"steps": 3, "parallel": "shard"})
    assert tune_with(folder, 2, arguments=changed).codes == [0, 0]
    assert difference(folder / "run", folder / "replicated") < 1e-5
    whole = adapter(folder / "run")
    for train in RECOMPUTED:
        write_recipe(folder, tiny_base, {"steps": 3, "parallel": "shard", **train})
        ended = tune_with(folder, 2, ANYWHERE, changed)
        assert ended.codes == [0, 0] and "each holds its share" in ended.output, ended.output
        assert adapter(folder / "run") == whole, train


def test_the_next_layer_is_gathered_before_one_has_computed(tiny_base: Path, tmp_path: Path) -> None:
    """In the backward; in the forward the device's stream overlaps them, since the host runs ahead."""
    run_in_two_processes(
        "import json, torch\n"
        "from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup\n"
        "from budwood.model.base import load_base\n"
        "from budwood.parallel.processes import Processes\n"
        "world = Processes.from_environment()\n"
        "world.join(torch.device('cpu'))\n"
        f"base = load_base({str(tiny_base)!r}, 'none', 'AutoModelForCausalLM', torch.float32, world=world)\n"
        "layers, events = base.model.model.layers, []\n"
        "numbers = {layer._get_fsdp_state()._fsdp_param_group: n for n, layer in enumerate(layers)}\n"
        "whole = FSDPParamGroup.unshard\n"
        "def unshard(group, *given):\n"
        "    if group in numbers and group._all_gather_result is None and not group.is_unsharded:\n"
        "        events.append(f'gather {numbers[group]}')\n"
        "    return whole(group, *given)\n"
        "FSDPParamGroup.unshard = unshard\n"
        "for n, layer in enumerate(layers):\n"
        "    mlp = layer.mlp\n"
        "    mlp.register_full_backward_hook(lambda *given, n=n: events.append(f'backward {n}'))\n"
        "embeddings = base.model.get_input_embeddings()(torch.arange(8)[None]).requires_grad_()\n"
        "logits = base.model(inputs_embeds=embeddings, use_cache=False).logits\n"
        "events.append('loss')\n"
        "logits.sum().backward()\n"
        "world.barrier()\n"
        f"open({str(tmp_path)!r} + '/events.json', 'w').write(json.dumps(events))\n"
        "world.leave()\n",
        tmp_path / "two",
    )
    events = json.loads((tmp_path / "events.json").read_text())
    assert events == ["gather 0", "gather 1", "loss", "gather 1", "gather 0", "backward 1", "backward 0"]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_evaluation_is_that_of_a_replicated_base(folder: Path, tiny_base: Path, quantization: str) -> None:
    """Its layers compute in halves, from weights that are gathered for each pass."""
    (folder / "eval.jsonl").write_bytes((folder / "train.jsonl").read_bytes())
    found: list[dict[str, float]] = []
    for parallel in ("replicate", "shard"):
        write_recipe(folder, tiny_base, {"steps": 2, "eval_every": 1, "eval_generate": 0, "parallel": parallel})
        changed = ["--overwrite", "-o", f"base.quantization={quantization}", "-o", "data.eval=eval.jsonl"]
        ended = tune_with(folder, 2, COUNTED, changed)
        assert ended.codes == [0, 0] and "evaluations in halves: True" in ended.output, ended.output
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found.append({str(row["step"]): row["eval_loss"] for row in rows if "eval_loss" in row})
    replicated, sharded = found
    assert len(replicated) > 1 and sharded == pytest.approx(replicated, rel=1e-5)
