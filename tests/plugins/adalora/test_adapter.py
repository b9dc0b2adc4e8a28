"""The adapter on a model: initialisation, formula, file here and in stock PEFT, pruning, swapping."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from budwood import CorruptError, InputError, Run
from budwood.adapters.peft_layers import live_adapters
from budwood.adapters.use import use_adapters
from budwood.model.text_tasks import CausalLM
from budwood.parallel.processes import Processes
from budwood_adalora.options import AdaLoRAOptions
from budwood_adalora.strategy import AdaLoRA
from budwood_lora.options import LoRAOptions
from budwood_lora.strategy import LoRA

IDS = torch.arange(5, 25)[None]


def load(folder: Path, quantization: str | None = None) -> Any:
    """Load the base, frozen, computing in fp32."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if quantization == "nf4" else None
    if quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False).eval()


def put_on(model: Any, steps: int = 20, **options: Any) -> tuple[AdaLoRA, Run]:
    """Set up AdaLoRA on `model` as a run of `steps` steps does."""
    strategy = AdaLoRA(AdaLoRAOptions(**{"initial_rank": 4, "target_rank": 2, "interval": 2, **options}), "adalora")
    section = SimpleNamespace(task="causal-lm", model="base")
    run = Run(
        SimpleNamespace(base=section), Path(), torch.device("cpu"), torch.float32, steps=steps, say=lambda text: None
    )
    run.task = CausalLM()
    run.model = strategy.prepare_model(run=run, model=model)
    run.groups = strategy.trainable_parameters(run=run, model=model)
    for parameter in run.trainable:
        parameter.requires_grad_(True)
    return strategy, run


