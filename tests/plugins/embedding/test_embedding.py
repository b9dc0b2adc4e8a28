"""The task embedding: its loss against float64, its vectors against sentence-transformers', and complete runs."""

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
from budwood.contract.types import Step
from budwood.model.quantizers import is_quantized, quantizer_of
from budwood.recipe.schema import Recipe
from budwood.serving.pool import AdapterPool
from budwood.testing import tiny_encoder
from budwood.training import setup
from budwood.training.batches import count_units
from budwood.training.report import Report
from budwood_embedding.losses import ranking_loss
from budwood_embedding.retrieval import retrieval_metrics

WORDS = ["games", "files", "data", "model", "small", "runtime", "section", "terminal", "library", "headers"]


def write_pairs(path: Path, count: int, seed: int, hard: bool = True) -> None:
    """Write pairs: a document names its query's words in another order; some have hard negatives and weight 2."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        words = draw.sample(WORDS, 3)
        row: dict[str, Any] = {"query": " ".join(words[:2]), "document": f"the {words[1]} {words[2]} {words[0]} of"}
        if hard and number % 3 == 0:
            row["negative"] = [f"the {' '.join(draw.sample(WORDS, 2))}" for _ in range(1 + number % 2)]
        rows.append({**row, "weight": 1 + (number % 4 == 3)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder in the layout of sentence-transformers, a decoder, and pairs."""
    folder = tmp_path_factory.mktemp("embedding")
    base = tiny_encoder(folder / "base", [*WORDS, "the of"])
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (base / "modules.json").write_text(json.dumps(modules))
    (base / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (base / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (base / "config_sentence_transformers.json").write_text('{"prompts": {"query": "section ", "document": ""}}')
    make_base(folder / "decoder")
    write_pairs(folder / "train.jsonl", 40, 0)
    write_pairs(folder / "eval.jsonl", 24, 1)
    return folder


@pytest.fixture
def recipe_of(files: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(
        *strategies: Any, base: str = "base", output: str = "run", options: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None, **train: Any,
    ) -> Recipe:  # fmt: skip
        task = {"task": "embedding", "task_options": options or {}}
        return Recipe.from_dict(
            {
                "base": {"model": str(files / base), "quantization": "none", **task},
                "data": {
                    "train": str(files / "train.jsonl"), "eval": str(files / "eval.jsonl"), "max_length": 64,
                    **(data or {}),
                },
                "strategies": list(strategies) or [{"lora": {"rank": 4}}],
                "train": {
                    "steps": 12, "batch_examples": 8, "micro_tokens": 512, "learning_rate": 2e-2, "precision": "fp32",
                    "schedule": "constant", "warmup": 0, **train,
                },
                "output": str(tmp_path / output),
            }
        )  # fmt: skip

    return make


def reference_loss(run: Any, rows: list[list[Any]], cuts: list[int], temperature: float) -> torch.Tensor:
    """The mean over cuts of -log softmax, one anchor at a time, by the model's own forward on each text alone."""
    vectors = {}
    for row in rows:
        for example in row:
            ids = torch.from_numpy(example.inputs["input_ids"]).long()[None]
            hidden = run.model(input_ids=ids).last_hidden_state[0]
            pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[run.task.options.pooling]
            vectors[example.key] = pooled
    text = {example.key: example.inputs["input_ids"].tobytes() for row in rows for example in row}
    losses = []
    for cut in cuts:
        unit = {key: vector[:cut] / vector[:cut].norm() for key, vector in vectors.items()}
        total = weights = 0.0
        for anchor, positive, *_ in rows:
            scores = {}
            for other, *documents in rows:
                for place, document in enumerate(documents):
                    own = document.key == positive.key
                    belongs = place == 0 and text[other.key] == text[anchor.key]
                    if own or not (belongs or text[document.key] == text[positive.key]):
                        scores[document.key] = unit[anchor.key] @ unit[document.key] / temperature
            chance = torch.stack(list(scores.values())).logsumexp(0) - scores[positive.key]
            weight = float(anchor.weights[0])
            total, weights = total + weight * chance, weights + weight
        losses.append(total / weights)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("base", ["base", "decoder"])
def test_the_loss_is_that_of_the_whole_step_in_any_split(recipe_of: Callable[..., Recipe], base: str) -> None:
    options = {"temperature": 0.2, "matryoshka": [8], "pooling": "mean" if base == "decoder" else None}
    recipe = recipe_of({"lora": {"rank": 2}}, base=base, options=options)
    run, hooks, engine = setup.prepare(recipe, Report(quiet=True), overwrite=True)
    assert run.packed
    run.model.double()
    for parameter in run.trainable:  # a new adapter has no effect
        torch.nn.init.normal_(parameter, std=0.2)
    groups: dict[int, list[Any]] = {}
    for example, group in zip(run.examples, run.examples.groups.tolist(), strict=True):
        groups.setdefault(group, []).append(example)
    rows = list(groups.values())
    queries = [bytes(row[0].inputs["input_ids"]) for row in rows]
    twin = next(i for i, query in enumerate(queries) if i >= 8 and query in queries[:7])
    rows = [*rows[:7], rows[twin]]  # two rows have the same anchor: the other's document is no negative
    expected = reference_loss(run, rows, [run.model.config.hidden_size, 8], 0.2)
    gradients = torch.autograd.grad(expected, run.trainable)
    for size in (8, 4, 1):
        parts = [[example for row in rows[at : at + size] for example in row] for at in range(0, 8, size)]
        batches = [run.task.collate(part, run.model, run.tokenizer, run.packed) for part in parts]
        run.counts = count_units(run, hooks, batches)
        steps = [Step(run, batch, engine, index) for index, batch in enumerate(batches)]
        if engine.step_terms.needs_first_pass(len(steps)):
            for step in steps:
                engine.step_terms.collect(step)
            engine.step_terms.exchange()
        for step in steps:
            hooks.call("backward", step=step)
        torch.testing.assert_close(engine.finish_step()["embedding"], expected.detach(), rtol=1e-9, atol=1e-12)
        for parameter, gradient in zip(run.trainable, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-11)
            parameter.grad = None


def test_metrics_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import ndcg_score

    generator = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(9, 6, generator=generator), torch.randn(30, 6, generator=generator)
    relevant = [[i, 29 - i] if i % 2 else [i] for i in range(9)]
    found = retrieval_metrics(queries, documents, relevant)
    truth, scores = torch.zeros(9, 30), queries @ documents.T
    for row, own in zip(truth, relevant, strict=True):
        row[own] = 1
    assert found["ndcg_at_10"] == pytest.approx(ndcg_score(truth, scores, k=10), abs=1e-9)
    for k in (1, 5, 10):
        hits = truth.gather(1, scores.topk(k).indices).sum(1) / truth.sum(1)
        assert found[f"recall_at_{k}"] == pytest.approx(float(hits.mean()), abs=1e-6)
    same = retrieval_metrics(torch.ones(1, 2), torch.ones(4, 2), [[0]])
    assert same["recall_at_1"] == 0 and same["ndcg_at_10"] == pytest.approx(1 / torch.tensor(5.0).log2().item())


def test_the_loss_of_scores_is_that_of_all_ordered_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(12, 5, dtype=torch.float64, generator=generator).requires_grad_()
    scores, weights = torch.tensor([0.0, 1, 4, 1, 5, 2.5]), torch.tensor([1.0, 2, 1, 0.5, 1, 1])
    similar = torch.cosine_similarity(vectors[0::2], vectors[1::2])
    total = 1 + sum(
        weights[i] * weights[j] * ((similar[i] - similar[j]) / 0.1).exp()
        for i in range(6)
        for j in range(6)
        if scores[i] < scores[j]
    )
    given = [torch.tensor([3, 4] * 6), scores.repeat_interleave(2), weights.double().repeat_interleave(2)]
    found = ranking_loss(vectors, *given, 0.1)
    torch.testing.assert_close(found, total.log(), rtol=1e-12, atol=0)
    ours, expected = (torch.autograd.grad(loss, vectors, retain_graph=True)[0] for loss in (found, total.log()))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    none = ranking_loss(vectors, given[0], torch.ones(12), given[2], 0.1)
    assert none == 0 and not torch.autograd.grad(none, vectors)[0].any()


def test_pairs_with_scores_are_learned_and_measured(
    recipe_of: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    for name, count in (("train", 48), ("eval", 24)):
        rows = []
        for _ in range(count):
            kinds = draw.randrange(2), draw.randrange(2)  # that of the first word decides
            first, second = (" ".join([draw.choice(WORDS[kind::2][:3]), *draw.sample(WORDS[6:], 2)]) for kind in kinds)
            rows.append({"sentence1": first, "sentence2": second, "score": 4.5 if kinds[0] == kinds[1] else 1})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
    run = tune(recipe_of(data=data, options={"matryoshka": [8], "pooling": "mean"}), quiet=True)
    assert run.best_metric is not None and run.best_metric.name == "eval_spearman"
    assert run.metrics["eval_spearman"] > run.before["eval_spearman"] + 0.1 and "eval_pearson_dim_8" in run.metrics
    adapter = run.directory / "adapter"
    assert command(["eval", str(adapter), "--data", data["eval"], "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["adapter"]
    assert again == {name: run.metrics[name] for name in again}
    assert command(["data", str(run.directory / "recipe.yaml"), "--samples", "1"]) == 0
    shown = capsys.readouterr().out
    assert "sentence1 (" in shown and "sentence2: " in shown


def test_a_run_learns_and_its_folder_opens_elsewhere_with_the_same_vectors(
    recipe_of: Callable[..., Recipe], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tune(recipe_of(options={"matryoshka": [8]}), quiet=True)
    assert run.metrics["eval_ndcg_at_10"] > run.before["eval_ndcg_at_10"] + 0.1
    assert run.metrics["eval_loss"] < run.before["eval_loss"] and "eval_recall_at_1_dim_8" in run.metrics
    adapter = run.directory / "adapter"
    assert command(["eval", str(adapter), "--data", str(files / "eval.jsonl"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["adapter"]
    assert again == {name: run.metrics[name] for name in again}
    assert command(["adapter", "verify", str(adapter)]) == 0
    texts = ["section games files", "the runtime model headers of data", "small"]
    arguments = [
        "generate",
        str(files / "base"),
        "--adapter",
        f"a={adapter}",
        "--prompt",
        texts[1],
        "--json",
        "--precision",
        "fp32",
    ]
    capsys.readouterr()
    assert command(arguments) == 0
    [answer] = json.loads(capsys.readouterr().out)["answers"]
    pool = AdapterPool(files / "base", task="embedding", precision="fp32")
    pool.load("a", adapter)
    pool.use("a")
    vectors = torch.tensor([each["vector"] for each in pool.respond(texts)])
    torch.testing.assert_close(torch.tensor(answer["vector"]), vectors[1], atol=1e-6, rtol=0)
    assert vectors.norm(dim=-1).allclose(torch.ones(3))

    from peft import PeftModel
    from transformers import AutoModel

    stock = PeftModel.from_pretrained(AutoModel.from_pretrained(files / "base"), adapter)
    assert type(stock).__name__ == "PeftModelForFeatureExtraction"
    ids = pool.tokenizer(texts[0], return_tensors="pt")
    with torch.no_grad():
        first = stock(**ids).last_hidden_state[0, 0]
    torch.testing.assert_close(first / first.norm(), vectors[0], atol=1e-5, rtol=0)

    merged = tmp_path / "merged"
    assert command(["adapter", "merge", str(adapter), str(merged), "--dtype", "fp32"]) == 0
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(merged), device="cpu")
    torch.testing.assert_close(torch.from_numpy(theirs.encode(texts)), vectors, atol=1e-5, rtol=0)
    query = torch.from_numpy(theirs.encode_query([texts[0].removeprefix("section ")]))
    torch.testing.assert_close(query[0], vectors[0], atol=1e-5, rtol=0)


def test_a_decoder_trains_with_an_adversary_and_an_average(recipe_of: Callable[..., Recipe]) -> None:
    others = [{"adversarial": {"method": "fgm", "epsilon": 0.5}}, {"ema": {"decay": 0.5}}, "l2-sp"]
    run = tune(recipe_of({"lora": {"rank": 4}}, *others, base="decoder", steps=6), quiet=True)
    assert run.task.options.pooling == "last" and run.packed
    assert run.metrics["eval_loss"] < run.before["eval_loss"]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_base_without_a_head_is_quantised(recipe_of: Callable[..., Recipe], quantization: str) -> None:
    recipe = recipe_of(steps=1)
    recipe = Recipe.from_dict({**recipe.to_dict(), "base": {**recipe.to_dict()["base"], "quantization": quantization}})
    base = tune(recipe, quiet=True).base
    assert base.unquantized_share < 0.9 and "stay in fp32: embeddings" in base.notes[0]
    assert any(quantizer_of(module).name == quantization for module in base.model.modules() if is_quantized(module))


def test_what_it_cannot_use_is_refused_before_the_base_loads(
    recipe_of: Callable[..., Recipe], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "load_base", lambda *_: pytest.fail("the base loads"))

    def refused(message: str, rows: list[dict[str, Any]] | None = None, *strategies: Any, **changes: Any) -> None:
        path = tmp_path / "bad.jsonl"
        if rows is not None:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            changes["data"] = {"train": str(path), "eval": "none"}
        with pytest.raises(InputError, match=message) as error:
            tune(recipe_of(*strategies, **changes), quiet=True, overwrite=True)
        assert "\n" not in str(error.value)

    pair = {"anchor": "a", "positive": "b"}
    refused("bad.jsonl:1: field 'positive' must be text, not missing or null", [{**pair, "positive": None}])
    refused("bad.jsonl:1: field 'anchor' is empty", [{**pair, "anchor": " "}])
    refused("bad.jsonl:2: 'positive' and 'negative' are equal", [pair, {**pair, "negative": "b"}])
    refused("all rows have the same document, so no anchor has a negative", [pair, {**pair, "anchor": "c"}] * 2)
    refused("batch_examples: 1: the other rows of a step", [pair, {"anchor": "c", "positive": "d"}], batch_examples=1)
    graded = {"sentence1": "a", "sentence2": "b", "score": 0.5}
    refused("bad.jsonl:2: field 'score' must be a finite number, not 'high'", [graded, {**graded, "score": "high"}])
    refused("all pairs have the same score, so there is nothing to rank", [graded, graded])
    refused("batch_examples: 1: pairs are compared", [graded, {**graded, "score": 1}], batch_examples=1)
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(graded) + "\n")
    refused("held.jsonl: it must have the same columns .*: anchors with", data={"eval": str(held)})
    refused("a run trains on one kind of data", data={"train": [str(files / "train.jsonl"), str(held)], "eval": "none"})
    refused("entropy.* has no distribution over tokens or classes", None, {"lora": {}}, "entropy")
    refused("distillation.* has no distribution", None, {"lora": {}}, {"distillation": {"teacher": "base"}})
    smart = {"adversarial": {"method": "smart"}}
    refused("smart compares distributions over tokens or classes, and task 'embedding'", None, {"lora": {}}, smart)
    refused("embedding.temperature: .*greater than 0", None, options={"temperature": 0})
    refused("matryoshka: 64 is not below the 32 dimensions", None, options={"matryoshka": [64]})
    refused("prompt \\+ completion is data for causal-lm", [{"prompt": "a", "completion": "b"}])
    pooling = files / "base" / "1_Pooling" / "config.json"
    before = pooling.read_text()
    pooling.write_text('{"pooling_mode": "max"}')
    try:
        refused("the pooling 'max' is not supported: set pooling in base.task_options", None)
    finally:
        pooling.write_text(before)
