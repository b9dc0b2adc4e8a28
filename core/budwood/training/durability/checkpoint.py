"""Checkpoints: the complete state for a bitwise identical resume, in folders that are complete or absent.

`runs/NAME/checkpoints/step-00000120/` holds `state.safetensors` (every tensor), `state.json` (everything else, with
references to the tensors) and, written last, `manifest.json`: the run's setting and the SHA-256 of each file. No pickle
is involved. A checkpoint holds the state at the end of an optimizer step, before any evaluation of that step.
"""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from budwood.contract.registry import Composition, PluginError
from budwood.contract.types import Run
from budwood.errors import CorruptError, InputError, ResourceError, system_error
from budwood.training.averages import average_state, load_average_state
from budwood.training.durability.changes import adapted, named_parameters, setting
from budwood.training.durability.lossless import check_same
from budwood.training.durability.reading import (
    FOLDER,
    FORMAT,
    MANIFEST,
    STATE,
    TENSORS,
    folder_name,
    sealed,
    steps_in,
)
from budwood.training.durability.resume import Resume
from budwood.training.durability.state import all_random_states, pack, set_random_state, unpack
from budwood.training.on_policy import active_state, load_active_state, sets_started
from budwood.training.progress import Best, Progress, planned_steps
from budwood.training.report import Report
from budwood.untrusted.files import complete_directory, sha256

SECONDS = 600
"""Time between checkpoints if the recipe has no `train.save_every`."""


class NotSavedError(ResourceError):
    """A checkpoint could not be written; the previous one is intact."""


