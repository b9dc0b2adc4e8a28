"""Saving adapters and rejecting bad ones, without a model."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from budwood import CorruptError, InputError, ResourceError, check_adapter_tensors
from budwood.adapters import store, weights
from budwood.adapters.manifest import tokenizer_hash
from budwood.model.checks import load_tokenizer
from budwood.testing import tiny_encoder
from budwood.untrusted.files import sha256

WEIGHTS = "adapter_model.safetensors"


def edit_json(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(store.sealed(values) if path.name == "budwood.json" else json.dumps(values))


def rehash(folder: Path) -> None:
    """Update the hashes in budwood.json, as a careful attacker would."""
    manifest = json.loads((folder / "budwood.json").read_text())
    manifest["files"] = {name: sha256(folder / name) for name in manifest["files"]}
    (folder / "budwood.json").write_text(store.sealed(manifest))


def test_a_written_adapter_reads_back(small):
    saved = store.read_adapter(small, base_fingerprint="f" * 64)
    assert saved.adapter_type == "lora"
    assert saved.notes == []
    assert saved.parameters == 16
    assert saved.bytes == 64
    assert saved.load_tensors()["base_model.model.layer.q.lora_A.weight"].equal(torch.ones(2, 4))
    manifest = saved.manifest
    assert manifest.base.name == "tiny"
    assert manifest.metrics == {"eval_loss": 1.5, "eval_perplexity": None}
    assert set(manifest.files) == {"adapter_config.json", WEIGHTS, "golden.safetensors"}
    assert manifest.golden.dtype == "float32"
    assert sorted(path.name for path in small.iterdir()) == sorted([*manifest.files, "budwood.json"])


def test_reading_imports_no_torch(small):
    code = (
        "import sys; from budwood.adapters.store import read_adapter; "
        f"read_adapter({str(small)!r}); sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_failing_export_leaves_the_old_adapter(small, save):
    def fail(folder):
        (folder / "adapter_config.json").write_text("{}")
        raise RuntimeError("export failed")

    before = {path.name: path.read_bytes() for path in small.iterdir()}
    with pytest.raises(RuntimeError, match="export failed"):
        store.write_adapter(small, fail, adapter_type="lora", distribution="x 1", base=None, task="causal-lm")
    assert {path.name: path.read_bytes() for path in small.iterdir()} == before
    assert [path.name for path in small.parent.iterdir()] == ["small"]


def test_a_folder_without_an_adapter_is_not_replaced(tmp_path, save):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="is not an adapter"):
        save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


class Trace:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "weights.pkl"])
def test_a_pickled_adapter_is_rejected_and_never_opened(small, tmp_path, name):
    trace = tmp_path / "trace"
    (small / WEIGHTS).unlink()
    (small / name).write_bytes(pickle.dumps(Trace(trace)))
    with pytest.raises(InputError, match=f"{name}.*safe_serialization"):
        store.read_adapter(small)
    assert not trace.exists()


def test_a_pickle_under_the_safe_name_is_never_opened(small, tmp_path):
    trace = tmp_path / "trace"
    torch.save(Trace(trace), small / WEIGHTS)
    rehash(small)
    with pytest.raises(CorruptError, match="pickle"):
        store.read_adapter(small)
    assert not trace.exists()


def test_a_pickle_beside_the_weights_is_ignored_with_a_note(small, tmp_path):
    trace = tmp_path / "trace"
    (small / "training_args.bin").write_bytes(pickle.dumps(Trace(trace)))
    assert store.read_adapter(small).notes == ["training_args.bin is a pickle and is ignored."]
    assert not trace.exists()


def test_truncation_at_any_length_is_corrupt(small):
    data = (small / WEIGHTS).read_bytes()
    for length in (0, 4, 8, 20, len(data) // 2, len(data) - 1):
        (small / WEIGHTS).write_bytes(data[:length])
        with pytest.raises(CorruptError):
            store.read_adapter(small)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS, "golden.safetensors"])
def test_one_flipped_bit_is_corrupt(small, name):
    data = bytearray((small / name).read_bytes())
    data[-5] ^= 1
    (small / name).write_bytes(data)
    with pytest.raises(CorruptError, match=name):
        store.read_adapter(small)


def test_a_header_of_100_mb_is_rejected_immediately(small):
    (small / WEIGHTS).write_bytes((100 << 20).to_bytes(8, "little") + b"{" + b" " * 1000)
    with pytest.raises(CorruptError, match="104,857,600"):
        store.read_adapter(small)


@pytest.mark.parametrize("change", [{"r": 10**9}, {"r": 1e30}, {"rank_pattern": {"q": 10**9}}])
def test_a_rank_larger_than_every_tensor_is_corrupt(small, change):
    edit_json(small / "adapter_config.json", **change)
    rehash(small)
    with pytest.raises(CorruptError, match="rank"):
        store.read_adapter(small)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_corrupt(small, value):
    tensors = load_file(small / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, small / WEIGHTS)
    rehash(small)
    with pytest.raises(CorruptError, match="NaN"):
        store.read_adapter(small).load_tensors()


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(
    ("key", "dtype", "fine"),
    [
        ("q.hada_w1_a", torch.int8, False),
        ("q.lora_A.weight", torch.bool, False),
        ("head.weight", torch.int64, False),
        ("head.num_batches_tracked", torch.int64, True),
        ("q.shira_indices", torch.int32, True),
        ("q.shira_indices", torch.float32, False),
        ("q.ia3_l", torch.bfloat16, True),
    ],
)
def test_values_are_floating_and_positions_are_integers(tmp_path, key, dtype, fine, weights):
    """Wherever an adapter is read; a cast would take an int8 factor for other values than were meant."""
    config = {"peft_type": "LORA", "target_modules": ["q"], "modules_to_save": ["head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"base_model.model.{key}": torch.ones(2, dtype=dtype)}, tmp_path / WEIGHTS)
    if fine:
        store.read_adapter(tmp_path, weights=weights)
        return
    with pytest.raises(CorruptError, match=rf"{WEIGHTS}: tensor 'base_model.model.{key}' has the dtype \w+, but must"):
        store.read_adapter(tmp_path, weights=weights)


def test_another_base_is_an_input_error_and_can_be_allowed(small):
    with pytest.raises(InputError, match=r"tiny.*ffffffffffff.*other.*eeeeeeeeeeee") as error:
        store.read_adapter(small, base_name="other", base_fingerprint="e" * 64)
    assert error.value.exit_code == 2
    saved = store.read_adapter(small, base_name="other", base_fingerprint="e" * 64, allow_other_base=True)
    assert "allow-other-base" in saved.notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 0}, "format 0"),
        ({"format": "x" * 1000}, "format"),
        ({"files": {"../../etc/passwd": "0"}}, "no hash for"),
        ({"base": "tiny"}, "base"),
        ({"adapter_type": 3}, "adapter_type"),
        ({"distribution": "x; rm -rf ~"}, "distribution"),
        ({"labels": [1]}, "labels"),
    ],
)
def test_an_invalid_manifest_is_corrupt(small, change, message):
    edit_json(small / "budwood.json", **change)
    with pytest.raises(CorruptError, match=message) as error:
        store.read_adapter(small)
    assert "\n" not in str(error.value)


def test_a_manifest_of_a_later_budwood_is_not_supported(small):
    edit_json(small / "budwood.json", format=store.FORMAT + 1)
    with pytest.raises(
        InputError, match=f"format {store.FORMAT + 1}; this Budwood reads up to .*pip install -U budwood"
    ):
        store.read_adapter(small)


def test_any_flipped_byte_of_budwood_json_is_detected(small):
    path = small / "budwood.json"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CorruptError, match="budwood.json"):
            store.read_adapter(small, hashes=False)


def test_a_missing_budwood_json_is_detected(small):
    (small / "budwood.json").unlink()
    with pytest.raises(CorruptError, match="budwood.json: is missing"):
        store.read_adapter(small)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "missing", "~/x", "x" * 5000, "a\0b"])
def test_files_outside_the_adapter_are_not_read(small, name):
    manifest = json.loads((small / "budwood.json").read_text())
    edit_json(small / "budwood.json", files=manifest["files"] | {name: "0" * 64})
    with pytest.raises(CorruptError, match="not a file of the adapter|cannot be inside|leads out"):
        store.read_adapter(small)


def test_a_type_that_is_not_installed_names_its_distribution(small):
    edit_json(small / "budwood.json", adapter_type="moss", distribution="budwood-moss 1.2")
    with pytest.raises(InputError, match=r"strategy 'moss' of budwood-moss 1\.2.*pip install budwood-moss$"):
        store.read_adapter(small)


def as_stock_peft(folder: Path) -> None:
    (folder / "budwood.json").unlink()
    (folder / "golden.safetensors").unlink()


def test_the_type_of_a_stock_peft_adapter_is_read_from_its_config(small):
    as_stock_peft(small)
    saved = store.read_adapter(small, base_fingerprint="e" * 64)
    assert saved.adapter_type == "lora"
    assert saved.manifest is None
    assert "base is not checked" in saved.notes[0]


@pytest.mark.parametrize(("peft_type", "error"), [("MOSS", InputError), (None, CorruptError), ([1], CorruptError)])
def test_a_type_without_an_owner_is_rejected(small, peft_type, error):
    as_stock_peft(small)
    edit_json(small / "adapter_config.json", peft_type=peft_type)
    with pytest.raises(error):
        store.read_adapter(small)


@pytest.mark.parametrize("version", [1, 2])
def test_adapters_of_earlier_versions_are_read(small, version):
    values = json.loads((small / "budwood.json").read_text())
    assert values["format"] == store.FORMAT
    values |= {"format": version, "kind": values.pop("adapter_type")}
    del values["sha256"]
    (small / "budwood.json").write_text(store.sealed(values) if version == 2 else json.dumps(values))
    assert store.read_adapter(small).adapter_type == "lora"


MOSS = """
class Moss(Strategy):
    api = 2
    adapter_types = ("MOSS", "LICHEN")
    raise OSError("imported")
