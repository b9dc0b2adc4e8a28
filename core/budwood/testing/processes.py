"""Runs in several processes of one group, with the environment that torchrun gives them.

They are forked from a process that has imported the libraries already, once for all runs of a session.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

LIBRARIES = [
    "torch.distributed", "transformers.models.llama.modeling_llama", "peft", "bitsandbytes", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "PIL.PngImagePlugin", "jinja2.sandbox",
    "transformers.utils.chat_template_utils", "budwood.training.loop", "budwood.training.evaluate",
    "budwood.cli.app", "budwood.testing.warm", "sklearn.metrics",
]  # fmt: skip
"""Modules that take the longest to import."""
_context = multiprocessing.get_context("forkserver")
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
    """Run recipes one after another in PROCESSES processes.

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
        left = [dict(recipe) for recipe in recipes[len(done) :]]
        ended = run_group(_work, (left, dict(classes), here), here, PROCESSES)
        outcomes = [_read(here, number) for number in range(len(left))]
        finished = [outcome for outcome in outcomes if outcome is not None]
        done += finished
        if len(done) < len(recipes) and not (finished and finished[-1].error):
            done.append(Outcome(error=_failure(ended)))
    return done


def run_group(
    work: Callable[..., None], arguments: Sequence[Any], folder: Path, count: int,
    limit: float = LIMIT, together: bool = True, port: int | None = None,
) -> list[tuple[int | None, str]]:  # fmt: skip
    """Call a function in `count` processes, on the CPU and with one thread each.

    Args:
        work: a function of an importable module.
        arguments: its arguments, which are pickled.
        folder: folder for the output of the processes, output-0 and so on.
        limit: timeout in seconds.
        together: kill the others as soon as one fails.
        port: of the first process; None: a free one.

    Returns:
        Of each process, its exit code (None: it did not end in time) and its output.
    """
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    group = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    started = []
    with without_main():
        for rank in range(count):
            environment = {**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = forkserver().Process(target=_call, args=(folder / f"output-{rank}", environment, work, arguments))
            process.start()
            started.append(process)
    end = time.monotonic() + limit
    while any(process.is_alive() for process in started) and time.monotonic() < end:
        if together and any(process.exitcode for process in started):
            break
        time.sleep(0.02)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()  # one that waits for a process that failed
        process.join()
    return [(code, _output(folder / f"output-{rank}")) for rank, code in enumerate(codes)]


def forkserver() -> ForkServerContext:
    """Return the context whose processes are forked from one that has imported the libraries."""
    _context.set_forkserver_preload(LIBRARIES)
    return _context


@contextmanager
def without_main() -> Iterator[None]:
    """Hide the main module, which a new process would import: a script may start tests without asking for its name."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _output(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _call(output: Path, environment: dict[str, str], work: Callable[..., None], arguments: Sequence[Any]) -> None:
    """Entry point of a process."""
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        work(*arguments)
    finally:
        atexit._run_exitfuncs()  # multiprocessing would skip them


def _read(folder: Path, number: int) -> Outcome | None:
    path = folder / f"{number}.json"
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    parameters = folder / f"{number}.safetensors"
    return Outcome(**values, parameters=parameters if parameters.exists() else None)


def _failure(ended: Sequence[tuple[int | None, str]]) -> str:
    """Return the last lines of the output of the process that failed."""
    if all(code in (0, None) for code, _ in ended):
        return f"the processes waited for each other for {LIMIT} seconds"
    output = next(output for code, output in ended if code)
    return "\n".join(output.strip().splitlines()[-20:])


def _work(recipes: Sequence[Mapping[str, Any]], classes: Mapping[str, Mapping[str, str]], folder: Path) -> None:
    """Run recipes in one of the processes."""
    import torch
    from safetensors.torch import save_file

    from budwood.recipe.schema import Recipe
    from budwood.testing.bench import explain, pretend_installed, without_plots
    from budwood.testing.probe import named_parameters
    from budwood.training.loop import tune

    main = os.environ["RANK"] == "0"
    for name, where in classes.items():
        pretend_installed(_find(where["module"], where["file"], where["class"]), name)
    for number, recipe in enumerate(recipes):
        try:
            with without_plots():
                run = tune(Recipe.from_dict(dict(recipe)), overwrite=True, quiet=True)
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
