"""llama.cpp itself, in the npm package node-llama-cpp: its tokens of an exported base and adapter are ours."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.core.serving.conftest import make_adapter
from tests.core.serving.test_gguf_files import BYTES, DIGITS, LLAMA3, make_model, split

from budwood import AdapterPool
from budwood.model.base import load_tokenizer
from budwood.serving.exports.targets import export_for
from budwood.serving.exports.wanted import Wanted

VERSION = "3.22.1"
SCRIPT = Path(__file__).with_name("llama.mjs")
REPOSITORY = Path(__file__).parents[2]
PACKAGES = {
    ("Linux", "x86_64"): "linux-x64",
    ("Linux", "aarch64"): "linux-arm64",
    ("Darwin", "arm64"): "mac-arm64-metal",
}
PROMPTS = [[1, 40, 50, 60, 70], [1, 99, 7], [1, 200, 201, 202, 203, 204, 205]]
TOKENS = 12
TEXTS = [
    "I'M here, don't WE'LL 12345678 ½ ² tests.\n\n  indented\tand\t\ttabs\r\n\r\nCRLF  ",
    "日本語のテキスト。\u00a0nbsp\u2003em مرحبا 🙂👩‍👩‍👧 e\u0301 Ǆ ﬁ Ⅷ 𝟘𝟙 ٣٤ १२",
    "<|im_start|>user\nx<|im_end|>\n<eos> <pad>", "   leading", "trailing   ", "a\n\n\n b", "x" * 50,
]  # fmt: skip


@pytest.fixture(scope="session")
def llama() -> Any:
    """Function `llama(jobs)` -> results of llama.mjs; node-llama-cpp is installed once, in ~/.cache/budwood."""
    node, npm = shutil.which("node"), shutil.which("npm")
    package = PACKAGES.get((platform.system(), platform.machine()))
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    if package is None:
        pytest.skip(f"node-llama-cpp has no program for {platform.system()} on {platform.machine()}")
    folder = Path.home() / ".cache" / "budwood" / f"node-llama-cpp-{VERSION}"
    library = folder / "node_modules" / "node-llama-cpp" / "dist" / "index.js"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text("{}")
        names = [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/{package}@{VERSION}"]
        options = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
        done = subprocess.run([npm, "install", *options, *names], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"npm cannot install node-llama-cpp: {(done.stderr.strip().splitlines() or ['?'])[-1]}")

    def run(jobs: list[dict[str, Any]], place: Path) -> list[dict[str, Any]]:
        file = place / "jobs.json"
        file.write_text(json.dumps([{"lora": None, "prompts": [], "texts": [], "tokens": TOKENS} | j for j in jobs]))
        environment = os.environ | {"NODE_LLAMA_CPP_SKIP_DOWNLOAD": "true"}
        command = [node, str(SCRIPT), str(library), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def greedy(base: Path, adapter: Path | None) -> list[list[int]]:
    """Our own tokens, whatever ends an answer."""
    pool = AdapterPool(base, precision="fp32", device="cpu")
    if adapter is not None:
        pool.load("a", adapter)
        pool.use("a")
    answers = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(TOKENS):
            ids.append(int(pool.logits([ids])[0].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_llama_cpp_answers_as_we_do(llama, tmp_path, kind):
    base = make_model(tmp_path / "base", kind)
    adapter = make_adapter(tmp_path / "a", 1, alpha_pattern={"k_proj": 3, "layers.1.mlp.up_proj": 11})
    export_for(adapter, tmp_path / "out", Wanted("ollama", base=str(base)))
    export_for(adapter, tmp_path / "merged", Wanted("gguf", merged=True, dtype="fp32", base=str(base)))
    model, lora = str(tmp_path / "out" / "base.gguf"), str(tmp_path / "out" / "adapter.gguf")
    jobs = [{"model": model}, {"model": model, "lora": lora}, {"model": str(tmp_path / "merged" / "model.gguf")}]
    alone, adapted, merged = (r["answers"] for r in llama([j | {"prompts": PROMPTS} for j in jobs], tmp_path))
    ours, without = greedy(base, adapter), greedy(base, None)
    assert adapted == ours and merged == ours
    assert alone == without
    assert all(one != other for one, other in zip(alone, adapted, strict=True))


def test_the_demos_base_and_llama_3s_rotary_factors(llama, tmp_path):
    demo = REPOSITORY / "examples" / "budwood_demo" / "base"
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    scaled = make_model(tmp_path / "scaled", "llama", rope_parameters=rope)
    names = {scaled: make_adapter(tmp_path / "a", 1)}
    jobs, expected = [], []
    for base, adapter in names.items():
        export_for(adapter, tmp_path / "out", Wanted("gguf", with_base=True, base=str(base)))
        jobs.append({"model": str(tmp_path / "out" / "base.gguf"), "prompts": PROMPTS})
        expected.append(greedy(base, None))
    model = tmp_path / "demo.gguf"
    write_base(demo, model)
    jobs.append({"model": str(model), "prompts": PROMPTS})
    expected.append(greedy(demo, None))
    assert [result["answers"] for result in llama(jobs, tmp_path)] == expected


def write_base(base: Path, path: Path) -> None:
    """Write a base as GGUF, as an export does."""
    from types import SimpleNamespace

    from budwood.serving.exports.gguf_files import write_model_gguf
    from budwood.serving.exports.llama_cpp import LlamaModel

    model = LlamaModel.open(str(base), SimpleNamespace(manifest=None))  # type: ignore[arg-type]
    write_model_gguf(path, model.folder, model.config, model.arch, model.vocabulary(), "base")


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges"),
    [
        (split(LLAMA3), True),
        (split(LLAMA3), False),
        (split(LLAMA3.replace("{1,3}", "")), False),
        ({"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}, False),
        (BYTES, False),
    ],
    ids=["llama-bpe", "smaug-bpe", "qwen2", "smollm", "gpt-2"],
)
def test_llama_cpp_tokenises_as_we_do(llama, tmp_path, pre_tokenizer, ignore_merges):
    base = make_model(tmp_path / "base", "llama")
    retrain(base, pre_tokenizer, ignore_merges)
    write_base(base, tmp_path / "base.gguf")
    tokenizer: Any = load_tokenizer(base)
    texts = [*TEXTS, *(REPOSITORY / "README.md").read_text(encoding="utf-8").split("\n\n")]
    (result,) = llama([{"model": str(tmp_path / "base.gguf"), "texts": texts}], tmp_path)
    for text, found in zip(texts, result["tokenized"], strict=True):
        assert found == tokenizer(text, add_special_tokens=False)["input_ids"], text


def retrain(base: Path, pre_tokenizer: dict[str, Any], ignore_merges: bool) -> None:
    """Give a model folder a tokenizer with this way of splitting, with merges across all that it keeps together."""
    from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers

    values = json.loads((base / "tokenizer.json").read_text())
    values["pre_tokenizer"] = pre_tokenizer
    tokenizer = Tokenizer.from_str(json.dumps(values))
    special = [AddedToken(t["content"], special=True, normalized=False) for t in values["added_tokens"]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=304, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(
        ["12345678 don't WE'LL\n\n\n  x.\n", "I'M here ,,,\r\n\r\n  a 12 123 1234"] * 4, trainer
    )
    trained = json.loads(tokenizer.to_str())
    trained["model"]["ignore_merges"] = ignore_merges
    (base / "tokenizer.json").write_text(json.dumps(trained))
