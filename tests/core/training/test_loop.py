"""The training loop as a user sees it: the same adapter for every split of a batch, and no silent failures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tests.core.conftest import write_rows
from tests.core.training.misuse import LORA, mine
from tests.faulty import tune_with, write_recipe
from tests.processes import run_in_two_processes
from torch import Tensor

from budwood.errors import DivergedError, InputError, Interrupted, ResourceError
from budwood.parallel.processes import Processes
from budwood.training import memory
from budwood.training.loop import sum_gradients, tune

Make = Callable[..., object]


def adapter(run_or_folder: object) -> dict[str, Tensor]:
    folder = getattr(run_or_folder, "directory", run_or_folder)
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_adapter_does_not_depend_on_micro_batches(make_recipe: Make, quantization: str) -> None:
    base = {"quantization": quantization}
    runs = [
        adapter(tune(make_recipe(f"run-{size}", base=base, train={"micro_tokens": size}), quiet=True))
        for size in (1024, 200, 128)
    ]
    assert distance(runs[0], runs[1]) < 1e-5
    assert distance(runs[0], runs[2]) < 1e-5


def test_gradients_that_are_added_at_once_are_the_same(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which takes one operation for all of them."""
    added: list[int] = []
    own = torch._foreach_add_

    def watched(to: list[Tensor], of: list[Tensor] | int) -> None:
        if isinstance(of, list):  # the optimizer adds numbers
            added.append(len(of))
        own(to, of)

    monkeypatch.setattr(torch, "_foreach_add_", watched)
    plain = adapter(tune(make_recipe("plain", train={"micro_tokens": 128}), quiet=True))
    assert added == []
    monkeypatch.setattr(memory, "device_type", lambda tensor: "cuda")
    run = tune(make_recipe("at-once", train={"micro_tokens": 128}), quiet=True)
    assert distance(plain, adapter(run)) == 0
    assert len(added) >= (run.steps or 0) and set(added) == {len(run.trainable)}


HOOKED = """
@hookimpl
def trainable_parameters(self, run):
    run.model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)
    return []
"""


def test_what_is_slower_than_it_could_be_is_told_once_after_the_first_step(
    distribution: Callable[..., None], make_recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    distribution("sprout", mine(HOOKED), {"mine": "Mine"})
    tune(make_recipe(strategies=[LORA, "mine"], train={"steps": 2}))
    told = capsys.readouterr()
    line = "layers take the model's own forward, which is slower: a hook is on its SiLUActivation"
    assert (told.out + told.err).count(line) == 1


def test_two_processes_equal_one(make_recipe: Make, tmp_path: Path) -> None:
    """The first process plans for both; the size of micro-batches leaves a share of each step to each."""
    one = tune(make_recipe("one", train={"micro_tokens": 128}), quiet=True)
    recipe = make_recipe("two", train={"micro_tokens": None})
    path = tmp_path / "two.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    run_in_two_processes(
        "import torch\n"
        "from budwood.contract.discovery import PluginError\n"
        "from budwood.planning import admission, process\n"
        "from budwood.training.loop import tune\n"
        "def estimate(*args, **options):\n"
        "    assert torch.distributed.get_rank() == 0\n"
        "    raise PluginError('not this one')\n"
        "process.estimate_in_process, admission.MARGIN = estimate, 10**9\n"
        f"run = tune({str(path)!r}, planner=admission.admit)\n"
        "sizes = [None, None]\n"
        "torch.distributed.all_gather_object(sizes, run.recipe.train.micro_tokens)\n"
        "assert sizes[0] == sizes[1] < 300, sizes\n"
        "assert run.processes == 2, run.processes\n"
        "assert torch.distributed.get_world_size() == 2\n",
        tmp_path,
    )
    assert distance(adapter(one), adapter(tmp_path / "two")) < 1e-5


