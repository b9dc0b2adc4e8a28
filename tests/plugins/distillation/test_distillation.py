"""Runs with a teacher against stock models in float64, one example at a time; composition, and side effects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import budwood
from budwood import Run, hookimpl
from budwood.training.loop import tune

Runs = Callable[..., Run]
LABELS = ("libs", "games", "doc")


@pytest.fixture
def teacher(tiny_bases: Callable[..., Path]) -> Path:
    """A different model with the base's hidden size and tokenizer, with a padded vocabulary."""
    return tiny_bases("teacher", seed=3, vocab_size=320)


@pytest.fixture
def classifier(tiny_base: Path, tmp_path: Path) -> Path:
    """A trained classifier with LABELS in the order of the data, and the base's tokenizer."""
    names = dict(enumerate(sorted(LABELS)))
    torch.manual_seed(5)
    config = LlamaConfig.from_pretrained(
        tiny_base, id2label=names, label2id={v: k for k, v in names.items()}, initializer_range=0.3
    )
    return save_with_tokenizer(LlamaForSequenceClassification(config), tiny_base, tmp_path / "classifier")


def save_with_tokenizer(model: Any, base: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    return folder


def kl(p: Tensor, q: Tensor, temperature: float = 1.0) -> float:
    """T² times the mean of KL(p ‖ q) over rows of logits."""
    log_p, log_q = ((z / temperature).log_softmax(-1) for z in (p, q))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2)


def double(folder: Path, adapter: Path | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


def double_classifier(folder: Path) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64, num_labels=3)
    return model.eval().requires_grad_(False)


