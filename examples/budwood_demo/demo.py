"""The demonstration: fine-tune the tiny base twice, swap the two adapters on the live model, and measure.

It uses only what `budwood` exports, so it is also an example of the Python interface.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from budwood import AdapterPool, installed, load_recipe, tune

HERE = Path(__file__).parent


def main(output: Path, overwrite: bool = False) -> dict[str, Any]:
    """Run the demo into the folder `output`, telling each step on stderr; return the figures.

    Raises:
        InputError: `output` holds something and `overwrite` is False.
    """
    started = time.perf_counter()
    tell("1. Strategies that are installed")
    for name, (strategy, *_) in installed().items():
        say(f"   {name} ({strategy.owner}): {strategy.summary}")

    tell("2. The base, quantised to 4 bits (NF4)")
    pool = AdapterPool(HERE / "base", quantization="nf4")
    base = pool.base
    saved = base.bytes_unquantized - base.bytes
    say(
        f"   {base.bytes:,} bytes instead of {base.bytes_unquantized:,} in {str(base.dtype).removeprefix('torch.')}: "
        f"{saved:,} ({saved / base.bytes_unquantized:.0%}) saved"
    )

    tell("3. Train a LoRA adapter to name the section of a package from its description")
    name_run = tune(recipe("name", output), overwrite=overwrite)
    tell("4. Train a second one, that writes a description for a section")
    tune(recipe("describe", output), overwrite=overwrite)

    tell("5. Both adapters and none, on one live model")
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
        raise RuntimeError("with the adapters off, the model's logits are not those of the base")
    say("   off again: every logit equals the base's, bit for bit")

    before, after = name_run.before["eval_exact_match"], name_run.metrics["eval_exact_match"]
    result = {
        "accuracy_before": before,
        "accuracy_after": after,
        "seconds": round(time.perf_counter() - started, 1),
        "base_bytes": base.bytes,
        "base_bytes_unquantized": base.bytes_unquantized,
        "adapter_bytes": (output / "name" / "adapter" / "adapter_model.safetensors").stat().st_size,
    }
    tell(f"Done in {result['seconds']:.0f} s")
    say(f"   accuracy on 933 unseen descriptions: {before:.3f} before, {after:.3f} after")
    say("   (always the most frequent section: 0.10; TF-IDF with logistic regression: 0.72)")
    say(
        f"   adapter {output / 'name' / 'adapter'}, log {output / 'name' / 'metrics.jsonl'}, "
        f"plot {output / 'name' / 'loss.png'}"
    )
    say("   next, your own data: budwood tune FILE.jsonl --base DIR")
    return result


def recipe(name: str, output: Path) -> Any:
    """The recipe `name` of this package, with its paths in the installed package and its run in `output`."""
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
    """What the adapters are tried on: one prompt of each kind."""
    return ["a fast and friendly web browser\nSection:", "A package of the section games:"]


def tell(text: str) -> None:
    """Say what comes next."""
    say(f"\n{text}")


def say(text: str) -> None:
    """One line to the user; results alone go to stdout."""
    print(text, file=sys.stderr, flush=True)
