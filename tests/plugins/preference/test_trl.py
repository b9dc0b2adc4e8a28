"""The losses against those of TRL's trainers: the same weights and tokens, fp32, one micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.plugins.preference.conftest import judge, make_pairs, stock
from torch import Tensor
from transformers import AutoTokenizer

from budwood import Run
from budwood.model.evaluation import collate_for
from budwood.training.batches import StepBatches, count_units
from budwood.training.memory import accumulate
from budwood.training.report import Report
from budwood.training.setup import prepare

trl = pytest.importorskip("trl")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def ours(recipe: Any) -> tuple[Run, dict[str, float]]:
    """Return a run with a non-zero adapter and the terms of its first optimizer step, all examples in one batch."""
    run, hooks, engine = prepare(recipe, Report(quiet=True), True)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in run.trainable:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    run.model.train()
    indices = list(range(len(run.examples)))
    batches = [collate_for(run, [run.examples[i] for i in indices], 0)]
    run.counts = count_units(run, hooks, batches)
    accumulate(run, hooks, engine, StepBatches(run.examples, indices, 0, run.micro_tokens, batches))  # type: ignore
    values = engine.finish_step()
    return run, {name: float(value) for name, value in {**values, **run.logged}.items()}


def padded(run: Run, indices: list[int], prefix: str = "") -> dict[str, Tensor]:
    """Return examples as TRL collates them: ids and masks, padded on the right."""
    examples = [run.examples[i] for i in indices]
    longest = max(len(e.inputs["input_ids"]) for e in examples)
    shape = (len(examples), longest)
    ids, mask, completion = torch.zeros(shape).long(), torch.zeros(shape).long(), torch.zeros(shape).long()
    for row, e in enumerate(examples):
        size = len(e.inputs["input_ids"])
        ids[row, :size] = torch.tensor(e.inputs["input_ids"].astype("int64"))
        mask[row, :size] = 1
        completion[row, torch.tensor(e.label_positions) + 1] = 1
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask, f"{prefix}completion_mask": completion}


def sides(run: Run) -> dict[str, Tensor]:
    """Return the pairs as TRL's older trainers collate them."""
    batch = {}
    for side, first in (("chosen", 0), ("rejected", 1)):
        values = padded(run, list(range(first, len(run.examples), 2)))
        labels = values["input_ids"].masked_fill(values["completion_mask"] == 0, -100)
        batch |= {f"{side}_input_ids": values["input_ids"], f"{side}_attention_mask": values["attention_mask"]}
        batch[f"{side}_labels"] = labels
    return batch


