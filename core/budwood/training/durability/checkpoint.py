"""Checkpoints: all that a run needs to go on to the same bytes, in folders that are complete or absent.

`runs/NAME/checkpoints/step-00000120/` holds `state.safetensors` (every tensor), `state.json` (all else, with the places
of the tensors) and, written last, `manifest.json`: what the run is made of, and the SHA-256 of each file. Nothing is
ever unpickled. What is saved is the state at the end of an optimizer step, before any evaluation of that step.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from budwood.contract.registry import Composition, PluginError
from budwood.contract.types import Run
from budwood.errors import CorruptError, InputError, ResourceError, system_error
from budwood.training.averages import average_state, load_average_state
from budwood.training.durability.changes import adapted, named_parameters, setting
from budwood.training.on_policy import active_state, load_active_state, sets_begun
from budwood.training.progress import Best, Progress, planned_steps
from budwood.training.report import Report
from budwood.untrusted.files import complete_directory, sha256
from budwood.untrusted.formats import read_header, read_json

if TYPE_CHECKING:
    from budwood.training.durability.resume import Resume

FOLDER, TENSORS, STATE, MANIFEST = "checkpoints", "state.safetensors", "state.json", "manifest.json"
FORMAT = 1
MAX_STATE = 64 << 20
"""Largest state.json and manifest.json that are read, in bytes."""
SECONDS = 600
"""Time between checkpoints where the recipe gives no `train.save_every`."""


class NotSavedError(ResourceError):
    """A checkpoint could not be written; the one before is whole."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found sound on disk: every file has the hash that its manifest says.

    `setting` is what the run was made of; see `changes`.
    """

    directory: Path
    step: int
    setting: dict[str, Any]
    accepted: list[dict[str, Any]]

    def load(self) -> dict[str, Any]:
        """Read the state.

        Raises:
            CorruptError: it changed since it was found.
        """
        read_header(self.directory / TENSORS)
        try:
            tensors = load_file(self.directory / TENSORS)
            state = unpack(read_json(self.directory / STATE, MAX_STATE), tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{self.directory}: cannot be read: {error}.") from error
        if not isinstance(state, dict):
            raise CorruptError(f"{self.directory / STATE}: holds no state.")
        return state


@dataclass(frozen=True)
class Snapshot:
    """A run at the end of a step, copied to the CPU: `tree` is plain JSON that refers to `tensors`."""

    step: int
    tree: Any
    tensors: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        """About as much as it takes on disk."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values()) + (1 << 20)


