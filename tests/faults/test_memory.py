"""Running out of memory: the same adapter with smaller micro-batches, or exit 3 with remedies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.processes import run_in_two_processes

from budwood.errors import ResourceError
from budwood.model.text_tasks import CausalLM
from budwood.training.loop import tune

from .conftest import STRATEGIES

Make = Callable[..., Any]
TRAIN = {"steps": 5, "batch_examples": 8, "micro_tokens": 512}
ADAPTERS = {
    "lora": [{"lora": {"rank": 4}}],
    "adalora + fgm": [
        {"adalora": {"initial_rank": 4, "target_rank": 2, "initial_phase": 1, "final_phase": 2, "interval": 1}},
        {"adversarial": {"method": "fgm", "epsilon": 0.5}},
    ],
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def distance(first: Path, second: Path) -> float:
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    return max(float((one[key] - two[key]).abs().max()) for key in one)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "where", "step", "error"),
    [
        ("lora", "forward", 1, "device"),
        ("lora", "backward", 4, "host"),
        ("adalora + fgm", "head", 4, "allocator"),
        ("adalora + fgm", "backward", 1, "device"),
    ],
)
def test_the_result_does_not_change_with_smaller_micro_batches(
    make_recipe: Make, faults: Any, capsys: Any, method: str, where: str, step: int, error: str
) -> None:
    strategies = ADAPTERS[method]
    never = {"exhaust": {"tokens": 1 << 30}}
    whole = tune(make_recipe("whole", strategies=[*strategies, never], train=TRAIN), quiet=True)
    exhaust = {"exhaust": {"where": where, "step": step, "error": error, "tokens": 100}}
    run = tune(make_recipe("parts", strategies=[*strategies, exhaust], train=TRAIN))
    lines = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert run.micro_tokens <= 200
    assert lines[-1].startswith(f"step {step}: ") and f"train.micro_tokens: {run.micro_tokens}" in lines[-1]
    assert all(line.startswith(f"step {step}: ") for line in lines), "later steps start with the smaller size"
    assert distance(whole.directory, run.directory) < 1e-5
    for expected, actual in zip(log(whole.directory), log(run.directory), strict=True):
        for name in ("causal_lm", "loss", "gradient_norm", "drawn", "tokens"):
            assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_one_row_that_does_not_fit_names_remedies_and_saves_the_adapter(make_recipe: Make, faults: Any) -> None:
    strategies = [{"lora": {"rank": 4}}, {"exhaust": {"step": 3, "tokens": 1}}]
    recipe = make_recipe(strategies=strategies, train=TRAIN)
    with pytest.raises(ResourceError) as caught:
        tune(recipe, quiet=True)
    text = str(caught.value)
    assert caught.value.exit_code == 3
    assert text.startswith("step 3: out of memory: one example of ") and "train.jsonl:" in text
    for remedy in ("data.max_length", "gradient_checkpointing", "base.quantization to nf4", "train.precision to bf16"):
        assert remedy in text
    assert f"the adapter of step 2 is kept in {recipe.output / 'adapter'}" in text
    assert tensors(recipe.output)


def test_an_optimizer_out_of_memory_before_any_update_is_retried(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole = tune(make_recipe("whole", train=TRAIN), quiet=True)
    for fail_at in (1, 4):
        calls, original = [], torch.optim.AdamW._init_group

        def fail(self: Any, group: Any, *args: Any, at: int = fail_at, seen: list = calls, do: Any = original) -> Any:
            result = do(self, group, *args)  # in the first step this creates the states
            if group is self.param_groups[0]:
                seen.append(1)
            if group is self.param_groups[0] and len(seen) == at:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return result

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "_init_group", fail)
            run = tune(make_recipe(f"again-{fail_at}", train=TRAIN))
        assert (
            f"step {fail_at}: out of memory in the optimizer; the second attempt succeeded" in capsys.readouterr().err
        )
        assert distance(whole.directory, run.directory) == 0


def test_an_optimizer_out_of_memory_halfway_ends_the_run_without_mixed_parameters(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.optim.AdamW.step

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if len(self.state) and next(iter(self.state.values()))["step"] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    recipe = make_recipe(evaluate=True, train={**TRAIN, "eval_every": 1})
    with pytest.raises(ResourceError, match="step 3: out of memory in the optimizer: lower .*step 2 is kept"):
        tune(recipe, quiet=True)
    unmeasured = make_recipe("unmeasured", train=TRAIN)
    with pytest.raises(ResourceError, match="step 3: out of memory in the optimizer: .*no adapter is kept"):
        tune(unmeasured, quiet=True)
    assert not (unmeasured.output / "adapter").exists()


def test_an_evaluation_is_split_and_measures_the_same(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    train = {**TRAIN, "eval_every": 2, "eval_generate": 4}
    whole = tune(make_recipe("whole", evaluate=True, train=train), quiet=True)
    original = CausalLM.outputs

    def outputs(self: Any, model: Any, batch: Any) -> Any:
        if not torch.is_grad_enabled() and sum(batch.lengths) > 40 and len(batch.keys) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, model, batch)

    generated, generate = [], type(whole.model).generate

    def few(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        generated.append(len(kwargs["input_ids"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(CausalLM, "outputs", outputs)
    monkeypatch.setattr(type(whole.model), "generate", few)
    monkeypatch.setattr("budwood.training.setup.check_packing", lambda run, report: _packed(run))
    run = tune(make_recipe("parts", evaluate=True, train=train))
    lines = [line for line in capsys.readouterr().err.splitlines() if "evaluation batches have at most" in line]
    assert lines and len(lines) < 6, "later evaluations start with the smaller size"
    assert run.micro_tokens == 512 and run.eval_tokens <= 80
    assert generated
    assert run.before == pytest.approx(whole.before, rel=1e-5)
    assert {k: v for k, v in run.metrics.items() if k.startswith("eval_")} == pytest.approx(
        {k: v for k, v in whole.metrics.items() if k.startswith("eval_")}, rel=1e-5
    )
    assert distance(whole.directory, run.directory) == 0


def _packed(run: Any) -> None:
    run.model.set_attn_implementation("budwood")


def test_one_row_too_large_for_evaluation_ends_the_run(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    original = CausalLM.outputs

    def outputs(self: Any, model: Any, batch: Any) -> Any:
        if not torch.is_grad_enabled() and 7 in batch.keys:
            raise MemoryError
        return original(self, model, batch)

    monkeypatch.setattr("budwood.training.setup.check_packing", lambda run, report: _packed(run))
    monkeypatch.setattr(CausalLM, "outputs", outputs)
    with pytest.raises(ResourceError, match=r"out of memory: one example of \d+ tokens \(.*eval.jsonl:8\)"):
        tune(make_recipe(evaluate=True, train=TRAIN), quiet=True)


def test_two_processes_restart_the_step_together(make_recipe: Make, faults: Any, tmp_path: Path) -> None:
    strategies = [{"lora": {"rank": 4}}]
    one = tune(make_recipe("one", strategies=strategies, train=TRAIN), quiet=True)
    exhaust = {"exhaust": {"where": "backward", "step": 2, "tokens": 60, "rank": 1}}
    recipe = make_recipe("two", strategies=[*strategies, exhaust], train={**TRAIN, "micro_tokens": 128})
    path = tmp_path / "two.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    run_in_two_processes(
        f"import sys, torch\ntorch.set_num_threads(1)\nsys.path.insert(0, {str(STRATEGIES)!r})\n"
        "from budwood.training.loop import tune\n"
        f"run = tune({str(path)!r}, quiet=True)\n"
        "assert run.processes == 2 and run.micro_tokens < 128\n",
        tmp_path,
    )
    assert distance(one.directory, tmp_path / "two") < 1e-5


def test_two_processes_redistribute_an_evaluation_if_one_runs_out_of_memory(make_recipe: Make, tmp_path: Path) -> None:
    """Otherwise the two would distribute the examples differently, evaluating some twice and others never."""
    train = {**TRAIN, "steps": 1, "micro_tokens": 128}
    one = tune(make_recipe("one", evaluate=True, train=train), quiet=True)
    path = tmp_path / "two.yaml"
    path.write_text(make_recipe("two", evaluate=True, train=train).to_yaml(), encoding="utf-8")
    run_in_two_processes(
        "import atexit, os, torch\n"
        "atexit.register(lambda: torch.distributed.is_initialized() and os._exit(9))  # runs last\n"
        "from budwood.model import evaluation\nfrom budwood.training.loop import tune\n"
        "attempt = evaluation._attempt\n"
        "def scarce(run, made, *rest):\n"
        "    tokens = sum(made.result().lengths)\n"
        "    return None if run.process_index and tokens > 80 else attempt(run, made, *rest)\n"
        "evaluation._attempt = scarce\n"
        f"run = tune({str(path)!r}, quiet=True)\n"
        f"expected = {one.before['eval_loss']!r}, {one.metrics['eval_loss']!r}\n"
        "actual = run.before['eval_loss'], run.metrics['eval_loss']\n"
        "assert all(abs(a - b) < 1e-5 * a for a, b in zip(expected, actual)), (expected, actual)\n"
        "sizes = [None, None]\n"
        "torch.distributed.all_gather_object(sizes, run.eval_tokens)\n"
        "assert sizes[0] == sizes[1] < 100, sizes\n",
        tmp_path,
    )


def test_a_resume_keeps_the_smaller_micro_batches(
    make_recipe: Make, faults: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over other micro-batches round differently, so the result is compared bitwise."""
    from budwood.training import loop

    strategies = [{"lora": {"rank": 4}}, {"exhaust": {"where": "backward", "step": 2, "tokens": 100}}]
    train = {**TRAIN, "save_every": 1}
    whole = tune(make_recipe("run", strategies=strategies, train=train), quiet=True)
    reference = whole.directory.rename(whole.directory.with_name("reference"))
    sum_gradients = loop.sum_gradients

    class Killed(BaseException):
        pass

    def die(run: Any) -> None:
        if run.step == 3:
            raise Killed
        sum_gradients(run)

    recipe = make_recipe("run", strategies=strategies, train=train)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "sum_gradients", die)
        with pytest.raises(Killed):
            tune(recipe, quiet=True)
    run = tune(recipe, quiet=True, resume=True)
    assert run.micro_tokens == whole.micro_tokens < 512
    assert distance(reference, run.directory) == 0