def randomise(run: Run, seed: int = 1) -> None:
    """Replace the initial values by random ones; perturb fully trained modules slightly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in run.groups:
            for parameter in group.parameters.values():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + 0.02 * noise if group.name == "modules_to_save" else 0.3 * noise)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def shrink(strategy: AdaLoRA, run: Run) -> dict[str, int]:
    """Prune ranks: all of the first module, two of the second, none of the third, and so on."""
    keep = {
        path: torch.tensor([[], [1, 3], [0, 1, 2, 3]][i % 3], dtype=torch.int64)
        for i, path in enumerate(strategy.ranks())
    }
    strategy._shrink(run, keep)
    return strategy.ranks()


def saved(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_it_starts_as_the_base_and_detaches_without_a_trace(tiny_base: Path, quantization: str | None) -> None:
    model = load(tiny_base, quantization)
    before, modules = logits(model), [type(m) for m in model.modules()]
    strategy, run = put_on(model, modules_to_save=["lm_head"])
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        for group in run.groups:
            for name, parameter in group.parameters.items():
                if name.endswith("lora_E"):
                    parameter.fill_(1.0)
    on = logits(model)
    assert (on - before).abs().max() > 1e-3
    use_adapters(strategy, model, [])
    assert torch.equal(logits(model), before)
    strategy.detach_adapter(model=model, name="default")
    assert torch.equal(logits(model), before)
    assert [type(m) for m in model.modules()] == modules
    assert live_adapters(model) is None


def test_a_first_step_of_adam_changes_the_weights_as_much_as_loras(tiny_base: Path) -> None:
    model = load(tiny_base, None)
    strategy, run = put_on(model)
    ratios = {p: g.learning_rate_ratio for g in run.groups for name, p in g.parameters.items() if name.endswith("_E")}
    assert len(ratios) == len(strategy._layers)
    for path, layer in strategy._layers.items():
        a, b, e = (getattr(layer, f"lora_{part}")["default"].detach() for part in "ABE")
        assert a.norm(dim=1).mean() == pytest.approx(1, abs=0.3)
        assert b.norm(dim=0).mean() == pytest.approx(1, abs=0.3)
        assert not e.any()
        step = ratios[layer.lora_E["default"]] * b @ a  # the first step of Adam is the rate, for every element
        lora = torch.ones_like(b) @ torch.empty_like(a).uniform_(-1, 1).div(a.shape[1] ** 0.5)
        assert step.norm() == pytest.approx(float(lora.norm()), rel=0.5), path


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_forward_and_gradients_match_the_formula(tiny_base: Path, quantization: str | None) -> None:
    """y = x (W + s B diag(E) A)ᵀ in float64, also with pruned ranks."""
    import bitsandbytes as bnb

    model = load(tiny_base, quantization)
    strategy, run = put_on(model, alpha=6)
    randomise(run)
    ranks = shrink(strategy, run)
    for path, rank in ranks.items():
        layer = model.get_submodule(path)
        weight = layer.base_layer.weight
        if quantization:
            weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        a, b, e = (getattr(layer, f"lora_{part}")["default"] for part in "ABE")
        assert a.shape[0] == b.shape[1] == e.shape[0] == rank
        x, grad = torch.randn(2, 5, weight.shape[1], requires_grad=True), torch.randn(2, 5, weight.shape[0])
        y = layer(x)
        y.backward(grad)
        exact = [t.detach().double().requires_grad_() for t in (x, a, b, e)]
        update = 6 / (4 + 1e-5) * exact[2] @ torch.diag(exact[3][:, 0]) @ exact[1]
        expected = exact[0] @ (weight.double() + update).t()
        expected.backward(grad.double())
        torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-4, msg=path)
        for ours, theirs in zip((x, a, b, e), exact, strict=True):
            if rank or ours is x:
                torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-4, rtol=1e-4, msg=path)


def test_shrinking_preserves_the_kept_triplets_and_their_optimizer_state(tiny_base: Path) -> None:
    model = load(tiny_base)
    strategy, run = put_on(model)
    randomise(run)
    run.optimizer = torch.optim.AdamW(run.trainable, lr=1e-3, fused=True)
    model(IDS).logits.square().mean().backward()
    run.optimizer.step()
    layer = next(iter(strategy._layers.values()))
    paths = list(strategy.ranks())
    moment = run.optimizer.state[strategy._layers[paths[1]].lora_B["default"]]["exp_avg"].clone()
    with torch.no_grad():  # the pruned triplets contribute nothing
        for i, path in enumerate(paths):
            pruned = [[0, 1, 2, 3], [0, 2], []][i % 3]
            strategy._layers[path].lora_E["default"][pruned] = 0.0
    before, elements = logits(model), sum(p.numel() for p in run.trainable)
    ranks = shrink(strategy, run)
    assert list(ranks.values())[:3] == [0, 2, 4]
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in run.trainable) < elements
    second = strategy._layers[paths[1]]
    assert torch.equal(run.optimizer.state[second.lora_B["default"]]["exp_avg"], moment[:, [1, 3]])
    assert {id(p) for p in run.trainable} == {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    run.optimizer.zero_grad(set_to_none=True)
    model(IDS).logits.square().mean().backward()
    assert layer.lora_A["default"].grad is None, "a module of rank 0 has no gradient"
    for parameter in run.trainable:  # as several processes do before the all-reduce
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    run.optimizer.step()
    assert torch.isfinite(logits(model)).all()


def test_the_penalty_is_added_once_per_optimizer_step(tiny_base: Path) -> None:
    strategy, run = put_on(load(tiny_base))
    for micro_step, replaying, process, expected in ((0, False, 0, True), (1, False, 0, False), (0, True, 0, False),
                                                     (0, False, 1, False)):  # fmt: skip
        run.world = Processes(rank=process, size=2)
        step = SimpleNamespace(micro_step=micro_step, replaying=replaying, run=run)
        assert (strategy.loss_terms(step=step) is not None) is expected


@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"], "dropout": 0.2}, {"layers": [1]}])
def test_its_file_gives_the_same_logits_in_stock_peft_and_when_reloaded(
    tiny_base: Path, tmp_path: Path, extra: dict[str, Any]
) -> None:
    model = load(tiny_base)
    strategy, run = put_on(model, **extra)
    randomise(run)
    run.directory = tmp_path
    strategy.export(run=run, model=model, directory=tmp_path)
    whole = (tmp_path / "adapter_model.safetensors").stat().st_size
    shrink(strategy, run)
    on = logits(model)
    strategy.export(run=run, model=model, directory=tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < whole
    peer = PeftModel.from_pretrained(load(tiny_base), tmp_path).eval()
    torch.testing.assert_close(logits(peer), on, atol=1e-5 * float(on.abs().max()), rtol=1e-5)

    fresh = load(tiny_base)
    before = logits(fresh)
    config, tensors = saved(tmp_path)
    strategy.attach_adapter(model=fresh, config=config, tensors=tensors, name="a")
    assert torch.equal(logits(fresh), before), "an attached adapter is inactive"
    use_adapters(strategy, fresh, ["a"])
    assert torch.equal(logits(fresh), on)
    strategy.merge_adapter(model=fresh, name="a")
    torch.testing.assert_close(logits(fresh), on, atol=1e-4, rtol=1e-4)
    assert live_adapters(fresh) is None


@pytest.mark.parametrize("patterned", [False, True])
def test_an_adapter_of_stock_peft_opens_here(tiny_base: Path, tmp_path: Path, patterned: bool) -> None:
    config = AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=7, total_step=10, tinit=1, tfinal=1, target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    peer = get_peft_model(load(tiny_base), config).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    if patterned:
        masks = [[False] * 4, [True, False, True, True], [True] * 4, [False, False, False, True]]
        names = [name for name, _ in peer.base_model.model.named_parameters() if "lora_E" in name]
        peer.peft_config["default"].rank_pattern = dict(zip(names, masks, strict=True))
        peer.base_model.rankallocator.mask_using_rank_pattern(peer.base_model.model, config.rank_pattern)
    peer.save_pretrained(tmp_path)
    model = load(tiny_base)
    strategy = AdaLoRA(AdaLoRAOptions(), "adalora")
    settings, tensors = saved(tmp_path)
    strategy.attach_adapter(model=model, config=settings, tensors=tensors, name="a")
    use_adapters(strategy, model, ["a"])
    expected = logits(PeftModel.from_pretrained(load(tiny_base), tmp_path).eval())
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model), logits(peer), atol=1e-5, rtol=1e-5)


def test_the_conversion_to_lora_computes_the_same_here_and_in_stock_peft(tiny_base: Path, tmp_path: Path) -> None:
    model = load(tiny_base)
    strategy, run = put_on(model, modules_to_save=["lm_head"])
    randomise(run)
    shrink(strategy, run)
    run.directory = tmp_path
    on = logits(model)
    strategy.export(run=run, model=model, directory=tmp_path)
    config, tensors = strategy.convert_adapter(*saved(tmp_path), adapter_type="lora")
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    assert sorted(set(config["rank_pattern"].values())) == [2, 4]
    peer = PeftModel.from_pretrained(load(tiny_base), folder).eval()
    torch.testing.assert_close(logits(peer), on, atol=1e-5, rtol=1e-5)
    fresh, lora = load(tiny_base), LoRA(LoRAOptions(), "lora")
    lora.attach_adapter(model=fresh, config=config, tensors=tensors, name="a")
    use_adapters(lora, fresh, ["a"])
    torch.testing.assert_close(logits(fresh), on, atol=1e-5, rtol=1e-5)
    assert strategy.convert_adapter(config=config, tensors=tensors, adapter_type="other") is None


@pytest.mark.parametrize("order", [("a", "ab", "lora"), ("lora", "ab", "a")])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_adapters_of_two_methods_share_a_model_and_a_batch(
    tiny_base: Path, tmp_path: Path, order: tuple[str, ...], quantization: str | None
) -> None:
    """`a`, `ab` (AdaLoRA) and a LoRA: each alone, one per row, and detached in any order."""
    files = {}
    for seed, name in enumerate(("a", "ab", "lora")):
        model = load(tiny_base)
        if name == "lora":
            strategy = LoRA(LoRAOptions(rank=3), "lora")
            run = put_on_lora(strategy, model)
        else:
            strategy, run = put_on(model)
        randomise(run, seed)
        if name == "ab":
            shrink(strategy, run)
        run.directory = tmp_path / name
        run.directory.mkdir()
        strategy.export(run=run, model=model, directory=run.directory)
        files[name] = saved(run.directory)
    model = load(tiny_base, quantization)
    base, modules = logits(model), [type(m) for m in model.modules()]
    owners = {"a": AdaLoRA(AdaLoRAOptions(), "adalora"), "lora": LoRA(LoRAOptions(), "lora")}
    owners["ab"] = owners["a"]

    def use(*names: str | None) -> None:
        for owner in set(owners.values()):
            own = [name for name in dict.fromkeys(names) if name is not None and owners[name] is owner]
            use_adapters(owner, model, own, [own.index(name) if name in own else -1 for name in names])

    alone, off = {}, {None: 0.0}
    for name in order:
        config, tensors = copy.deepcopy(files[name])
        owners[name].attach_adapter(model=model, config=config, tensors=tensors, name=name)
        assert torch.equal(logits(model), base)
        use(name)
        alone[name] = logits(model)
        use(None)
    for name in order:  # a batch adds its products in another order: how far the base carries such roundings
        owners["other"], changes = owners[name], []
        for seed in range(3):
            config, tensors = copy.deepcopy(files[name])
            owners[name].attach_adapter(model=model, config=config, tensors=rounded(tensors, seed), name="other")
            use("other")
            changes.append(float((logits(model) - alone[name]).abs().max()))
            use(None)
            owners[name].detach_adapter(model=model, name="other")
        off[name] = max(changes)
    for name in order:  # unaffected by adapters attached later
        use(name)
        assert torch.equal(logits(model), alone[name])
    rows = [None, "ab", "lora", "a"]
    use(*rows)
    together = logits(model, IDS.repeat(4, 1))
    for row, name in enumerate(rows):
        torch.testing.assert_close(together[row], (alone | {None: base})[name][0], atol=max(1e-5, off[name]), rtol=1e-5)
    use(None)
    for count, name in enumerate(("ab", "lora", "a")):
        owners[name].detach_adapter(model=model, name=name)
        for left in ("ab", "lora", "a")[count + 1 :]:
            use(left)
            assert torch.equal(logits(model), alone[left])
        use(None)
    assert torch.equal(logits(model), base)
    assert [type(m) for m in model.modules()] == modules


def rounded(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Return an adapter's factors, each number changed by as much as a sum of so many products is rounded at most."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.finfo(torch.float32).eps / 2
    return {
        name: tensor * (1 + tensor.shape[-1] * unit * (2 * torch.randint(2, tensor.shape, generator=generator) - 1))
        for name, tensor in tensors.items()
    }


def put_on_lora(strategy: LoRA, model: Any) -> Run:
    section = SimpleNamespace(task="causal-lm", model="base")
    run = Run(SimpleNamespace(base=section), Path(), torch.device("cpu"), torch.float32)
    run.task = CausalLM()
    strategy.prepare_model(run=run, model=model)
    run.groups = strategy.trainable_parameters(run=run, model=model)
    return run


def test_saved_modules_of_two_methods_do_not_disable_each_other(tiny_base: Path, tmp_path: Path) -> None:
    files = {}
    for name, strategy in (("x", LoRA(LoRAOptions(modules_to_save=["lm_head"]), "lora")), ("y", None)):
        model = load(tiny_base)
        if strategy is None:
            strategy, run = put_on(model, modules_to_save=["lm_head"])
        else:
            run = put_on_lora(strategy, model)
        randomise(run)
        run.directory = tmp_path / name
        run.directory.mkdir()
        strategy.export(run=run, model=model, directory=run.directory)
        files[name] = (strategy, saved(run.directory), logits(model))
    model = load(tiny_base)
    for name, (strategy, (config, tensors), _) in files.items():
        strategy.attach_adapter(model=model, config=config, tensors=tensors, name=name)
    lora, adalora = files["x"][0], files["y"][0]
    use_adapters(adalora, model, ["y"])
    use_adapters(lora, model, [])
    torch.testing.assert_close(logits(model), files["y"][2], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="cannot share a batch"):
        use_adapters(lora, model, ["x"], [0, -1])


@pytest.mark.parametrize("damage", ["renamed", "missing", "surplus", "rank", "pattern", "shape", "variant"])
def test_a_corrupt_adapter_is_refused_and_does_not_change_the_model(
    tiny_base: Path, tmp_path: Path, damage: str
) -> None:
    model = load(tiny_base)
    strategy, run = put_on(model)
    shrink(strategy, run)
    run.directory = tmp_path
    strategy.export(run=run, model=model, directory=tmp_path)
    config, tensors = saved(tmp_path)
    key = next(key for key in tensors if key.endswith("lora_A"))
    if damage == "renamed":
        tensors["base_model.other"] = tensors.pop(key)
    elif damage == "missing":
        del tensors[key]
    elif damage == "surplus":
        tensors["more"] = torch.zeros(1)
    elif damage == "rank":
        config["init_r"] = 10**9
    elif damage == "pattern":
        config["rank_pattern"]["model.layers.7.lora_E"] = [True] * 4
    elif damage == "shape":
        tensors[key] = tensors[key][:, :-1].contiguous()
    else:
        config["use_dora"] = True
    fresh = load(tiny_base)
    before = logits(fresh)
    with pytest.raises((CorruptError, InputError)):
        strategy.attach_adapter(model=fresh, config=config, tensors=tensors, name="a")
    assert torch.equal(logits(fresh), before)
    assert live_adapters(fresh) is None
