"""What a launcher asks for and a run does not do is refused by name, or noted."""

from __future__ import annotations

import pytest

from budwood.cli.app import run as command
from budwood.errors import InputError
from budwood.parallel.refusals import refuse_engines, without_effect


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "DeepSpeed (use_deepspeed)"),
        ({"ACCELERATE_USE_FSDP": "1"}, "accelerate's FSDP"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tensor parallelism"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_PP_SIZE": "4"}, "pipeline parallelism"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8"),
    ],
)
def test_other_engines_are_refused_by_name(environment: dict[str, str], name: str) -> None:
    with pytest.raises(InputError) as caught:
        refuse_engines(environment)
    assert name in str(caught.value) and (
        "train.parallel" in str(caught.value) or "train.precision" in str(caught.value)
    )


def test_what_accelerate_always_sets_is_no_reason() -> None:
    usual = {
        "ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_USE_CPU": "True",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "1",
    }  # fmt: skip
    refuse_engines(usual)
    assert without_effect(usual) == []
    noted = without_effect({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"})
    assert [line.partition(" has")[0] for line in noted] == [
        "accelerate's mixed_precision bf16", "accelerate's gradient_accumulation_steps 4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "instead"), [(["plan", "r.yaml"], "without torchrun"), (["sweep", "r.yaml"], "once per GPU")]
)
def test_other_commands_are_one_process(
    arguments: list[str], instead: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert command(arguments) == 2
    assert capsys.readouterr().err.startswith("error: RANK: the environment (WORLD_SIZE='4')")  # and not a KeyError
    for rank, lines in (("0", 1), ("3", 0)):
        monkeypatch.setenv("RANK", rank)
        assert command(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == lines and (not lines or instead in error)
