"""Two machines in one: a network namespace each, joined by a virtual cable, with folders that the other cannot see."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PORT = "29517"
LIMIT = 240
"""Timeout in seconds."""


@dataclass(frozen=True)
class Machine:
    """A machine: its folder, which is empty on the other, its name, and the name of its network card."""

    folder: Path
    name: str
    card: str
    network: str
    hidden: Path
    """The other machine's folder."""

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start a command in its folder, as the head of a process group of its own."""
        within = (
            f"mount -t tmpfs none {self.hidden} && hostname {self.name} && cd {self.folder} && "
            f'exec nsenter --net=/run/netns/{self.network} "$@"'
        )
        output = (self.folder / "output").open("w")
        with output:
            return subprocess.Popen(
                ["unshare", "--mount", "--uts", "sh", "-c", within, "sh", *arguments],
                stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                env={**os.environ, **environment},
            )  # fmt: skip

    @property
    def output(self) -> str:
        """What its last command printed."""
        return (self.folder / "output").read_text()


@dataclass(frozen=True)
class Ended:
    """How a run ended: the launchers' exit codes, each machine's lines `error: …`, and the seconds since a kill."""

    codes: list[int]
    errors: list[list[str]]
    seconds: float


def why_not() -> str:
    """Return why two machines cannot be made here; empty if they can."""
    if missing := [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]:
        return f"no network namespaces without {', '.join(missing)}"
    name = f"bw{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    mounted = ["unshare", "--mount", "--uts", "sh", "-c", "mount -t tmpfs none /mnt && hostname x"]
    tried = subprocess.run(mounted, capture_output=True, text=True)
    return f"no mount namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@contextlib.contextmanager
def two_machines(root: Path) -> Iterator[tuple[Machine, Machine]]:
    """Yield two machines, 10.213.7.1 and 10.213.7.2, whose folders are in `root`."""
    number = os.getpid()
    networks, cards = [f"bw{number}{c}" for c in "ab"], [f"bw{number % 100000}{c}" for c in "ab"]
    folders = [root / "first", root / "second"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for network in networks:
            ip("netns", "add", network)
        ip("link", "add", cards[0], "type", "veth", "peer", "name", cards[1])
        for index in range(2):
            folders[index].mkdir()
            ip("link", "set", cards[index], "netns", networks[index])
            ip("-n", networks[index], "addr", "add", f"10.213.7.{index + 1}/24", "dev", cards[index])
            for card in (cards[index], "lo"):
                ip("-n", networks[index], "link", "set", card, "up")
        names = ("node-a", "node-b")
        yield (
            Machine(folders[0], names[0], cards[0], networks[0], folders[1]),
            Machine(folders[1], names[1], cards[1], networks[1], folders[0]),
        )
    finally:
        for network in networks:
            subprocess.run(["ip", "netns", "delete", network], capture_output=True)


def tune_on(
    machines: Sequence[Machine], arguments: Sequence[str] = ("--overwrite",), each: int = 2, kills: int | None = None
) -> Ended:
    """Run `worker.py tune recipe.json` by torchrun on all machines, `each` processes on each.

    Args:
        kills: kill the launcher and the processes of this machine once there is a checkpoint, as if its power failed.
    """
    started = []
    for rank, machine in enumerate(machines):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(machines)), "--node-rank", str(rank),
            "--master-addr", "10.213.7.1", "--master-port", PORT, "--nproc-per-node", str(each), "worker.py", "tune",
            "recipe.json", *arguments,
        ]  # fmt: skip
        started.append(
            machine.start(
                command,
                {
                    "GLOO_SOCKET_IFNAME": machine.card, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                    "BUDWOOD_CACHE": str(machine.folder / "cache"), "HF_HOME": str(machine.folder / "hub"),
                    "PYTHONPATH": os.pathsep.join(sys.path),
                },
            )
        )  # fmt: skip
    end, killed = time.monotonic() + LIMIT, time.monotonic()
    try:
        while any(process.poll() is None for process in started) and time.monotonic() < end:
            if kills is not None and any((machines[0].folder / "run" / "checkpoints").glob("step-*")):
                _kill(started[kills])
                kills, killed = None, time.monotonic()
            time.sleep(0.05)
    finally:
        for process in started:
            _kill(process)
    outputs = [machine.output.splitlines() for machine in machines]
    errors = [[line for line in lines if line.startswith("error:")] for lines in outputs]
    return Ended([process.wait() for process in started], errors, time.monotonic() - killed)


def _kill(launcher: subprocess.Popen[str]) -> None:
    """Kill a launcher and its processes, which are sessions of their own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(launcher.pid)
        for process in [family, *family.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
