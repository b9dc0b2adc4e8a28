"""Adapters combined, shrunk and compared: against weighted sums of merged weights in float64, and PEFT's pruning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.core.adapters.conftest import make_saved
from tests.core.serving.conftest import make_adalora
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from budwood import AdapterPool, CorruptError, InputError
from budwood.adapters.store import read_adapter
from budwood.cli.app import app
from budwood.serving.material.combine import combine
from budwood.serving.material.diff import diff
from budwood.serving.material.options import METHODS
from budwood.serving.material.shrink import shrink
from budwood.serving.verify import verify

PROMPTS = [[1, 40, 50, 60, 70], [1, 99, 7], [1, 200, 201, 202, 203, 204, 205]]
PATTERNS = {"rank_pattern": {"v_proj": 6}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True}


@pytest.fixture(scope="module")
def pair(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters of the tiny base, of different ranks, scales and targets."""
    folder = tmp_path_factory.mktemp("pair")
    first = make_saved(tiny_base, folder / "a", **PATTERNS)
    return first, make_saved(tiny_base, folder / "b", seed=2, r=3, target_modules=["q_proj", "up_proj"])


def deltas(adapter: Path) -> dict[str, torch.Tensor]:
    """Update of each linear in float64, by PEFT's rules for the scale."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors, found = load_file(adapter / "adapter_model.safetensors"), {}
    for key, a in tensors.items():
        path, is_a, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
        if not is_a:
            continue
        b = tensors[key.replace("lora_A", "lora_B")]
        named = [alpha for name, alpha in (config.get("alpha_pattern") or {}).items() if path.endswith(name)]
        alpha = named[0] if named else config["lora_alpha"]
        scale = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        found[path] = scale * b.double() @ a.double()
    return found


def summed(pair: tuple[Path, Path], weights: tuple[float, float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in zip(pair, weights, strict=True):
        for path, delta in deltas(adapter).items():
            total[path] = total.get(path, 0) + weight * delta
    return total


def logits(base: Path, adapter: Path) -> torch.Tensor:
    pool = AdapterPool(base, precision="fp32", device="cpu")
    pool.load("a", adapter)
    pool.use("a")
    return pool.logits(PROMPTS)


def test_linear_is_the_weighted_sum_of_the_updates(tiny_base, pair, tmp_path):
    done = combine(pair, tmp_path / "out", weights=[0.7, -0.3])
    expected = summed(pair, (0.7, -0.3))
    actual = deltas(tmp_path / "out")
    assert actual.keys() == expected.keys()
    for path, delta in expected.items():
        torch.testing.assert_close(actual[path], delta, atol=1e-6, rtol=1e-5)
    assert done.error == 0 and done.rank == 7 and done.modules == len(expected)
    report = verify(tmp_path / "out")
    assert report.exact and report.effect.largest > 0.01
    saved = read_adapter(tmp_path / "out")
    assert saved.manifest is not None and saved.manifest.made is not None
    assert [part.weight for part in saved.manifest.made.parts] == [0.7, -0.3]
    assert saved.manifest.made.parts[0].weights == read_adapter(pair[0]).hashes.weights


def test_svd_is_the_nearest_of_its_rank(tiny_base, pair, tmp_path):
    done = combine(pair, tmp_path / "out", method="svd", rank=2)
    exact, actual, kept, whole = summed(pair, (0.5, 0.5)), deltas(tmp_path / "out"), 0.0, 0.0
    for path, delta in exact.items():
        u, s, v = torch.linalg.svd(delta)
        torch.testing.assert_close(actual[path], (u[:, :2] * s[:2]) @ v[:2], atol=1e-6, rtol=1e-5)
        kept, whole = kept + float(s[:2].square().sum()), whole + float(s.square().sum())
    assert done.kept == pytest.approx(kept / whole, rel=1e-4) and done.rank == 2
    combine(pair, tmp_path / "sum")
    apart = (logits(tiny_base, tmp_path / "sum") - logits(tiny_base, tmp_path / "out")).abs().max()
    assert done.distance.largest == pytest.approx(float(apart), rel=1e-3)
    assert 0 < done.error < 1


@pytest.mark.parametrize("method", ["ties", "dare", "magnitude"])
def test_pruning_is_pefts_on_the_updates(pair, tmp_path, method):
    from peft.utils import merge_utils

    function = {"ties": "ties", "dare": "dare_linear", "magnitude": "magnitude_prune"}[method]
    seed = 5 if method == "dare" else None
    done = combine(pair, tmp_path / "out", weights=[0.6, 0.4], method=method, rank=64, density=0.3, seed=seed)
    parts, actual = [deltas(adapter) for adapter in pair], deltas(tmp_path / "out")
    torch.manual_seed(5)
    for path in dict.fromkeys([*parts[0], *parts[1]]):
        present = [(part[path].float(), w) for part, w in zip(parts, (0.6, 0.4), strict=True) if path in part]
        expected = getattr(merge_utils, function)([d for d, _ in present], torch.tensor([w for _, w in present]), 0.3)
        torch.testing.assert_close(actual[path].float(), expected, atol=1e-5, rtol=1e-4)
    assert done.kept == pytest.approx(1, abs=1e-5) and done.error > 0
    assert verify(tmp_path / "out").exact


def test_dare_depends_on_the_seed_alone(pair, tmp_path):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        combine(pair, tmp_path / name, method="dare", rank=4, seed=seed)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "same", "other")]
    assert files[0] == files[1] != files[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapter_that_its_owner_converts_can_be_combined(tiny_base, pair, tmp_path):
    adalora = make_adalora(tmp_path / "adalora", 3)
    done = combine([pair[0], adalora], tmp_path / "out")
    assert any("records no base" in note for note in done.notes)
    pool = AdapterPool(tiny_base, precision="fp32", device="cpu")
    for name, folder in (("a", pair[0]), ("b", adalora), ("sum", tmp_path / "out")):
        pool.load(name, folder)
    blended, made = (
        pool.generate(PROMPTS, adapters=[adapter] * 3, max_new_tokens=8) for adapter in ({"a": 0.5, "b": 0.5}, "sum")
    )
    assert [answer.tokens for answer in blended] == [answer.tokens for answer in made]


def test_shrink_keeps_the_largest_singular_values_and_everything_else(tiny_base, pair, tmp_path):
    done = shrink(pair[0], tmp_path / "out", 2, force=True)
    actual = deltas(tmp_path / "out")
    for path, delta in deltas(pair[0]).items():
        u, s, v = torch.linalg.svd(delta)
        torch.testing.assert_close(actual[path], (u[:, :2] * s[:2]) @ v[:2], atol=1e-6, rtol=1e-5)
    before, after = logits(tiny_base, pair[0]), logits(tiny_base, tmp_path / "out")
    assert done.was == 6 and done.rank == 2 and 0 < done.kept < 1 and done.bytes[1] < done.bytes[0]
    assert (before - after).abs().max() > 0.001 and done.error > 0
    assert verify(tmp_path / "out").exact


def test_a_loss_of_a_quarter_needs_force(pair, tmp_path):
    with pytest.raises(InputError, match=r"with rank 1 the answers change by \d+% .* nothing was written"):
        shrink(pair[0], tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def nothing(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as stock PEFT creates it, whose B is zero."""
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("nothing")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["shrink", "A", "OUT", "--rank", "2"],
        ["export", "A", "OUT", "--for", "peft", "--as", "lora", "--rank", "2"],
        *(["combine", "A", "A", "OUT", "--method", method] for method in METHODS[1:]),
    ],
    ids=lambda words: words[-1],
)
def test_an_adapter_without_effect_loses_nothing(tiny_base, nothing, tmp_path, words):
    folders = {"A": str(nothing), "OUT": str(tmp_path / "out")}
    arguments = [folders.get(word, word) for word in words]
    done = CliRunner().invoke(app, ["adapter", *arguments, "--base", str(tiny_base)])
    assert done.exit_code == 0, done.exception
    assert "changes no answer" in done.output and "inf" not in done.output and "nan" not in done.output
    assert not any(delta.any() for delta in deltas(tmp_path / "out").values())
    if words[0] != "export":
        assert verify(tmp_path / "out", str(tiny_base)).exact


