"""Pre-train a small vision transformer on digits without labels, then fine-tune it with LoRA on a few labelled ones.

It uses only the public API of `budwood`; `budwood tune` runs the same recipes, which it writes beside its results.

    python examples/digits/digits.py runs/digits
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

TARGET = 0.85
"""Accuracy on dev at which tuning stops."""
TRIALS = ({"rank": 2, "learning_rate": 1e-3}, {"rank": 4, "learning_rate": 3e-3}, {"rank": 8, "learning_rate": 5e-3})
"""Settings of LoRA, tried in this order until one reaches the target, with and without pre-training."""
SIZES = {"train": 100, "dev": 200, "test": 500}
"""Labelled images of each set; those of train and the other 997 are what the base sees without labels."""
AUGMENTED = {"crop": 0.75, "rotate": 10}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 8, "width": 8}, "resample": 2,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.3], "image_std": [0.38],
}  # fmt: skip
WHOLE = ["vit.embeddings", *(f"vit.layers.{number}" for number in range(4))]
"""What trains whole beside the last norm, the target of `ln_tuning`: together all of the transformer."""


def main(output: Path) -> dict[str, Any]:
    """Run everything in the new folder `output`; return the figures."""
    from budwood import AdapterPool

    if output.exists() and any(output.iterdir()):
        raise SystemExit(f"{output} is not empty: name another folder.")
    started = time.perf_counter()
    say("1. 1,797 digits of 8 × 8 pixels: images without labels, and train, dev and test sets")
    sets = write_images(output / "data")

    say("2. A transformer with random weights, pre-trained on masked images")
    random = make_base(output / "random")
    pretrained = pretrain(random, output)

    say(f"3. LoRA on {SIZES['train']} labelled digits, tuned on dev until an accuracy of {TARGET:.0%}")
    dev, best = tuned("lora", pretrained, output)

    say("4. The same without pre-training, and full tuning of both")
    _, other = tuned("lora-random", random, output)
    classify("full", pretrained, full(), 5e-4, output)
    classify("full-random", random, full(), 5e-4, output)

    say(f"5. On {SIZES['test']} test images")
    results, truth = {}, None
    names = {"LoRA": best, "full tuning": "full", "LoRA, not pre-trained": other,
             "full tuning, not pre-trained": "full-random"}  # fmt: skip
    for title, name in names.items():
        base = random if "random" in name else pretrained
        pool = AdapterPool(base, task="image-classification", labels=list("0123456789"), precision="fp32")
        pool.load("a", output / name / "adapter")
        pool.use("a")
        answers = [answer["label"] for answer in pool.respond([str(path) for path in sets["test"][0]])]
        truth = sets["test"][1]
        results[title] = float(np.mean(np.array(answers) == truth))
        if title == "LoRA":
            report(truth, answers, output / "confusion.png")
    results["logistic regression on pixels"] = regression(sets)
    for title, accuracy in sorted(results.items(), key=lambda item: -item[1]):
        say(f"   {accuracy:.3f}  {title}")
    adapter = sum(file.stat().st_size for file in (output / best / "adapter").glob("*.safetensors"))
    result = {
        "accuracy": results, "dev": dev, "adapter_bytes": adapter,
        "base_bytes": (pretrained / "model.safetensors").stat().st_size,
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    (output / "result.json").write_text(json.dumps(result, indent=2))
    say(f"   adapter {adapter:,} bytes, base {result['base_bytes']:,}; {output / 'confusion.png'}")
    say(f"Done in {result['seconds']:.0f} s")
    return result


def write_images(folder: Path) -> dict[str, tuple[list[Path], np.ndarray]]:
    """Write the digits as PNG files, and return the paths and labels of each labelled set."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels, labels = (digits.images * 255 / 16).round().astype(np.uint8), digits.target.astype(str)
    rest, sets = np.arange(len(labels)), {}
    for name in ("test", "dev", "train"):
        rest, part = train_test_split(rest, test_size=SIZES[name], random_state=0, stratify=labels[rest])
        paths = [folder / name / labels[index] / f"{index}.png" for index in part]
        sets[name] = (paths, labels[part])
        for index, path in zip(part, paths, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index]).save(path)
    (folder / "unlabelled").mkdir()
    for path in sets["train"][0]:
        shutil.copy(path, folder / "unlabelled")
    for index in rest:
        Image.fromarray(pixels[index]).save(folder / "unlabelled" / f"{index}.png")
    return sets