def test_packed_equals_padded_in_the_peer_library(make_recipe: Make, test_strategies: object, tiny_base: Path) -> None:
    """Gradients of the first step against transformers + PEFT on padded rows, in float64."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = tune(
        make_recipe(
            strategies=[{"lora": {"rank": 4}}, "recorder"], train={"steps": 1, "batch_examples": 24, "clip": 0}
        ),
        quiet=True,
    )
    ours = dict(zip([n for g in run.groups for n in g.parameters], test_strategies.SEEN[0][1], strict=True))

    model = AutoModelForCausalLM.from_pretrained(tiny_base).double()
    peer = PeftModel.from_pretrained(model, run.directory / "adapter", is_trainable=True, autocast_adapter_dtype=False)
    peer = peer.double()
    with torch.no_grad():  # restore the start of the first step: B = 0 and the seeded A
        fresh = _fresh_a(run)
        for name, parameter in peer.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
            elif "lora_A" in name:
                key = name.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".lora_A")
                parameter.copy_(fresh[key].double())
    total, labels = 0.0, 0
    for example in run.examples:
        ids = torch.tensor(example.inputs["input_ids"][None].astype("int64"))
        targets = torch.full_like(ids, -100)
        targets[0, example.label_positions + 1] = torch.tensor(example.labels.astype("int64"))
        logits = peer(input_ids=ids).logits[:, :-1].flatten(0, 1)
        total = total + torch.nn.functional.cross_entropy(logits, targets[:, 1:].flatten(), reduction="sum")
        labels += len(example.labels)
    (total / labels).backward()
    compared = 0
    for name, parameter in peer.named_parameters():
        if "lora_B" in name:
            key = name.removeprefix("base_model.model.").replace(".lora_B.default.weight", ".lora_B")
            torch.testing.assert_close(ours[key].double(), parameter.grad, atol=1e-6, rtol=1e-4)
            compared += 1
    assert compared == 14
    assert run.metrics["loss"] == pytest.approx(float(total / labels), abs=1e-5)


def _fresh_a(run: object) -> dict[str, Tensor]:
    """Return the seeded initial value of every A, as `prepare_model` draws it."""
    from transformers import AutoModelForCausalLM

    from budwood.contract.loading import build_strategy

    model = AutoModelForCausalLM.from_pretrained(run.recipe.base.model)
    strategy = build_strategy("lora", {"rank": 4}, lambda *place: "test")
    strategy.prepare_model(run=run, model=model)
    groups = strategy.trainable_parameters(run=run, model=model)
    return {name: parameter.detach().clone() for name, parameter in groups[0].parameters.items()}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_evaluation_in_the_middle_changes_no_bit(make_recipe: Make, quantization: str) -> None:
    base = {"quantization": quantization}
    without = tune(make_recipe("a", base=base), quiet=True)
    with_eval = make_recipe("b", base=base, evaluate=True, train={"eval_every": 1, "eval_generate": 4})
    run = tune(with_eval, quiet=True)
    assert run.metrics["best_step"] == 4, "the last step must be the best for the two to be comparable"
    assert distance(adapter(without), adapter(run)) == 0


def test_gradient_checkpointing_gives_the_same_adapter(make_recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Of no layer, one, and as many as a run without a plan recomputes; dropout is the same in the recomputation."""
    runs = []
    for setting in (False, 1, "auto"):
        lora = [{"lora": {"rank": 4, "dropout": 0.2}}]
        runs.append(tune(make_recipe(f"{setting}", lora, train={"gradient_checkpointing": setting, "steps": 2})))
        assert distance(adapter(runs[0]), adapter(runs[-1])) == 0
    said = capsys.readouterr().err
    assert "; 1 of 2 layers recompute their activations" in said and "; 2 of 2 layers recompute" in said
    assert "gradient_checkpointing: true" in (runs[-1].directory / "recipe.yaml").read_text()


