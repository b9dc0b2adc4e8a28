"""Runs in several processes: the parent starts torchrun once for many recipes; as a module, this file is the worker.

torchrun --nproc-per-node 2 -m budwood.testing.processes JOBS.json
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROCESSES = int(os.environ.get("BUDWOOD_TEST_PROCESSES", "2"))
"""Number of processes; another one is for tests of core."""
PARALLEL = os.environ.get("BUDWOOD_TEST_PARALLEL")
"""How they hold the base: `train.parallel` of their recipes; None: as these say."""
LIMIT = 300
"""Timeout in seconds of processes that wait for each other."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one recipe in several processes.

    Attributes:
        processes: number of processes according to the run.
        world: number of processes according to torch.distributed.
        metrics: final metrics of the run.
        parameters: safetensors file of the trained parameters, by group and name.
        error: why it did not finish, or "".
    """

    processes: int = 0
    world: int = 0
    metrics: Mapping[str, float] | None = None
    parameters: Path | None = None
    error: str = ""


def tune_in_processes(
    recipes: Sequence[Mapping[str, Any]], classes: Mapping[str, Mapping[str, str]], folder: Path
) -> list[Outcome]:
    """Run recipes one after another in PROCESSES processes started by torchrun.

    A failure ends the processes; they are restarted for the remaining recipes.

    Args:
        recipes: plain values from `Recipe.to_dict`.
        classes: classes of the temporary distribution, from `bench.registered`.
        folder: folder for the output of the processes.
    """
    if PARALLEL:
        recipes = [{**recipe, "train": {**recipe["train"], "parallel": PARALLEL}} for recipe in recipes]
    done: list[Outcome] = []
    while len(done) < len(recipes):
        here = Path(tempfile.mkdtemp(dir=folder, prefix="processes-"))
        jobs = {"recipes": list(recipes[len(done) :]), "classes": dict(classes), "folder": str(here)}
        (here / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
        output = _start(here / "jobs.json")
        outcomes = [_read(here, number) for number in range(len(jobs["recipes"]))]
        finished = [outcome for outcome in outcomes if outcome is not None]
        done += finished
        if len(done) < len(recipes) and not (finished and finished[-1].error):
            done.append(Outcome(error=output))
    return done


def _start(jobs: Path) -> str:
    """Run torchrun; return the last lines of its output."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={PROCESSES}", "--standalone"]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            [*torchrun, "-m", "budwood.testing.processes", str(jobs)],
            capture_output=True, text=True, timeout=LIMIT, env=environment, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"the processes waited for each other for {LIMIT} seconds"
    return "\n".join((done.stderr or done.stdout).strip().splitlines()[-20:])


def _read(folder: Path, number: int) -> Outcome | None:
    path = folder / f"{number}.json"
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    parameters = folder / f"{number}.safetensors"
    return Outcome(**values, parameters=parameters if parameters.exists() else None)


def _work(path: Path) -> None:
    """Entry point of a worker process."""
    import torch
    from safetensors.torch import save_file

    from budwood.recipe.schema import Recipe
    from budwood.testing.bench import explain, pretend_installed, without_plots
    from budwood.testing.probe import named_parameters
    from budwood.training.loop import tune

    torch.set_num_threads(1)
    jobs = json.loads(path.read_text(encoding="utf-8"))
    folder, main = Path(jobs["folder"]), os.environ["RANK"] == "0"
    for name, where in jobs["classes"].items():
        pretend_installed(_find(where["module"], where["file"], where["class"]), name)
    for number, recipe in enumerate(jobs["recipes"]):
        try:
            with without_plots():
                run = tune(Recipe.from_dict(recipe), overwrite=True, quiet=True)
        except Exception as error:
            failure = {"error": f"in process {os.environ['RANK']}: {explain(error)}"}
            (folder / f"{number}.json").write_text(json.dumps(failure), encoding="utf-8")
            raise
        assert not PARALLEL or run.sharded == (PARALLEL == "shard")
        if main:
            tensors = {name: tensor.contiguous() for name, tensor in named_parameters(run).items()}
            save_file(tensors, folder / f"{number}.safetensors")
            values = {
                "processes": run.processes,
                "world": torch.distributed.get_world_size(),
                "metrics": {name: float(value) for name, value in run.metrics.items()},
            }
            (folder / f"{number}.json").write_text(json.dumps(values), encoding="utf-8")
    torch.distributed.destroy_process_group()


def _find(module: str, file: str, class_name: str) -> Any:
    """Return a class from its module, which is loaded from its file if it cannot be imported (a test module)."""
    try:
        imported = sys.modules.get(module) or importlib.import_module(module)
    except ImportError:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None and spec.loader is not None, file
        imported = importlib.util.module_from_spec(spec)
        sys.modules[module] = imported
        spec.loader.exec_module(imported)
    target: Any = imported
    for part in class_name.split("."):
        target = getattr(target, part)
    return target


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