@pytest.fixture
def trainer(tiny_base: Path, tmp_path: Path) -> Callable[..., Any]:
    """Function (name, run, options) -> a trainer of TRL on the run's policy and reference."""
    from datasets import Dataset

    def make(name: str, run: Run, **options: Any) -> Any:
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        classes = {
            "dpo": (trl.DPOConfig, trl.DPOTrainer), "kto": (trl.KTOConfig, trl.KTOTrainer),
            "orpo": (ORPOConfig, ORPOTrainer), "cpo": (CPOConfig, CPOTrainer),
        }  # fmt: skip
        config, cls = classes[name]
        rows = make_pairs(2)
        data = Dataset.from_list(judge(rows) if name == "kto" else rows)
        args = config(
            output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=2, **options,
        )  # fmt: skip
        models = {"model": stock(run)}
        if name in ("dpo", "kto"):
            models["ref_model"] = stock(run, adapted=False)
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        made = cls(args=args, train_dataset=data, processing_class=tokenizer, **models)
        return SimpleNamespace(trainer=made, model=made.model)

    return make


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {}),
    "ipo": ({"loss": "ipo"}, {"loss_types": ["ipo"]}),
    "hinge": ({"loss": "hinge"}, {"loss_types": ["hinge"]}),
    "robust": ({"loss": "robust", "label_smoothing": 0.2}, {"loss_types": ["robust"], "label_smoothing": 0.2}),
    "normalised": ({"length_normalized": True}, {"loss_types": ["sigmoid_norm"]}),
    "with sft": ({"sft": 0.3}, {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
}


def test_dpo_is_trls(make_recipe: Callable[..., Any], trainer: Callable[..., Any]) -> None:
    made = None
    for name, (options, attributes) in VARIANTS.items():
        run, terms = ours(make_recipe([{"lora": {"rank": 3}}, {"dpo": {"beta": 0.3, **options}}], make_pairs(4)))
        made = made or trainer("dpo", run, beta=0.3)
        defaults = {"loss_types": ["sigmoid"], "loss_weights": [1.0], "label_smoothing": 0.0}
        vars(made.trainer).update(defaults | attributes)
        order = [*range(0, 8, 2), *range(1, 8, 2)]
        loss = made.trainer._compute_loss(made.model, padded(run, order), False)
        torch.testing.assert_close(
            terms["loss"], float(loss.detach()), **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )
        logged = made.trainer._metrics["eval"]
        for key, own in (
            ("rewards/chosen", "reward_chosen"),
            ("rewards/margins", "margin"),
            ("logps/rejected", "log_prob_rejected"),
        ):
            torch.testing.assert_close(terms[f"dpo_{own}"], logged[key][-1], **TOLERANCE)


def test_orpo_simpo_and_cpo_are_trls(make_recipe: Callable[..., Any], trainer: Callable[..., Any]) -> None:
    """TRL's ORPO takes the loss of prompts too; its odds-ratio term is compared, and the answers' loss with CPO's."""
    run, terms = ours(make_recipe([{"lora": {"rank": 3}}, {"orpo": {"weight": 0.7}}], make_pairs(4)))
    made = trainer("orpo", run, beta=0.7, max_length=128)
    _, metrics = made.trainer.get_batch_loss_metrics(made.model, sides(run))
    torch.testing.assert_close(terms["orpo"], -metrics["log_odds_ratio"], **TOLERANCE)
    torch.testing.assert_close(terms["orpo_margin"], metrics["rewards/margins"], **TOLERANCE)
    nll = terms["causal_lm"]

    run, terms = ours(make_recipe([{"lora": {"rank": 3}}, {"cpo": {"beta": 0.2, "sft": 0.6}}], make_pairs(4)))
    made = trainer("cpo", run, beta=0.2, cpo_alpha=0.6, max_length=128)
    loss, metrics = made.trainer.get_batch_loss_metrics(made.model, sides(run))
    torch.testing.assert_close(terms["loss"], float(loss.detach()), **TOLERANCE)
    torch.testing.assert_close(terms["causal_lm"], metrics["nll_loss"], **TOLERANCE)
    torch.testing.assert_close(nll, metrics["nll_loss"], **TOLERANCE)

    options = {"beta": 1.5, "gamma": 0.4, "sft": 0.2}
    run, terms = ours(make_recipe([{"lora": {"rank": 3}}, {"simpo": options}], make_pairs(4)))
    vars(made.trainer).update(loss_type="simpo", simpo_gamma=0.4, beta=1.5, cpo_alpha=0.2)
    loss, metrics = made.trainer.get_batch_loss_metrics(made.model, sides(run))
    torch.testing.assert_close(terms["loss"], float(loss.detach()), **TOLERANCE)
    torch.testing.assert_close(terms["simpo_accuracy"], metrics["rewards/accuracies"], **TOLERANCE)


def test_kto_is_trls(make_recipe: Callable[..., Any], trainer: Callable[..., Any]) -> None:
    options = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    run, terms = ours(make_recipe([{"lora": {"rank": 3}}, {"kto": options}], judge(make_pairs(6))))
    made = trainer("kto", run, **options)
    kinds = [float(e.columns["kto_mismatched"].values) for e in run.examples]
    answers, others = ([i for i, kind in enumerate(kinds) if kind == wanted] for wanted in (0, 1))
    labels = torch.tensor([bool(run.examples[i].columns["desirable"].values) for i in answers])
    inputs = {**padded(run, answers), **padded(run, others, "KL_"), "label": labels}
    loss = made.trainer._compute_loss(made.model, inputs, False)
    torch.testing.assert_close(terms["loss"], float(loss.detach()), **TOLERANCE)
    torch.testing.assert_close(terms["kto_kl"], made.trainer._metrics["eval"]["kl"][-1], **TOLERANCE)
