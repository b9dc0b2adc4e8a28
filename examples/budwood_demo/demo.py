"""The demo: fine-tune two adapters on the tiny base, swap them on the live model, and report accuracy and size.

It uses only the public API of `budwood`, so it is also an example of the Python interface.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from budwood import AdapterPool, installed, load_recipe, tune

HERE = Path(__file__).parent


def main(output: Path, overwrite: bool = False) -> dict[str, Any]:
    """Run the demo with output in the folder `output` and progress on stderr; return the figures.

    Raises:
        InputError: `output` is not empty and `overwrite` is False.
    """
    started = time.perf_counter()
    heading("1. Installed strategies")
    for name, (strategy, *_) in installed().items():
        say(f"   {name} ({strategy.owner}): {strategy.summary}")

    heading("2. The base, quantised to 4 bits (NF4)")
    pool = AdapterPool(HERE / "base", quantization="nf4")
    base = pool.base
    saved = base.bytes_unquantized - base.bytes
    say(
        f"   {base.bytes:,} bytes instead of {base.bytes_unquantized:,} in {str(base.dtype).removeprefix('torch.')}: "
        f"{saved:,} ({saved / base.bytes_unquantized:.0%}) saved"
    )

    heading("3. Train a LoRA adapter to name the section of a package from its description")
    name_run = tune(recipe("name", output), overwrite=overwrite)
    heading("4. Train a second adapter to write a description for a section")
    tune(recipe("describe", output), overwrite=overwrite)

    heading("5. Both adapters, and none, on one live model")
    untouched = pool.logits(prompts())
    pool.load("name", output / "name" / "adapter")
    pool.load("describe", output / "describe" / "adapter")
    for prompt in prompts():
        say(f"   {prompt!r}")
        for adapter in ("name", "describe", None):
            pool.use(adapter)
            answer = pool.generate([prompt], max_new_tokens=16)[0].text
            say(f"      {adapter or 'none':>8}: {' '.join(answer.split())[:90]}")
    pool.use(None)
    same = all(bool((a == b).all()) for a, b in zip(pool.logits(prompts()), untouched, strict=True))
    if not same:
        raise RuntimeError("with the adapters disabled, the model's logits differ from the base's")
    say("   adapters disabled: all logits are bitwise identical to the base's")

    before, after = name_run.before["eval_exact_match"], name_run.metrics["eval_exact_match"]
    result = {
        "accuracy_before": before,
        "accuracy_after": after,
        "seconds": round(time.perf_counter() - started, 1),
        "base_bytes": base.bytes,
        "base_bytes_unquantized": base.bytes_unquantized,
        "adapter_bytes": (output / "name" / "adapter" / "adapter_model.safetensors").stat().st_size,
    }
    heading(f"Done in {result['seconds']:.0f} s")
    say(f"   accuracy on 933 held-out descriptions: {before:.3f} before, {after:.3f} after")
    say("   (most frequent section: 0.10; TF-IDF with logistic regression: 0.72)")
    say(
        f"   adapter {output / 'name' / 'adapter'}, log {output / 'name' / 'metrics.jsonl'}, "
        f"plot {output / 'name' / 'loss.png'}"
    )
    say("   next, use your own data: budwood tune FILE.jsonl --base DIR")
    return result


def recipe(name: str, output: Path) -> Any:
    """Load the recipe `name` of this package, with paths in the installed package and its run in `output`."""
    return load_recipe(
        HERE / "recipes" / f"{name}.yaml",
        [
            f"base.model={HERE / 'base'}",
            f"data.train={HERE / 'data' / name / 'train.jsonl'}",
            f"data.eval={HERE / 'data' / name / 'eval.jsonl'}",
            f"output={output / name}",
            f"train.eval_generate={933 if name == 'name' else 0}",
        ],
    )


def prompts() -> list[str]:
    """Return one example prompt for each adapter."""
    return ["a fast and friendly web browser\nSection:", "A package of the section games:"]


def heading(text: str) -> None:
    """Print the heading of a step."""
    say(f"\n{text}")


def say(text: str) -> None:
    """Print a line on stderr; only results go to stdout."""
    print(text, file=sys.stderr, flush=True)
