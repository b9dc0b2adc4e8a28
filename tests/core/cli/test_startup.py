"""Commands that need no library, and refusals of what is not there, import none: they answer within a second.

A report on data loads torch and the tokenizer, but no model class, which would take as long again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.core.adapters.conftest import make_saved

HEAVY = [
    *("accelerate", "datasets", "fastapi", "matplotlib", "peft", "scipy", "sklearn", "tokenizers", "torch"),
    "transformers",
]
MOST = 1000
"""Modules, those of Python and of all commands together; torch alone has 1,200."""
COMMANDS = [
    (["--version"], 0),
    (["plugins"], 0),
    (["plugins", "lora"], 0),
    (["adapter", "info", "ADAPTER"], 0),
    (["adapter", "info", "missing"], 2),
    (["adapter", "verify", "ADAPTER", "--base", "missing/base/here"], 2),
    (["adapter", "verify", "ADAPTER", "--base", "OTHER"], 2),
    (["adapter", "merge", "ADAPTER", "."], 2),
    (["adapter", "merge", "ADAPTER", "out", "--dtype", "nosuch"], 2),
    (["adapter", "export", "ADAPTER", "."], 2),
    (["adapter", "export", "ADAPTER", "out", "--for", "vllm", "--base", "OTHER"], 2),
    (["adapter", "shrink", "ADAPTER", "out", "--rank", "0"], 2),
    (["adapter", "combine", "ADAPTER", "ADAPTER", "out", "--weights", "1"], 2),
    (["adapter", "verify", "missing"], 2),
    (["adapter", "merge", "missing", "out"], 2),
    (["adapter", "export", "missing", "out"], 2),
    (["adapter", "shrink", "missing", "out", "--rank", "2"], 2),
    (["adapter", "diff", "ADAPTER", "missing"], 2),
    (["adapter", "combine", "ADAPTER", "missing", "out"], 2),
    (["plan", "missing.yaml"], 2),
    (["plan", "-"], 2),
    (["plan", "recipe.yaml", "--device", "nosuch"], 2),
    (["plan", "recipe.yaml", "--fit", "nosuch"], 2),
    (["plan", "recipe.yaml", "--fit", "24GiB", "--allow", "nosuch"], 2),
    (["plan", "recipe.yaml", "--processes", "2", "--link", "3"], 2),
    (["plan", "recipe.yaml", "--device", "4090", "-o", "train.compile=true"], 2),
    (["check", "missing.yaml"], 2),
    (["data", "missing.yaml"], 2),
    (["data", "recipe.yaml", "-o", "strategies=[lora, adalora]"], 2),
    (["data", "recipe.yaml", "-o", "base.model=missing/base/here"], 2),
    (["data", "malformed.jsonl", "--base", "BASE"], 2),
    (["data", "missing.jsonl", "--base", "BASE"], 2),
    (["tune", "missing.jsonl", "--base", "BASE"], 2),
    (["tune", "rows.jsonl", "--base", "BASE", "-o", "lora.rnk=2"], 2),
    (["tune", "rows.jsonl", "--base", "some/missing"], 3),
    (["tune", "recipe.yaml", "--fit", "nosuch"], 2),
    (["tune", "recipe.yaml", "-o", "train.activation_offloading=true", "-o", "base.device=cpu"], 2),
    (["tune", "recipe.yaml", "-o", "train.compile=true", "-o", "base.device=cuda"], 2),
    (["sweep", "missing.yaml", "-s", "lora.rank=2,4"], 2),
    (["eval", "missing"], 2),
    (["eval", "."], 2),
    (["eval", "ADAPTER", "--base", "OTHER", "--data", "rows.jsonl"], 2),
    (["eval", "ADAPTER", "--data", "malformed.jsonl"], 2),
    (["eval", "ADAPTER", "--attack", "nosuch"], 2),
    (["generate", "some/missing", "--prompt", "x"], 3),
    (["generate", "BASE", "--adapter", "a=missing", "--prompt", "x"], 2),
    (["generate", "BASE", "--prompt", ""], 2),
    (["generate", "BASE", "--prompt", "x", "--quantization", "nosuch"], 2),
    (["generate", "OTHER", "--adapter", "a=ADAPTER", "--prompt", "x"], 2),
    (["chat", "BASE", "--adapter", "a=ADAPTER", "--use", "b"], 2),
    (["chat", "some/missing"], 3),
    (["serve", "some/missing"], 3),
    (["compare", "missing", "missing2"], 2),
]
OF_MODELS = [
    "bitsandbytes",
    "datasets",
    "matplotlib",
    "peft",
    "scipy",
    "sklearn",
    "torchao",
    "transformers.modeling_utils",
]
"""What a valid recipe's data needs no more than its refusal does."""
CHILD = """
import json, sys
from budwood.cli.app import run
codes = [(run(arguments), [name for name in json.loads(sys.argv[2]) if name in sys.modules])
         for arguments in json.loads(sys.argv[1])]
count = len(sys.modules)
last = [run(["data", "recipe.yaml", "--json"]), [name for name in json.loads(sys.argv[3]) if name in sys.modules]]
print("\\n" + json.dumps([codes, count, last]))
"""


def test_refusals_import_no_library(tmp_path: Path, tiny_base: Path, tiny_bases: Callable[..., Path]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3, encoding="utf-8")
    (tmp_path / "malformed.jsonl").write_text('{"prompt": 1', encoding="utf-8")
    recipe = {
        "base": {"model": str(tiny_base)},
        "data": {"train": "rows.jsonl"},
        "strategies": ["lora"],
        "output": "out",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    places = {
        "BASE": str(tiny_base),
        "OTHER": str(tiny_bases("other", seed=5)),
        "ADAPTER": str(make_saved(tiny_base, tmp_path / "adapter")),
    }
    places["a=ADAPTER"] = f"a={places['ADAPTER']}"
    commands = [[places.get(part, part) for part in arguments] for arguments, _ in COMMANDS]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(commands), json.dumps(HEAVY), json.dumps(OF_MODELS)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    codes, modules, last = json.loads(done.stdout.splitlines()[-1])
    assert codes == [[code, []] for _, code in COMMANDS], done.stderr
    assert modules < MOST
    assert last == [0, []]
