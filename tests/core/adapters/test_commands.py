"""`budwood adapter …` and `budwood generate`: their output, and their errors on bad input."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys

import pytest

from budwood import AdapterPool
from budwood.adapters.store import sealed
from budwood.cli.app import run


@pytest.fixture
def no_base(monkeypatch):
    """Fail the test if a base loads."""

    def load(*args, **kwargs):
        raise AssertionError("a base was loaded")

    monkeypatch.setattr("budwood.serving.pool.load_base", load)


def refused(capsys, arguments: list[str], code: int, *words: str) -> None:
    """Run a command that must exit with `code` and print one plain line that contains `words`."""
    assert run([str(argument) for argument in arguments]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    for word in ("error: ", *words):
        assert word in shown.err


def test_info_prints_text_and_json(saved, stock, capsys):
    assert run(["adapter", "info", str(saved)]) == 0
    text = capsys.readouterr().out
    for word in ("lora, from budwood", "none, float32", "causal-lm", "28 tensors"):
        assert word in text
    assert run(["adapter", "info", str(saved), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["manifest"]["base"]["quantization"] == "none"
    assert values["tensors"] == 28
    assert run(["adapter", "info", str(stock)]) == 0
    shown = capsys.readouterr()
    assert "stock PEFT" in shown.out
    assert "base is not checked" in shown.err


def test_info_and_bad_adapters_need_no_torch(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "bad")
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    for arguments, code in ((["adapter", "info", str(saved)], 0), (["adapter", "info", str(tmp_path / "bad")], 4)):
        script = (
            "import sys; from budwood.cli.app import run; "
            f"code = run({arguments!r}); sys.exit(9 if 'torch' in sys.modules or 'peft' in sys.modules else code)"
        )
        assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == code


def test_verify_prints_its_result(saved, capsys):
    assert run(["adapter", "verify", str(saved)]) == 0
    assert "verified: 3 golden prompts, same setting" in capsys.readouterr().out
    assert run(["adapter", "verify", str(saved), "--quantization", "nf4"]) == 0
    text = capsys.readouterr().out
    assert "different setting: recorded on" in text
    assert "top-1 agreement" in text
    assert run(["adapter", "verify", str(saved), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["exact"] is True
    assert values["adapter"]["largest"] <= 1e-5


def test_merge_and_export_write_folders(saved, tmp_path, capsys):
    assert run(["adapter", "merge", str(saved), str(tmp_path / "merged"), "--dtype", "fp32"]) == 0
    text = capsys.readouterr().out
    for word in ("14 weights changed", "rounds away 0.0%", "vs. unquantised base + adapter"):
        assert word in text
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert run(["adapter", "export", str(saved), str(tmp_path / "out"), "--as", "peft"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_bad_adapters_end_with_one_line_and_their_code(saved, tiny_base, tiny_bases, tmp_path, capsys, no_base):
    def copy(name):
        return shutil.copytree(saved, tmp_path / name)

    weights = "adapter_model.safetensors"
    truncated, huge, pickled = copy("truncated"), copy("huge"), copy("pickled")
    (truncated / weights).write_bytes((saved / weights).read_bytes()[:-100])
    (huge / weights).write_bytes((100 << 20).to_bytes(8, "little") + b"{}")
    (pickled / weights).rename(pickled / "adapter_model.bin")
    for folder, code, word in (
        (truncated, 4, "truncated"),
        (huge, 4, "104,857,600"),
        (pickled, 2, "adapter_model.bin"),
    ):
        for start in ("info", "verify"):
            refused(capsys, ["adapter", start, folder], code, word)
        refused(capsys, ["generate", tiny_base, "--adapter", f"a={folder}", "--prompt", "x"], code, word)
    refused(capsys, ["adapter", "info", tmp_path / "nothing"], 2, "no such folder")
    stranger = tiny_bases("stranger", seed=7)
    refused(capsys, ["generate", stranger, "--adapter", f"a={saved}", "--prompt", "x"], 2, "was trained on the base")
    refused(capsys, ["adapter", "verify", saved, "--base", stranger], 2, "was trained on the base")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--adapter", "../x=DIR"], "'../x'"),
        (["--adapter", "/abs=DIR"], "'/abs'"),
        (["--adapter", "x" * 300 + "=DIR"], "300 characters"),
        (["--adapter", "DIR"], "NAME=DIR"),
        (["--adapter", "a="], "NAME=DIR"),
        (["--adapter", "a=DIR", "--adapter", "a=DIR"], "twice"),
        (["--adapter", "first=DIR", "--use", "frist"], "Did you mean 'first'"),
        (["--use", "a"], "no --adapter has this name"),
        (["--top-p", "0"], "above 0"),
        (["--top-p", "1.5"], "top-p"),
        (["--temperature", "-1"], "temperature"),
        (["--max-new-tokens", "0"], "max-new-tokens"),
        (["--prompt", ""], "empty"),
    ],
)
def test_generate_rejects_bad_input_before_the_base_loads(saved, tiny_base, capsys, no_base, arguments, word):
    arguments = [argument.replace("DIR", str(saved)) for argument in arguments]
    if "--prompt" not in arguments:
        arguments += ["--prompt", "x"]
    refused(capsys, ["generate", tiny_base, *arguments], 2, word)


def test_generate_streams_what_the_pool_generates(saved, tiny_base, capsys, monkeypatch):
    options = ["--max-new-tokens", "8"]
    pool = AdapterPool(tiny_base)
    pool.load("a", saved)
    base, adapted = (answer.text for answer in pool.generate(["The quick"] * 2, [None, "a"], max_new_tokens=8))
    assert base != adapted
    assert run(["generate", str(tiny_base), "--prompt", "The quick", *options]) == 0
    assert capsys.readouterr().out == base + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("The quick"))
    assert run(["generate", str(tiny_base), "--adapter", f"a={saved}", *options]) == 0
    assert capsys.readouterr().out == adapted + "\n"


def test_several_adapters_answer_side_by_side(saved, stock, tiny_base, capsys):
    options = ["--adapter", f"a={saved}", "--adapter", f"b={stock}", "--prompt", "The quick", "--max-new-tokens", "6"]
    assert run(["generate", str(tiny_base), *options, "--json"]) == 0
    shown = capsys.readouterr()
    answers = json.loads(shown.out)["answers"]
    assert [answer["adapter"] for answer in answers] == [None, "a", "b"]
    assert "adapter 'b': no budwood.json" in shown.err
    assert run(["generate", str(tiny_base), *options]) == 0
    text = capsys.readouterr().out
    assert text == "".join(f"── {a['adapter'] or 'base'}\n{a['text']}\n" for a in answers)
    assert run(["generate", str(tiny_base), *options, "--use", "b"]) == 0
    assert capsys.readouterr().out == answers[2]["text"] + "\n"


def test_chat_uses_the_template(tiny_base, capsys):
    assert run(["generate", str(tiny_base), "--prompt", "Hello", "--chat", "--max-new-tokens", "5"]) == 0
    expected = AdapterPool(tiny_base).generate([[{"role": "user", "content": "Hello"}]], max_new_tokens=5)[0].text
    assert capsys.readouterr().out == expected + "\n"


def test_control_codes_in_an_adapter_do_not_reach_the_terminal(saved, tmp_path, capsys):
    folder = shutil.copytree(saved, tmp_path / "a")
    manifest = json.loads((folder / "budwood.json").read_text())
    manifest["base"]["name"] = "\x1b[2Jtiny"
    (folder / "budwood.json").write_text(sealed(manifest))
    assert run(["adapter", "info", str(folder)]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("command", [["adapter", "verify"], ["adapter", "merge"], ["eval"]])
def test_a_base_named_only_by_the_adapter_is_not_downloaded(saved, tmp_path, capsys, monkeypatch, command):
    import huggingface_hub

    folder = shutil.copytree(saved, tmp_path / "a")
    manifest = json.loads((folder / "budwood.json").read_text())
    manifest["base"]["name"] = "someone/else"
    (folder / "budwood.json").write_text(sealed(manifest))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')

    def fetch(name, **options):
        raise AssertionError("the hub was queried")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    more = {"merge": [str(tmp_path / "out")], "eval": ["--data", str(tmp_path / "rows.jsonl")]}.get(command[-1], [])
    refused(capsys, [*command, folder, *more], 2, "name explicitly is downloaded: --base someone/else")
