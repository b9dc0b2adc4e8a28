"""Strategies with required options: an adapter loads with the options of its run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from budwood import AdapterPool, InputError
from budwood.adapters.store import write_adapter
from budwood.model.base import load_base

PROMPTS = [[1, 40, 50, 60, 70], [1, 99, 7]]
STEP = torch.linspace(0, 50, 300)

SCALED = """
    import torch

    class Scale(Options):
        scale: float = Field(gt=0)

    class Scaled(Strategy):
        'Adds a vector to the logits, scaled by its option; stores its selection on the model.'
        api = 2
        Options = Scale
        adapter_types = ("SCALED",)

        @hookimpl
        def attach_adapter(self, model, config, tensors, name):
            vars(model).setdefault("_scaled", {})[name] = self.options.scale * tensors["step"]

        @hookimpl
        def use_adapters(self, model, names, index):
            if handle := vars(model).pop("_scaled_handle", None):
                handle.remove()
            if names:
                found = [vars(model)["_scaled"][name] for name in names]
                rows = torch.stack([found[i] if i >= 0 else torch.zeros(300) for i in index or [0]])

                def add(module, args, output):
                    output.logits = output.logits + rows[:, None]

                vars(model)["_scaled_handle"] = model.register_forward_hook(add)

        @hookimpl
        def detach_adapter(self, model, name):
            del vars(model)["_scaled"][name]

        @hookimpl
        def convert_adapter(self, config, tensors, adapter_type):
            return {**config, "scale": self.options.scale}, tensors
"""


@pytest.fixture
def base(tiny_base: Path, distribution) -> object:
    distribution("budwood-scaled", SCALED, {"scaled": "Scaled"})
    return load_base(tiny_base, "none", "AutoModelForCausalLM", torch.float32)


def save(directory: Path, base: object, options: dict[str, object] | None) -> Path:
    def write(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "SCALED"}))
        save_file({"step": STEP}, folder / "adapter_model.safetensors")

    strategies = [{"name": "other", "distribution": "x 1", "options": {"scale": 99.0}}]
    if options is not None:
        strategies.append({"name": "scaled", "distribution": "budwood-scaled 1.0", "options": options})
    write_adapter(
        directory, write, adapter_type="scaled", distribution="budwood-scaled 1.0", base=base, task="causal-lm",
        strategies=strategies,
    )  # fmt: skip
    return directory


def test_adapters_of_one_type_use_the_options_of_their_runs(base, tmp_path: Path) -> None:
    pool = AdapterPool(base)
    alone = pool.logits(PROMPTS)
    for name, scale in (("two", 2.0), ("five", 5.0), ("too", 2.0)):
        pool.load(name, save(tmp_path / name, base, {"scale": scale}))
    for name, scale in (("two", 2.0), ("five", 5.0), ("two", 2.0), ("too", 2.0)):
        pool.use(name)
        torch.testing.assert_close(pool.logits(PROMPTS), alone + scale * STEP, atol=1e-4, rtol=0)
    each = {name: pool.generate([PROMPTS[0]], [name], max_new_tokens=3)[0].tokens for name in ("two", "five", None)}
    names = ["five", "two", None, "too"]
    mixed = pool.generate([PROMPTS[0]] * 4, names, max_new_tokens=3)
    assert [answer.tokens for answer in mixed] == [each[{"too": "two"}.get(name, name)] for name in names]
    pool.unload("five")
    torch.testing.assert_close(pool.logits(PROMPTS), alone + 2.0 * STEP, atol=1e-4, rtol=0)
    for name in ("two", "too"):
        pool.unload(name)
    assert pool.logits(PROMPTS).equal(alone)


def test_an_adapter_without_valid_options_is_rejected(base, tmp_path: Path) -> None:
    pool = AdapterPool(base)
    with pytest.raises(InputError, match=r"'scaled' of budwood-scaled 1.0 has required options, but no bud"):
        pool.load("a", save(tmp_path / "a", base, None))
    with pytest.raises(InputError, match=r"b/budwood.json: scaled.scale: .*greater than 0"):
        pool.load("b", save(tmp_path / "b", base, {"scale": -1.0}))
    stock = save(tmp_path / "c", base, {"scale": 1.0})
    (stock / "budwood.json").unlink()
    with pytest.raises(InputError, match="open the folder that its run wrote"):
        pool.load("c", stock)
    assert pool.names == []


def test_a_conversion_uses_them_too(base, tmp_path: Path) -> None:
    from budwood.adapters.export import converted
    from budwood.adapters.store import read_adapter

    saved = read_adapter(save(tmp_path / "a", base, {"scale": 4.0}))
    found = converted(saved, saved.load_tensors(), "anything")
    assert found is not None and found[0]["scale"] == 4.0
