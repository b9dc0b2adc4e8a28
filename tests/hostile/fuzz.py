"""`make fuzz`: coverage-guided fuzzing (atheris, libFuzzer) of every parser of untrusted input.

Each target gets its share of the time in a separate process, with a generated corpus of valid inputs. Findings are
saved in .fuzz/TARGET/; reproduce one with `python -m tests.hostile.fuzz --target TARGET --input FILE`.
Exit codes: 0 no findings, 1 findings, 3 atheris is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOUND = ROOT / ".fuzz"
ROWS = [
    {"prompt": "a question", "completion": " an answer"},
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]},
    {"text": "some text"},
]
RECIPE = b"base: {model: b}\ndata: {train: x.jsonl}\nstrategies:\n  - lora: {rank: 4, alpha: 8}\n  - adversarial\n"
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "rank_pattern": {"q": 2}}
MANIFEST = {"format": 1, "kind": "lora", "distribution": "budwood 0.1.0", "base": {"name": "b", "fingerprint": "f"}}


def header(*tensors: tuple[str, str, list[int], int, int]) -> bytes:
    """Return a safetensors file of zeros."""
    entries = {name: {"dtype": dtype, "shape": shape, "data_offsets": [a, b]} for name, dtype, shape, a, b in tensors}
    text = json.dumps(entries | {"__metadata__": {"format": "pt"}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(max((t[4] for t in tensors), default=0))


# Each returns the name of the parsed file, valid inputs, and a function that parses it.


def recipe() -> tuple[str, list[bytes], Callable[[Path], object]]:
    from budwood.recipe.schema import load_recipe

    plain = json.dumps({"base": {"model": "b"}, "data": {"train": "x"}, "strategies": ["lora"]}).encode()
    return "recipe.yaml", [RECIPE, plain], load_recipe


def override() -> tuple[str, list[bytes], Callable[[Path], object]]:
    from budwood.recipe.schema import Recipe

    data = {"base": {"model": "b"}, "data": {"train": "x"}, "strategies": [{"lora": {"rank": 4}}], "output": "run"}
    sound = [b"train.steps=3", b"lora.rank=8", b"strategies=[lora]", b"output=x\ntrain.learning_rate=1e-3"]

    def parse(path: Path) -> object:
        return Recipe.from_dict(data, path.read_bytes().decode("utf-8", "replace").split("\n"))

    return "overrides", sound, parse


def rows(suffix: str, sound: list[bytes]) -> tuple[str, list[bytes], Callable[[Path], object]]:
    from budwood.data.reading import read_rows
    from budwood.data.recognition import recognise

    def parse(path: Path) -> None:
        file_rows = read_rows(path)
        form = recognise(file_rows.columns, "causal-lm", str(path))
        for index, row in enumerate(file_rows):
            form.item(row, file_rows.location(index))

    return f"rows{suffix}", sound, parse


def jsonl() -> tuple[str, list[bytes], Callable[[Path], object]]:
    return rows(".jsonl", [json.dumps(row).encode() + b"\n" for row in ROWS])


def csv() -> tuple[str, list[bytes], Callable[[Path], object]]:
    return rows(".csv", [b'prompt,completion\n"a ""b""",c\n', b"text\na\n"])


def safetensors() -> tuple[str, list[bytes], Callable[[Path], object]]:
    from budwood.untrusted.formats import read_header

    sound = [header(("a", "F32", [2, 2], 0, 16), ("b", "BF16", [3], 16, 22)), header(("c", "F4", [0], 0, 0)), header()]
    return "x.safetensors", sound, read_header


def adapter_config() -> tuple[str, list[bytes], Callable[[Path], object]]:
    from budwood.adapters.store import read_adapter

    weights = header(("base_model.model.q.lora_A.weight", "F32", [2, 4], 0, 32))

    def parse(path: Path) -> None:
        path.with_name("adapter_model.safetensors").write_bytes(weights)
        read_adapter(path.parent)

    return "adapter_config.json", [json.dumps(ADAPTER).encode()], parse


def manifest() -> tuple[str, list[bytes], Callable[[Path], object]]:
    from budwood.adapters.store import read_adapter

    def parse(path: Path) -> None:
        path.with_name("adapter_model.safetensors").write_bytes(header(("q", "F32", [2], 0, 8)))
        path.with_name("adapter_config.json").write_text(json.dumps(ADAPTER))
        read_adapter(path.parent)

    sound = MANIFEST | {"files": {"adapter_config.json": "0", "adapter_model.safetensors": "0"}, "labels": ["a"]}
    return "budwood.json", [json.dumps(sound).encode()], parse


