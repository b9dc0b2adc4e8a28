"""The task reward-model: its loss against Bradley-Terry in float64, and complete runs on preference pairs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import make_base

from budwood import InputError, tune
from budwood.cli.app import run as command
from budwood.recipe.schema import Recipe
from budwood.training import setup
from budwood.training.batches import count_units
from budwood.training.report import Report

WORDS = ["games", "files", "data", "model", "small", "runtime"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and pairs whose chosen answer begins with "yes"; every third row has weight 2."""
    folder = tmp_path_factory.mktemp("reward")
    make_base(folder / "base")
    draw = random.Random(0)
    for name, count in (("train", 48), ("eval", 12)):
        rows = []
        for number in range(count):
            more = " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))
            sides = {"chosen": f" yes {more}", "rejected": f" no {more}"}
            rows.append({"prompt": f"{draw.choice(WORDS)}:", **sides, "weight": 1 + (number % 3 == 2)})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def recipe_of(files: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(*strategies: Any, output: str = "run", data: dict[str, Any] | None = None, **train: Any) -> Recipe:
        return Recipe.from_dict(
            {
                "base": {"model": str(files / "base"), "quantization": "none", "task": "reward-model"},
                "data": {
                    "train": str(files / "train.jsonl"), "eval": str(files / "eval.jsonl"), "max_length": 64,
                    **(data or {}),
                },
                "strategies": list(strategies),
                "train": {
                    "steps": 10, "batch_examples": 8, "micro_tokens": 128, "learning_rate": 1e-2, "precision": "fp32",
                    "schedule": "constant", "warmup": 0, **train,
                },
                "output": str(tmp_path / output),
            }
        )  # fmt: skip

    return make


def test_the_loss_is_that_of_bradley_and_terry_in_any_split(recipe_of: Callable[..., Recipe]) -> None:
    from budwood.contract.types import Step

    run, hooks, engine = setup.prepare(recipe_of({"lora": {"rank": 2}}), Report(quiet=True), overwrite=True)
    run.model.double()
    for parameter in run.trainable:  # a new adapter has no effect
        torch.nn.init.normal_(parameter, std=0.2)
    pairs = [(run.examples[2 * i], run.examples[2 * i + 1]) for i in range(6)]

    def score(example: Any) -> torch.Tensor:
        ids = torch.from_numpy(example.inputs["input_ids"]).long()[None]
        return run.model.score(run.model.model(ids, use_cache=False).last_hidden_state[0, -1])[0]

    weights = [float(chosen.weights[0]) for chosen, _ in pairs]
    assert set(weights) == {1.0, 2.0}
    gaps = [score(chosen) - score(rejected) for chosen, rejected in pairs]
    expected = sum(w * torch.log1p(torch.exp(-gap)) for w, gap in zip(weights, gaps, strict=True)) / sum(weights)
    gradients = torch.autograd.grad(expected, run.trainable)
    for size in (6, 2):
        batches = []
        for start in range(0, 6, size):
            examples = [example for pair in pairs[start : start + size] for example in pair]
            batches.append(run.task.collate(examples, run.model, run.tokenizer, run.packed))
        run.counts = count_units(run, hooks, batches)
        for index, batch in enumerate(batches):
            hooks.call("backward", step=Step(run, batch, engine, index))
        values = engine.finish_step()
        torch.testing.assert_close(values["reward_model"], expected.detach(), rtol=1e-9, atol=1e-12)
        for parameter, gradient in zip(run.trainable, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
            parameter.grad = None


ADALORA = {"adalora": {"initial_rank": 4, "target_rank": 2, "interval": 1, "initial_phase": 0, "final_phase": 2}}


def test_runs_learn_and_are_evaluated_and_continued(
    recipe_of: Callable[..., Recipe], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tune(recipe_of("lora"), quiet=True)
    assert run.metrics["eval_accuracy"] == 1 and run.metrics["eval_margin"] > 1 > run.before["eval_accuracy"]
    assert command(["eval", str(run.directory / "adapter"), "--data", str(files / "eval.jsonl"), "--json"]) == 0
    printed = capsys.readouterr()
    again = json.loads(printed.out)["adapter"]
    assert "not their order" not in printed.err
    assert {name: again[name] for name in ("eval_accuracy", "eval_loss", "eval_margin")} == {
        name: run.metrics[name] for name in ("eval_accuracy", "eval_loss", "eval_margin")
    }
    assert command(["adapter", "verify", str(run.directory / "adapter")]) == 0
    words = ["generate", str(files / "base"), "--adapter", f"rm={run.directory / 'adapter'}", "--prompt", "games: yes"]
    capsys.readouterr()
    assert command(words) == 0 and capsys.readouterr().out.startswith("rm: ")
    assert command([*words, "--chat", "--seed", "3"]) == 2
    told = "--chat, --seed: task 'reward-model' generates no text, so they have no effect: leave them out."
    assert told in capsys.readouterr().err
    child = recipe_of("lora", output="child", steps=1)
    child = Recipe.from_dict({**child.to_dict(), "adapter": str(run.directory / "adapter")})
    assert tune(child, quiet=True).before["eval_loss"] == run.metrics["eval_loss"], "the head is continued too"
    others = [{"adversarial": {"method": "fgm"}}, {"ema": {"decay": 0.5}}, "l2-sp"]
    composed = tune(recipe_of(ADALORA, *others, output="composed", steps=4), quiet=True)
    assert composed.metrics["reward_model"] < 0.7 and composed.metrics["adversarial_gain"] > 0


def test_what_it_cannot_use_is_refused(
    recipe_of: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "load_base", lambda *_: pytest.fail("the base loads"))
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    for strategies, data, message in (
        ([{"distillation": {"teacher": "base"}}], {}, "distillation.* has no distribution over tokens or classes"),
        (["entropy"], {}, "entropy.* has no distribution over tokens or classes"),
        ([], {"train": str(plain)}, "prompt \\+ completion is data for causal-lm, but the task is reward-model"),
    ):
        with pytest.raises(InputError, match=message):
            tune(recipe_of("lora", *strategies, data=data), quiet=True, overwrite=True)


def test_a_text_is_scored_as_in_training_after_the_token_that_ends_it(recipe_of: Callable[..., Recipe]) -> None:
    run, _, _ = setup.prepare(recipe_of("lora"), Report(quiet=True), overwrite=True)
    ids = run.examples[0].inputs["input_ids"].tolist()
    text = run.tokenizer.decode(ids[1:-1])
    for given in (text, f"{text}<eos>"):
        assert run.task.read_texts(run.model, run.tokenizer, [given]) == [ids]
    (long,) = run.task.read_texts(run.model, run.tokenizer, ["word " * 2000])
    assert len(long) == 512 and long[-1] == run.tokenizer.eos_token_id


def test_an_encoder_without_an_end_of_sequence_token_ends_answers_as_it_ends_every_text(
    recipe_of: Callable[..., Recipe], files: Path, tmp_path: Path
) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    base = tmp_path / "encoder"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=300, **sizes)).save_pretrained(base)
    inner = AutoTokenizer.from_pretrained(files / "base").backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, cls_token="<bos>", sep_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(base)
    recipe = recipe_of("lora", steps=2)
    recipe = Recipe.from_dict({**recipe.to_dict(), "base": {**recipe.to_dict()["base"], "model": str(base)}})
    run = tune(recipe, quiet=True)
    ids = run.examples[0].inputs["input_ids"].tolist()
    assert run.tokenizer.eos_token_id is None and ids[0] == 1 and ids.count(2) == 1 and ids[-1] == 2
    assert run.task.read_texts(run.model, run.tokenizer, [run.tokenizer.decode(ids[1:-1])]) == [ids]