def test_a_sum_that_cancels_is_shrunk_without_a_share(pair, tmp_path):
    combine([pair[0], pair[0]], tmp_path / "sum", weights=[1, -1])
    done = shrink(tmp_path / "sum", tmp_path / "out", 2)
    assert done.kept == 1 and done.error is None and done.distance.largest < 1e-5


def test_diff_measures_the_updates(pair, tmp_path):
    found = diff(*pair)
    first, second = (deltas(adapter) for adapter in pair)
    assert not found.same and len(found.modules) == len({*first, *second})
    for module in found.modules:
        one, other = first.get(module.path), second.get(module.path)
        if one is not None and other is not None:
            assert module.norms == pytest.approx((float(one.norm()), float(other.norm())), rel=1e-5)
            assert module.distance == pytest.approx(
                float((one - other).norm() / max(one.norm(), other.norm())), rel=1e-4
            )
            assert module.cosine == pytest.approx(float((one * other).sum() / one.norm() / other.norm()), abs=1e-5)
        else:
            assert module.distance == pytest.approx(1) and 0 in module.ranks and math.isnan(module.cosine)
    assert ("config.r" in {name for name, *_ in found.fields}) and found.answers is not None
    same = diff(pair[0], pair[0])
    assert same.same and not same.fields and not same.tensors and same.total.distance == 0


