"""`python -m benchmarks.evidence`: whether AdaLoRA, adversarial training and a teacher help, on real models and texts.

AdaLoRA and LoRA train with the defaults alone. Every other arm is tuned with the same number of trials, trained on rows
of train and scored on other rows of it. Then each arm trains once per seed with the options of its best trial, on rows
that the seed draws, and is evaluated once on rows of eval. The runs use `budwood.tune` and the evaluation of
`budwood eval`, one thread each, one run per core at the same time. Results are written as runs finish: raw to
docs/benchmarks/evidence.json, as a page to docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import after_sft_page, defaults_page, models, real_page, transfer_page
from benchmarks.evidence_page import ATTACKED, METHODS, best_trial, criteria, write_page
from benchmarks.train import machine, say

ROOT = Path(__file__).parent.parent
JSON, PAGE = ROOT / "docs" / "benchmarks" / "evidence.json", ROOT / "docs" / "evidence.md"
SECTIONS = {
    JSON.with_name("real.json"): real_page.section,
    JSON.with_name("after-sft.json"): after_sft_page.section,
    JSON.with_name("defaults.json"): defaults_page.section,
    JSON.with_name("transfer.json"): transfer_page.section,
}
"""Results of other benchmarks, and the function that formats each as a section of the page."""

SETTINGS: dict[str, Any] = {
    "heldout_rows": 200, "eval_rows": 400, "epochs": 3, "teacher_epochs": 2, "teacher_rank": 16,
    "attacks": {"pgd": "pgd:relative_epsilon=0.1,steps=3", "typos": "typos:rate=0.1"},
}  # fmt: skip
QUICK = {"heldout_rows": 40, "eval_rows": 40, "epochs": 1}
QUICK_ROWS = 48
TEACHER = "TEACHER"
TUNING_SEED = 1000
"""Seed of the trials; final runs use others."""
SIZES: dict[str, tuple[dict[str, Any], str, tuple[float, float]]] = {
    "fgm": ({}, "relative_epsilon", (0.1, 0.4)),
    "pgd": ({"steps": 2}, "relative_epsilon", (0.1, 0.4)),
    "freelb": ({"steps": 2}, "relative_epsilon", (0.1, 0.4)),
    "smart": ({}, "relative_epsilon", (0.02, 0.08)),
    "vat": ({}, "relative_epsilon", (0.1, 0.4)),
    "neftune": ({}, "alpha", (1.0, 5.0)),
}
"""Fixed options of each adversarial method, and the one that is tuned."""


@dataclass(frozen=True)
class Set:
    """A base and a set of labelled texts.

    Attributes:
        title: what is to be told from a text, for the page.
        model: name of the base, for the page.
        base: fetches its folder.
        read: returns the rows of train and of eval.
        precision: of training and evaluation.
        rows: number of rows that a seed draws.
        rate: learning rate of the arms that are tuned; the plain one also tries half of it.
        methods: adversarial methods that are measured; without any, only AdaLoRA is.
    """

    title: str
    model: str
    base: Callable[[], Path]
    read: Callable[[], tuple[list[dict[str, Any]], list[dict[str, Any]]]]
    precision: str
    rows: int
    rate: float
    methods: tuple[str, ...]

    def trials(self) -> dict[str, list[dict[str, Any]]]:
        """Return the trials of each arm: learning rate (None: the default's) and strategies."""
        arms = {
            "lora": [_trial(None, "lora")],
            "adalora": [_trial(None, "adalora")],
            "adalora-7": [_trial(None, {"adalora": {"target_rank": 7}})],
        }
        if not self.methods:
            return arms
        arms["plain"] = [_trial(rate, "lora") for rate in (self.rate / 2, self.rate)]
        for method in self.methods:
            fixed, size, values = SIZES[method]
            options = [{"method": method, **fixed, size: value} for value in values]
            arms[method] = [_trial(self.rate, "lora", {"adversarial": o}) for o in options]
        taught = [{"teacher": f"base+{TEACHER}", "temperature": 2.0, "weight": weight} for weight in (0.5, 0.9)]
        arms["taught"] = [_trial(self.rate, "lora", {"distillation": o}) for o in taught]
        return arms


def _trial(rate: float | None, *strategies: Any) -> dict[str, Any]:
    return {"learning_rate": rate, "strategies": list(strategies)}


def _encoder(
    title: str, read: Callable[[], tuple[list[dict[str, Any]], list[dict[str, Any]]]], methods: tuple[str, ...] = ()
) -> Set:
    return Set(title, "MiniLM", models.minilm, read, "fp32", 256, 1.2e-3, methods)


def _sections() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return list(models.sections("train")), list(models.sections("eval"))


SECTION = "which of 15 sections a Debian package belongs to, given its description"
SETS = {
    "sections": _encoder(SECTION, _sections, METHODS),
    "products": _encoder(
        "whether a sentence of a product review is negative, neutral or positive",
        partial(models.vader_parts, "products"),
    ),
    "tweets": _encoder("the same of a tweet", partial(models.vader_parts, "tweets")),
    "smollm2-sections": Set(
        SECTION, "SmolLM2-135M-Instruct", models.smollm2, _sections, "bf16", 128, 1.3e-3,
        ("fgm", "neftune"),
    ),
}  # fmt: skip


def draw(rows: list[dict[str, str]], count: int, seed: object) -> list[dict[str, str]]:
    """Draw `count` rows at random, at least one of each label."""
    mixed = random.Random(str(seed)).sample(rows, len(rows))
    first = {row["label"]: row for row in reversed(mixed)}
    rest = [row for row in mixed if first[row["label"]] is not row]
    return [*first.values(), *rest][:count]


class Folder:
    """The benchmark's files: rows by set, part and seed, and each set's teacher.

    Attributes:
        frequent: the share of the most frequent class among the rows of eval, by set.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.pool: dict[str, list[dict[str, str]]] = {}
        self.frequent: dict[str, float] = {}
        for name, each in SETS.items():
            train, held = each.read()
            heldout = draw(train, settings["heldout_rows"], f"{name} heldout")
            taken = {id(row) for row in heldout}
            self.pool[name] = [row for row in train if id(row) not in taken]
            self._write(f"{name}-heldout", heldout)
            scored = draw(held, settings["eval_rows"], f"{name} eval")
            self.frequent[name] = max(Counter(row["label"] for row in scored).values()) / len(scored)
            self._write(f"{name}-eval", scored)
            self._write(f"{name}-pool", self.pool[name])

    def job(self, name: str, arm: str, number: int, trial: dict[str, Any], seed: int) -> dict[str, Any]:
        """Return the job of one run."""
        train = self.folder / f"{name}-{seed}.jsonl"
        if not train.exists():
            count = self.settings["sets"][name]["rows"]
            self._write(train.stem, draw(self.pool[name], count, f"{name} {seed}"))
        part = "heldout" if seed == TUNING_SEED else "eval"
        job = self._job(name, f"{name}/{arm}/{number}/{seed}", trial, train, self.folder / f"{name}-{part}.jsonl", seed)
        job["attacks"] = self.settings["attacks"] if arm in ATTACKED else {}
        job["count"] = part == "eval"
        return job

    def teacher(self, name: str) -> dict[str, Any]:
        """Return the job of a set's teacher: a higher rank, on all rows that are not held out."""
        rank = self.settings["teacher_rank"]
        trial = _trial(None, {"lora": {"rank": rank, "alpha": 2 * rank}})
        pool, held = self.folder / f"{name}-pool.jsonl", self.folder / f"{name}-eval.jsonl"
        job = self._job(name, f"{name}/teacher", trial, pool, held, TUNING_SEED)
        job["recipe"]["train"]["epochs"] = self.settings["teacher_epochs"]
        return {**job, "output": self._teacher(name), "keep": True}

    def _teacher(self, name: str) -> Path:
        return self.folder / f"{name}-teacher"

    def _job(self, name: str, key: str, trial: dict[str, Any], train: Path, held: Path, seed: int) -> dict[str, Any]:
        text = json.dumps(trial["strategies"]).replace(TEACHER, str(self._teacher(name) / "adapter"))
        rate = trial["learning_rate"]
        chosen = {} if rate is None else {"learning_rate": rate, "epochs": self.settings["epochs"]}
        recipe = {
            "base": {"model": str(SETS[name].base()), "quantization": "none", "task": "sequence-classification"},
            "data": {"train": str(train), "eval": "none"},
            "strategies": json.loads(text),
            "train": {"precision": SETS[name].precision, "seed": seed, **chosen},
        }
        output = self.folder / key.replace("/", "-")
        return {"key": key, "recipe": recipe, "data": held, "output": output, "attacks": {}, "count": False}

    def _write(self, stem: str, rows: list[dict[str, str]]) -> None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.folder / f"{stem}.jsonl").write_text(lines, encoding="utf-8")


