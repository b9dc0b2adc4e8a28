"""`budwood plan`: tables or JSON on stdout, one line per problem on stderr, and the exit code."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from budwood.cli import app as cli
from budwood.planning import waiting


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Keep the signal handlers and warning filters of the test process."""
    monkeypatch.setattr(cli, "silence_libraries", lambda debug: None)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a recipe in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    Path("recipe.yaml").write_text(
        f"base: {{model: {tiny_base}}}\ndata: {{train: train.jsonl}}\nstrategies:\n  - lora: {{rank: 4}}\n"
    )
    return "recipe.yaml"


def test_the_plan_is_printed_as_tables(recipe, capsys):
    assert cli.run(["plan", recipe, "-o", "lora.rank=2", "--composition"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert any(line.startswith("lora ") and "rank 2" in line and "slots adapter" in line for line in lines)
    assert any(line.split() == ["backward", "core", "core"] for line in lines)


def test_the_plan_is_printed_as_json(recipe, capsys):
    assert cli.run(["plan", recipe, "--json", "--composition"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert err == ""
    assert printed["steps"] is None
    assert printed["problems"] == []
    assert [strategy["name"] for strategy in printed["strategies"]] == ["lora"]
    backward = next(hook for hook in printed["hooks"] if hook["name"] == "backward")
    assert [call["name"] for call in backward["calls"]] == ["core"]


def test_memory_time_and_disk_of_a_card_without_data(recipe, capsys, monkeypatch):
    """In a process that is started ahead, as by a command; the data is not there yet."""
    started = []
    begin = waiting.PlanningProcess.__init__
    monkeypatch.setattr(waiting, "saves_time", lambda: True)
    monkeypatch.setattr(waiting.PlanningProcess, "__init__", lambda self: started.append(self) or begin(self))
    Path("train.jsonl").unlink()
    Path("hqq").mkdir()  # a folder beside the recipe is no library
    arguments = ["plan", recipe, "--json", "--device", "4060 Ti"]
    assert cli.run(arguments) == 2
    assert "no such file: train.jsonl" in capsys.readouterr().err
    assert started == []
    arguments += ["--tokens", "1024", "--processes", "2", "--parallel", "shard", "--link", "8Gbit/s"]
    assert cli.run([*arguments, "-o", "train.steps=3", "-o", "base.quantization=nf4"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [process._process.poll() for process in started] == [0]
    memory, step = printed["memory"], printed["step"]
    assert memory["peak_bytes"] == sum(memory["parts"].values()) and memory["where"]
    assert {"base, quantised", "activations", "CUDA's context"} <= memory["parts"].keys()
    assert step["flops"] > 1e8 and 0 < step["tokens"] <= 2 * step["largest_micro_batch"] * step["micro_batches"] + 1
    assert 0 < printed["time"]["seconds"][0] < printed["time"]["seconds"][1] < 10
    assert printed["disk"]["bytes"] > 0 and printed["host"]["peak_bytes"] > 0
    assert printed["fits"] is True
    several = printed["processes"]
    assert (several["processes"], several["parallel"], several["link_bytes_per_second"]) == (2, "shard", 1e9)
    assert several["share_bytes"] > 0 and several["all_gathers"] > 0 and several["seconds"][0] < several["seconds"][1]
    gathered = several["gathered_bytes"]  # in the peak, unless that is in the head
    assert memory["parts"].get("gathered layers", gathered) == gathered > 0
    assert any("planned without data, for micro-batches of 1,024 tokens" in note for note in printed["notes"])


def test_a_device_that_is_not_known_is_one_line(recipe, capsys):
    assert cli.run(["plan", recipe, "--device", "RTX 9999"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "RTX 4090 24G" in err
    assert cli.run(["plan", recipe, "--composition", "--tokens", "99"]) == 2


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_every_problem_is_one_line(recipe, capsys, as_json):
    assert cli.run(["plan", recipe, "-o", "lora.rnk=1", "-o", "train.x=2", "-o", "lora.y\x1b[31m=2", *as_json]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 3
    assert all(line.startswith("error: -o ") for line in err.splitlines())
    assert "\x1b" not in err
    if as_json:
        printed = json.loads(out)
        assert len(printed["problems"]) == 3 and [part["sound"] for part in printed["strategies"]] == [False]
    else:
        assert out == ""  # what composition there is is known once the options are right


def test_a_missing_recipe_is_a_one_line_error(capsys):
    assert cli.run(["plan", "nothing.yaml", "--json"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: nothing.yaml: no such recipe.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "recipe.yaml", "--allow", "rank"], "--allow and --write need --fit"),
        (["plan", "recipe.yaml", "--fit", "24GiB", "--write", "recipe.yaml"], "recipe.yaml exists"),
        (["plan", "recipe.yaml", "--fit", "24GiB", "--allow", "ranks"], "Did you mean 'rank'?"),
        (["plan", "recipe.yaml", "--fit", "lots"], "'lots' is not known"),
        (["plan", "recipe.yaml", "--fit", ""], "--fit: '' is not known"),
        (["plan", "recipe.yaml", "--device", ""], "--device: '' is not known"),
        (["plan", "recipe.yaml", "--device", "", "--composition"], "have no effect with it"),
        (["plan", "recipe.yaml", "--processes", "2", "--link", ""], "--link: ''"),
        (["plan", "recipe.yaml", "--processes", "0"], "greater than or equal to 1"),
        (["plan", "recipe.yaml", "--processes", "100000"], "less than or equal to 4096"),
        (["plan", "recipe.yaml", "--processes", "2", "--parallel", "split"], "'split': give replicate or shard"),
        (["plan", "recipe.yaml", "--processes", "2", "--link", "8Gb/s"], "'8Gb/s': give a bandwidth such as 16GB/s"),
        (["plan", "recipe.yaml", "--link", "8GB/s"], "--parallel and --link need --processes, from 2 on"),
        (["plan", "recipe.yaml", "--processes", "2", "--composition"], "--processes have no effect with it"),
        (["tune", "recipe.yaml", "--allow", "rank"], "--allow needs --fit"),
        (["tune", "recipe.yaml", "--fit", ""], "--fit: '' is not known"),
        (["tune", "recipe.yaml", "--fit", "24GiB", "--resume"], "resume with the recipe.yaml in the output folder"),
        (["tune", "recipe.yaml", "--fit", "24GiB", "--allow", "x"], "--allow: 'x' is not known"),
    ],
)
def test_bad_options(recipe, capsys, arguments, message):
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err
    assert not Path("runs").exists()


def test_the_recipe_that_fits_is_written(recipe, capsys, monkeypatch):
    """Checkpointing is the only thing that helps; the estimates are made up."""
    from tests.core.planning.test_sizes import estimate_of

    from budwood.planning import process
    from budwood.planning.options import GIB

    def estimate(recipe, device, *args, **options):
        result = estimate_of(2048)
        result.device, result.peak = device, GIB if recipe.train.gradient_checkpointing else 30 * GIB
        return result

    monkeypatch.setattr(process, "estimate_in_process", estimate)
    assert cli.run(["plan", recipe, "--fit", "24GiB"]) == 0
    out = capsys.readouterr().out
    assert "to fit: -o train.gradient_checkpointing=true" in out and "written: recipe-fit.png, recipe-fit.yaml" in out
    assert "gradient_checkpointing: true" in Path("recipe-fit.yaml").read_text()
    assert cli.run(["plan", recipe, "--fit", "24GiB", "--json"]) == 0
    fit = json.loads(capsys.readouterr().out)["fit"]
    assert fit["files"] == ["recipe-fit-2.png", "recipe-fit-2.yaml"] and len(fit["candidates"]) == 2
    assert cli.run(["plan", recipe, "--fit", "500MiB"]) == 3
    assert "nothing fits without changing the result" in capsys.readouterr().out