def make_base(folder: Path) -> Path:
    """Save a small vision transformer with random weights, and its image processor."""
    import torch
    from transformers import ViTConfig, ViTForMaskedImageModeling

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, encoder_stride=2, num_channels=1, hidden_size=64, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ViTForMaskedImageModeling(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def pretrain(base: Path, output: Path) -> Path:
    """Train the base to fill masks of unlabelled images, and return the folder of the result."""
    from budwood import tune

    run = tune(
        recipe(
            "masked", output, {"model": str(base), "task": "masked-image", "task_options": {"share": 0.5}},
            {"train": str(output / "data" / "unlabelled")}, full(),
            {"epochs": 100, "batch_examples": 64, "learning_rate": 2e-3, "eval_every": 200},
        )
    )  # fmt: skip
    say(f"   error of a masked patch: {run.before['eval_loss']:.3f} before, {run.metrics['eval_loss']:.3f} after")
    merged = output / "pretrained"
    command = ["adapter", "merge", output / "masked" / "adapter", merged, "--dtype", "fp32"]
    subprocess.run([sys.executable, "-m", "budwood", *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return merged


def tuned(name: str, base: Path, output: Path) -> tuple[float, str]:
    """Try the settings until one reaches the target; return the best accuracy on dev, and the name of its run."""
    found: list[tuple[float, str]] = []
    for number, trial in enumerate(TRIALS, 1):
        accuracy = classify(f"{name}-{number}", base, lora(trial), trial["learning_rate"], output)
        say(f"   rank {trial['rank']}, learning rate {trial['learning_rate']:g}: {accuracy:.3f} on dev")
        found.append((accuracy, f"{name}-{number}"))
        if accuracy >= TARGET:
            break
    return max(found)


def classify(name: str, base: Path, strategies: list[Any], rate: float, output: Path) -> float:
    """Fine-tune a base to ten classes, keep the adapter that is best on dev, and return its accuracy there."""
    from budwood import tune

    data = output / "data"
    run = tune(
        recipe(
            name, output, {"model": str(base), "task": "image-classification", "task_options": AUGMENTED},
            {"train": str(data / "train"), "eval": str(data / "dev")}, strategies,
            {"steps": 300, "batch_examples": 32, "learning_rate": rate, "eval_every": 50},
        )
    )  # fmt: skip
    return float(run.metrics["eval_accuracy"])


def lora(settings: dict[str, Any]) -> list[Any]:
    """Return the strategies of LoRA with the settings of a trial.

    The embeddings train whole, since the class token, which the classifier reads, has no part in filling masks.
    """
    rank = settings["rank"]
    return [{"lora": {"rank": rank, "alpha": 2 * rank, "modules_to_save": WHOLE[:1]}}]


def full() -> list[Any]:
    """Return the strategies that train all of the transformer."""
    return [{"ln_tuning": {"targets": ["vit.layernorm"], "modules_to_save": WHOLE}}]


def recipe(
    name: str, output: Path, base: dict[str, Any], data: dict[str, Any], strategies: list[Any], train: dict[str, Any]
) -> Any:
    """Write a recipe, which `budwood tune` also reads, and load it."""
    from budwood import load_recipe

    values = {
        "base": {"quantization": "none", "device": "cpu", **base}, "data": data, "strategies": strategies,
        "train": {"precision": "fp32", "warmup": 0.1, "micro_tokens": 4096, **train}, "output": str(output / name),
    }  # fmt: skip
    path = output / "recipes" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2))
    return load_recipe(path)


def regression(sets: dict[str, tuple[list[Path], np.ndarray]]) -> float:
    """Return the accuracy on test of logistic regression on the pixels of train, its penalty chosen on dev."""
    from PIL import Image
    from sklearn.linear_model import LogisticRegression

    pixels = {
        name: np.stack([np.asarray(Image.open(path), dtype=float).ravel() / 255 for path in paths])
        for name, (paths, _) in sets.items()
    }
    models = [
        LogisticRegression(C=10.0**power, max_iter=2000).fit(pixels["train"], sets["train"][1])
        for power in range(-2, 3)
    ]
    best = max(models, key=lambda model: model.score(pixels["dev"], sets["dev"][1]))
    return float(best.score(pixels["test"], sets["test"][1]))


def report(truth: np.ndarray, answers: list[str], picture: Path) -> None:
    """Print the classification report, and draw the confusions."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from sklearn.metrics import ConfusionMatrixDisplay, classification_report

    say(classification_report(truth, answers, digits=3, zero_division=0))
    figure, axes = pyplot.subplots(figsize=(6, 5.4), layout="constrained")
    ConfusionMatrixDisplay.from_predictions(truth, answers, ax=axes, cmap="Greens", colorbar=False)
    axes.set(title="500 digits that nothing was trained or tuned on")
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def say(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits"))