def base_config() -> tuple[str, list[bytes], Callable[[Path], object]]:
    from budwood.model.checks import check_base

    def parse(path: Path) -> None:
        path.with_name("model.safetensors").write_bytes(header(("a", "F32", [2], 0, 8)))
        check_base(path.parent, "none")

    sound = {"model_type": "llama", "num_hidden_layers": 2, "quantization_config": {"load_in_4bit": True}}
    return (
        "config.json",
        [json.dumps(sound).encode(), b'{"model_type": "gpt2", "auto_map": {"AutoConfig": "x.Y"}}'],
        parse,
    )


def index() -> tuple[str, list[bytes], Callable[[Path], object]]:
    from budwood.model.checkpoint import read_tensors

    def parse(path: Path) -> None:
        path.with_name("a.safetensors").write_bytes(header(("a", "F32", [2], 0, 8)))
        read_tensors(path.parent)

    return "model.safetensors.index.json", [b'{"weight_map": {"a": "a.safetensors"}}'], parse


TARGETS = {
    target.__name__: target
    for target in (recipe, override, jsonl, csv, safetensors, adapter_config, manifest, base_config, index)
}


def fuzz(name: str, seconds: int, given: Path | None) -> None:
    """Fuzz one target in this process until the time is up or an input fails; does not return."""
    import atheris

    with atheris.instrument_imports(include=["budwood", "ruamel"]):
        from budwood.errors import BudwoodError

        file, sound, parse = TARGETS[name]()
    work = Path(tempfile.mkdtemp(prefix="budwood-fuzz-"))
    path = work / file
    corpus = FOUND / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(sound):
        (corpus / f"sound-{number}").write_bytes(data)

    def once(data: bytes) -> None:
        path.write_bytes(data)
        try:
            parse(path)
        except BudwoodError as error:
            assert error.exit_code in (2, 3, 4), error
            assert "\n" not in str(error), error

    if given is not None:
        once(given.read_bytes())
        return
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={FOUND / name}/", "-timeout=10", "-rss_limit_mb=3000"]
    atheris.Setup([name, *options, "-print_final_stats=1", "-max_len=4096", "-verbosity=1", str(corpus)], once)
    atheris.Fuzz()


def main() -> int:
    """Fuzz every target, or one of them, and print a table."""
    parser = argparse.ArgumentParser(prog="fuzz")
    parser.add_argument("--seconds", type=int, default=300, help="total time for all targets")
    parser.add_argument("--target", choices=TARGETS, help="only this target")
    parser.add_argument("--input", type=Path, help="run the target on this file only")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("fuzz: atheris is not installed: pip install 'budwood[fuzz]' (Python 3.11 to 3.13)", file=sys.stderr)
        return 3
    if options.inside or options.input:
        fuzz(options.target, options.seconds, options.input)
        return 0
    names = [options.target] if options.target else list(TARGETS)
    share = max(options.seconds // len(names), 5)
    found = 0
    print(f"{'target':16} {'inputs':>10} {'features':>9} {'corpus':>7} {'found':>6}", flush=True)
    for name in names:
        before = set(FOUND.glob(f"{name}/*-*"))
        command = [sys.executable, "-m", "tests.hostile.fuzz", "--inside", "--target", name, "--seconds", str(share)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
        output = done.stdout + done.stderr
        new = sorted(set(FOUND.glob(f"{name}/*-*")) - before)
        inputs = (re.findall(r"number_of_executed_units: (\d+)", output) or ["?"])[-1]
        features = (re.findall(r" ft: (\d+)", output) or ["?"])[-1]
        corpus = len(list((FOUND / name / "corpus").iterdir())) if (FOUND / name / "corpus").is_dir() else 0
        broken = bool(new) or done.returncode != 0
        found += broken
        print(f"{name:16} {inputs:>10} {features:>9} {corpus:>7} {broken:>6}")
        if broken:
            print("\n".join(f"    {line}" for line in output.strip().splitlines()[-12:]))
            print(
                f"    reproduce: python -m tests.hostile.fuzz --target {name} --input {new[0] if new else '?'}",
                flush=True,
            )
    print(f"{len(names)} targets, {found} with findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
