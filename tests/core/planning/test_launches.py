"""The operations that a layer hands to a GPU in training and in evaluations: each costs the host time."""

from __future__ import annotations

import collections
import json

import pytest
import torch

from budwood.model.device import planned_device
from budwood.planning.rehearsal import rehearse
from budwood.recipe.schema import load_recipe


@pytest.mark.parametrize(("recomputes", "most"), [("false", 61), ("true", 77)])
def test_a_layer_in_4_bit_with_adapters_on_all_linears(tiny_bases, tmp_path, recomputes, most):
    """In the first micro-batch of a run, and in one that adds its gradients to those of another."""
    rows = [json.dumps({"prompt": f"hello there {i}", "completion": " x y z"}) for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    counts: dict[int, list[collections.Counter[str]]] = {}
    for layers in (1, 3):
        recipe = tmp_path / f"{layers}.yaml"
        recipe.write_text(
            f"base: {{model: {tiny_bases(f'layers{layers}', num_hidden_layers=layers)}, quantization: nf4}}\n"
            f"data: {{train: {tmp_path / 'train.jsonl'}, eval: none}}\n"
            "strategies: [lora: {rank: 8}]\n"
            f"train: {{steps: 1, batch_examples: 8, gradient_checkpointing: {recomputes}}}\n"
        )
        with (
            planned_device("cuda", (9, 0)),
            rehearse(load_recipe(str(recipe)), torch.bfloat16, cuda=True) as rehearsal,
        ):
            micros = [micro for step in rehearsal.steps for micro in step][:1]
            for later in (False, True):
                rehearsal.take_step(micros, later)
                names = collections.Counter(op.name for op in rehearsal.trace.operations if op.in_pass)
                counts.setdefault(layers, []).append(names)
            for _ in range(2):  # from the second pass on, the factors of all layers are written at once
                rehearsal.evaluate([rehearsal.run.examples[i] for i in micros[0].members], micros[0])
            counts[layers].append(collections.Counter(op.name for op in rehearsal.trace.operations))
    first, later, evaluated = (more - one for one, more in zip(counts[1], counts[3], strict=True))
    for added in (first, later):
        assert added["dequantize_4bit"] == 2 * 8  # two more layers: 4 groups of linears, forward and backward
        assert not {"silu", "neg", "rsqrt", "pow", "dequantize_blockwise"} & set(added)  # those are kernels
        assert not added["copy_"]  # gradients and factors are converted by one kernel for all of a group
    assert sum(first.values()) <= 2 * most, first
    assert sum(evaluated.values()) <= 2 * 22, evaluated
    # All gradients are added, and the factors of all layers written, by one operation each that is not a layer's.
    assert sum(later.values()) <= 2 * (most - 1), later
    assert counts[3][1]["_foreach_add_"] == 1
