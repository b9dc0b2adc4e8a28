"""LoRA on the experts of a mixture: stock PEFT computes the same, either way; rows mix; merges are exact; DoRA."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.core.model.test_experts import FAMILIES, make_family
from transformers import AutoModelForCausalLM

from budwood import load_base
from budwood.adapters.live_blend import blend
from budwood.adapters.live_table import LiveTable, Plan
from budwood.adapters.store import read_adapter
from budwood.errors import CorruptError, InputError
from budwood.lowrank import experts_of, remove_adapter, select_adapters
from budwood.model.experts import Experts, count_experts
from budwood.recipe.schema import Recipe
from budwood.serving.exports.targets import export_for
from budwood.serving.exports.wanted import Wanted
from budwood.serving.material.shrink import shrink
from budwood.serving.merge import merge as merge_folder
from budwood.serving.verify import open_pool, verify
from budwood.training import setup
from budwood.training.loop import tune
from budwood_adalora.file import live as live_adalora
from budwood_lora.adapter import attach, merge, tensor_slots
from budwood_lora.live import live

IDS = torch.arange(1, 61).view(3, 20)
PLAIN = "AutoModelForCausalLM", torch.float32


def stock_adapter(base, folder, **changes):
    """Save an adapter of stock PEFT on all experts and on attention, and return it on its base."""
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["o_proj"], "init_lora_weights": False}
    parameters = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    torch.manual_seed(1)
    config = LoraConfig(**options | {"target_parameters": parameters} | changes)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_an_adapter_of_stock_peft_opens_with_the_same_logits(name, tmp_path):
    plain = make_family(name, tmp_path / "base")(IDS).logits
    stock = stock_adapter(tmp_path / "base", tmp_path / "adapter")(IDS).logits
    saved = read_adapter(tmp_path / "adapter")
    model = load_base(tmp_path / "base", "none", "AutoModelForCausalLM", torch.float32).model
    tensors = saved.load_tensors()
    attach(model, saved.config, tensors, "one")
    assert all(torch.equal(tensors[key], slot) for key, slot in tensor_slots(model, "one").items())
    attach(model, saved.config, {key: 0.5 * tensor for key, tensor in tensors.items()}, "two")
    select_adapters(model, "lora", ["two"])
    half = model(IDS).logits
    select_adapters(model, "lora", ["one", "two"], [1, -1, 0])
    mixed = model(IDS).logits
    for row, expected in zip(mixed, (half[0], plain[1], stock[2]), strict=True):
        assert (row - expected).abs().max() < 1e-5 * (1 + stock.abs().max())
    assert (stock - plain).abs().max() > 0.1
    served = load_base(tmp_path / "base", "none", "AutoModelForCausalLM", torch.float32).model
    table = LiveTable(served)
    one = live(served, saved.config, tensors)
    two = live(served, saved.config, {key: 0.5 * tensor for key, tensor in tensors.items()})
    for rows, wanted in (([two, None, one], (half[0], plain[1], stock[2])), ([one], stock)):
        table.add(one)
        table.add(two)
        table.plan = Plan(rows)
        for row, expected in zip(served(IDS).logits, wanted, strict=True):
            assert (row - expected).abs().max() < 1e-5 * (1 + stock.abs().max())
        table.remove(one)
        table.remove(two)
    remove_adapter(model, "two")
    merge(model, "one")
    assert (model(IDS).logits - stock).abs().max() < 1e-5 * (1 + stock.abs().max())


def test_a_run_on_a_4_bit_mixture_opens_in_stock_peft_and_merges(tmp_path, make_recipe, said):
    make_family("Qwen3Moe", tmp_path / "base")
    recipe = make_recipe(
        base={"model": str(tmp_path / "base"), "quantization": "nf4"},
        strategies=[{"lora": {"rank": 4, "dropout": 0.1}}],
        train={"steps": 4, "learning_rate": 1e-2},
    )
    folder = tune(recipe).directory / "adapter"
    assert "lora: the file says lora_dropout: 0, as PEFT's layers for experts refuse dropout" in said
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0 and len(config["target_parameters"]) == 4
    assert verify(folder).exact
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    stock = PeftModel.from_pretrained(plain, folder).eval()
    saved = read_adapter(folder)
    replayed = export_for(folder, tmp_path / "exported", Wanted("peft"))  # by stock PEFT on experts in 4 bit
    assert replayed.replay.error < 1e-3
    with pytest.raises(
        InputError, match="adapts experts .*which a shrunk adapter does not take: merge it into its base"
    ):
        shrink(folder, tmp_path / "shrunk", 2)
    a = saved.load_tensors()["base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"]
    assert a.shape == (6 * 4, 64)
    pool = open_pool(saved, None, quantization="none", precision="fp32", device="cpu")
    pool.load("mine", folder)
    pool.use("mine")
    with torch.no_grad():
        expected = stock(IDS).logits
        assert (pool.model(IDS).logits - expected).abs().max() < 1e-5
        report = merge_folder(folder, tmp_path / "merged", dtype="fp32", again=True)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        assert (merged(IDS).logits - expected).abs().max() < 1e-5
    assert report.weights == 12


def test_dora_on_experts_is_the_paper_and_survives_its_file(tmp_path, make_recipe, said):
    make_family("GptOss", tmp_path / "base")
    options = {"rank": 3, "dora": True, "targets": ["gate_up_proj", "down_proj"]}
    recipe = make_recipe(base={"model": str(tmp_path / "base")}, strategies=[{"lora": options}], train={"steps": 2})
    folder = tune(recipe).directory / "adapter"
    assert any("PEFT has no DoRA on experts" in line for line in said)
    saved = read_adapter(folder)
    tensors = saved.load_tensors()
    model = load_base(tmp_path / "base", "none", "AutoModelForCausalLM", torch.float32).model
    modules = {path: module for path, module in model.named_modules() if experts_of(module)}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    parameters = dict(plain.named_parameters())
    for path, module in modules.items():
        inside = path.rpartition(".")[0] + ("" if path.endswith("down_proj") else ".base_layer")
        a, b, magnitude = (
            tensors[f"base_model.model.{inside}.lora_{key}"].double()
            for key in ("A.weight", "B.weight", "magnitude_vector")
        )
        for expert in range(module.experts):
            update = b.view(b.shape[0], 3, -1)[:, :, expert] @ a.view(-1, 3, a.shape[1])[expert]
            wide = module.dequantize(expert, expert + 1, torch.float32)[0].double() + 16 / 3 * update
            parameters[path].data[expert] = (magnitude[expert] * (wide / wide.norm(dim=1, keepdim=True)).t()).float()
    attach(model, saved.config, tensors, "x")
    select_adapters(model, "lora", ["x"])
    with torch.no_grad():
        expected = plain(IDS).logits
        assert (model(IDS).logits - expected).abs().max() < 1e-5
        merge(model, "x")
        assert (model(IDS).logits - expected).abs().max() < 1e-5
    assert verify(folder).exact


def test_adalora_ranks_experts_by_themselves(tmp_path, make_recipe, said):
    make_family("Olmoe", tmp_path / "base")
    options = {"initial_rank": 4, "target_rank": 2, "interval": 1, "targets": ["o_proj", "gate_up_proj", "down_proj"]}
    recipe = make_recipe(
        base={"model": str(tmp_path / "base"), "quantization": "nf4"}, strategies=[{"adalora": options}],
        train={"steps": 8},
    )  # fmt: skip
    folder = tune(recipe).directory / "adapter"
    updates = 2 * (1 + 6 + 6)
    assert any(f"adalora: {2 * updates} of {4 * updates} ranks remain" in line for line in said)
    saved = read_adapter(folder)
    masks = saved.config["rank_pattern"]
    assert sum(map(sum, masks.values())) == 2 * updates and any(len(mask) == 6 * 4 for mask in masks.values())
    assert len({sum(mask[i : i + 4]) for mask in masks.values() for i in range(0, len(mask), 4)}) > 1
    assert verify(folder).exact
    with pytest.raises(
        InputError, match=r"does not load in stock PEFT .*: nothing was written\. Merge it instead: --f"
    ):
        export_for(folder, tmp_path / "exported", Wanted("peft"))
    with pytest.raises(InputError, match=f"{folder}: it adapts experts"):
        export_for(folder, tmp_path / "exported", Wanted("peft", as_type="lora"))
    report = merge_folder(folder, tmp_path / "merged", dtype="fp32")  # which compares it with base and adapter
    assert report.error < 1e-3


def test_a_blend_is_the_weighted_sum_of_what_was_merged(tmp_path, make_recipe):
    make_family("Olmoe", tmp_path / "base")
    targets = {"targets": ["o_proj", "gate_up_proj", "down_proj"]}
    made = {
        "wide": {"lora": {"rank": 4} | targets},
        "dora": {"lora": {"rank": 3, "dora": True} | targets},
        "adalora": {"adalora": {"initial_rank": 4, "target_rank": 2, "interval": 1} | targets},
    }
    opened = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    plain, served = opened(tmp_path / "base").eval(), load_base(tmp_path / "base", "none", *PLAIN).model
    before, adapters, merged = {n: p.clone() for n, p in plain.named_parameters()}, {}, {}
    for name, strategy in made.items():
        train = {"steps": 8, "learning_rate": 3e-2}
        recipe = make_recipe(name, base={"model": str(tmp_path / "base")}, strategies=[strategy], train=train)
        folder = tune(recipe, quiet=True).directory / "adapter"
        saved = read_adapter(folder)
        live_of = live_adalora if name == "adalora" else live
        adapters[name] = live_of(served, saved.config, saved.load_tensors())
        merge_folder(folder, tmp_path / f"merged-{name}", dtype="fp32")
        merged[name] = dict(opened(tmp_path / f"merged-{name}").named_parameters())
    table = LiveTable(served)
    for weights in (
        {"wide": 0.5, "adalora": 0.75},
        {"wide": 1.5, "dora": -0.5},
        {"wide": 0.5, "dora": 1, "adalora": 1},
    ):
        with torch.no_grad():
            for path, parameter in plain.named_parameters():
                change = sum(weight * (merged[name][path] - before[path]) for name, weight in weights.items())
                parameter.copy_(before[path] + change)
            expected = plain(IDS).logits
            blended = blend({adapters[name]: weight for name, weight in weights.items()}, {})
            table.add(blended)
            table.plan = Plan([blended])
            assert (served(IDS).logits - expected).abs().max() < 2e-5 * (1 + expected.abs().max())
            table.plan = Plan([None, blended, blended])
            mixed = served(IDS).logits
            assert (mixed[1:] - expected[1:]).abs().max() < 2e-5 * (1 + expected.abs().max())
            assert (mixed[0] - expected[0]).abs().max() > 0.1
            table.remove(blended)


def test_a_router_that_peft_adapts_is_named_by_the_adapter_that_a_run_continues(tmp_path, make_recipe):
    make_family("Mixtral", tmp_path / "base")
    stock_adapter(tmp_path / "base", tmp_path / "adapter", target_parameters=["mlp.gate.weight"])
    values = make_recipe(base={"model": str(tmp_path / "base")}, strategies=["lora"]).to_dict()
    with pytest.raises(
        InputError, match=r"target_parameters: 'mlp.gate.weight' is not the experts of a mixture.*: mer"
    ):
        tune(Recipe.from_dict({**values, "adapter": str(tmp_path / "adapter")}))


def test_bad_targets_are_named_before_the_base_loads(tmp_path, tiny_base, make_recipe, said):
    make_family("Mixtral", tmp_path / "base")
    base = {"model": str(tmp_path / "base")}
    nf4 = {"lora": {"modules_to_save": ["experts"]}}
    with pytest.raises(InputError, match="modules_to_save: '.*experts' holds quantised experts.*quantization: none"):
        tune(make_recipe("whole", base={**base, "quantization": "nf4"}, strategies=[nf4]))
    for strategies, model, message in (
        ([{"lora": {"targets": ["gate_up_proj"]}}], str(tiny_base), "no linear module is called 'gate_up_proj'"),
        ([{"lora": {"targets": ["experts"]}}], str(tiny_base), "'experts' names experts, and the base is no mixture"),
        (
            [{"lora": {"targets": ["experts"]}}],
            base["model"],
            "'experts' holds the experts .*: gate_up_proj, down_proj",
        ),
        ([{"ia3": {"targets": ["experts"]}}], base["model"], "ia3.*'experts' stands for the experts of a mixture"),
        ([{"ia3": {"targets": ["gate_up_proj"]}}], base["model"], "ia3.*'gate_up_proj' stands for the experts .*lora"),
    ):
        with pytest.raises(InputError, match=message):
            tune(make_recipe(base={"model": model}, strategies=strategies))
    assert not any(line.startswith("base ") for line in said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_local_experts": 8},
            r"4 weights in another shape than config\.json gives: .*experts\.gate_up_proj.*saved with these",
        ),
        ({"hidden_size": 128}, r"weights in another shape than config\.json gives: .*embed_tokens"),
        ({"hidden_size": "wide"}, r"config\.json: .*'hidden_size'.* expected"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused_before_the_base_loads(
    tmp_path, make_recipe, said, monkeypatch, change, message
):
    make_family("Mixtral", tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    monkeypatch.setattr(setup, "load_base", lambda *_: pytest.fail("the base loads"))
    with pytest.raises(CorruptError, match=message):
        tune(make_recipe(base={"model": str(tmp_path / "base"), "quantization": "nf4"}, strategies=["lora"]))


def test_experts_that_train_whole_open_in_stock_peft(tmp_path, make_recipe):
    make_family("Mixtral", tmp_path / "base")
    options = {"targets": ["q_proj"], "modules_to_save": ["experts"]}
    recipe = make_recipe(base={"model": str(tmp_path / "base")}, strategies=[{"lora": options}], train={"steps": 2})
    run = tune(recipe)
    assert count_experts(run.model) == Experts(8, 0, 8)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    stock = PeftModel.from_pretrained(plain, run.directory / "adapter").eval()
    with torch.no_grad():
        assert (stock(IDS).logits - run.model.eval()(IDS).logits).abs().max() < 1e-5
