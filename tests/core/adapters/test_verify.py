"""Golden logits: reproduced to 1e-5 in the same setting; in another, their distance is reported."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from budwood import CorruptError, InputError
from budwood.adapters.golden import Distance, Golden, comparable
from budwood.adapters.manifest import GoldenRecord
from budwood.adapters.store import sealed
from budwood.model.text_tasks import as_probe
from budwood.serving.verify import verify
from budwood.untrusted.files import sha256

PROBES = [as_probe([1, 2, 3]), as_probe([4])]


def test_golden_logits_of_an_earlier_version_are_read(tmp_path):
    logits = {"base": torch.zeros(2, 5), "adapter": torch.ones(2, 5)}
    flat = {
        "prompts": torch.tensor([1, 2, 3, 4], dtype=torch.int32),
        "lengths": torch.tensor([3, 1], dtype=torch.int32),
    }
    save_file({**logits, **flat}, tmp_path / "g.safetensors")
    back = Golden.load(tmp_path / "g.safetensors")
    assert [probe.inputs["input_ids"].tolist() for probe in back.probes] == [[1, 2, 3], [4]]
    assert [probe.label_positions.tolist() for probe in back.probes] == [[2], [0]]
    save_file({**logits, **flat, "lengths": torch.tensor([4, 0], dtype=torch.int32)}, tmp_path / "g.safetensors")
    with pytest.raises(CorruptError, match="golden"):
        Golden.load(tmp_path / "g.safetensors")


def test_golden_logits_read_back(tmp_path):
    golden = Golden.of(PROBES, [torch.zeros(5), torch.ones(5)], [torch.ones(5), torch.arange(5.0)])
    golden.save(tmp_path / "g.safetensors")
    back = Golden.load(tmp_path / "g.safetensors")
    for one, other in zip(back.probes, golden.probes, strict=True):
        assert one.inputs["input_ids"].tolist() == other.inputs["input_ids"].tolist()
        assert one.label_positions.tolist() == other.label_positions.tolist()
    assert back.base.equal(golden.base)
    assert back.adapter.equal(golden.adapter)


@pytest.mark.parametrize(
    "change",
    [
        {"0/position": torch.tensor([3])},
        {"0/position": torch.tensor([-1])},
        {"1/position": torch.tensor([0, 0])},
        {"adapter": torch.zeros(2, 6)},
        {"base": torch.zeros(1, 5)},
        {"adapter": torch.full((2, 5), float("nan"))},
        {"more": torch.zeros(1)},
        {"2/position": torch.tensor([0])},
        {"1/inputs/input_ids": torch.zeros(0)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_inconsistent_golden_logits_are_corrupt(tmp_path, change):
    path = tmp_path / "g.safetensors"
    Golden.of(PROBES, [torch.zeros(5)] * 2, [torch.ones(5)] * 2).save(path)
    save_file(load_file(path) | change, path)
    with pytest.raises(CorruptError, match="golden"):
        Golden.load(path)


def test_distance_is_in_nats_and_fractions():
    a = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1]]))
    b = torch.log(torch.tensor([[0.25, 0.75], [0.9, 0.1]]))
    result = Distance.between(a, b)
    by_hand = (0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()) / 2
    assert result.divergence == pytest.approx(float(by_hand), rel=1e-6)
    assert result.agreement == 0.5
    assert Distance.between(a, a) == Distance(0.0, 0.0, 1.0)


def test_comparable_settings():
    def record(**changes) -> GoldenRecord:
        values = {"device": "cpu", "dtype": "float32", "quantization": "nf4", "threads": 1, "torch": "2.13"}
        return GoldenRecord(**(values | changes))

    assert comparable(record(), record(threads=8, torch="2.14"))
    assert not comparable(record(), record(device="other"))
    assert not comparable(record(), record(quantization="none"))
    assert not comparable(record(dtype="bfloat16"), record())
    assert not comparable(record(dtype="bfloat16"), record(dtype="bfloat16", torch="2.14"))


@pytest.mark.parametrize(
    ("quantization", "precision"),
    [("none", "fp32"), ("nf4", "fp32"), ("nf4", "bf16"), ("int8", "bf16")],
)
def test_the_same_setting_gives_the_same_logits(tiny_base, tmp_path, make_saved, quantization, precision):
    folder = make_saved(tiny_base, tmp_path / "a", quantization, precision)
    report = verify(folder)
    assert report.exact
    assert report.prompts == 3
    assert report.adapter.largest <= 1e-5
    assert report.base.largest <= 1e-5
    assert report.effect.largest > 0.1
    assert report.notes == []


def test_another_setting_is_noted_and_measured(saved):
    report = verify(saved, quantization="nf4")
    assert not report.exact
    assert report.current.quantization == "nf4"
    assert report.adapter.largest > 1e-5
    assert 0 < report.adapter.divergence < report.effect.divergence
    assert "used with nf4" in report.notes[0]


def test_the_recorded_thread_count_is_used_and_restored(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "a")
    manifest = json.loads((saved / "budwood.json").read_text())
    manifest["golden"]["threads"] = 10**9
    (tmp_path / "a" / "budwood.json").write_text(sealed(manifest))
    before = torch.get_num_threads()
    assert verify(tmp_path / "a").exact
    assert torch.get_num_threads() == before


def alter(saved, to, name: str, change) -> None:
    """Copy an adapter, change tensors of one of its files, and make the hashes agree."""
    shutil.copytree(saved, to)
    tensors = load_file(to / name)
    change(tensors)
    save_file(tensors, to / name)
    manifest = json.loads((to / "budwood.json").read_text())
    manifest["files"][name] = sha256(to / name)
    (to / "budwood.json").write_text(sealed(manifest))


def test_altered_weights_are_corrupt(saved, tmp_path):
    alter(saved, tmp_path / "a", "adapter_model.safetensors", lambda t: next(iter(t.values())).mul_(1.01))
    with pytest.raises(CorruptError, match="differ by up to .*the base's own logits are unchanged") as error:
        verify(tmp_path / "a")
    assert error.value.exit_code == 4


def test_slightly_altered_weights_are_corrupt_in_16_bit_too(tiny_base, tmp_path, make_saved):
    folder = make_saved(tiny_base, tmp_path / "a", "int8", "bf16")
    alter(folder, tmp_path / "b", "adapter_model.safetensors", lambda t: [x.mul_(1.02) for x in t.values()])
    with pytest.raises(CorruptError, match="differ by up to .*the base's own logits are unchanged"):
        verify(tmp_path / "b")


def test_other_kernels_are_another_setting(saved, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")  # oneDNN has already read it: only the record changes
    report = verify(saved)
    assert not report.exact
    assert "ONEDNN_MAX_CPU_ISA=SSE41" in report.current.device
    assert "SSE41" not in report.recorded.device


def test_an_adapter_that_changes_nothing_is_corrupt_in_any_setting(saved, tmp_path):
    alter(
        saved, tmp_path / "a", "adapter_model.safetensors", lambda t: [x.zero_() for n, x in t.items() if "lora_B" in n]
    )
    with pytest.raises(CorruptError, match="changes no logit"):
        verify(tmp_path / "a", quantization="nf4")


def test_golden_prompts_outside_the_vocabulary_are_corrupt(saved, tmp_path):
    alter(saved, tmp_path / "a", "golden.safetensors", lambda t: t["0/inputs/input_ids"].fill_(10**6))
    with pytest.raises(CorruptError, match="token"):
        verify(tmp_path / "a")


def test_golden_logits_of_another_width_are_corrupt(saved, tmp_path):
    alter(
        saved, tmp_path / "a", "golden.safetensors",
        lambda t: t.update({n: t[n][:, :7].clone() for n in ("base", "adapter")}),
    )  # fmt: skip
    with pytest.raises(CorruptError, match="7 logits per probe, but the model now returns 300"):
        verify(tmp_path / "a")


def test_an_adapter_that_cannot_be_verified_is_rejected_before_a_base_loads(
    saved, stock, tiny_bases, monkeypatch, tmp_path
):
    def load(*args, **kwargs):
        raise AssertionError("a base was loaded")

    stranger = tiny_bases("stranger", seed=7)
    monkeypatch.setattr("budwood.serving.pool.load_base", load)
    with pytest.raises(InputError, match="no golden logits"):
        verify(stock)
    with pytest.raises(InputError, match="was trained on the base"):
        verify(saved, str(stranger))
    shutil.copytree(saved, tmp_path / "a")
    manifest = json.loads((saved / "budwood.json").read_text())
    manifest["base"]["name"] = str(tmp_path / "moved")
    (tmp_path / "a" / "budwood.json").write_text(sealed(manifest))
    with pytest.raises(InputError, match="pass its current location with --base"):
        verify(tmp_path / "a")