def start_worker() -> None:
    """Use one thread per run: matrices are small, and results do not depend on the number of workers."""
    import torch

    torch.set_num_threads(1)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Tune and evaluate; return accuracies, and the number of parameters without the classification head."""
    import budwood
    from budwood.adapters.export import export
    from budwood.recipe.schema import Recipe
    from budwood.training.evaluate import evaluate_adapter

    started, output = time.process_time(), Path(job["output"])
    run = budwood.tune(Recipe.from_dict({**job["recipe"], "output": str(output)}), overwrite=True, quiet=True)
    adapter = output / "adapter"
    precision = job["recipe"]["train"]["precision"]
    scores = evaluate_adapter(adapter, job["data"], precision=precision, attacks=[*job["attacks"].values()], quiet=True)
    result: dict[str, Any] = {"clean": scores.adapter["eval_accuracy"], "steps": run.steps}
    for name, text in job["attacks"].items():
        result[name] = scores.attacks[text]["eval_accuracy"]
    if job["count"]:
        result["file_parameters"] = _parameters(adapter)
        as_lora = adapter if run.strategies[0].name == "lora" else export(adapter, output / "as-lora", "lora")
        result["parameters"] = _parameters(as_lora)
    if not job.get("keep"):
        shutil.rmtree(output)
    return {**result, "processor_seconds": round(time.process_time() - started, 2)}


def _parameters(adapter: Path) -> int:
    import math

    from budwood import read_adapter

    infos = read_adapter(adapter).infos
    return sum(math.prod(info.shape) for name, info in infos.items() if "lora_" in name)


class Benchmark:
    """The results so far, and the remaining runs."""

    def __init__(self, result: dict[str, Any], folder: Path, workers: int, out: tuple[Path, Path]) -> None:
        self.result, self.out, self.trials = result, out, result["settings"]["trials"]
        self.files = Folder(folder, result["settings"])
        result["frequent"] = self.files.frequent
        context = get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)

    def run(self, names: list[str], seeds: int) -> None:
        """Run teachers and trials of some sets, then the final runs seed by seed."""
        tuning = [
            self.files.job(name, arm, number, trial, TUNING_SEED)
            for name in names
            for arm, arm_trials in self.trials[name].items()
            if len(arm_trials) > 1
            for number, trial in enumerate(arm_trials)
        ]
        taught = [job for job in tuning if "/taught/" in job["key"]]
        self._do([*self._teachers(names, seeds), *(job for job in tuning if job not in taught)])
        self._do(taught)
        self._do([job for seed in range(seeds) for job in self._finals(names, seed)])
        self.save()

    def save(self) -> None:
        """Write the raw results, and the page once there is a final run."""
        raw, page = self.out
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
        if self.result["finals"]:
            render(self.result, page)

    def _finals(self, names: list[str], seed: int) -> list[dict[str, Any]]:
        """Return the jobs of a seed: each arm with its best trial, the plain arm with the best by each criterion."""
        jobs = []
        for name in names:
            for arm, arm_trials in self.trials[name].items():
                for number in sorted({best_trial(self.result, name, arm, by) for by in criteria(arm)}):
                    jobs.append(self.files.job(name, arm, number, arm_trials[number], seed))
        return jobs

    def _teachers(self, names: list[str], seeds: int) -> list[dict[str, Any]]:
        """Return the jobs of the teachers that unfinished runs need."""
        names = [name for name in names if "taught" in self.trials[name]]
        done = [sum(key.startswith(f"{name}/taught/") for key in self.result["finals"]) for name in names]
        return [self.files.teacher(name) for name, count in zip(names, done, strict=True) if count < seeds]

    def _do(self, jobs: list[dict[str, Any]]) -> None:
        for job, outcome in self._each(jobs):
            part = "teachers" if job.get("keep") else "trials" if job["key"].endswith(f"/{TUNING_SEED}") else "finals"
            recorded = self.result[part].setdefault(job["key"], outcome)
            if recorded["clean"] != outcome["clean"]:  # a teacher is trained again, as its files are not saved
                raise SystemExit(
                    f"error: {self.out[0]}: the accuracy of {job['key']} is {outcome['clean']:.4f} here and "
                    f"{recorded['clean']:.4f} in the file, which is from another machine; start without --continue."
                )
            self.save()

    def _each(self, jobs: list[dict[str, Any]]) -> Any:
        """Run the unfinished jobs; yield (job, outcome) as they complete."""
        done = {**self.result["trials"], **self.result["finals"]}
        pending = {self.pool.submit(work, job): job for job in jobs if job["key"] not in done}
        for future in as_completed(pending):
            job, outcome = pending[future], future.result()
            shown = ", ".join(f"{key} {value}" for key, value in outcome.items())
            say(f"{job['key']}: {shown}")
            yield job, outcome


def begin(settings: dict[str, Any], file: Path, resume: bool, quick: bool = False) -> dict[str, Any]:
    """Return an empty result, or the one in `file`."""
    settings = {**settings, "trials": {name: each.trials() for name, each in SETS.items()}}
    settings["sets"] = {
        name: {
            "title": each.title, "model": each.model, "precision": each.precision,
            "rows": QUICK_ROWS if quick else each.rows,
        }
        for name, each in SETS.items()
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))
    if not resume:
        return {"settings": settings, "machine": machine(), "teachers": {}, "trials": {}, "finals": {}}
    if not file.exists():
        raise SystemExit(f"error: --continue: {file} does not exist; start without it.")
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    differ = [name for name in settings if result["settings"].get(name) != settings[name]]
    differ += [f"machine's {key}" for key, value in machine().items() if result["machine"].get(key) != value]
    if differ:
        raise SystemExit(f"error: --continue: {file} was made with a different {', '.join(differ)}; start without it.")
    return result


def render(result: dict[str, Any], page: Path) -> None:
    """Write the page: these results, and those of other benchmarks that have run."""
    text = write_page(result)
    for file, section in SECTIONS.items():
        if file.exists():
            text += "\n" + section(json.loads(file.read_text(encoding="utf-8"))).rstrip("\n") + "\n"
    page.write_text(text, encoding="utf-8")


def main() -> None:
    """Run the remaining jobs, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="(default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="final runs of each arm (default 5)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="concurrent runs (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="few rows, short runs: a smoke test, not evidence")
    parser.add_argument("--continue", dest="resume", action="store_true", help="resume from the results in --json")
    parser.add_argument("--render", action="store_true", help="only write the page again, from the saved results")
    parser.add_argument("--json", type=Path, help="raw results (default docs/benchmarks/evidence.json)")
    parser.add_argument("--page", type=Path, help="page (default docs/evidence.md)")
    chosen = parser.parse_args()
    if chosen.seeds < 2 or chosen.workers < 1:
        parser.error("--seeds: at least 2, for a standard deviation; --workers: at least 1")
    if chosen.quick and not (chosen.json and chosen.page):
        parser.error("--quick: set --json and --page too, so that it does not replace the evidence")
    if chosen.render:
        render(json.loads((chosen.json or JSON).read_text(encoding="utf-8")), chosen.page or PAGE)
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # otherwise the workers would survive
    out = chosen.json or JSON, chosen.page or PAGE
    result = begin({**SETTINGS, **(QUICK if chosen.quick else {})}, out[0], chosen.resume, chosen.quick)
    with tempfile.TemporaryDirectory(prefix="budwood-bench-") as folder:
        benchmark = Benchmark(result, Path(folder), chosen.workers, out)
        try:
            benchmark.run(chosen.sets, chosen.seeds)
        except KeyboardInterrupt:
            say(f"interrupted; {out[0]} has the finished runs: resume with --continue")
            sys.exit(130)
        finally:
            benchmark.pool.shutdown(cancel_futures=True)
    say(f"wrote {out[0]}, {out[1]}")


if __name__ == "__main__":
    main()
