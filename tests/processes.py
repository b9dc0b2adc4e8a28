"""Runs a script in several processes, as torchrun would, forked from one that has imported the libraries already."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path

LIBRARIES = [
    "torch.distributed", "transformers.models.llama.modeling_llama", "peft", "bitsandbytes", "budwood.training.loop",
]  # fmt: skip
"""Modules that take the longest to import."""
LIMIT = 240
"""Timeout in seconds."""

_context = multiprocessing.get_context("forkserver")


def run_in_two_processes(script: str, folder: Path, path: tuple[Path, ...] = ()) -> None:
    """Run `script`, Python source, in two processes of one group; see `run_in_processes`."""
    run_in_processes(script, folder, 2, path)


def run_in_processes(script: str, folder: Path, count: int, path: tuple[Path, ...] = ()) -> None:
    """Run `script`, Python source, in `count` processes of one group.

    Args:
        script: may expect one thread and torchrun's environment variables.
        folder: an empty or new folder for the script and its output.
        path: folders that the script imports from.

    Raises:
        AssertionError: a process failed or did not end in time; the message is its output.
    """
    folder.mkdir(exist_ok=True)
    (folder / "worker.py").write_text(script, encoding="utf-8")
    _context.set_forkserver_preload(LIBRARIES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    processes = []
    for rank in range(count):
        environment = {**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _context.Process(target=_run, args=(folder, rank, environment, [*map(str, path), *sys.path]))
        process.start()
        processes.append(process)
    end = time.monotonic() + LIMIT
    while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes) and time.monotonic() < end:
        time.sleep(0.02)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # one that waits for a process that failed
        process.join()
    assert codes == [0] * count, "\n".join((folder / f"output-{rank}").read_text() for rank in range(count))


def _run(folder: Path, rank: int, environment: dict[str, str], path: list[str]) -> None:
    """Run the script in a new process."""
    output = os.open(folder / f"output-{rank}", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path
    import torch

    torch.set_num_threads(1)
    try:
        runpy.run_path(str(folder / "worker.py"), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing would skip them
