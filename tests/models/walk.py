"""One architecture: LoRA trains on it as in stock PEFT, opens there, and merges; or it is refused in one line."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tests.models.architectures import LABELS, TASKS, build
from torch import Tensor

from budwood import BudwoodError, match_targets
from budwood.contract.loading import build_task
from budwood.lowrank import moved_targets
from budwood.model.base import skeleton
from budwood.model.experts import RoutedExperts, count_experts, experts_in
from budwood.recipe.schema import Recipe
from budwood.serving.merge import merge
from budwood.training.loop import tune

STEPS, RATE, RANK = 5, 1e-3, 4
BOUND = 1e-5
"""Largest difference of a loss, and of a logit relative to the largest (at least 1), in fp32."""
WORDS = "games section library terminal description runtime shared files".split()  # noqa: SIM905


@dataclass
class Outcome:
    """What was found.

    Attributes:
        refused: the one line that refuses the model; "" if it trains.
        unbuilt: why transformers does not build it from the sizes of the walk; "" if it does.
        faults: what should hold and does not.
        packed: whether rows were packed.
        linears: number of adapted linears.
        experts: number of fused experts, which `lora` leaves unadapted here.
        opened: how many of these are in a form that quantisers and adapters reach.
        curve, stock, merged: largest differences from stock PEFT's losses, and of the logits of the adapter in stock
            PEFT and of the merged model.
        notes: what a user should know.
    """

    name: str
    task: str
    model_class: str = ""
    refused: str = ""
    unbuilt: str = ""
    faults: list[str] = field(default_factory=list)
    packed: bool = False
    linears: int = 0
    experts: int = 0
    opened: int = 0
    curve: float = 0.0
    stock: float = 0.0
    merged: float = 0.0
    notes: list[str] = field(default_factory=list)


def check(case: tuple[str, str]) -> Outcome:
    """Walk one model type in a folder of its own; what it raises becomes a fault."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    name, task = case
    with tempfile.TemporaryDirectory(prefix="budwood-models-") as folder:
        try:
            return walk(name, task, Path(folder))
        except Exception as error:
            return Outcome(name, task, faults=[f"{type(error).__name__}: {error}"])


def walk(name: str, task: str, folder: Path) -> Outcome:
    """Check one model type on a task, in an empty folder."""
    outcome = Outcome(name, task)
    try:
        cls = build(name, task, folder / "base")
    except Exception as error:  # what transformers cannot build says nothing about Budwood
        lines = str(error).strip().splitlines() or [""]
        outcome.unbuilt = f"{type(error).__name__}: {lines[0]}"
        return outcome
    outcome.model_class = cls.__name__
    try:
        _check(outcome, cls, folder)
    except BudwoodError as error:
        text = str(error).replace(str(folder), "…")
        if error.exit_code == 1 and "not supported" not in text:
            outcome.faults.append(text)
        outcome.refused = text
    return outcome


def opened_experts(frame: Any) -> int:
    """Return the number of experts of a base without weights that a quantiser packs and an adapter finds."""
    return sum(experts_in(module) for module in frame.modules() if isinstance(module, RoutedExperts))