def test_layers_that_cannot_be_recomputed_are_refused_before_the_base_loads(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("budwood.training.setup.load_base", lambda *a, **k: pytest.fail("the base was loaded"))
    with pytest.raises(InputError, match=r"gradient_checkpointing: 3 layers cannot be recomputed: the base has 2"):
        tune(make_recipe(train={"gradient_checkpointing": 3}), quiet=True)
    with pytest.raises(InputError, match=r"activation_offloading: on the CPU, activations are in the host's memory"):
        tune(make_recipe(train={"gradient_checkpointing": True, "activation_offloading": True}), quiet=True)


def test_training_learns_and_writes_the_documented_files(make_recipe: Make) -> None:
    run = tune(make_recipe(evaluate=True, train={"steps": 30, "eval_every": 10}), quiet=True)
    assert run.metrics["eval_loss"] < run.before["eval_loss"] - 0.5
    names = {path.name for path in run.directory.iterdir()}
    assert names >= {"recipe.yaml", "manifest.json", "metrics.jsonl", "adapter"}
    manifest = json.loads((run.directory / "manifest.json").read_text())
    assert manifest["finished"] is True
    assert manifest["strategies"][0]["options"]["rank"] == 4


@pytest.mark.plots
def test_a_run_prints_at_most_fifteen_lines_and_writes_log_and_plot(make_recipe: Make, capsys: object) -> None:
    run = tune(make_recipe(evaluate=True, train={"eval_every": 2, "eval_generate": 4}))
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("step ")]
    assert len(lines) <= 15, "\n".join(lines)
    text = "\n".join(lines)
    for expected in ("fp32", "prompt + completion", "trainable parameters", "before", "peak memory", "next:"):
        assert expected in text
    records = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4]
    assert all("causal_lm" in r and "tokens_per_second" in r for r in records if r["kind"] == "step")
    assert [r["step"] for r in records if r["kind"] == "evaluation"] == [0, 2, 4]
    assert (run.directory / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("train", "remark"),
    [
        ({"steps": None, "epochs": 2}, "lower train.batch_examples (an epoch has 24), or raise train.epochs"),
        (
            {"steps": None, "epochs": 1, "batch_examples": None, "batch_tokens": 4096},
            "lower train.batch_tokens (an epo",
        ),
        ({"steps": None, "epochs": 3, "batch_examples": 3}, None),
        ({"steps": 2}, None),
    ],
)
def test_few_steps_are_noted(make_recipe: Make, said: list[str], train: dict, remark: str | None) -> None:
    tune(make_recipe(train=train))
    notes = [line for line in said if "so few steps" in line]
    assert bool(notes) is bool(remark) and all(remark in note for note in notes)


def test_an_adapter_whose_changes_are_rounded_away_names_the_precision(make_recipe):
    with pytest.raises(DivergedError, match="lost in the rounding of bf16, .*: raise train.learning_rate or"):
        tune(make_recipe(train={"precision": "bf16", "steps": 1, "learning_rate": 1e-9}), quiet=True)


def test_a_non_finite_loss_names_step_and_row_and_keeps_the_best(make_recipe: Make, test_strategies: object) -> None:
    strategies = [{"lora": {"rank": 4}}, {"poison": {"step": 2, "example": 3}}]
    recipe = make_recipe(strategies=strategies, evaluate=True, train={"batch_examples": 24, "eval_every": 1})
    with pytest.raises(DivergedError, match=r"step 3: .*not finite.*train.jsonl:4\b.*step 2 is kept") as caught:
        tune(recipe, quiet=True)
    assert caught.value.exit_code == 5
    assert adapter(recipe.output)


def test_a_run_in_which_nothing_moves_is_an_error(make_recipe: Make, test_strategies: object) -> None:
    recipe = make_recipe(strategies=["lora", "still"])
    with pytest.raises(DivergedError, match="no trained tensor moved"):
        tune(recipe, quiet=True)
    assert not (Path(recipe.output) / "adapter").exists()


def test_ctrl_c_keeps_the_best_adapter_so_far(make_recipe: Make, test_strategies: object) -> None:
    recipe = make_recipe(strategies=["lora", {"interrupt": {"step": 3}}], evaluate=True, train={"eval_every": 1})
    with pytest.raises(Interrupted, match=r"step 2 is kept in .*adapter") as caught:
        tune(recipe, quiet=True)
    assert caught.value.exit_code == 130
    assert adapter(recipe.output)


