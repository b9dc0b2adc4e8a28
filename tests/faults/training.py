"""Runs out of memory, and non-finite losses, in complete runs: at step 1 and at a late step."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from budwood.model.text_tasks import CausalLM
from budwood.training import loop
from budwood.training.loop import tune

from .harness import Ended, Outcome, Shop, incomplete

LORA = "lora"
PLACES = ("forward", "head", "backward", "optimizer", "evaluation")


def training(shop: Shop, late: int = 500) -> Iterator[Outcome]:
    """Run out of memory in every place, at step 1 and at step `late`; then non-finite losses and gradients."""
    method = "lora"
    for step in (1, late):
        train = {"steps": step + 3, "save_every": 1000, "eval_every": step, "micro_tokens": 512, "batch_examples": 4}
        whole = shop.recipe(method, "memory-whole", **train)
        shop.tune(whole)
        for where in PLACES:
            recipe, strategies = shop.recipe(method, "memory", **train), []
            if where in ("forward", "head", "backward"):
                strategies = [{"exhaust": {"where": where, "step": step, "tokens": 100}}]
                recipe = shop.recipe(method, "memory", strategies, **train)
            ended = shop.finish(shop.fork(lambda r=recipe, w=where, s=step: _exhausted(r, w, s)))  # type: ignore[misc]
            lost = _same(ended, whole.output, recipe.output)
            lost = lost or ("" if "out of memory" in ended.said else "no message was printed")
            yield Outcome("out of memory: split", f"{where}, step {step}", lost)
            shop.remove(recipe.output)
        recipe = shop.recipe(method, "memory", [{"exhaust": {"step": step, "tokens": 1}}], **train)
        lost = _refused(shop.tune(recipe), 3, f"step {step}: out of memory: one example of")
        yield Outcome("out of memory: one row does not fit", f"step {step}", lost or incomplete(recipe.output))
        shop.remove(recipe.output)
        shop.remove(whole.output)
    yield from _limited(shop, method)
    yield from _not_finite(shop, method)


def _exhausted(recipe: Any, where: str, step: int) -> None:
    """Run a recipe that runs out of memory in the optimizer at a step, or in evaluations of several examples."""
    steps, outputs = torch.optim.AdamW.step, CausalLM.outputs
    calls: list[int] = []

    def fail_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return steps(self, *args, **kwargs)

    def fail_evaluation(self: Any, model: Any, batch: Any) -> Any:
        if not model.training and sum(batch.lengths) > 100 and len(batch.keys) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return outputs(self, model, batch)

    patches = {
        "optimizer": lambda: mock.patch.object(torch.optim.AdamW, "step", fail_step),
        "evaluation": lambda: mock.patch.object(CausalLM, "outputs", fail_evaluation),
    }
    if where in patches:
        with patches[where]():
            tune(recipe)
    else:
        tune(recipe)


def _limited(shop: Shop, method: str) -> Iterator[Outcome]:
    """Limit the process's memory after setup, so that torch's allocator fails in the steps."""
    shop.write_long_rows()
    train = {"steps": 3, "batch_examples": 64, "micro_tokens": 40000, "eval_every": None, "save_every": 1000}
    recipes = [shop.recipe(method, name, data="long.jsonl", max_length=400, **train) for name in ("roomy", "tight")]
    shop.tune(recipes[0])
    for mebibytes in (200, 100, 60):

        def work(limit: int = mebibytes << 20) -> None:
            original = loop.take_steps

            def take_steps(*args: Any) -> None:
                now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (now + limit, now + limit))
                original(*args)

            with mock.patch.object(loop, "take_steps", take_steps):
                tune(recipes[1])

        lost = _same(shop.finish(shop.fork(work)), recipes[0].output, recipes[1].output)
        yield Outcome("out of memory: split", f"a process with {mebibytes} MiB to spare", lost)
        shop.remove(recipes[1].output)


def _not_finite(shop: Shop, method: str) -> Iterator[Outcome]:
    """At step k, by policy: the run stops and saves the adapter so far, or skips the step."""
    for what in ("loss", "gradient"):
        for step in (1, 4):
            spoil = [{"spoil": {"what": what, "steps": [step]}}]
            recipe = shop.recipe(method, "spoiled", spoil, batch_examples=24)
            lost = _refused(shop.tune(recipe), 5, f"step {step}: ") or incomplete(recipe.output)
            yield Outcome(f"{what} not finite: stop", f"step {step}", lost)
            shop.remove(recipe.output)
            recipe = shop.recipe(method, "spoiled", spoil, batch_examples=24, non_finite="skip")
            ended = shop.tune(recipe)
            said = (
                f"step {step}: " in ended.said and "the step is skipped" in ended.said and "train.jsonl:" in ended.said
            )
            lost = f"exit code {ended.code}: {ended.error}" if ended.code else "" if said else "the rows are not named"
            lost = lost or incomplete(recipe.output)
            yield Outcome(f"{what} not finite: skip", f"step {step}", lost)
            shop.remove(recipe.output)


def _same(ended: Ended, whole: Any, output: Any) -> str:
    if ended.code:
        return f"exit code {ended.code}: {ended.error}"
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, output))
    distance = max(float((one[key] - two[key]).abs().max()) for key in one)
    return "" if distance < 1e-5 else f"the adapter differs by {distance:.1e}"


def _refused(ended: Ended, code: int, text: str) -> str:
    if ended.code != code or text not in ended.error:
        return f"exit code {ended.code}, not {code}: {ended.error}"
    return ""
