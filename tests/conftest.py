"""Configuration of all tests: no network, one thread, a temporary cache, and generated tiny bases.

Tests run on the CPU. `pytest -m gpu` runs those that need a GPU; any other run hides it, also from subprocesses.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

os.environ["HF_HUB_OFFLINE"] = "1"
if os.environ.get("BUDWOOD_TESTS") != str(os.getpid()):  # otherwise it is the second import, as tests.conftest
    os.environ["BUDWOOD_TESTS"] = str(os.getpid())
    os.environ["BUDWOOD_CACHE"] = tempfile.mkdtemp(prefix="budwood-cache-")
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="budwood-hub-")
    for name in ("BUDWOOD_CACHE", "HF_HOME"):
        atexit.register(shutil.rmtree, os.environ[name], ignore_errors=True)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["GOMP_SPINCOUNT"] = "1000"

LONGEST = (
    "test_conformance.py", "test_task_conformance.py", "test_packages_own_tests.py", "test_together.py",
    "test_harness.py", "test_checks.py",
)  # fmt: skip
"""Slowest test files, which run first."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "Section: games. Description: a small library for the terminal.",
    "Describe a package of the section libs: shared libraries and headers for the runtime.",
    "user assistant system name description section files data model tokens",
]


def make_tokenizer(folder: Path, vocab_size: int = 300) -> None:
    """Save a byte-level BPE tokenizer with bos, eos and pad, a ChatML template, and a bos before every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=512
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)


def make_base(folder: Path, dtype: torch.dtype | None = None, shard: str = "5GB", seed: int = 0, **changes) -> Path:
    """Save a random Llama (hidden 64, 2 layers) with its tokenizer in `folder`; `changes` override its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(options | changes))).to(dtype or torch.float32)
    model.save_pretrained(folder, max_shard_size=shard)
    make_tokenizer(folder)
    return folder


def without_template(base: Path, folder: Path) -> Path:
    """Copy a base, and remove its chat template."""
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU before torch initialises it, unless the tests are selected by `gpu`."""
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Prepare a process that runs tests. One that only distributes them imports nothing large: all wait for it."""
    if session.config.pluginmanager.hasplugin("dsession"):
        return
    gc.disable()  # until all tests are collected: imports make a million objects, and no garbage
    for name in ("torchao", "torch.utils._pytree"):  # complaints of their imports, from each worker
        logging.getLogger(name).setLevel(logging.ERROR)
    import torch
    import typer

    torch.set_num_threads(1)  # the models are tiny: a second thread only waits
    os.fsync = lambda descriptor: None  # no file of a test has to survive a power cut
    typer.main.get_command = functools.cache(typer.main.get_command)  # a tenth of a second for each command here


def pytest_collection_finish() -> None:
    """Collect garbage from here on, a tenth as often as by default, which takes a twentieth of the time."""
    gc.set_threshold(7_000, 10, 10)
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the slowest files first, so that no worker ends with one of them; skip tests that need a GPU.

    Tests marked `scale` or `compiled` run only if they are selected by it.
    """
    for name in ("scale", "compiled"):
        if name not in config.option.markexpr:
            others = [item for item in items if item.get_closest_marker(name)]  # not a folder's name, as in keywords
            config.hook.pytest_deselected(items=others)
            items[:] = [item for item in items if item not in set(others)]
    import torch

    no_gpu = pytest.mark.skip(reason="needs a CUDA device, and `make gpu`")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
    order = {name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def frozen_libraries() -> None:
    """Leave what is alive between two files, the imported libraries, out of later collections of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def empty_data_cache() -> None:
    """Begin each file without encoded data in the cache, since saving an entry looks at all others."""
    shutil.rmtree(Path(os.environ["BUDWOOD_CACHE"]) / "tokens", ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def no_strategies_of_other_files() -> Iterator[None]:
    """Remove strategies that the kit has registered, which commands would find in the tests of other files."""
    yield
    bench = sys.modules.get("budwood.testing.bench")
    if bench is not None:
        bench.forget_pretended()


@pytest.fixture(autouse=True)
def no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Draw plots, which takes longer than the steps of a run, only in tests marked `plots`."""
    if "plots" in request.keywords:
        yield
        return
    from budwood.testing.bench import without_plots
    from budwood_adalora import picture

    monkeypatch.setattr(picture, "draw_ranks", lambda *given: None)
    with without_plots():
        yield


@pytest.fixture(autouse=True)
def quiet_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset what a command sets for the rest of its process: the variable of `--debug`, and where `serve` logs."""
    monkeypatch.setenv("BUDWOOD_DEBUG", "0")
    monkeypatch.setattr(logging.getLogger("budwood.serve"), "handlers", [])


@pytest.fixture
def forked() -> Iterator[None]:
    """Fork the processes of Python that a test starts from one that has imported the libraries; see `tests.forked`."""
    from tests.forked import forking

    with forking():
        yield


@pytest.fixture
def forked_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the processes that render chat templates, of which the tests of templates start dozens."""
    from tests.forked import Popen

    from budwood.untrusted import chat_template

    monkeypatch.setattr(chat_template, "subprocess", SimpleNamespace(Popen=Popen, PIPE=subprocess.PIPE))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random fp32 Llama (hidden 64, 2 layers, vocabulary 300) with tokenizer and chat template."""
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function `tiny_bases(name, **changes)` -> folder of a separate tiny base, created once per session."""
    bases: dict[str, Path] = {}

    def make(name: str, **changes) -> Path:
        key = repr((name, changes))
        if key not in bases:
            bases[key] = make_base(tmp_path_factory.mktemp("base") / name, **changes)
        return bases[key]

    return make
