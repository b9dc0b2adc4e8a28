"""No input may execute code: pickles in place of any file, files that name code; the payloads leave a trace."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from budwood.data.sources import read_rows
from budwood.errors import BudwoodError, CorruptError, InputError
from budwood.model.base import load_base, load_tokenizer

ROOT = Path(__file__).parents[2]
FORMATS = ["pickle", "zip"]
"""A bare pickle, and the format of `torch.save`."""


class Payload:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that every payload would create; its absence is checked at the end.

    A module `payload` that would create it is in the working folder, which is on sys.path.
    """
    trace = tmp_path / "trace"
    (tmp_path / "payload.py").write_text(f"open({str(trace)!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield trace
    assert not trace.exists(), "code ran"
    assert "payload" not in sys.modules


@pytest.fixture
def plant(trace: Path) -> Callable[[Path, str], None]:
    """Function `plant(path, format)`: replace a file by a pickle that leaves a trace."""

    def put(path: Path, form: str) -> None:
        if form == "zip":
            torch.save(Payload(trace), path)
        else:
            path.write_bytes(pickle.dumps(Payload(trace), protocol=2))

    return put


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that contains a module `payload`."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (folder / "payload.py").write_text(
        f"open({str(tmp_path / 'trace')!r}, 'w')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig): model_type = 'own'\n"
        "class Model(LlamaForCausalLM): config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
    )
    return folder


def outcome(call: Callable[[], object]) -> BudwoodError | None:
    """Return the error of `call`, if any; it must be an input or corruption error in one line."""
    try:
        call()
    except BudwoodError as error:
        assert error.exit_code in (2, 4)
        assert "\n" not in str(error)
        return error
    return None


def open_base(folder: Path) -> BudwoodError | None:
    return outcome(lambda: load_base(folder, "none", "AutoModelForCausalLM", torch.float32))


def test_the_payloads_work(trace, plant, tmp_path):
    """Otherwise the tests below would prove nothing."""
    for form in FORMATS:
        plant(tmp_path / "x", form)
        torch.load(tmp_path / "x", weights_only=False) if form == "zip" else pickle.loads((tmp_path / "x").read_bytes())
        assert trace.exists()
        trace.unlink()
    __import__("payload")
    del sys.modules["payload"]
    trace.unlink()


# --- pickles