"""


def test_the_owner_of_a_peft_type_is_found_without_an_import(small, distribution):
    distribution("budwood-moss", MOSS, {"green": "Moss"})
    as_stock_peft(small)
    edit_json(small / "adapter_config.json", peft_type="LICHEN")
    assert store.read_adapter(small).adapter_type == "green"
    edit_json(small / "adapter_config.json", peft_type="LICHENN")
    with pytest.raises(InputError, match="reads PEFT's adapter type 'LICHENN'. Did you mean 'LICHEN'?"):
        store.read_adapter(small)


def test_a_type_that_is_known_only_after_an_import_is_found(small, distribution):
    source = "TYPES = ('MOSS',)\nclass Moss(Strategy):\n    api = 2\n    adapter_types = TYPES\n"
    distribution("budwood-moss", source, {"green": "Moss"})
    as_stock_peft(small)
    edit_json(small / "adapter_config.json", peft_type="MOSS")
    assert store.read_adapter(small).adapter_type == "green"


def test_two_owners_of_a_type_are_named(small, distribution):
    for name in ("budwood-moss", "budwood-fern"):
        distribution(name, MOSS, {name.removeprefix("budwood-"): "Moss"})
    as_stock_peft(small)
    edit_json(small / "adapter_config.json", peft_type="MOSS")
    with pytest.raises(InputError, match="owned by strategy .fern. of budwood-fern 1.0 and strategy .moss. of "):
        store.read_adapter(small)


@pytest.mark.parametrize(("version", "owner"), [(1, "moss"), (2, "")])
def test_a_strategy_of_version_1_owns_the_type_of_its_name(small, distribution, version, owner):
    distribution("budwood-moss", f"class Moss(Strategy): api = {version}", {"moss": "Moss"})
    as_stock_peft(small)
    edit_json(small / "adapter_config.json", peft_type="MOSS")
    if owner:
        assert store.read_adapter(small).adapter_type == owner
    else:
        with pytest.raises(InputError, match="no installed strategy reads"):
            store.read_adapter(small)


def test_fields_that_name_code_are_not_passed_on(small):
    edit_json(
        small / "adapter_config.json",
        auto_mapping={"parent_library": "os"},
        megatron_core="os",
        auto_map={"AutoModel": "evil.Model"},
    )
    rehash(small)
    saved = store.read_adapter(small)
    assert not {"auto_mapping", "megatron_core", "auto_map"} & set(saved.config)
    assert saved.config["r"] == 2


def test_folders_without_an_adapter(tmp_path, small):
    with pytest.raises(InputError, match="no such folder"):
        store.read_adapter(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no adapter"):
        store.read_adapter(tmp_path / "empty")
    (small / "adapter_config.json").unlink()
    with pytest.raises(CorruptError, match=r"adapter_config\.json is missing"):
        store.read_adapter(small)


def test_tensors_must_match_the_expected_keys_and_shapes():
    tensors = {"a.lora_A.weight": torch.zeros(2, 3), "b": torch.zeros(1)}
    check_adapter_tensors({"a.lora_A.weight": (2, 3), "b": (1,)}, tensors)
    with pytest.raises(CorruptError, match=r"'b' not expected"):
        check_adapter_tensors({"a.lora_A.weight": (2, 3)}, tensors)
    with pytest.raises(CorruptError, match=r"'c' missing"):
        check_adapter_tensors({"a.lora_A.weight": (2, 3), "b": (1,), "c": (1,)}, tensors)
    with pytest.raises(CorruptError, match=r"nearest: 'a\.lora_B\.weight'.*'a\.lora_B\.weight' and 1 more missing"):
        check_adapter_tensors({"a.lora_B.weight": (2, 3), "b": (1,), "c": (2,)}, tensors)
    with pytest.raises(CorruptError, match=r"'b' is \[1\]; config and base require \[2\]"):
        check_adapter_tensors({"a.lora_A.weight": (2, 3), "b": (2,)}, tensors)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS, "golden.safetensors", "budwood.json"])
def test_an_adapter_with_files_outside_its_folder_is_corrupt(small, tmp_path, name):
    (small / name).rename(tmp_path / "elsewhere")
    (small / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match=f"{name}: leads out of its folder"):
        store.read_adapter(small)


def test_tensors_larger_than_memory_are_not_read(small, monkeypatch):
    monkeypatch.setattr(weights.os, "sysconf", lambda name: 7)
    with pytest.raises(ResourceError, match="64 bytes of tensors are more than this machine's memory"):
        store.read_adapter(small).load_tensors()


def test_truncation_and_padding_are_not_part_of_a_tokenizer(tmp_path):
    """A call with `truncation=False` changes them, so an adapter's tokenizer would seem to be another one."""
    tokenizer = load_tokenizer(tiny_encoder(tmp_path / "base", ["some words"]))
    before = tokenizer_hash(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    assert tokenizer_hash(tokenizer) == before and tokenizer.backend_tokenizer.truncation is not None


def test_the_folder_around_an_adapter_is_no_adapter_and_says_where_one_is(small, tmp_path):
    around = tmp_path / "around"
    small.rename(around.mkdir() or around / "adapter")
    with pytest.raises(InputError, match=r"around: no adapter: .* There is one in \S+around/adapter\.$"):
        store.read_adapter(around)
    (around / "other").mkdir()
    (around / "other" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="It has 2 in its folders, of which name one: adapter, other"):
        store.read_adapter(around)
