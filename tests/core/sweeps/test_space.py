"""The space of a sweep, as it is given and as a recipe takes it."""

from pathlib import Path

import pytest

from budwood.errors import InputError
from budwood.sweeps.space import check_space, read_space
from budwood.sweeps.study import combinations


def test_forms(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(
        "lora.alpha: {low: 8, high: 32, step: 8}\n"
        "lora.targets: {choices: [all-linear, [q_proj]]}\nlora.dropout: 0..0.5\n"
    )
    options = ["lora.rank=4,8,16", "train.learning_rate=1e-4..1e-2@log", "data.train=../a.jsonl,b.jsonl"]
    fields = {field.key: field for field in read_space(options, file)}
    assert fields["lora.rank"].choices == (4, 8, 16) and fields["lora.rank"].source == "-s lora.rank=4,8,16"
    rate = fields["train.learning_rate"]
    assert (rate.low, rate.high, rate.log, rate.count) == (1e-4, 1e-2, True, float("inf"))
    assert fields["lora.alpha"].values() == [8, 16, 24, 32] and fields["lora.alpha"].source == f"{file}:1"
    assert fields["lora.targets"].override(["q_proj"]) == 'lora.targets=["q_proj"]'
    assert fields["lora.dropout"].low == 0.0 and not fields["lora.dropout"].whole
    assert fields["data.train"].choices == ("../a.jsonl", "b.jsonl")
    assert combinations([fields["lora.rank"], fields["lora.alpha"]]) == 12


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("lora.rank", "write KEY=VALUES"),
        ("lora.rank=", "write KEY=VALUES"),
        ("lora.rank=[]", "list of values or a range"),
        ("lora.rank=8..4", "the range is empty: 8 is not less than 4"),
        ("lora.rank=4..4", "the range is empty"),
        ("lora.rank=0..4@log", "must begin above 0, not at 0"),
        ("lora.rank=1..4@lin", "neither @log nor @step"),
        ("lora.rank=1..4@step=9", "a step must be above 0, at most 3"),
        ("lora.rank=a..4", "'a' is not a number"),
        ("lora.rank=1...inf", "is not a number"),
        ("lora.rank=4,4", "4 is given twice"),
        ("lora.rank=[1", "is not YAML"),
    ],
)
def test_values_that_are_none(option: str, message: str) -> None:
    with pytest.raises(InputError, match="^-s lora.rank") as caught:
        read_space([option], None)
    assert message in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    for text, message in (
        ("", "is empty"), ("lora: {rank: [4]}", ":1: lora: write a list"), ("a.b: 3", ":1: a.b: must be a list"),
        ("a.b: [1]\nc.d: {low: 1, high: 2, log: x}", ":2: c.d: log must be"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(InputError) as caught:
            read_space([], file)
        assert message in str(caught.value), text
    file.write_text("lora.rank: [1]")
    for given, message in (([], "the space is empty"), (["lora.rank=2,3"], "already in the space")):
        with pytest.raises(InputError, match=message):
            read_space(given, None if not given else file)
    with pytest.raises(InputError, match="no such file"):
        read_space([], tmp_path / "none.yaml")


def test_the_recipe_takes_every_end() -> None:
    def check(overrides: list[str]) -> None:
        values = dict(override.split("=", 1) for override in overrides)
        if not 1 <= float(values.get("a.rank", "1")) <= 64 or "." in values.get("a.rank", "1"):
            raise InputError(f"-o a.rank={values['a.rank']}: a.rank: must be a whole number from 1 to 64.")

    for option in ("a.rank=0,8", "a.rank=8,65", "a.rank=0..8", "a.rank=8..65"):
        with pytest.raises(InputError, match=f"^-s {option}: a.rank: must be"):
            check_space(read_space([option], None), check, [])
    whole, real = check_space(read_space(["a.rank=1..64", "a.dropout=0..1"], None), check, [])
    assert whole.whole and not real.whole  # a range of integers is of real numbers where the field takes them
    with pytest.raises(InputError, match="also set with -o"):
        check_space(read_space(["a.rank=1,2"], None), check, ["a.rank=3"])
    with pytest.raises(InputError, match="a folder of its own"):
        check_space(read_space(["output=a,b"], None), check, [])