def adapter_of(run: Run) -> dict[str, Tensor]:
    return load_file(run.directory / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_a_teacher_model_is_compared_only_at_the_labels(
    run_it: Runs, losses: Callable, at_labels: Callable, tiny_base: Path, teacher: Path, weight: float
) -> None:
    """Packed rows against each example alone; the teacher's 20 padding logits are ignored."""
    run = run_it({"teacher": str(teacher), "temperature": 2.0, "weight": weight})
    (p, _), (q, _) = at_labels(run, double(teacher)), at_labels(run, double(tiny_base))
    assert p.shape[1] == 320 and q.shape[1] == 300
    assert losses(run)[0] == pytest.approx(kl(p[:, :300], q, 2.0), rel=1e-5)
    for loss, task, term in zip(*(losses(run, n) for n in ("loss", "causal_lm", "distillation")), strict=True):
        assert loss == pytest.approx((1 - weight) * task + weight * term, rel=1e-6)


def test_the_gradient_matches_plain_autograd(
    run_it: Runs, at_labels: Callable, tiny_base: Path, teacher: Path, test_strategies: Any
) -> None:
    """The gradient of every B, at B = 0, against stock models in float64."""
    options = {"teacher": str(teacher), "divergence": "jensen-shannon", "beta": 0.3, "temperature": 3.0}
    run = run_it(options, others=("recorder",), train={"steps": 1})
    gradients = next(entry[1] for entry in test_strategies.SEEN if entry[0] == "gradients")
    names = [name for group in run.groups for name in group.parameters]
    downs, ups = {}, {}
    student = double(tiny_base)
    for name, parameter in zip(names, run.trainable, strict=True):
        path = name.removesuffix(".lora_A").removesuffix(".lora_B")
        if name.endswith(".lora_A"):  # unchanged: with B = 0 its gradient is 0
            downs[path] = parameter.detach().double()
        else:
            ups[path] = torch.zeros_like(parameter, dtype=torch.float64, requires_grad=True)

    for path, down in downs.items():
        layer = student.get_submodule(path)
        layer.register_forward_hook(
            lambda module, args, out, down=down, up=ups[path]: out + 4.0 * args[0] @ down.t() @ up.t()
        )
    q, _ = at_labels(run, student)
    p, _ = at_labels(run, double(teacher))
    log_p, log_q = ((z[:, :300] / 3).log_softmax(-1) for z in (p, q))
    log_m = (0.3 * log_p.exp() + 0.7 * log_q.exp()).log()
    parts = [(a.exp() * (a - log_m)).sum(-1) for a in (log_p, log_q)]
    labels = torch.cat([torch.tensor(e.labels.astype("int64")) for e in run.examples])
    loss = 0.5 * 9 * (0.3 * parts[0] + 0.7 * parts[1]).mean() + 0.5 * F.cross_entropy(q, labels)
    loss.backward()
    compared = 0
    for name, gradient in zip(names, gradients, strict=True):
        if name.endswith(".lora_B"):
            expected = ups[name.removesuffix(".lora_B")].grad
            torch.testing.assert_close(gradient.double(), expected, atol=1e-6, rtol=1e-3)
            compared += 1
    assert compared == 14


def test_the_base_teacher_is_constant_while_the_adapter_trains(
    run_it: Runs, losses: Callable, at_labels: Callable, tiny_base: Path
) -> None:
    one = run_it({"teacher": "base", "divergence": "reverse-kl"}, "one", train={"steps": 1})
    two = run_it({"teacher": "base", "divergence": "reverse-kl"}, "two")
    assert losses(two)[0] == 0.0
    (p, _), (q, _) = at_labels(one, double(tiny_base)), at_labels(one, double(tiny_base, one.directory / "adapter"))
    assert losses(two)[1] == pytest.approx(kl(q, p), rel=1e-4)


def test_another_adapter_on_the_base_teaches_and_does_not_train(
    run_it: Runs, losses: Callable, at_labels: Callable, tiny_base: Path
) -> None:
    """It adapts more modules than the student."""
    first = run_it(None, "first", lora={"rank": 6})
    folder = first.directory / "adapter"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run = run_it({"teacher": f"base+{folder}"}, lora={"targets": ["q_proj"]})
    (p, _), (q, _) = at_labels(run, double(tiny_base, folder)), at_labels(run, double(tiny_base))
    assert losses(run)[0] == pytest.approx(kl(p, q), rel=1e-5)
    assert {name.split(".")[-3] for name in adapter_of(run)} == {"q_proj"}
    assert not any("teacher" in name for name in adapter_of(run))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    reopened = double(tiny_base, run.directory / "adapter")
    assert not torch.equal(at_labels(run, reopened)[0], q)


def test_a_teacher_in_four_bits(
    run_it: Runs, losses: Callable, at_labels: Callable, tiny_base: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from budwood.model.quantizers.bitsandbytes import assert_not_packed

    loaded = []
    load = budwood.load_frozen
    monkeypatch.setattr(budwood, "load_frozen", lambda *args: loaded.append(load(*args)) or loaded[-1])
    run = run_it({"teacher": str(teacher), "quantization": "nf4"}, base={"double_quantization": False})
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    peer = AutoModelForCausalLM.from_pretrained(teacher, quantization_config=config, dtype=torch.float32).eval()
    peer.requires_grad_(False)
    for layer in peer.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    (p, _), (q, _) = at_labels(run, peer), at_labels(run, double(tiny_base))
    assert losses(run)[0] == pytest.approx(kl(p[:, :300], q), rel=1e-4)
    model = loaded[0].model
    assert loaded[0].quantization == "nf4" and not model.training
    assert_not_packed(model)
    peers = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None
        assert torch.equal(parameter, peers[name]), f"{name} has changed"


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_hidden_state_term(
    run_it: Runs, losses: Callable, at_labels: Callable, tiny_base: Path, teacher: Path, distance: str
) -> None:
    run = run_it({"teacher": str(teacher), "hidden_weight": 0.1, "hidden_distance": distance})
    (_, theirs), (_, ours) = at_labels(run, double(teacher)), at_labels(run, double(tiny_base))
    if distance == "mse":
        values = (ours - theirs).square().mean(-1)
    else:
        values = 1 - (ours * theirs).sum(-1) / ours.norm(dim=-1) / theirs.norm(dim=-1)
    counts = [len(e.labels) for e in run.examples]
    expected = torch.stack([part.mean() for part in values.split(counts)]).mean()
    assert losses(run, "distillation_hidden")[0] == pytest.approx(float(expected), rel=1e-5)
    loss, *terms = (losses(run, name)[0] for name in ("loss", "causal_lm", "distillation", "distillation_hidden"))
    assert loss == pytest.approx(0.5 * terms[0] + 0.5 * terms[1] + 0.1 * terms[2], rel=1e-6)


OPTIONS: dict[str, dict[str, Any]] = {
    "base": {"teacher": "base", "divergence": "jensen-shannon"},
    "cache": {"cache": "teacher-cache", "top_k": 8},
}


@pytest.mark.parametrize(("options", "quantization"), [("cache", "none"), ("base", "nf4")])
def test_the_adapter_does_not_depend_on_micro_batches(
    run_it: Runs, teacher: Path, tmp_path: Path, options: str, quantization: str
) -> None:
    """`test_conformance` splits the steps of a teacher in a folder, with hidden states, and of an unquantised base."""
    settings = {"teacher": str(teacher), **OPTIONS[options]}
    if "cache" in settings:
        settings["cache"] = str(tmp_path / settings["cache"])
    sizes = [{"batch_examples": 16, "micro_tokens": size} for size in (1024, 128)]
    one, two = (
        adapter_of(run_it(settings, f"run{i}", train=t, base={"quantization": quantization}))
        for i, t in enumerate(sizes)
    )
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5


@pytest.mark.parametrize("options", [{}, {"teacher": "base"}])
def test_the_teacher_runs_once_per_micro_step_under_replay(
    make_recipe: Callable, teacher: Path, test_strategies: Any, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    """FGM replays each micro-step twice: for the gradient of the noise, and with the noise."""
    from budwood.model.text_tasks import CausalLM

    quiet, noisy = [], []
    outputs = CausalLM.outputs

    def counting(self: CausalLM, model: Any, batch: Any) -> Any:
        (noisy if torch.is_grad_enabled() else quiet).append(batch.keys)
        return outputs(self, model, batch)

    recipe = make_recipe({"teacher": str(teacher), **options}, others=({"fgm": {"epsilon": 0.1}},),
                         train={"steps": 2, "micro_tokens": 200})  # fmt: skip
    probes = []
    from budwood.training import loop, setup

    def prepare(*args: Any, **more: Any) -> Any:
        prepared = setup.prepare(*args, **more)
        monkeypatch.setattr(CausalLM, "outputs", counting)
        probes.append(len(quiet))
        return prepared

    monkeypatch.setattr(loop, "prepare", prepare)
    run = tune(recipe, quiet=True)
    micro_steps = len(noisy) // 3
    assert micro_steps > 2 and len(noisy) == 3 * micro_steps
    assert len(quiet) == micro_steps, "the teacher runs once per micro-step"
    assert run.step == 2


def test_the_noise_of_an_adversary_does_not_reach_the_teacher(
    run_it: Runs, losses: Callable, teacher: Path, test_strategies: Any
) -> None:
    """The gradient at zero noise equals that of the clean pass: both use the same teacher outputs."""
    run_it({"teacher": str(teacher)}, others=({"fgm": {"epsilon": 0.5}},), train={"steps": 1})
    _, _, noise, at_zero, clean = next(entry for entry in test_strategies.SEEN if entry[0] == "noise")
    assert noise.abs().max() > 0
    torch.testing.assert_close(at_zero, clean, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"gradient_checkpointing": True}])
def test_a_teacher_with_negligible_weight_does_not_change_training(run_it: Runs, teacher: Path, changes: dict) -> None:
    """It affects neither the random state of dropout, nor autocast's casts, nor recomputation in the backward pass."""
    lora = {"dropout": 0.2, "modules_to_save": ["lm_head", "embed_tokens"]}
    plain = adapter_of(run_it(None, "plain", lora=lora, train=changes))
    for number, name in enumerate(("base", str(teacher))):
        options = {"teacher": name, "weight": 1e-12}
        taught = adapter_of(run_it(options, f"taught-{number}", lora=lora, train=changes))
        assert max(float((plain[key] - taught[key]).abs().max()) for key in plain) < 1e-6, name


def test_a_teacher_adapter_with_negligible_weight_does_not_change_training(run_it: Runs) -> None:
    """Its saved head is replaced by the student's again before the student trains."""
    folder = run_it(None, "first", labels=LABELS).directory / "adapter"
    plain = adapter_of(run_it(None, "plain", labels=LABELS, train={"seed": 1}))
    options = {"teacher": f"base+{folder}", "weight": 1e-12}
    taught = adapter_of(run_it(options, "taught", labels=LABELS, train={"seed": 1}))
    assert max(float((plain[key] - taught[key]).abs().max()) for key in plain) < 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_untrained_adapter_gives_a_divergence_of_exactly_zero(
    run_it: Runs, losses: Callable, precision: str
) -> None:
    options = {"teacher": "base", "divergence": "reverse-kl", "hidden_weight": 1.0}
    run = run_it(options, train={"precision": precision, "steps": 3}, lora={"dropout": 0.0})
    assert losses(run)[0] == 0.0 and losses(run, "distillation_hidden")[0] == 0.0
    assert losses(run)[2] > 0 and losses(run, "distillation_hidden")[2] > 0


def test_the_full_logits_of_the_teacher_are_never_materialised(
    run_it: Runs, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import budwood_distillation.strategy as module

    rows = []
    load = budwood.load_frozen

    def watched(*args: Any) -> Any:
        base = load(*args)
        base.model.lm_head.register_forward_hook(lambda layer, inputs, out: rows.append(out.shape[:-1].numel()))
        return base

    monkeypatch.setattr(budwood, "load_frozen", watched)
    monkeypatch.setattr("budwood.model.evaluation.CHUNK", 20)
    monkeypatch.setattr(module, "CHUNK", 20)
    for number, cache in enumerate(({}, {"cache": str(tmp_path / "cache")})):
        rows.clear()
        run = run_it({"teacher": str(teacher), **cache}, f"run{number}", train={"steps": 1})
        assert max(rows) == 20 and sum(rows) == run.examples.stats.supervised > 100


def test_a_classifier_teaches_a_classifier(
    run_it: Runs, losses: Callable, at_labels: Callable, classifier: Path, tiny_base: Path
) -> None:
    run = run_it({"teacher": str(classifier), "temperature": 2.0, "hidden_weight": 0.1}, labels=LABELS)
    peer, student = double_classifier(classifier), double_classifier(tiny_base)
    student.score.weight.copy_(run.model.score.original_module.weight)
    (p, theirs), (q, ours) = at_labels(run, peer), at_labels(run, student)
    assert losses(run)[0] == pytest.approx(kl(p, q, 2.0), rel=1e-4)
    assert losses(run, "distillation_hidden")[0] == pytest.approx(float((ours - theirs).square().mean()), rel=1e-4)


def test_a_classifier_adapter_teaches_with_its_saved_head(
    run_it: Runs, losses: Callable, at_labels: Callable, tiny_base: Path
) -> None:
    first = run_it(None, "first", labels=LABELS, train={"steps": 6})
    folder = first.directory / "adapter"
    run = run_it({"teacher": f"base+{folder}"}, labels=LABELS, train={"seed": 1})
    peer, student = PeftModel.from_pretrained(double_classifier(tiny_base), folder).eval(), double_classifier(tiny_base)
    student.score.weight.copy_(run.model.score.original_module.weight)
    (p, _), (q, _) = at_labels(run, peer), at_labels(run, student)
    assert losses(run)[0] == pytest.approx(kl(p, q), rel=1e-4)
    assert {key for key in adapter_of(run) if "score" in key} == {"base_model.model.score.weight"}


def test_a_trained_classifier_can_be_its_own_teacher(run_it: Runs, losses: Callable, classifier: Path) -> None:
    run = run_it({"teacher": "base"}, labels=LABELS, base={"model": str(classifier)})
    assert losses(run)[0] == 0.0 and losses(run)[1] > 0


def test_rows_are_padded_if_the_teacher_does_not_support_packing(
    run_it: Runs, losses: Callable, at_labels: Callable, tiny_base: Path, tmp_path: Path, lines: list[str]
) -> None:
    torch.manual_seed(0)
    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2, initializer_range=0.3, pad_token_id=0)
    )
    folder = save_with_tokenizer(bloom, tiny_base, tmp_path / "bloom")
    run = run_it({"teacher": str(folder)})
    assert not run.packed and any(str(folder) in line and "padded" in line for line in lines)
    (p, _), (q, _) = at_labels(run, double(folder)), at_labels(run, double(tiny_base))
    assert losses(run)[0] == pytest.approx(kl(p, q), rel=1e-4)