READ = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"]
READ += ["model.safetensors", "special_tokens_map.json", "added_tokens.json"]
BESIDE = ["pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "tokenizer.model"]
BESIDE += ["vocab.pkl", "processor_config.json", "model.safetensors.index.json", "merges.txt", "vocab.json", "x.npy"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", READ)
def test_a_pickle_in_place_of_a_base_file_is_refused(base, plant, name, form):
    plant(base / name, form)
    error = open_base(base)
    assert isinstance(error, CorruptError)
    assert str(base) in str(error)


@pytest.mark.parametrize("form", FORMATS)
def test_pickles_beside_a_base_are_not_opened(base, plant, form):
    for name in BESIDE:
        plant(base / name, form)
    assert open_base(base) is None


def test_a_base_with_only_pickles_is_refused_with_a_remedy(base, plant):
    (base / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.ckpt", "weights.pkl"):
        plant(base / name, "zip")
        error = open_base(base)
        assert isinstance(error, InputError)
        assert name in str(error)
        assert "if you trust them, convert them once" in str(error)
        (base / name).unlink()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet"])
def test_a_pickle_in_place_of_data_is_refused(plant, tmp_path, name, form):
    plant(tmp_path / name, form)
    assert isinstance(outcome(lambda: list(read_rows(tmp_path / name))), InputError)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder of `datasets` that contains a module `payload`."""
    import datasets

    folder = tmp_path / "dataset"
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(folder))
    (folder / "payload.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    return folder


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_pickle_in_a_folder_of_datasets_is_refused(dataset, plant, name, form):
    plant(dataset / name, form)
    plant(dataset / "cache.pkl", form)
    assert isinstance(outcome(lambda: list(read_rows(dataset))), InputError)


def test_a_pickle_in_the_schema_of_a_table_is_not_opened(trace, dataset, tmp_path):
    """Arrow's Python extension types used to be pickles in a field's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    marks = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    marks[b"ARROW:extension:metadata"] = pickle.dumps(Payload(trace))
    table = pa.table({"text": ["a"]}, schema=pa.schema([pa.field("text", pa.string(), metadata=marks)]))
    with pa.ipc.new_stream(str(dataset / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert outcome(lambda: list(read_rows(dataset))) is None
    pq.write_table(table, tmp_path / "x.parquet")
    assert outcome(lambda: list(read_rows(tmp_path / "x.parquet"))) is None


@pytest.mark.parametrize("form", FORMATS)
def test_a_pickle_in_place_of_cached_tokens_is_replaced(tiny_base, plant, tmp_path, form):
    from budwood.data.build import build_examples

    (tmp_path / "x.jsonl").write_text('{"text": "a b c"}\n')
    tokenizer, folder = load_tokenizer(tiny_base), tmp_path / "cache"
    first = build_examples(tmp_path / "x.jsonl", tokenizer, "causal-lm", 64, cache_dir=folder)
    for path in folder.rglob("*"):
        if path.is_file():
            plant(path, form)
    again = build_examples(tmp_path / "x.jsonl", tokenizer, "causal-lm", 64, cache_dir=folder)
    assert again[0].inputs["input_ids"].tolist() == first[0].inputs["input_ids"].tolist()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["cache.json", "shard-00000.safetensors"])
def test_a_pickle_in_a_teacher_cache_is_refused(plant, tmp_path, name, form):
    from types import SimpleNamespace

    import numpy as np

    from budwood_distillation.cache import TeacherCache

    examples = [SimpleNamespace(key=0, labels=[0])]
    key, folder = {"top_k": 2}, tmp_path / "cache"
    cache = TeacherCache(folder, key, examples)
    cache.begin()
    cache.write(0, np.zeros((1, 2), np.int32), np.zeros((1, 3), np.float32))
    cache.verify()
    plant(folder / name, form)
    assert isinstance(outcome(lambda: TeacherCache(folder, key, examples).verify()), CorruptError)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_a_pickle_in_a_checkpoint_is_not_opened(plant, tmp_path, name, form):
    """Including optimizer and random states, and with matching hashes, as a careful attacker would write."""
    from safetensors.torch import save_file

    from budwood.training.durability.reading import FORMAT, read_checkpoint, sealed
    from budwood.untrusted.files import sha256

    folder = tmp_path / "step-00000003"
    folder.mkdir()
    save_file({"random": torch.zeros(2)}, folder / "state.safetensors")
    (folder / "state.json").write_text('{"random": {"$tensor": "random"}}')

    def seal() -> None:
        files = {file: sha256(folder / file) for file in ("state.safetensors", "state.json")}
        manifest = {"format": FORMAT, "step": 3, "setting": {}, "accepted": [], "files": files}
        (folder / "manifest.json").write_bytes(sealed(manifest))

    seal()
    assert read_checkpoint(folder).load()["random"].equal(torch.zeros(2))
    plant(folder / name, form)
    assert isinstance(outcome(lambda: read_checkpoint(folder)), CorruptError)
    if name != "manifest.json":
        seal()
        assert isinstance(outcome(lambda: read_checkpoint(folder).load()), CorruptError)


def test_the_code_never_unpickles_or_evaluates():
    """No library reader that can execute code is called; `weights_only` has had vulnerabilities."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    calls = {"eval", "exec", "torch.load", "np.load", "numpy.load", "pd.read_pickle", "yaml.load", "yaml.unsafe_load"}
    violations = []
    for path in [*ROOT.glob("core/**/*.py"), *ROOT.glob("plugins/**/*.py"), *ROOT.glob("examples/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if forbidden & {name.split(".")[0] for name in names} or called in calls:
                violations.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert violations == []


# --- files that name code

CLASSES = {"AutoConfig": "payload.Config", "AutoModelForCausalLM": "payload.Model"}
TOKENIZERS = {"AutoTokenizer": ["payload.Tokenizer", "payload.Tokenizer"]}


def change(path: Path, **changes: object) -> None:
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | changes))


@pytest.mark.parametrize(
    ("name", "changes", "refused"),
    [
        ("config.json", {"auto_map": CLASSES}, None),  # transformers has a class for this type
        ("config.json", {"auto_map": CLASSES | TOKENIZERS, "trust_remote_code": True}, None),
        ("config.json", {"auto_map": {"AutoConfig": "someone/else--payload.Config"}, "trust_remote_code": True}, None),
        (
            "config.json",
            {"auto_map": CLASSES, "trust_remote_code": True, "model_type": "own"},
            "custom Python code",
        ),
        ("config.json", {"model_type": "payload.Config"}, "does not support model type"),
        ("config.json", {"model_type": "../../payload"}, "does not support model type"),
        (
            "config.json",
            {"architectures": ["payload.Model"], "_target_": "payload.Model", "custom_code": "payload"},
            None,
        ),
        ("config.json", {"custom_pipelines": {"x": {"impl": "payload.Model", "pt": ["payload.Model"]}}}, None),
        ("config.json", {"_attn_implementation": "someone/kernel", "attn_implementation": "payload"}, None),
        ("config.json", {"hidden_act": "payload.Model"}, "KeyError"),
        ("config.json", {"rope_parameters": {"rope_type": "payload"}}, "payload"),
        ("config.json", {"dtype": "save"}, ""),
        ("config.json", {"quantization_config": {"quant_method": "payload.Model"}}, "already quantised, with payload"),
        ("config.json", {"configuration_files": ["../payload.py", "config.4.0.0.json"]}, ""),
        ("tokenizer_config.json", {"auto_map": TOKENIZERS, "trust_remote_code": True}, None),
        ("tokenizer_config.json", {"auto_map": TOKENIZERS, "tokenizer_class": "Tokenizer"}, "custom Python code"),
        ("tokenizer_config.json", {"tokenizer_class": "payload.Tokenizer"}, None),
        ("tokenizer_config.json", {"tokenizer_class": "os.system"}, None),
        ("tokenizer_config.json", {"tokenizer_class": "RagTokenizer"}, ""),
        ("tokenizer_config.json", {"backend": "payload", "processor_class": "payload.X", "_target_": "payload"}, None),
        (
            "generation_config.json",
            {"custom_generate": "payload", "auto_map": CLASSES, "trust_remote_code": True},
            None,
        ),
        ("adapter_config.json", {"peft_type": "LORA", "auto_mapping": {"parent_library": "payload"}}, None),
    ],
)
def test_code_named_by_a_base_does_not_run(base, trace, name, changes, refused):
    """`refused`: a part of the error; "": depends on the library version; None: the base loads without the code."""
    change(base / name, **changes)
    if "tokenizer_class" in changes and "auto_map" in changes:
        change(base / "config.json", model_type="llama", auto_map=TOKENIZERS)
    error = open_base(base)
    if refused is None:
        assert error is None
    elif refused:
        assert refused in str(error)


def test_only_the_recipe_enables_code(base, trace):
    """Neither a file nor `--base`: only `trust_remote_code` in the recipe, which a base cannot set."""
    from budwood.recipe.schema import Recipe

    change(base / "config.json", auto_map=CLASSES, model_type="own")
    data = {"base": {"model": str(base)}, "data": {"train": "x.jsonl"}, "strategies": ["lora"]}
    assert Recipe.from_dict(data).base.trust_remote_code is False
    assert open_base(base) is not None
    assert not trace.exists()
    load_base(base, "none", "AutoModelForCausalLM", torch.float32, trust_remote_code=True)
    assert trace.exists()
    trace.unlink()


ADAPTER = {
    "auto_mapping": {"base_model_class": "Model", "parent_library": "payload"},
    "auto_map": CLASSES,
    "base_model_class": "payload.Model",
    "parent_library": "payload",
    "trust_remote_code": True,
    "megatron_config": {"a": 1},
    "megatron_core": "payload",
    "custom_modules": {"payload.Model": "payload.Model"},
    "_custom_modules": {"payload.Model": "payload.Model"},
    "runtime_config": {"ephemeral_gpu_offload": True, "_target_": "payload.Model"},
    "loftq_config": {"_target_": "payload.Model"},
    "eva_config": {"_target_": "payload.Model"},
    "corda_config": {"_target_": "payload.Model"},
    "init_lora_weights": "payload.Model",
    "layer_replication": [[0, 10**9]],
    "peft_type": "payload.Model",
    "task_type": "payload.Model",
    "target_modules": "payload.Model",
    "modules_to_save": ["payload.Model"],
    "_target_": "payload.Model",
}


@pytest.mark.parametrize("field", ADAPTER)
def test_code_named_by_an_adapter_does_not_run(tiny_base, lora, tmp_path, trace, field):
    from budwood import AdapterPool

    folder = shutil.copytree(lora, tmp_path / "adapter")
    shutil.copyfile("payload.py", folder / "payload.py")
    change(folder / "adapter_config.json", **{field: ADAPTER[field]})
    pool = AdapterPool(tiny_base, precision="fp32", device="cpu")
    outcome(lambda: pool.load("a", folder))


@pytest.fixture(scope="session")
def lora(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the tiny base from stock PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapters") / "stock"
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dataset_info.json", {"features": {"text": {"_type": "payload.Model"}}}),
        ("dataset_info.json", {"features": {"text": {"_type": "Value", "dtype": "__import__('payload')"}}}),
        ("dataset_info.json", {"builder_name": "payload", "_target_": "payload.Model"}),
        ("state.json", {"_format_type": "payload.Model"}),
        ("state.json", {"_data_files": [{"filename": "../payload.py"}]}),
        ("state.json", {"_data_files": [{"filename": "/etc/passwd"}]}),
        ("state.json", {"_data_files": []}),
    ],
)
def test_a_datasets_folder_that_names_code_or_outside_files(dataset, trace, name, changes):
    change(dataset / name, **changes)
    error = outcome(lambda: list(read_rows(dataset)))
    assert isinstance(error, InputError) or "builder_name" in changes


# --- absurd sizes


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_size": 10**9}, "describes a model of"),
        ({"vocab_size": 10**15}, "describes a model of"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000; its checkpoint has 21 tensors"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"hidden_size": -4}, "config.json"),
        ({"num_attention_heads": 0}, ""),
        ({"num_hidden_layers": "many"}, ""),
    ],
)
def test_a_config_with_absurd_sizes_is_refused_before_allocation(base, changes, word):
    change(base / "config.json", **changes)
    error = open_base(base)
    assert isinstance(error, CorruptError)
    assert word in str(error)


def test_a_huge_or_special_tokenizer_file_is_not_read(base):
    import os

    with (base / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    assert "tokenizer.json: not a regular file of at most 256.0 MB" in str(outcome(lambda: load_tokenizer(base)))
    (base / "tokenizer.json").unlink()
    os.mkfifo(base / "tokenizer.json")
    assert "tokenizer.json: not a regular file" in str(outcome(lambda: load_tokenizer(base)))


# --- endless regular expressions

ENDLESS = r"((\w|[._]|.)+)+\d"
"""The number of ways to match a name doubles with each character."""


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 2}},
        {"alpha_pattern": {ENDLESS: 2.0}},
        {"target_modules": "("},
        {"rank_pattern": {"(": 2}},
        {"exclude_modules": "(" * 10_000},
    ],
)
def test_the_regular_expressions_of_an_adapter_have_a_time_limit(tiny_base, lora, tmp_path, monkeypatch, changes):
    from budwood import AdapterPool
    from budwood.adapters import targets

    monkeypatch.setattr(targets, "SECONDS", 0.2)
    folder = shutil.copytree(lora, tmp_path / "adapter")
    change(folder / "adapter_config.json", **changes)
    pool = AdapterPool(tiny_base, precision="fp32", device="cpu")
    error = outcome(lambda: pool.load("a", folder))
    assert isinstance(error, CorruptError)
    assert "takes too long" in str(error) or "not a regular expression" in str(error)


def test_patterns_match_as_in_peft(tiny_base, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from budwood import AdapterPool

    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*\.(q_proj|v_proj|down_proj)",
        exclude_modules=r".*layers\.1.*down_proj",
        rank_pattern={r"layers\.0\..*q_proj": 2, "v_proj": 3},
        alpha_pattern={r"^model\.layers\.1\.self_attn\.v_proj": 16},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config).save_pretrained(tmp_path / "a")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "a").eval()
    with torch.no_grad():
        theirs = model(torch.tensor([[1, 50, 60, 70]])).logits[0, -1]
    pool = AdapterPool(tiny_base, precision="fp32", device="cpu")
    pool.load("a", tmp_path / "a")
    pool.use("a")
    assert torch.allclose(pool.logits([[1, 50, 60, 70]])[0], theirs, atol=1e-5)
