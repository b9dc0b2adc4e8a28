"""PEFT's methods with the options of the tests, adapters of each that stock PEFT makes, and recipes for runs.

As a module, it runs the tests of all methods and writes a page.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import peft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from budwood.contract.loading import load_strategy

METHODS: dict[str, dict[str, Any]] = {
    "ia3": {"feedforward": ["down_proj"]},
    "loha": {"rank": 3, "alpha": 5},
    "lokr": {"rank": 3, "alpha": 5, "decompose_both": True},
    "oft": {"block_size": 8},
    "vera": {"rank": 16},
    "hra": {"rank": 4},
    "miss": {"rank": 8},
    "boft": {"block_size": 4},
    "fourierft": {"frequencies": 40},
    "randlora": {"rank": 8, "alpha": 64},
    "shira": {"rank": 2},
    "c3a": {"block_size": 8},
    "road": {"group_size": 16},
    "gralora": {"rank": 4, "hybrid_rank": 2},
    "delora": {"rank": 4},
    "hira": {"rank": 4},
    "vblora": {"vectors": 16, "vector_length": 8},
    "waveft": {"frequencies": 40},
    "supertuning": {"sparsity": 0.98},
    "tinylora": {"size": 5},
    "peanut": {"rank": 4, "depth": 1},
    "glora": {"rank": 2},
    "ln_tuning": {},
    "trainable_tokens": {"tokens": [9, 7, *range(20, 300)]},
}
"""The options of each method in the tests; their names in recipes are the keys."""
SUMMED = [method for method in METHODS if hasattr(load_strategy(method)[0], "combine_adapters")]
"""The methods whose weighted sums are of the same method."""
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *METHODS.items(),
    ("ia3", {}),
    ("lokr", {"rank": 2, "decompose_factor": 4}),
    ("oft", {"block_size": 0, "blocks": 4, "block_share": True, "cayley_neumann": False}),
    ("vera", {"rank": 8, "save_projection": False, "seed": 3}),
    ("miss", {"rank": 8, "variant": "bat"}),
    ("miss", {"rank": 8, "variant": "mini", "mini_rank": 16}),
    ("boft", {"block_size": 0, "blocks": 8}),
    ("randlora", {"rank": 8, "alpha": 64, "sparse": True}),
    ("road", {"variant": "road_4", "group_size": 32}),
    ("vblora", {"vectors": 12, "vector_length": 16, "topk": 3, "rank": 2}),
    ("waveft", {"frequencies": 50, "wavelet": "db3", "proportional": True}),
    ("waveft", {"frequencies": 30, "transform": False, "scaling": 5.0}),
    ("supertuning", {"sparsity": 0.9, "select_top": False, "rank": 2, "alpha": 3.0}),
    ("tinylora", {"rank": 3, "size": 4, "tying": 0.5, "save_projection": False}),
    ("peanut", {"rank": 3, "activation": "tanh", "scaling": 0.5}),
    ("glora", {"weight": "vector", "coupling": "none"}),
]
TARGETS = ["q_proj", "v_proj", "down_proj"]
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
"""Stock PEFT and Budwood compute in fp32, with a few sums in another order; logits are of the order of 1."""


def load(base: Path, quantization: str | None = None) -> Any:
    """Return the tiny base, frozen, in fp32."""
    return copy.deepcopy(_loaded(base, quantization))


@functools.cache
def _loaded(base: Path, quantization: str | None) -> Any:
    config = None
    if quantization:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantization)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it would repack the weights
    return model.requires_grad_(False).eval()


def config_of(method: str, options: dict[str, Any], **changes: Any) -> Any:
    """Return stock PEFT's config with the fields that the strategy sets for these options."""
    cls = load_strategy(method)[0]
    if method == "ln_tuning":
        fields = {"target_modules": ["input_layernorm", "norm"], "task_type": "CAUSAL_LM"}
        return peft.LNTuningConfig(**fields | changes)
    if method == "trainable_tokens":
        return peft.TrainableTokensConfig(token_indices=options["tokens"], task_type="CAUSAL_LM", **changes)
    fields = cls.Options(**options).fields()
    if "feedforward" in cls.Options.model_fields:
        fields["feedforward_modules"] = options.get("feedforward", [])
    if "random_seed" in fields:
        fields["random_seed"] = 0
    return getattr(peft, cls.peft_config)(**{"target_modules": TARGETS, "task_type": "CAUSAL_LM"} | fields | changes)