def _check(outcome: Outcome, cls: Any, folder: Path) -> None:
    base, start = folder / "base", folder / "start"

    def stock() -> Any:
        return cls.from_pretrained(base, dtype=torch.float32)

    model = stock()
    task = build_task(outcome.task, {})
    targets = match_targets(model, "all-linear", None)
    outcome.linears, outcome.experts = len(targets), count_experts(model).total
    outcome.opened = opened_experts(skeleton(base, TASKS[outcome.task]))
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, init_lora_weights=False, task_type=task.peft_task_type,
        target_modules=sorted(set(targets) - set(moved := moved_targets(model, targets))),
        target_parameters=[f"{name}.weight" for name in moved] or None,
        modules_to_save=task.head_modules(model) or None,
    )  # fmt: skip
    torch.manual_seed(1)
    peer = get_peft_model(model, config)
    peer.save_pretrained(start)
    reopened = PeftModel.from_pretrained(stock(), start)
    differ = [key for key, value in reopened.state_dict().items() if not torch.equal(value, peer.state_dict()[key])]
    if differ:
        outcome.notes.append(f"stock PEFT does not open its own adapter: it leaves out {differ[0]}")
    run = tune(Recipe.from_dict(_recipe(outcome.task, folder)), quiet=True)
    outcome.packed = bool(run.packed)
    examples = [run.examples[index] for index in range(len(run.examples))]
    losses = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = [record["loss"] for record in losses if record["kind"] == "step"]
    theirs = _losses(copy.deepcopy(peer), outcome.task, examples)
    outcome.curve = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if not outcome.curve <= BOUND:
        outcome.faults.append(f"the loss differs by {outcome.curve:.1e}")
    if not theirs[-1] < theirs[0]:
        outcome.faults.append("the loss does not fall")

    @torch.no_grad()
    def logits(other: Any) -> Tensor:
        return torch.cat([_logits(other.eval(), outcome.task, example).flatten() for example in examples])

    wanted = logits(run.model)
    bound = BOUND * max(1.0, float(wanted.abs().max()))
    if not differ:
        opened = PeftModel.from_pretrained(stock(), folder / "run" / "adapter")
        outcome.stock = float((logits(opened) - wanted).abs().max())
        if not outcome.stock <= bound:
            outcome.faults.append(f"in stock PEFT a logit differs by {outcome.stock:.1e}")
    merge(folder / "run" / "adapter", folder / "merged", dtype="fp32")
    merged = cls.from_pretrained(folder / "merged", dtype=torch.float32)
    outcome.merged = float((logits(merged) - wanted).abs().max())
    if not outcome.merged <= bound:
        outcome.faults.append(f"merged, a logit differs by {outcome.merged:.1e}")


def _recipe(task: str, folder: Path) -> dict[str, Any]:
    prompts = [" ".join(WORDS[at : at + 1 + at % 3]) for at in range(1, 7)]
    rows: list[dict[str, str]] = [
        {"text": prompt, "label": LABELS[at % 3]}
        if task == "sequence-classification"
        else {"prompt": f"{prompt}:", "completion": f" {WORDS[-at]}"}
        for at, prompt in enumerate(prompts, 1)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base": {"model": str(folder / "base"), "quantization": "none", "task": task},
        "data": {"train": str(folder / "train.jsonl"), "eval": "none", "max_length": 64},
        "adapter": str(folder / "start"),
        "strategies": ["lora"],
        "train": {
            "steps": STEPS, "batch_examples": 6, "micro_tokens": 90, "learning_rate": RATE, "precision": "fp32",
            "schedule": "constant", "warmup": 0,
        },
        "output": str(folder / "run"),
    }  # fmt: skip


def _losses(peer: Any, task: str, examples: list[Any]) -> list[float]:
    """Return the loss of each step of stock PEFT, in plain torch, one example at a time."""
    trained = [parameter for parameter in peer.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    count = sum(len(example.labels) for example in examples)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for example in examples:
            labels = torch.from_numpy(np.asarray(example.labels)).long()
            loss = torch.nn.functional.cross_entropy(_logits(peer, task, example), labels, reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(total)
    return losses


def _logits(model: Any, task: str, example: Any) -> Tensor:
    """Return the model's own logits [L, …] at an example's labels, without packing and padding."""
    ids, positions = (torch.from_numpy(np.asarray(value)).long() for value in (example.inputs["input_ids"],
                                                                               example.label_positions))  # fmt: skip
    if task == "sequence-classification":
        logits: Tensor = model(input_ids=ids[None]).logits
        return logits
    inputs = {"input_ids": ids[None], "use_cache": False}
    if task == "sequence-to-sequence":
        shifted = [model.config.decoder_start_token_id, *np.asarray(example.labels)[:-1].tolist()]
        inputs["decoder_input_ids"] = torch.tensor([shifted])
    return model(**inputs).logits[0][positions]
