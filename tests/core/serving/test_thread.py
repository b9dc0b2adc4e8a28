"""The thread of a model at the exit of the interpreter, which aborts if one is still inside torch."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import time
import torch
from budwood.serving.thread import CommandThread

class Owner:
    def step(self):
        return False

def close():
    end = time.monotonic() + 1
    while time.monotonic() < end:
        torch.ones(1000).sum()
    print("closed")

def work(owner):
    time.sleep(0.3)

owner = Owner()
CommandThread(owner, close).post(lambda owner=owner: work(owner))
del owner  # the thread has the last reference, so it calls close
time.sleep(0.6)
"""


def test_a_thread_that_drops_the_last_reference_ends_before_the_interpreter() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")
