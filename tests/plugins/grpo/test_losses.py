"""The losses of all methods: in float64 against the papers' equations in any split, in fp32 against TRL's trainers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.core.training import float64 as f64
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from budwood import Column, Example, Options, Strategy, hookimpl
from budwood.recipe.schema import Recipe
from budwood.testing.bench import register

SPLITS = [[list(range(8))], [[0, 1, 2, 3], [4, 5, 6, 7]], [[i] for i in range(8)]]
LONGEST = 12
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"method": "grpo", "kl": 0.04, "reference": "base"},
    "grpo at a temperature, capped": {
        "method": "grpo",
        "kl": 0.3,
        "temperature": 1.7,
        "importance_cap": 1.1,
        "reference": "base",
    },
    "grpo from the start": {"method": "grpo", "kl": 0.3, "temperature": 0.8, "reference": "start"},
    "dr-grpo": {"method": "dr-grpo", "kl": 0.1, "reference": "base", "unbiased_kl": True},
    "dapo": {"method": "dapo"},
    "gspo": {"method": "gspo", "clip_low": 0.1, "clip_high": 0.2, "kl": 0.1, "reference": "base"},
    "rloo": {"method": "rloo", "clip_low": 0.4, "clip_high": 0.6},
    "reinforce++": {"method": "reinforce++", "kl": 0.1},
}


class Columns(Strategy):
    """Gives the examples advantages and old log-probabilities, and converts the model if asked."""

    api = 2
    after = ("adapter",)

    class Options(Options):
        wide: bool = True
        near: float = 0.6

    @hookimpl
    def prepare_examples(self, examples: Sequence[Example]) -> list[Example]:
        draw, prepared = np.random.default_rng(0), []
        for example in examples:
            size = len(example.labels)
            columns = {
                "old": -draw.uniform(4, 7, size),
                "advantage": np.full(size, draw.normal()),
                "importance": draw.uniform(0.3, 1.1, size),
            }
            prepared.append(replace(example, columns={n: Column(v, "label") for n, v in columns.items()}))
        return prepared

    @hookimpl
    def prepare_model(self, model: nn.Module) -> nn.Module:
        return f64.wide(model) if self.options.wide else model


@pytest.fixture(autouse=True)
def installed() -> None:
    register(Columns, "columns")


def prepared(make_recipe: Callable[..., Recipe], options: dict[str, Any]) -> Any:
    """Return a float64 run and its engine; old log-probabilities are near the policy's, so that some are clipped."""
    recipe = make_recipe(
        {"max_new_tokens": LONGEST, **options}, others=({"columns": {}},), completions=True, data={"eval": "none"}
    )
    run, engine = f64.ready(recipe)
    temperature, draw = options.get("temperature", 1.0), np.random.default_rng(1)
    stock = f64.Stock(run)
    for index in range(8):
        example = stock.score(index).at(temperature)
        old = example.log_probs.detach().numpy() + draw.normal(scale=0.3, size=len(example.labels))
        run.examples._extra[index]["old"] = Column(old, "label")  # type: ignore[index]
    return run, engine


def expected(options: dict[str, Any], start: dict[int, Tensor] | None = None) -> f64.Terms:
    """Return the terms by the papers' equations, one answer at a time."""
    method, beta = options["method"], options.get("kl", 0.0)
    low, high = {"dapo": (0.2, 0.28)}.get(method, (0.2, 0.2))
    low, high = options.get("clip_low", low), options.get("clip_high", high)
    temperature = options.get("temperature", 1.0)

    def terms(examples: list[f64.Scored]) -> dict[str, tuple[Tensor, float]]:
        losses, divergences = [], []
        for number, scored in enumerate(examples):
            e = scored.at(temperature)
            base = (e.base_logits / temperature).log_softmax(-1).gather(-1, e.labels[:, None])[:, 0]
            base = base if start is None else start[number]
            ratio = (e.log_probs - e.columns["old"]).exp()
            if method == "gspo":  # equation 7: (π(y) / π_old(y))^(1 / |y|)
                ratio = ratio.prod().pow(1 / len(ratio)).expand_as(ratio)
            if method == "rloo":
                ratio = ratio.prod().expand_as(ratio)
            advantage = e.columns["advantage"]
            bounded = [min(max(r, 1 - low), 1 + high) for r in ratio]
            value = -torch.stack([min(r * a, b * a) for r, b, a in zip(ratio, bounded, advantage, strict=True)])
            losses.append(value * e.columns["importance"] if options.get("importance_cap") else value)
            divergence = base.exp() / e.log_probs.exp() - (base - e.log_probs) - 1
            divergences.append(divergence * ratio if options.get("unbiased_kl") else divergence)

        def mean(parts: list[Tensor]) -> Tensor:
            if method in ("grpo", "gspo", "rloo"):
                return sum(part.mean() for part in parts) / len(parts)
            total = sum(part.sum() for part in parts)
            return total / (len(parts) * LONGEST if method == "dr-grpo" else sum(len(part) for part in parts))

        with_kl = beta and method not in ("rloo", "reinforce++")
        return {"grpo": (mean(losses), 1.0), **({"grpo_kl": (mean(divergences), beta)} if with_kl else {})}

    return terms


@pytest.mark.parametrize("case", CASES)
def test_the_papers_equations_in_any_split(make_recipe: Callable[..., Recipe], case: str) -> None:
    options = CASES[case]
    run, engine = prepared(make_recipe, options)
    start = None
    if options.get("reference") == "start":
        stock, now = f64.Stock(run), [p.detach().clone() for p in run.trainable]
        run.only_adapter_trains = False  # so that the start is not computed as the base
        run.start = [p + 0.1 * torch.randn_like(p) for p in now]
        f64_put(run, run.start)
        start = {i: stock.score(i).at(options["temperature"]).log_probs.detach() for i in range(8)}
        f64_put(run, now)
    terms = [f64.own("causal_lm", 0.0), expected(options, start)]
    whole = f64.expect(run, SPLITS[0], terms)
    for rows in SPLITS:
        f64.agree(f64.take(run, engine, rows), whole)
    assert whole.values["grpo"].abs() > 1e-4