@dataclass(frozen=True)
class Snapshot:
    """A run's state at the end of a step, copied to the CPU; `tree` is plain JSON that refers to `tensors`."""

    step: int
    tree: Any
    tensors: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        """Approximate size on disk."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values()) + (1 << 20)


class Saver:
    """Copies the run's state in the foreground and writes it in the background, one checkpoint at a time."""

    def __init__(self, run: Run, hooks: Composition, progress: Progress, resume: Resume | None = None) -> None:
        self.run, self.hooks, self.progress = run, hooks, progress
        self.setting = {**setting(run), **adapted(run)}
        self.accepted = resume.accepted if resume is not None else []
        self.folder = run.directory / FOLDER
        for partial in self.folder.glob(".*") if run.world.first else ():  # left by a killed process
            shutil.rmtree(partial, ignore_errors=True)
        self.last = 0
        """Step of the newest complete checkpoint; 0 if there is none."""
        self._submitted = 0
        self._checked = False
        """Whether the strategies' state has been checked to survive a round trip."""
        self._saved_at = time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._seconds = 0.0
        self._started = time.monotonic()

    def due(self) -> bool:
        """Whether to save a checkpoint of this step; all processes get the same answer."""
        every = self.run.recipe.train.save_every
        if every is not None:
            return bool(self.run.step % every == 0)
        late = time.monotonic() - self._saved_at >= SECONDS
        return self.run.world.broadcast(late)

    def check_space(self) -> None:
        """Check before training that the disk has room for the run's checkpoints and adapter.

        Raises:
            ResourceError: it has not; the message names the bytes needed.
        """
        current = self.snapshot()
        if not self.run.world.first:
            return
        train, evaluates = sum(p.nbytes for p in self.run.trainable), self.run.eval_examples is not None
        moments = sum(t.nbytes for name, t in current.tensors.items() if name.startswith("optimizer/"))
        best = sum(t.nbytes for name, t in current.tensors.items() if name.startswith("best/"))
        # Add tensors that do not exist yet: the optimizer's two moments and the best parameters.
        size = current.bytes + max(2 * train - moments, 0) + max(train * evaluates - best, 0)
        present = sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file()) if self.folder.is_dir() else 0
        # A new checkpoint is complete before an old one is removed, and the best may be kept in addition.
        needed = size * (self.run.recipe.train.keep_checkpoints + 1 + evaluates) + train - present
        free = _free(self.run.directory)
        if needed > free:
            raise ResourceError(
                f"output: the run needs {needed:,} bytes for checkpoints and adapter, and {free:,} are free in "
                f"{self.run.directory}: make room, lower train.keep_checkpoints, or name another folder."
            )

    def snapshot(self) -> Snapshot:
        """Copy the state at the end of the last completed step. Every process must call this."""
        run, progress = self.run, self.progress
        states = self.hooks.collect("state_dict", run=run)
        random_states = all_random_states(run)
        if not run.world.first:
            return Snapshot(run.step, None, {})
        tensors: dict[str, Tensor] = {}
        strategies = {}
        for plugin, plugin_state in states:
            try:
                packed = pack(plugin_state, tensors, f"strategies/{plugin.name}")
                if not self._checked:
                    restored = unpack(json.loads(json.dumps(packed, allow_nan=False)), tensors)
                    check_same(plugin_state, restored, f"strategies/{plugin.name}")
            except (TypeError, ValueError) as error:
                raise PluginError(f"{plugin}, hook state_dict: {error}.") from error
            strategies[plugin.name] = {"distribution": getattr(plugin, "distribution", ""), "state": packed}
        self._checked = True
        state = {
            "step": run.step,
            "epoch": run.epoch,
            "examples": progress.examples,
            "parameters": named_parameters(run),
            "average": average_state(run),
            "active": active_state(progress.active, run),
            "optimizer": run.optimizer.state_dict(),
            "scheduler": run.scheduler.state_dict(),
            "scaler": progress.scaler.state_dict(),
            "random": random_states,
            "skipped": progress.skipped,
            "metrics": run.metrics,
            "before": run.before,
            "task_weight": run.task_weight,
            "adapter_final": run.adapter_final,
            "micro_tokens": [run.micro_tokens, run.eval_tokens],
            "reference_tokens": run.reference_tokens,
            "seconds": self._seconds + time.monotonic() - self._started,
        }
        tree = pack(state, tensors)
        tree["strategies"] = strategies
        tree["best"] = pack(vars(progress.best), tensors, "best", copy=False)  # never modified
        return Snapshot(run.step, tree, tensors)

    def save(self, snapshot: Snapshot) -> None:
        """Start writing a snapshot after the previous one is written; does nothing if it is already written.

        Raises:
            NotSavedError: the disk is full, or the previous snapshot could not be written.
        """
        self.wait()
        self._saved_at = time.monotonic()
        if not self.run.world.first:
            self.last = snapshot.step
        if snapshot.step == self._submitted or not self.run.world.first:
            return
        self._submitted = snapshot.step
        if snapshot.bytes > _free(self.run.directory):
            raise self._failed(snapshot, "No space left on device")
        self._writing = self._pool.submit(self._write, snapshot)

    def wait(self) -> None:
        """Wait until the current snapshot is written.

        Raises:
            NotSavedError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def check(self) -> None:
        """Raise a background error if there is one, without waiting."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def finish(self, report: Report) -> None:
        """Wait for the last checkpoint after the results are written; a failure is only reported."""
        try:
            self.wait()
        except NotSavedError as error:
            report.say(f"warning: {error}")

    def close(self, wait: bool = True) -> None:
        """Accept no more snapshots. The current write completes: now, or without `wait` before the process ends."""
        self._pool.shutdown(wait)

    def resume_hint(self) -> str:
        """Return the command that resumes the run, for a message."""
        if not self.last:
            return "there is no checkpoint yet: the next run starts from the beginning"
        return f"resume from step {self.last} with: budwood tune {self.run.directory / 'recipe.yaml'} --resume"

    def _write(self, snapshot: Snapshot) -> None:
        target = self.folder / folder_name(snapshot.step)
        try:
            with complete_directory(target, replace=True) as folder:
                save_file(snapshot.tensors, folder / TENSORS)
                (folder / STATE).write_bytes(json.dumps(snapshot.tree, allow_nan=False).encode())
                manifest = {
                    "format": FORMAT,
                    "step": snapshot.step,
                    "setting": self.setting,
                    "accepted": self.accepted,
                    "files": {name: sha256(folder / name) for name in (TENSORS, STATE)},
                }
                (folder / MANIFEST).write_bytes(sealed(manifest))
        except (SafetensorError, ResourceError) as error:
            cause = system_error(error.__cause__ or error)
            reason = (cause is not None and cause.strerror) or str(error)
            raise self._failed(snapshot, reason) from error
        self.last = snapshot.step
        try:
            self._prune()
        except OSError as error:
            self.run.say(f"warning: an old checkpoint cannot be removed: {error}")

    def _prune(self) -> None:
        """Remove all but the last and the best, and those past the newest, which are from an abandoned run."""
        folders = steps_in(self.folder)
        kept = sorted(step for step in folders if step <= self.last)[-self.run.recipe.train.keep_checkpoints :]
        for step, path in folders.items():
            if step not in (*kept, self.progress.best.step):
                hidden = path.with_name(f".{path.name}.gone")  # an interrupted removal leaves no incomplete checkpoint
                path.rename(hidden)
                shutil.rmtree(hidden, ignore_errors=True)

    def _failed(self, snapshot: Snapshot, reason: str) -> NotSavedError:
        free = _free(self.run.directory)
        return NotSavedError(
            f"the checkpoint of step {snapshot.step} cannot be written ({reason}): it needs {snapshot.bytes:,} bytes, "
            f"and {free:,} are free in {self.folder}. Make room; {self.resume_hint()}"
        )

    def restore(self, resume: Resume) -> None:
        """Restore a checkpoint's state in a prepared run: strategies first, then parameters, then everything else.

        If changes were accepted, the recipe's current learning rates, weight decay and schedule apply.

        Raises:
            InputError: a parameter has a different shape.
            CorruptError: the state does not match the run.
        """
        run, progress, checkpoint = self.run, self.progress, resume.checkpoint
        state = checkpoint.load()
        try:
            for name, saved in state["strategies"].items():
                self.hooks.ask("load_state_dict", name, run=run, state=saved["state"])
            for name, parameter in named_parameters(run).items():
                value = state["parameters"][name]
                if value.shape != parameter.shape:
                    raise InputError(
                        f"{checkpoint.directory}: '{name}' is {list(value.shape)} there, but "
                        f"{list(parameter.shape)} in this run"
                    )
                parameter.data.copy_(value)
            load_average_state(run, state.get("average"))
            progress.active = load_active_state(run, self.hooks, state.get("active"))
            fresh = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in run.optimizer.param_groups]
            rates = getattr(run.scheduler, "base_lrs", None)
            run.optimizer.load_state_dict(state["optimizer"])
            run.scheduler.load_state_dict(state["scheduler"])
            if resume.changes and rates is not None:
                for group, values in zip(run.optimizer.param_groups, fresh, strict=True):
                    group.update(values)
                run.scheduler.base_lrs = rates
                run.scheduler.last_epoch -= 1
                run.scheduler.step()
            progress.scaler.load_state_dict(state["scaler"])
            progress.best = Best(**state["best"])
            progress.skipped, progress.examples = state["skipped"], state["examples"]
            run.step, run.epoch = state["step"], state["epoch"]
            run.metrics, run.before = dict(state["metrics"]), dict(state["before"])
            run.task_weight, run.adapter_final = state["task_weight"], state["adapter_final"]
            self._seconds = state["seconds"]
            if not resume.changes:
                run.micro_tokens, run.eval_tokens = state["micro_tokens"]
                drawn = islice(planned_steps(run), sets_started(self.hooks, run.step))
                planned = sum(len(indices) for _, indices in drawn)
                if planned != progress.examples:
                    raise CorruptError(
                        f"{checkpoint.directory}: records {progress.examples} examples drawn by then, but the run's "
                        f"plan draws {planned}"
                    )
            set_random_state(run, state["random"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise CorruptError(f"{checkpoint.directory}: its state does not match the run ({cause}).") from error
        self.last = self._submitted = checkpoint.step


def _free(directory: Path) -> int:
    """Return the free bytes on the folder's disk; 0 if the folder no longer exists."""
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return 0