def put_stock(model: Any, method: str, options: dict[str, Any], **changes: Any) -> Any:
    """Put an adapter on a model with stock PEFT; its parameters are moved, so it changes every logit."""
    torch.manual_seed(1)
    stock = peft.get_peft_model(model, config_of(method, options, **changes))
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if parameter.requires_grad:
                size = 3.0 if "spectrum" in name or "c3a" in name else 0.1
                parameter.add_(torch.randn_like(parameter) * size)
    return stock.eval()


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the config and the tensors of an adapter's files."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def recipe_of(base: Path, folder: Path, strategy: Any, **sections: Any) -> dict[str, Any]:
    """Return a recipe of two steps with one strategy, whose rows are written to the folder."""
    rows = [{"prompt": f"{word} {word[::-1]}:", "completion": word} for word in ("one", "two", "three", "four")]
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"steps": 2, "batch_examples": 4, "micro_tokens": 256, "learning_rate": 1e-2, "precision": "fp32"}
    recipe = {
        "base": {"model": str(base), "quantization": "none", "device": "cpu"},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 64},
        "strategies": [strategy],
        "train": {**train, "warmup": 0, "schedule": "constant", "eval_generate": 0},
        "output": str(folder / "run"),
    }
    return {**recipe, **sections}


PAGE = Path(__file__).parents[3] / "docs" / "methods.md"
TESTS = "tests/plugins/peft_methods"
STARTS = "tests/plugins/initialisations"
PACKAGES = "tests/e2e/test_packages_own_tests.py"
"""Tests of LoRA's initialisations, which the page names and `make combinations` runs in full."""
EVERYTHING = "BUDWOOD_COMBINATIONS"
"""Environment variable that makes the conformance tests take all methods."""
COLUMNS = {
    "stock PEFT": "test_forward_gradients_and_file_are_those_of_stock_peft",
    "nf4": "test_on_a_quantised_base_it_computes_with_the_dequantised_weights",
    "mixed batch": "test_it_shares_a_batch_with_lora_and_the_base",
    "merge": "test_merging_gives_the_logits_of_the_adapter",
    "continues, packed": "test_a_run_continues_an_adapter_of_stock_peft_on_packed_rows",
    "combine": "test_it_changes_the_base_by_the_weighted_sum_of_the_changes",
    "budget": "test_it_has_no_budget_of_ranks_that_training_divides",
}
"""The test of each column; a method that a column's test does not take is shown as "—"."""
SHOWN = {"combine": "exact", "budget": "—"}
"""What a passed test is called, if not "yes"."""
HEAD = f"""\
# Methods of PEFT

Generated by `make combinations` from the outcomes of [{TESTS}](../{TESTS}); do not edit.

`lora` and `adalora` are strategies of their own; these are PEFT's other methods. A strategy has the name of PEFT's
type; its options are in [the recipe](recipe.md). PEFT's layers compute them, on the base's frozen product. **yes**:

- **stock PEFT**: an adapter that PEFT saved has the same logits and gradients here, in fp32, and the file that Budwood
  writes of it holds the same tensors and opens in PEFT with the same logits.
- **nf4**: on a quantised base it computes what PEFT computes on the dequantised weights.
- **mixed batch**: in one batch with the base and a LoRA adapter, each row has the answer that it has alone; unloaded,
  the base's logits are bitwise those from before.
- **merge**: merged into an unquantised base, it has the same logits.
- **continues, packed**: a run with `adapter:` trains an adapter of stock PEFT on, in packed rows; PEFT opens its file.
- **combine**: exact: `budwood adapter combine` writes the weighted sum as an adapter of the same method, which changes
  the base by the sum of what its parts change; —: such a sum is none of the method. It says so, and names the remedy:
  `budwood adapter export --for peft --as lora --rank R` for each part, which is lossy.
- **budget**: training divides a budget of ranks among the modules; —: PEFT has none for it. `adalora` has one, whose
  adapters are combined as LoRA. AdaMSS, which has one too, is
  [absent](../plugins/peft_methods/budwood_peft_methods/absent.py).

All start as the base's function (`hra` up to rounding in the run's precision, since its reflections cancel in pairs),
train on nf4, resume to the same bytes, plan on fake tensors, and meet the rest of the conformance kit, which `make
combinations` runs for each.
"""