def find_newest(directory: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest sound checkpoint of the run in `directory`; one that is damaged is named and passed over.

    Raises:
        CorruptError: there are some, and none is sound.
    """
    found = sorted(steps_in(directory / FOLDER).items(), reverse=True)
    for _, path in found:
        try:
            return read_checkpoint(path)
        except (CorruptError, ResourceError, OSError) as error:
            say(f"warning: {error} The checkpoint before it is tried.")
    if found:
        raise CorruptError(f"{directory / FOLDER}: no checkpoint is sound: start over with --overwrite.")
    return None


def steps_in(folder: Path) -> dict[int, Path]:
    """Folders of checkpoints by their step."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {int(p.name[5:]): p for p in paths if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir()}


def read_checkpoint(path: Path) -> Checkpoint:
    """Check a checkpoint, every file by its hash.

    Raises:
        CorruptError: it names the file that is truncated, altered, missing, or too many.
    """
    where = path / MANIFEST
    if not where.is_file():
        raise CorruptError(f"{where}: is missing.")
    manifest = read_json(where, MAX_STATE)
    stated = manifest.pop("sha256", None)
    if stated != _digest(manifest) or where.read_bytes() != _text(manifest | {"sha256": stated}):
        raise CorruptError(f"{where}: was altered after it was saved.")
    kinds = {"files": dict, "setting": dict, "accepted": list, "step": int}
    if not all(type(manifest.get(name)) is kind for name, kind in kinds.items()):
        raise CorruptError(f"{where}: is not that of a checkpoint.")
    if manifest.get("format") != FORMAT:
        raise CorruptError(f"{where}: format {manifest.get('format')}; this Budwood reads format {FORMAT}.")
    if path.name != _name(manifest["step"]):
        raise CorruptError(f"{path}: is the checkpoint of step {manifest['step']}.")
    present = {p.name for p in path.iterdir()} - {MANIFEST}
    for name in sorted(present ^ manifest["files"].keys()):
        raise CorruptError(f"{path / name}: {'does not belong there' if name in present else 'is missing'}.")
    for name, expected in manifest["files"].items():
        try:
            if sha256(path / name) != expected:
                raise CorruptError(f"{path / name}: was altered after it was saved (its SHA-256 differs).")
        except OSError as error:
            raise CorruptError(f"{path / name}: cannot be read: {error.strerror}.") from error
    return Checkpoint(path, manifest["step"], manifest["setting"], manifest["accepted"])


class Saver:
    """Takes the run's state in the foreground, and writes it in the background, one checkpoint at a time."""

    def __init__(self, run: Run, hooks: Composition, progress: Progress, resume: Resume | None = None) -> None:
        self.run, self.hooks, self.progress = run, hooks, progress
        self.setting = {**setting(run), **adapted(run)}
        self.accepted = resume.accepted if resume is not None else []
        self.folder = run.directory / FOLDER
        for left in self.folder.glob(".*") if run.accelerator.is_main_process else ():  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.last = 0
        """Step of the newest complete checkpoint; 0: none."""
        self._submitted = 0
        self._saved_at = time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._seconds = 0.0
        self._started = time.monotonic()

    def due(self) -> bool:
        """Whether a checkpoint of this step shall be saved; every process gets the same answer."""
        every = self.run.recipe.train.save_every
        if every is not None:
            return bool(self.run.step % every == 0)
        late = time.monotonic() - self._saved_at >= SECONDS
        if self.run.processes > 1:
            flag = torch.tensor(int(late), device=self.run.device)
            torch.distributed.broadcast(flag, 0)
            late = bool(flag)
        return late

    def check_space(self) -> None:
        """Check before training begins that the disk has room for what the run will keep.

        Raises:
            ResourceError: with the bytes needed.
        """
        now = self.snapshot()
        if not self.run.accelerator.is_main_process:
            return
        train, evaluates = sum(p.nbytes for p in self.run.trainable), self.run.eval_examples is not None
        moments = sum(t.nbytes for name, t in now.tensors.items() if name.startswith("optimizer/"))
        best = sum(t.nbytes for name, t in now.tensors.items() if name.startswith("best/"))
        # What is not there yet: an optimizer's two moments, the best parameters.
        one = now.bytes + max(2 * train - moments, 0) + max(train * evaluates - best, 0)
        there = sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file()) if self.folder.is_dir() else 0
        # A new one is complete before an old one goes; the best may be beside the last.
        needed = one * (self.run.recipe.train.keep_checkpoints + 1 + evaluates) + train - there
        free = _free(self.run.directory)
        if needed > free:
            raise ResourceError(
                f"output: the run needs {needed:,} bytes for checkpoints and adapter, and {free:,} are free in "
                f"{self.run.directory}: make room, lower train.keep_checkpoints, or name another folder."
            )

    def snapshot(self) -> Snapshot:
        """Copy the state at the end of the step that was completed last. Every process must call it."""
        run, progress = self.run, self.progress
        states = self.hooks.collect("state_dict", run=run)
        everyone = _all_random_states(run)
        if not run.accelerator.is_main_process:
            return Snapshot(run.step, None, {})
        tensors: dict[str, Tensor] = {}
        strategies = {}
        for plugin, found in states:
            try:
                packed = pack(found, tensors, f"strategies/{plugin.name}")
            except TypeError as error:
                raise PluginError(f"{plugin}, hook state_dict: {error}.") from error
            strategies[plugin.name] = {"distribution": getattr(plugin, "distribution", ""), "state": packed}
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
            "random": everyone,
            "skipped": progress.skipped,
            "metrics": run.metrics,
            "before": run.before,
            "task_weight": run.task_weight,
            "adapter_final": run.adapter_final,
            "micro_tokens": [run.micro_tokens, run.eval_tokens],
            "seconds": self._seconds + time.monotonic() - self._started,
        }
        tree = pack(state, tensors)
        tree["strategies"] = strategies
        tree["best"] = pack(vars(progress.best), tensors, "best", copy=False)  # made once, changed never
        return Snapshot(run.step, tree, tensors)

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write a snapshot, once the one before is written; does nothing where it is written already.

        Raises:
            NotSavedError: the disk has no room for it, or the one before could not be written.
        """
        self.wait()
        self._saved_at = time.monotonic()
        if not self.run.accelerator.is_main_process:
            self.last = snapshot.step
        if snapshot.step == self._submitted or not self.run.accelerator.is_main_process:
            return
        self._submitted = snapshot.step
        if snapshot.bytes > _free(self.run.directory):
            raise self._failed(snapshot, "No space left on device")
        self._writing = self._pool.submit(self._write, snapshot)

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
            NotSavedError: it could not be.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def check(self) -> None:
        """Raise what went wrong in the background, without waiting for it."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def finish(self, report: Report) -> None:
        """Wait for the last checkpoint of a run whose results are written; without it they are no less whole."""
        try:
            self.wait()
        except NotSavedError as error:
            report.say(f"warning: {error}")

    def close(self, wait: bool = True) -> None:
        """Take no more. What is being written is completed: now, or without `wait` before the process ends."""
        self._pool.shutdown(wait)

    def how_to_go_on(self) -> str:
        """The command that resumes the run, for a message."""
        if not self.last:
            return "there is no checkpoint yet, so it begins anew"
        return f"go on from step {self.last} with: budwood tune {self.run.directory / 'recipe.yaml'} --resume"

    def _write(self, snapshot: Snapshot) -> None:
        target = self.folder / _name(snapshot.step)
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
                (folder / MANIFEST).write_bytes(_text(manifest | {"sha256": _digest(manifest)}))
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
        """Remove all but the last and the best; whatever stands behind the newest is of a run that was not gone on."""
        found = steps_in(self.folder)
        kept = sorted(step for step in found if step <= self.last)[-self.run.recipe.train.keep_checkpoints :]
        for step, path in found.items():
            if step not in (*kept, self.progress.best.step):
                hidden = path.with_name(f".{path.name}.gone")  # what has its name is whole, also when this is cut short
                path.rename(hidden)
                shutil.rmtree(hidden, ignore_errors=True)

    def _failed(self, snapshot: Snapshot, reason: str) -> NotSavedError:
        free = _free(self.run.directory)
        return NotSavedError(
            f"the checkpoint of step {snapshot.step} cannot be written ({reason}): it needs {snapshot.bytes:,} bytes, "
            f"and {free:,} are free in {self.folder}. Make room; {self.how_to_go_on()}"
        )

    def restore(self, resume: Resume) -> None:
        """Put a checkpoint's state into a run that is prepared: strategies first, then shapes, then all else.

        Where changes were accepted, what the recipe says now of rates, decay and schedule holds.

        Raises:
            InputError: a parameter has another shape.
            CorruptError: the state does not fit the run.
        """
        run, progress, checkpoint = self.run, self.progress, resume.checkpoint
        state = checkpoint.load()
        try:
            for name, saved in state["strategies"].items():
                self.hooks.ask("load_state_dict", name, run=run, state=saved["state"])
            for name, parameter in named_parameters(run).items():
                kept = state["parameters"][name]
                if kept.shape != parameter.shape:
                    raise InputError(
                        f"{checkpoint.directory}: '{name}' is {list(kept.shape)} there and {list(parameter.shape)} here"
                    )
                parameter.data.copy_(kept)
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
                drawn = islice(planned_steps(run), sets_begun(self.hooks, run.step))
                planned = sum(len(indices) for _, indices in drawn)
                if planned != progress.examples:
                    raise CorruptError(
                        f"{checkpoint.directory}: {progress.examples} examples were drawn by then, and the plan of the "
                        f"run makes them {planned}"
                    )
            _set_random_state(run, state["random"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            what = f"{type(error).__name__}: {error}"
            raise CorruptError(f"{checkpoint.directory}: its state does not fit the run ({what}).") from error
        self.last = self._submitted = checkpoint.step


def pack(value: Any, tensors: dict[str, Tensor], place: str = "", copy: bool = True) -> Any:
    """Turn nested values into plain JSON; tensors are copied to the CPU, into `tensors`, under their place.

    Tuples, arrays, keys that are no text, and numbers that are not finite are marked, so that `unpack` gives the same.

    Raises:
        TypeError: a value is none of these; the message names its place.
    """
    if isinstance(value, Tensor | np.ndarray) and place in tensors:
        place = f"{place}#{len(tensors)}"  # keys that hold slashes may meet
    if isinstance(value, Tensor):
        tensors[place] = (value.detach().to("cpu", copy=True) if copy else value).contiguous()
        return {"$tensor": place}
    if isinstance(value, np.ndarray):
        tensors[place] = torch.from_numpy(value.copy())
        return {"$array": place}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, Mapping):
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        packed = {key: pack(item, tensors, f"{place}/{key}".lstrip("/"), copy) for key, item in value.items()}
        return packed if plain else {"$items": [[key, item] for key, item in packed.items()]}
    if isinstance(value, list | tuple):
        items = [pack(item, tensors, f"{place}/{i}", copy) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    raise TypeError(f"{place}: a {type(value).__name__} cannot be saved; give tensors and JSON values")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `pack`."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((mark, inner),) = value.items()
        if mark == "$tensor":
            return tensors[inner]
        if mark == "$array":
            return tensors[inner].numpy()
        if mark == "$float":
            return float(inner)
        if mark == "$tuple":
            return tuple(unpack(item, tensors) for item in inner)
        if mark == "$items":
            return {key: unpack(item, tensors) for key, item in inner}
    return {key: unpack(item, tensors) for key, item in value.items()}


def _random_state(run: Run) -> Tensor:
    """Python's, NumPy's and torch's random states as one vector [n] float64, which holds all their integers exactly."""
    version, internal, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    _, keys, position, has_gauss, cached = legacy
    parts = [
        torch.tensor([version, *internal, math.nan if gauss is None else gauss], dtype=torch.float64),
        torch.tensor([*keys.tolist(), position, has_gauss, cached], dtype=torch.float64),
        torch.get_rng_state().double(),
    ]
    if run.device.type == "cuda":
        parts.append(torch.cuda.get_rng_state(run.device).double())
    return torch.cat(parts)


def _all_random_states(run: Run) -> Tensor:
    """The random states of every process, [processes, n] float64."""
    own = _random_state(run)
    if run.processes == 1:
        return own[None]
    everyone = [torch.empty_like(own, device=run.device) for _ in range(run.processes)]
    torch.distributed.all_gather(everyone, own.to(run.device))
    return torch.stack(everyone).cpu()


def _set_random_state(run: Run, everyone: Tensor) -> None:
    """Put this process's random states back; one that had none starts a stream of its own."""
    if run.process_index >= len(everyone):
        torch.manual_seed(run.seed + run.process_index + run.step)
        return
    sizes = [627, 627, len(torch.get_rng_state())]
    python, numpy, cpu, cuda = everyone[run.process_index].split([*sizes, everyone.shape[1] - sum(sizes)])
    version, *internal, gauss = python.tolist()
    random.setstate((int(version), tuple(map(int, internal)), None if math.isnan(gauss) else gauss))
    *keys, position, has_gauss, cached = numpy.tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(cpu.to(torch.uint8))
    if run.device.type == "cuda" and len(cuda):
        torch.cuda.set_rng_state(cuda.to(torch.uint8), run.device)


def _free(directory: Path) -> int:
    """Free bytes of the folder's disk; 0 where the folder is gone."""
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return 0


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _text(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(manifest)).hexdigest()