def f64_put(run: Any, values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(run.trainable, values, strict=True):
            parameter.copy_(value)


# --- TRL

HOT = 1.5
TRL_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"method": "grpo", "kl": 0.04, "reference": "base"}, {"loss_type": "grpo", "beta": 0.04}),
    "dr-grpo": (
        {"method": "dr-grpo", "kl": 0.1, "reference": "base", "unbiased_kl": True},
        {"loss_type": "dr_grpo", "beta": 0.1},
    ),
    "dapo": ({"method": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (
        {"method": "gspo", "clip_low": 0.1, "clip_high": 0.2},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.2},
    ),
    "token mean with a KL at a temperature": (
        {"method": "dapo", "kl": 0.2, "temperature": HOT, "reference": "base"},
        {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.2},
    ),
}


@pytest.fixture(scope="module")
def trl_trainers(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """TRL's trainers on the tiny base, on the CPU in fp32."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    options: dict[str, Any] = {
        "output_dir": str(tmp_path_factory.mktemp("trl")), "report_to": [], "use_cpu": True, "bf16": False,
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": LONGEST,
        "gradient_checkpointing": False, "disable_dropout": True,
    }  # fmt: skip
    data = Dataset.from_list([{"prompt": "games:"}] * 8)
    trainers = {}
    kinds: Any = (
        ("grpo", GRPOTrainer, GRPOConfig),
        ("rloo", RLOOTrainer, RLOOConfig),
        ("hot", GRPOTrainer, GRPOConfig),
    )
    for name, cls, config in kinds:
        trainers[name] = cls(
            model=str(tiny_base), reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config(**options, temperature=HOT if name == "hot" else 1.0), train_dataset=data,
        )  # fmt: skip
        trainers[name].current_gradient_accumulation_steps = 1
    return trainers


def load_policy(model: nn.Module, run: Any) -> None:
    """Give a stock model the run's weights, with the adapter merged."""
    weights = f64.Stock(run).weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def trl_inputs(run: Any, base: Any, temperature: float) -> dict[str, Any]:
    """Return the run's first 8 examples as TRL pads them: prompts on the left, completions on the right."""
    examples = [run.examples[i] for i in range(8)]
    first = [int(e.label_positions[0]) + 1 for e in examples]
    ids = [torch.tensor(e.inputs["input_ids"].astype(np.int64)) for e in examples]
    width, length = max(first), max(len(i) - f for i, f in zip(ids, first, strict=True))
    inputs: dict[str, Any] = {
        name: torch.zeros(8, size, dtype=torch.int64)
        for name, size in (
            ("prompt_ids", width), ("prompt_mask", width), ("completion_ids", length), ("completion_mask", length),
        )
    }  # fmt: skip
    extra = {name: torch.zeros(8, length) for name in ("old_per_token_logps", "ref_per_token_logps")}
    for row, (example, tokens, start) in enumerate(zip(examples, ids, first, strict=True)):
        answer = tokens[start:]
        inputs["prompt_ids"][row, width - start :] = tokens[:start]
        inputs["prompt_mask"][row, width - start :] = 1
        inputs["completion_ids"][row, : len(answer)] = answer
        inputs["completion_mask"][row, : len(answer)] = 1
        with torch.no_grad():
            logits = base(tokens[None]).logits[0, start - 1 : -1] / temperature
        extra["ref_per_token_logps"][row, : len(answer)] = logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]
        extra["old_per_token_logps"][row, : len(answer)] = torch.tensor(example.columns["old"].values)
    advantages = torch.tensor([float(e.columns["advantage"].values[0]) for e in examples])
    inputs |= {**extra, "advantages": advantages, "num_items_in_batch": inputs["completion_mask"].sum()}
    return {**inputs, "old_logps": extra["old_per_token_logps"].sum(1)}


def test_the_losses_of_trl(make_recipe: Callable[..., Recipe], trl_trainers: dict[str, Any], tiny_base: Path) -> None:
    """The bound: values of size 1 in fp32, summed in two orders by two implementations."""
    rloo: tuple[Any, Any] = ({"method": "rloo", "clip_low": 0.4, "clip_high": 0.6}, {})
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    for name, (options, theirs) in {**TRL_CASES, "rloo": rloo}.items():
        run, engine = prepared(make_recipe, options)
        run.model.float()
        run.dtype = torch.float32
        ours = f64.take(run, engine, SPLITS[0]).values["loss"]
        temperature = options.get("temperature", 1.0)
        trainer = trl_trainers["rloo" if name == "rloo" else "grpo" if temperature == 1 else "hot"]
        given = {
            "loss_type": "grpo", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2,
            "importance_sampling_level": "token", **theirs,
        }  # fmt: skip
        if name == "rloo":
            given = {"epsilon_low": 0.4, "epsilon_high": 0.6}
        for key, value in given.items():
            assert hasattr(trainer, key), key
            setattr(trainer, key, value)
        trainer.args.use_bias_correction_kl = options.get("unbiased_kl", False)
        load_policy(trainer.model, run)
        loss = trainer._compute_loss(trainer.model.train(), trl_inputs(run, base, temperature))
        assert abs(loss.item() - ours.item()) < 1e-5, name
        assert abs(loss.item()) > 1e-3, name