def cells() -> list[tuple[str, str]]:
    """Return method and column of each cell."""
    return [(m, c) for m in METHODS for c in COLUMNS if c != "combine" or m in SUMMED]


def page(passed: Mapping[tuple[str, str], bool]) -> str:
    """Return the text of the docs page, from whether the tests of each cell passed."""
    lines = [HEAD, f"| | {' | '.join(COLUMNS)} | learning rate |", "|---" * (len(COLUMNS) + 2) + "|"]
    for method in METHODS:
        shown = [
            (SHOWN.get(column, "yes") if passed[method, column] else "**no**") if (method, column) in cells() else "—"
            for column in COLUMNS
        ]
        rate = f"{load_strategy(method)[0].learning_rate_scale:g} × LoRA's"
        lines.append(f"| `{method}` | {' | '.join(shown)} | {rate} |")
    return "\n".join([*lines, "", *NOTES]) + "\n"


NOTES = [
    "`miss` with `variant: bat` computes with the base's weight, and is refused on a quantised base before it loads.",
    "Linears that store [in, out], as GPT-2's do, take `ia3`, `vera`, `fourierft`, `randlora`, `gralora`, `vblora`,",
    "`waveft`, `tinylora`, `ln_tuning` and `trainable_tokens`, as in PEFT; the others are refused there.",
    "",
    "Of all these only `adalora` has a budget of ranks. [LoRA's initialisations](../plugins/initialisations/README.md)",
    "(`pissa`, `olora`, `corda`, `eva`, `lora-ga`, `loftq`) run beside `lora`, on nf4 and packed rows, and are saved",
    "as plain LoRA, which merges and shares batches; `loftq` is bound to its quantised base, and does not merge.",
    f"[{STARTS}](../{STARTS}) compares them with stock PEFT.",
]


def outcomes() -> tuple[dict[tuple[str, str], bool], bool]:
    """Run the tests of all methods; return whether those of each cell passed, and whether all did."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", TESTS, STARTS, PACKAGES, f"--junit-xml={report}", "--deselect"]
        command += [f"{TESTS}/test_methods_in_runs.py::test_the_page_of_methods_is_up_to_date"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", EVERYTHING: "all"}
        workers = ["-n", "auto", "--maxprocesses", "4"]
        subprocess.run([*command, *workers], cwd=PAGE.parents[1], env=environment, stdout=sys.stderr, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    good: dict[tuple[str, str], bool] = {}
    for case in cases:
        test, _, values = str(case.get("name")).partition("[")
        method = values.rstrip("]").partition("-")[0]
        column = next((column for column, name in COLUMNS.items() if name == test), "")
        if column and method in METHODS:
            good[method, column] = good.get((method, column), True) and len(case) == 0
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return good, not failed


if __name__ == "__main__":
    results, all_passed = outcomes()
    PAGE.write_text(page(results), encoding="utf-8")
    sys.exit(0 if all_passed else 1)