def test_the_best_adapter_is_kept_and_a_run_stops_early(make_recipe: Make) -> None:
    train = {"steps": 40, "eval_every": 2, "patience": 2, "learning_rate": 0.3}
    run = tune(make_recipe(evaluate=True, train=train), quiet=True)
    assert run.step < 40
    assert run.metrics["best_step"] < run.step


def test_a_failing_tracker_never_stops_the_run(make_recipe: Make, capsys: object, monkeypatch: object) -> None:
    from accelerate import Accelerator

    from budwood.training import setup

    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to the tracker")

    monkeypatch.setattr(setup, "get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setattr(Accelerator, "init_trackers", fail)
    run = tune(make_recipe(train={"trackers": ["tensorboard"]}))
    assert "warning: the trackers did not start (ConnectionError: no route to the tracker)" in capsys.readouterr().err
    assert adapter(run)


def test_a_tracker_that_is_not_installed_is_rejected(make_recipe: Make, monkeypatch: object) -> None:
    from budwood.training import setup

    monkeypatch.setattr(setup, "get_available_trackers", lambda: [])
    with pytest.raises(ResourceError, match="trackers: wandb is not installed: pip install"):
        tune(make_recipe(train={"trackers": ["wandb"]}), quiet=True)


def test_the_output_of_another_run_is_rejected_or_overwritten_on_request(make_recipe: Make) -> None:
    first = tune(make_recipe(), quiet=True)
    with pytest.raises(InputError, match="holds another run.*--overwrite"):
        tune(make_recipe(), quiet=True)
    before = (first.directory / "adapter" / "budwood.json").stat().st_mtime_ns
    tune(make_recipe(), quiet=True, overwrite=True)
    assert (first.directory / "adapter" / "budwood.json").stat().st_mtime_ns != before
    (first.directory / "manifest.json").unlink()
    with pytest.raises(InputError, match="not empty and does not hold a run"):
        tune(make_recipe(), quiet=True, overwrite=True)


@pytest.mark.parametrize("name", ["notes.txt", "merged/model.safetensors", "adapter/README.md", "checkpoints/notes"])
def test_overwrite_deletes_no_file_that_no_run_wrote(make_recipe: Make, name: str) -> None:
    run = tune(make_recipe(), quiet=True).directory
    path = run / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    files = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    with pytest.raises(InputError, match="was not written by a run, and --overwrite would lose it: move it"):
        tune(make_recipe(), quiet=True, overwrite=True)
    assert path.read_text() == "mine" and files == {p: p.stat().st_mtime_ns for p in run.rglob("*")}


@pytest.mark.parametrize("text", ['{"name": "an extension", "manifest_version": 3}', "[]", "not JSON"])
def test_a_folder_with_somebody_elses_manifest_is_left_alone(make_recipe: Make, text: str) -> None:
    recipe = make_recipe()
    recipe.output.mkdir()
    for name, content in (("manifest.json", text), ("main.py", "print()")):
        (recipe.output / name).write_text(content)
    for options in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(InputError, match="not empty and does not hold a run: name another folder"):
            tune(recipe, quiet=True, **options)
    assert (recipe.output / "main.py").read_text() == "print()" and (
        recipe.output / "manifest.json"
    ).read_text() == text


def test_overwrite_keeps_hidden_files(make_recipe: Make) -> None:
    run = tune(make_recipe(), quiet=True)
    (run.directory / ".git").mkdir()
    (run.directory / ".git" / "config").write_text("mine")
    (run.directory / ".gitignore").write_text("*.safetensors")
    tune(make_recipe(), quiet=True, overwrite=True)
    assert (run.directory / ".git" / "config").read_text() == "mine" and (run.directory / ".gitignore").exists()


def test_dropout_is_reproducible_from_the_seed(make_recipe: Make) -> None:
    strategies = [{"lora": {"rank": 4, "dropout": 0.3}}]
    first = adapter(tune(make_recipe("a", strategies=strategies), quiet=True))
    torch.rand(7)
    again = adapter(tune(make_recipe("b", strategies=strategies), quiet=True))
    other = adapter(tune(make_recipe("c", strategies=strategies, train={"seed": 1}), quiet=True))
    assert distance(first, again) == 0
    assert distance(first, other) > 0


def test_fp16_scales_the_loss_and_counts_what_it_skips(make_recipe: Make) -> None:
    half = tune(make_recipe("half", train={"precision": "fp16", "steps": 8}), quiet=True)
    full = tune(make_recipe("full", train={"precision": "fp32", "steps": 8}), quiet=True)
    assert half.metrics["loss"] == pytest.approx(full.metrics["loss"], rel=0.1)
    assert half.metrics["skipped"] < 8


def test_bf16_differs_from_fp32_only_by_rounding(make_recipe: Make) -> None:
    rounded = tune(make_recipe("bf16", train={"precision": "bf16"}), quiet=True)
    exact = tune(make_recipe("fp32"), quiet=True)
    assert rounded.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.02)


