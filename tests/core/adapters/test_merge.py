"""Merging into the original weights, rounding loss, and folders that stock libraries open."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from budwood import AdapterPool, BudwoodError, CorruptError, InputError
from budwood.adapters.export import export
from budwood.adapters.golden import Distance, Golden, relative_error
from budwood.adapters.manifest import merged_into
from budwood.adapters.rounding import round_stochastically
from budwood.adapters.store import read_adapter
from budwood.recipe.schema import Recipe, default_recipe
from budwood.serving import merge as merging
from budwood.serving.merge import merge
from budwood.serving.verify import verify
from budwood.training.loop import tune

PROMPTS = [[1, 40, 50, 60, 70], [1, 99, 7], [1, 200, 201, 202, 203, 204, 205]]


def stock_logits(folder) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])


def pool_logits(base, adapter) -> torch.Tensor:
    pool = AdapterPool(base, precision="fp32", device="cpu")
    pool.load("a", adapter)
    pool.use("a")
    return pool.logits(PROMPTS)


def pool_alone(base) -> torch.Tensor:
    return AdapterPool(base, precision="fp32", device="cpu").logits(PROMPTS)


def test_merged_in_fp32_stock_transformers_gives_the_adapters_logits(saved, tiny_base, tmp_path):
    report = merge(saved, tmp_path / "merged", dtype="fp32")
    torch.testing.assert_close(stock_logits(tmp_path / "merged"), pool_logits(tiny_base, saved), atol=1e-4, rtol=0)
    assert report.rounded_away == 0
    assert report.weights == 14
    assert report.unquantized.largest < 1e-4
    assert report.recorded.largest < 1e-4
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert not list((tmp_path / "merged").glob("*.bin"))
    record = json.loads((tmp_path / "merged" / "budwood-merge.json").read_text())
    assert record["base"] == str(tiny_base)
    assert record["forced"] is False


def test_merged_in_bf16_the_reported_distance_is_that_of_the_saved_model(saved, tiny_base, tmp_path):
    report = merge(saved, tmp_path / "merged", dtype="bf16")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    apart = (stock_logits(tmp_path / "merged") - pool_logits(tiny_base, saved)).abs().max()
    assert report.unquantized.largest == pytest.approx(float(apart), rel=0.1)
    assert report.rounded_away < 0.05


def test_an_adapter_of_a_4_bit_base_merges_into_theoriginal_weights(tiny_base, tmp_path, make_saved):
    folder = make_saved(tiny_base, tmp_path / "a", "nf4")
    report = merge(folder, tmp_path / "merged", dtype="fp32")
    assert report.unquantized.largest < 1e-4  # from the unquantised base with the adapter
    assert report.recorded.largest > 1e-3  # training saw the 4-bit base
    assert "quantization nf4 and is used with none" in report.notes[0]


def test_updates_below_the_resolution_of_bf16_survive_the_default_merge(tiny_bases, tmp_path, make_saved, monkeypatch):
    base = tiny_bases("half", dtype=torch.bfloat16)
    folder = make_saved(base, tmp_path / "a", scale=1e-2)
    report = merge(folder, tmp_path / "merged")
    assert report.dtype == "bf16" and report.rounded_away < 0.05 and report.error < 0.25
    again = merge(folder, tmp_path / "again")
    assert again.error == report.error, "the draws are seeded"
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    alone, adapted, merged = pool_alone(base), pool_logits(base, folder), stock_logits(tmp_path / "merged")
    assert (merged - adapted).norm() < 0.4 * (adapted - alone).norm(), "on prompts that the merge did not see"
    small = make_saved(base, tmp_path / "small", scale=3e-4)
    stochastic = merge(small, tmp_path / "stochastic", force=True)
    monkeypatch.setattr(merging, "round_stochastically", lambda values, target, name: values.to(target).float())
    nearest = merge(small, tmp_path / "nearest", force=True)
    assert stochastic.rounded_away < 0.05 < 0.2 < nearest.rounded_away, (
        "rounding to nearest loses more of a small update"
    )


def test_what_an_ordinary_run_has_trained_merges_by_default(tiny_bases, tmp_path):
    """Nothing is named but the base and the data; the base is in 16 bit, and trained on in 4."""
    rows = [
        {"prompt": f"{word} number {i}:", "completion": f" {word}"} for i in range(8) for word in ("games", "fonts")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = tiny_bases("half", dtype=torch.bfloat16)
    recipe = default_recipe(tmp_path / "rows.jsonl", str(base), overrides=[f"output={tmp_path / 'run'}"])
    assert recipe.base.quantization == "nf4"
    report = merge(tune(recipe, quiet=True).directory / "adapter", tmp_path / "merged")
    assert report.dtype == "bf16" and report.error < 0.25 and report.rounded_away < 0.05


def test_an_effect_smaller_than_the_rounding_is_rejected_and_nothing_is_written(tiny_bases, tmp_path, make_saved):
    base = tiny_bases("half", dtype=torch.bfloat16)
    folder = make_saved(base, tmp_path / "a", scale=1e-6)
    with pytest.raises(InputError, match=r"by \d+% of the adapter's effect, more than 25% .*--dtype fp32, or --force"):
        merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    report = merge(folder, tmp_path / "forced", force=True)
    assert report.error > 0.25
    assert json.loads((tmp_path / "forced" / "budwood-merge.json").read_text())["forced"] is True
    exact = merge(folder, tmp_path / "merged", dtype="fp32")
    assert exact.rounded_away == 0 and exact.error < 0.25


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_the_default_is_the_dtype_in_which_the_base_is_stored(tiny_bases, tmp_path, make_saved, name, dtype):
    """So weights that the adapter leaves alone stay as they are."""
    base = tiny_bases(name, dtype=dtype)
    report = merge(make_saved(base, tmp_path / "a"), tmp_path / "merged")
    assert report.dtype == name and report.error < 0.25
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    untouched = [key for key in before if "proj" not in key]
    assert untouched and all(torch.equal(before[key], after[key]) for key in untouched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_takes_a_neighbour_and_its_mean_is_the_value(dtype):
    numbers = torch.tensor([1.001, -1.001, 3e-9, -3e-9, 0.0, 1.0, -0.3, 2.0**-14 * 1.0001, 60000.0])
    draws = torch.stack([round_stochastically(numbers, dtype, str(seed)) for seed in range(2000)])
    assert torch.equal(draws.to(dtype).float(), draws), "every draw is representable in the dtype"
    assert all(len(draws[:, column].unique()) <= 2 for column in range(len(numbers)))
    gap = draws.max(0).values - draws.min(0).values
    assert ((draws - numbers).abs() <= gap.clamp(min=(numbers.to(dtype).float() - numbers).abs())).all()
    error = (draws.double().mean(0) - numbers.double()).abs()
    assert (error <= 4 * gap / 2 / 2000**0.5 + 1e-12).all(), (
        "4 standard deviations of the mean; one draw's is at most gap / 2"
    )
    exact = numbers.to(dtype).float()
    assert torch.equal(round_stochastically(exact, dtype, "x"), exact)


def test_the_fraction_rounded_away_follows_the_formula():
    linear = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 1.0]]))
    before = merging.original_weights(linear)
    step = 2.0**-7  # between 1 and the next bf16
    with torch.no_grad():
        linear.weight += torch.tensor([[4 * step, 0.25 * step]])
    changed, share, worst = merging._round(linear, before, torch.bfloat16)
    assert changed == 1
    kept = float(linear.weight.detach()[0, 1] - 1)
    assert linear.weight[0, 0] == 1 + 4 * step and kept in (0, step)
    assert share == pytest.approx(max(1 - (16 + 0.25 * kept / step) / (16 + 0.25**2), 0))
    assert worst == ("weight", pytest.approx(1 - (16 + 0.25 * kept / step) / (16 + 0.25**2)))


def test_an_error_is_relative_to_the_effect():
    base, exact = torch.zeros(2, 3), torch.tensor([[3.0, 0.0, -3.0], [0.0, 0.0, 0.0]])
    assert relative_error(base, exact, exact + 5) == 0, "probabilities do not change"
    assert relative_error(base, exact, exact * 1.1) == pytest.approx(0.1)
    scores = torch.tensor([[0.5], [-1.0]])  # of a regression or a reward: a softmax over one is always 1
    assert relative_error(scores, scores + 1, scores + 1.1) == pytest.approx(0.1)
    assert Distance.between(scores, scores + 1).divergence > 0.05
    assert relative_error(base, base, base) is None, "there is no effect, of which an error could be a share"
    assert relative_error(base, base + 1e-7 * exact, base) is None, "rounding is no effect"
    with pytest.raises(InputError, match="are not finite"):
        relative_error(base, exact, exact * torch.nan)


def test_adapters_of_stock_peft_merge_if_their_base_is_passed(stock, tiny_base, tmp_path):
    with pytest.raises(InputError, match="--base"):
        merge(stock, tmp_path / "merged", dtype="fp32")
    report = merge(stock, tmp_path / "merged", base=str(tiny_base), dtype="fp32")
    assert report.recorded is None
    torch.testing.assert_close(stock_logits(tmp_path / "merged"), pool_logits(tiny_base, stock), atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_variants_merge(tiny_base, tmp_path, make_saved, changes):
    folder = make_saved(tiny_base, tmp_path / "a", target_modules=["q_proj", "v_proj"], **changes)
    merge(folder, tmp_path / "merged", dtype="fp32")
    torch.testing.assert_close(stock_logits(tmp_path / "merged"), pool_logits(tiny_base, folder), atol=1e-4, rtol=0)


def test_tied_embeddings_stay_tied(tiny_bases, tmp_path, make_saved):
    base = tiny_bases("tied", tie_word_embeddings=True)
    folder = make_saved(base, tmp_path / "a")
    merge(folder, tmp_path / "merged", dtype="fp32")
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    torch.testing.assert_close(stock_logits(tmp_path / "merged"), pool_logits(base, folder), atol=1e-4, rtol=0)


def test_a_base_quantised_on_disk_is_rejected(saved, tiny_base, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plan = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=plan, device_map={"": "cpu"})
    model.save_pretrained(tmp_path / "quantised")
    with pytest.raises(InputError, match="quantised on disk.*unquantised original"):
        merge(saved, tmp_path / "merged", base=str(tmp_path / "quantised"), allow_other_base=True)


def test_an_adapter_on_a_merged_base_records_what_is_in_it_and_fits_no_other(saved, tiny_base, tmp_path, capsys):
    merge(saved, tmp_path / "with-a", dtype="fp32")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{word}:", "completion": word}) + "\n" for word in "abcd"))
    recipe = {
        "base": {"model": str(tmp_path / "with-a"), "quantization": "nf4", "device": "cpu"},
        "data": {"train": str(rows), "max_length": 32},
        "strategies": [{"lora": {"rank": 2}}],
        "train": {"steps": 1, "learning_rate": 1e-2, "precision": "fp32"},
        "output": str(tmp_path / "run"),
    }
    tune(Recipe.from_dict(recipe))
    a, b = read_adapter(saved), tmp_path / "run" / "adapter"
    assert f"adapter {a.hashes.weights[:12]} is merged into it" in "".join(capsys.readouterr())
    assert read_adapter(b).manifest.base.merged == [a.hashes]
    assert verify(b).exact
    with pytest.raises(InputError, match=f"with-a' with adapter {a.hashes.weights[:12]} merged into it"):
        AdapterPool(str(tiny_base), precision="fp32", device="cpu").load("b", b)
    merge(b, tmp_path / "with-both", dtype="fp32")
    assert merged_into(tmp_path / "with-both") == [a.hashes, read_adapter(b).hashes]
    (tmp_path / "with-a" / "budwood-merge.json").write_text('{"merged": [{"weights": 3}]}')
    with pytest.raises(CorruptError, match="'merged': must list"):
        merged_into(tmp_path / "with-a")


def test_bad_input_is_rejected_before_the_base_loads(saved, tiny_base, tiny_bases, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a base was loaded")

    stranger = tiny_bases("stranger", seed=7)
    monkeypatch.setattr("budwood.serving.pool.load_base", load)
    with pytest.raises(InputError, match="exists"):
        merge(saved, tiny_base)
    with pytest.raises(InputError, match="choose one of bf16"):
        merge(saved, tmp_path / "merged", dtype="int4")
    with pytest.raises(InputError, match="was trained on the base"):
        merge(saved, tmp_path / "merged", base=str(stranger))


def test_an_export_opens_in_stock_peft_with_the_same_logits(saved, tiny_base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert export(saved, tmp_path / "out") == tmp_path / "out"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "out").eval()
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
    torch.testing.assert_close(logits, pool_logits(tiny_base, saved), atol=1e-5, rtol=0)


def test_an_export_needs_no_base(tiny_base, tmp_path, make_saved):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    folder = make_saved(base, tmp_path / "a")
    shutil.rmtree(base)
    export(folder, tmp_path / "exported")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "exported"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_invalid_exports_are_rejected(saved, small, tmp_path):
    with pytest.raises(InputError, match="exists"):
        export(saved, small)
    with pytest.raises(InputError, match="use peft"):
        export(saved, tmp_path / "out", "gguf")
    (small / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(CorruptError):
        export(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_into_another_model_writes_nothing(tiny_bases, tmp_path, make_saved, monkeypatch):
    base = tiny_bases("tied", tie_word_embeddings=True)
    folder = make_saved(base, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    monkeypatch.setattr("budwood.adapters.peft_layers.untie", lambda model, paths: None)
    with pytest.raises(BudwoodError, match="into another model .*nothing was written. This is a bug"):
        merge(folder, tmp_path / "merged", dtype="fp32", force=True)
    assert not (tmp_path / "merged").exists()


def test_logits_other_than_recorded_mean_another_model_unless_the_base_differs_too(
    saved, tiny_base, tmp_path, monkeypatch
):
    sound = Golden.load(saved / "golden.safetensors")
    other = Golden(sound.probes, sound.base, sound.adapter.flip(-1))
    monkeypatch.setattr(Golden, "load", lambda path: other)
    with pytest.raises(CorruptError, match="another model than the one that training recorded.*nothing was written"):
        merge(saved, tmp_path / "merged", dtype="fp32", force=True)
    assert not (tmp_path / "merged").exists()
    monkeypatch.setattr("budwood.serving.verify.comparable", lambda recorded, current: False)
    with pytest.raises(CorruptError, match="another model than the one that training recorded"):
        verify(saved)
    changed = Golden(sound.probes, sound.base.flip(-1), sound.adapter.flip(-1))  # the base's logits differ too
    monkeypatch.setattr(Golden, "load", lambda path: changed)
    merge(saved, tmp_path / "merged", dtype="fp32")


def test_logits_that_are_not_finite_are_another_model():
    logits = torch.randn(2, 5)
    assert not Distance.between(logits, logits + 1e-3).is_another_model()
    assert Distance.between(logits, logits * torch.inf).is_another_model()