def test_encoders_teach_encoders(run_it: Runs, losses: Callable, tiny_base: Path, tmp_path: Path) -> None:
    names = dict(enumerate(sorted(LABELS)))
    folders, models = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=300, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            id2label=names, label2id={v: k for k, v in names.items()}, initializer_range=0.2,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        models.append(BertForSequenceClassification(config).eval().requires_grad_(False))
        folders.append(save_with_tokenizer(models[-1], tiny_base, tmp_path / f"bert{seed}"))
    run = run_it({"teacher": str(folders[0])}, labels=LABELS, base={"model": str(folders[1])})
    p, q = (
        torch.cat([m(torch.tensor(e.inputs["input_ids"][None].astype("int64"))).logits for e in run.examples])
        for m in models
    )
    assert losses(run)[0] == pytest.approx(kl(p, q), rel=1e-4)


def test_a_teacher_with_a_shorter_context_causes_a_warning(
    run_it: Runs, tiny_bases: Callable, lines: list[str]
) -> None:
    short = tiny_bases("short", seed=8, max_position_embeddings=16)
    run = run_it({"teacher": str(short)})
    longest = int(run.examples.lengths.max())
    assert any(f"its config allows 16 tokens, and the longest example has {longest}" in line for line in lines)


def test_evaluation_uses_only_the_tasks_loss(run_it: Runs, teacher: Path, tmp_path: Path) -> None:
    data = {"eval": str(tmp_path / "train.jsonl")}
    plain, taught = run_it(None, "plain", data=data), run_it({"teacher": str(teacher)}, "taught", data=data)
    assert taught.before == plain.before
    assert set(taught.metrics) - set(plain.metrics) == {"distillation"}


def test_the_size_of_the_teacher_is_reported(run_it: Runs, teacher: Path, lines: list[str]) -> None:
    run_it({"teacher": str(teacher), "quantization": "nf4"})
    assert any(line.startswith(f"teacher {teacher}: ") and "kB in nf4" in line for line in lines)


def test_a_student_identical_to_its_teacher_causes_a_warning(
    run_it: Runs, lines: list[str], test_strategies: Any
) -> None:
    from budwood import DivergedError

    class Frozen(test_strategies.Still):
        @hookimpl
        def before_optimizer_step(self, run: Run) -> None:
            for parameter in run.trainable:
                parameter.grad = torch.zeros_like(parameter)

    test_strategies.Still = Frozen
    with pytest.raises(DivergedError, match="no trained tensor moved"):
        run_it({"teacher": "base"}, others=("still",), train={"steps": 12})
    assert sum("after 10 steps the outputs of teacher and student are still" in line for line in lines) == 1
    lines.clear()
    run_it({"teacher": "base"}, "moves", train={"steps": 3})
    assert not any("bitwise identical" in line for line in lines)