def test_classification_learns_its_labels_and_trains_its_head(make_recipe: Make, tmp_path: Path) -> None:
    rows = [{"text": f"{word} things number {i}", "label": word} for i in range(16) for word in ("games", "fonts")]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = make_recipe(
        base={"task": "sequence-classification"}, data={"train": str(path), "eval": str(path)},
        train={"steps": 40, "micro_tokens": 256, "learning_rate": 3e-3},
    )  # fmt: skip
    run = tune(recipe, quiet=True)
    assert run.metrics["eval_accuracy"] > 0.95 > run.before["eval_accuracy"]
    assert run.metrics["eval_macro_f1"] > 0.95
    assert "fonts" in run.task.report
    assert json.loads((run.directory / "adapter" / "budwood.json").read_text())["labels"] == ["fonts", "games"]
    assert any("score" in key for key in adapter(run))


def test_the_gradients_of_all_processes_are_summed_in_one_all_reduce_per_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """One all-reduce per dtype, for any shapes and layouts; a parameter without a gradient adds zeros."""
    shapes, sent = [(3, 4), (), (0, 2), (5,)], []
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    parameters.append(torch.nn.Parameter(torch.randn(2, 2, dtype=torch.bfloat16)))
    own = [torch.randn_like(p) for p in parameters]
    own[0] = torch.randn(4, 3).T  # not contiguous
    for parameter, gradient in zip(parameters[1:], own[1:], strict=True):
        parameter.grad = gradient.clone()
    parameters[0].grad = own[0]
    without = torch.nn.Parameter(torch.randn(2))

    def all_reduce(tensor: Tensor) -> None:
        sent.append(tensor.dtype)
        tensor.mul_(2)  # two processes with the same gradients

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    expected = [2 * gradient for gradient in own]
    sum_gradients(SimpleNamespace(processes=2, world=Processes(size=2), trainable=[*parameters, without]))
    assert sent == [torch.float32, torch.bfloat16]
    assert all(torch.equal(p.grad, want) for p, want in zip(parameters, expected, strict=True))
    assert torch.equal(without.grad, torch.zeros(2))


def test_a_process_without_the_data_or_that_is_killed_ends_both(tiny_base: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_base, {})
    write_rows(tmp_path / "train.jsonl")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.json").write_text((tmp_path / "recipe.json").read_text())
    ended = tune_with(tmp_path, 2, "if rank == 1: os.chdir('other')")
    assert ended.codes == [2, 2] and [len(lines) for lines in ended.errors] == [1, 0]
    assert "error: rank 1 on " in ended.errors[0][0] and "no such file: train.jsonl" in ended.errors[0][0]
    assert not (tmp_path / "run").exists()
    ended = tune_with(tmp_path, 2, "if rank == 1: at(2, die)")
    assert ended.codes == [3, -9] and [len(lines) for lines in ended.errors] == [1, 0]
    assert "was killed" in ended.errors[0][0] and "--resume" in ended.errors[0][0]
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