def test_diff_and_combine_say_that_the_bases_differ(tiny_bases, pair, tmp_path):
    wider = make_saved(tiny_bases("wider", hidden_size=32), tmp_path / "b")
    wider = as_stock(wider, tmp_path / "wider", "")
    for words in (["diff"], ["combine"]):
        out = [str(tmp_path / "out"), "--allow-other-base"] if words == ["combine"] else []
        done = CliRunner().invoke(app, ["adapter", *words, str(pair[0]), str(wider), *out])
        assert isinstance(done.exception, InputError), done.output
        text = str(done.exception)
        assert text.startswith(f"{wider}: its update of 'model.layers.0.") and "they are of different bases." in text


def test_diff_compares_tensors_of_what_is_no_low_rank_update(tiny_base, tmp_path):
    one = make_saved(tiny_base, tmp_path / "a", use_dora=True)
    other = make_saved(tiny_base, tmp_path / "b", use_dora=True, seed=2)
    found = diff(one, other)
    assert not found.modules and "DoRA" in found.notes[0]
    assert any("lora_A" in name and what.startswith("differ by up to") for name, what in found.tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tie"}, "--method tie: choose one of linear, svd, ties, dare, magnitude. Did you mean 'ties'"),
        ({"weights": [1.0]}, "--weights: 1 for 2 adapters"),
        ({"weights": [1.0, math.nan]}, "--weights: must be finite"),
        ({"weights": [0.0, 0.0]}, "nothing would be left"),
        ({"rank": 4}, "--rank: linear is exact"),
        ({"method": "svd", "rank": 0}, "--rank 0: must be at least 1"),
        ({"density": 0.5}, "--density: has no effect with --method linear"),
        ({"method": "ties", "seed": 3}, "--seed: has no effect with --method ties"),
        ({"method": "ties", "density": 1.5}, "--density 1.5: must be above 0 and at most 1"),
    ],
)
def test_options_out_of_range(pair, tmp_path, options, message):
    with pytest.raises(InputError) as caught:
        combine(pair, tmp_path / "out", **options)
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def test_what_cannot_be_combined_or_shrunk(tiny_base, tiny_bases, pair, tmp_path):
    other = make_saved(tiny_bases("another", seed=9), tmp_path / "other")
    with pytest.raises(InputError, match="adapters of one base can be combined"):
        combine([pair[0], other], tmp_path / "out")
    dora = make_saved(tiny_base, tmp_path / "dora", use_dora=True)
    with pytest.raises(
        InputError, match=r"it is DoRA .*: budwood adapter export \S+dora OUT --for peft --as lora --rank R$"
    ):
        combine([pair[0], dora], tmp_path / "out")
    whole = make_saved(tiny_base, tmp_path / "whole", modules_to_save=["lm_head"])
    with pytest.raises(InputError, match=r"lm_head.*: merge it into its base: budwood adapter merge \S+whole OUT$"):
        combine([pair[0], whole], tmp_path / "out")
    for method in ("linear", "svd"):
        with pytest.raises(InputError, match="--weights: the weighted sum is larger than fp32 can hold: give smaller"):
            combine(pair, tmp_path / "out", weights=[1e39, 1.0], method=method)
    with pytest.raises(InputError, match="--rank 6: the largest rank of .* is 6: choose a lower one"):
        shrink(pair[0], tmp_path / "out", 6)
    with pytest.raises(InputError, match="already exists"):
        shrink(pair[0], pair[1], 2)
    with pytest.raises(InputError, match="give at least two"):
        combine([pair[0]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_stock_peft_are_of_one_base_by_its_name(tiny_base, pair, tmp_path):
    """A folder and a name on the hub may be the same base; `--allow-other-base` says that two names are."""
    stock = {
        name: as_stock(pair[0], tmp_path / name.replace("/", "-"), name) for name in ("org/One", "/data/one", "two")
    }
    base = {"base": str(tiny_base)}
    done = combine([stock["org/One"], stock["/data/one"]], tmp_path / "same", **base)
    assert sum("records no base" in note for note in done.notes) == 2
    with pytest.raises(InputError, match="two names the base 'two', but .* 'org/One': .* --allow-other-base"):
        combine([stock["org/One"], stock["two"]], tmp_path / "out", **base)
    assert combine([stock["org/One"], stock["two"]], tmp_path / "out", allow_other_base=True, **base).rank == 12
    saved = read_adapter(stock["two"], base_name="/data/one")
    assert saved.notes[1] == "its adapter_config.json names the base 'two', and this base is '/data/one'."


def as_stock(adapter: Path, folder: Path, base: str, change: Any = None) -> Path:
    """Return a copy of an adapter as stock PEFT saves it, which names its base, with tensors that `change` alters."""
    folder.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_every_command_names_the_adapter_whose_tensors_are_wrong(tiny_base, pair, tmp_path):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    whole = as_stock(pair[1], tmp_path / "whole", str(tiny_base), lambda t: t.update({key: t[key].to(torch.int32)}))
    with pytest.raises(CorruptError, match=rf"whole/adapter_model.*{key}' has the dtype I32, but must have one of F64"):
        combine([pair[1], whole], tmp_path / "out")
    wrong = as_stock(pair[1], tmp_path / "wrong", str(tiny_base), lambda t: t.update({key: torch.randn(2, 64)}))
    for call in (lambda: shrink(wrong, tmp_path / "out", 2), lambda: diff(wrong, pair[1])):
        with pytest.raises(CorruptError, match=rf"wrong: .*{key}' is \[2, 64\]"):
            call()
    table = as_stock(
        pair[1], tmp_path / "table", str(tiny_base), lambda t: t.update({"x.embed.lora_embedding_A": torch.ones(2, 3)})
    )
    with pytest.raises(InputError, match="it adapts an embedding .*merge it into its base with PEFT's merge_and_unl"):
        combine([pair[1], table], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_commands(pair, tmp_path):
    run = CliRunner().invoke
    made = run(app, ["adapter", "combine", *map(str, pair), str(tmp_path / "out"), "--weights", "1, 2"])
    assert made.exit_code == 0 and "combined: LoRA of rank 7" in made.output, made.output
    assert "made          combine (linear) of " in run(app, ["adapter", "info", str(tmp_path / "out")]).output
    shown = run(app, ["adapter", "diff", str(pair[0]), str(tmp_path / "out"), "--json"])
    assert json.loads(shown.output)["total"]["distance"] > 0
    assert "linears; distance of the updates" in run(app, ["adapter", "diff", *map(str, pair)]).output
    small = run(
        app, ["adapter", "shrink", str(tmp_path / "out"), str(tmp_path / "s"), "--rank", "5", "--force", "--json"]
    )
    assert json.loads(small.output)["rank"] == 5 and METHODS[0] == "linear"
