"""Adapters for tests: small ones that need no model, and real ones that stock PEFT makes for the tiny base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from budwood.adapters.manifest import ChatRecord
from budwood.adapters.store import SavedAdapter, write_adapter
from budwood.model.text_tasks import as_probe
from budwood.serving.pool import AdapterPool

FAKE_BASE = SimpleNamespace(
    added=range(0),
    double_quantization=True,
    name="tiny",
    path=Path("tiny"),
    fingerprint="f" * 64,
    revision=None,
    quantization="none",
    dtype=torch.float32,
    device=torch.device("cpu"),
)


def write_small(folder: Path, fill: float = 1.0) -> None:
    """Write the config and tensors of a one-layer adapter, as a strategy's export does."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "base_model_name_or_path": "tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        "base_model.model.layer.q.lora_A.weight": torch.full((2, 4), fill),
        "base_model.model.layer.q.lora_B.weight": torch.full((4, 2), fill),
    }
    save_file(tensors, folder / "adapter_model.safetensors")


def save_small(directory: Path, **changes) -> SavedAdapter:
    """Save the small adapter with budwood.json and golden logits."""
    arguments = {
        "adapter_type": "lora",
        "distribution": "budwood 0.1.0",
        "base": FAKE_BASE,
        "task": "causal-lm",
        "metrics": {"eval_loss": 1.5, "eval_perplexity": float("inf")},
        "strategies": [{"name": "lora", "distribution": "budwood 0.1.0", "options": {"rank": 2}}],
        "probes": [as_probe([1, 2, 3]), as_probe([4])],
        "base_logits": [torch.zeros(5), torch.zeros(5)],
        "adapter_logits": [torch.ones(5), torch.arange(5.0)],
    }
    return write_adapter(directory, write_small, **(arguments | changes))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Folder of a valid adapter that needs no model."""
    return save_small(tmp_path / "small").directory


@pytest.fixture
def save() -> Callable[..., SavedAdapter]:
    """The function `save_small`."""
    return save_small


def make_stock(base: Path, folder: Path, seed: int = 1, scale: float = 0.3, **changes) -> Path:
    """Save a LoRA adapter with stock PEFT; B is not zero, so it changes every logit."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    model.save_pretrained(folder)
    return folder


def make_saved(
    base: Path,
    folder: Path,
    quantization: str = "none",
    precision: str = "fp32",
    chat: ChatRecord | None = None,
    on_messages: bool | None = None,
    stop_ids: tuple[int, ...] = (),
    **changes,
) -> Path:
    """Save the stock adapter as a run does, with budwood.json and golden logits of `base`."""
    stock = make_stock(base, folder.with_name(folder.name + "-stock"), **changes)
    pool = AdapterPool(base, quantization, precision=precision, device="cpu")
    probes = [as_probe(ids) for ids in ([1, 40, 50, 60, 70], [1, 99, 7], [1, 200, 201, 202, 203, 204, 205])]
    without = pool.measure(probes)
    pool.load("adapter", stock)
    pool.use("adapter")

    def write(target: Path) -> None:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(stock / name, target / name)

    write_adapter(
        folder,
        write,
        adapter_type="lora",
        distribution="budwood 0.1.0",
        base=pool.base,
        task="causal-lm",
        tokenizer=pool.tokenizer,
        chat=chat,
        on_messages=on_messages,
        stop_ids=stop_ids,
        probes=probes,
        base_logits=list(without),
        adapter_logits=list(pool.measure(probes)),
    )
    return folder


@pytest.fixture(scope="session")
def stock(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the tiny base, saved by stock PEFT."""
    return make_stock(tiny_base, tmp_path_factory.mktemp("adapters") / "stock")


@pytest.fixture(scope="session")
def other(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second stock adapter, with a different seed, rank and targets."""
    folder = tmp_path_factory.mktemp("adapters") / "other"
    return make_stock(tiny_base, folder, seed=2, r=2, target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="session")
def saved(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the tiny base in fp32, with budwood.json and golden logits; copy it before altering it."""
    return make_saved(tiny_base, tmp_path_factory.mktemp("adapters") / "saved")


@pytest.fixture(name="make_stock")
def make_stock_fixture() -> Callable[..., Path]:
    """The function `make_stock`."""
    return make_stock


@pytest.fixture(name="make_saved")
def make_saved_fixture() -> Callable[..., Path]:
    """The function `make_saved`."""
    return make_saved
