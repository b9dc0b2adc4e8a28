"""The study of a sweep: Optuna's, in a database that several workers may share. Imports no torch."""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from budwood.errors import BudwoodError, InputError, ResourceError, describe
from budwood.sweeps.space import Field
from budwood.training.records import flat
from budwood.untrusted.files import complete_file
from budwood.untrusted.redaction import redact_url

MARK = "sweep.json"
"""File that identifies the output folder of a sweep."""
DATABASE = "study.db"
IDENTITY = "budwood"
"""The study's attribute that says what it optimises."""
SILENT = 600
"""Seconds without a sign of life after which the trial of a worker on another machine counts as interrupted."""
STARTUP = 10
"""Random trials before Optuna's model chooses."""
UNPRUNED = 5
"""Complete trials before one is pruned."""


def need_optuna() -> Any:
    """Import Optuna, without its own log.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ResourceError("sweeps need Optuna: pip install 'budwood[sweep]', or pip install optuna.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


@dataclass(frozen=True)
class Goal:
    """What a sweep optimises.

    Attributes:
        recipe: the recipe as plain values, without the output.
        metric: a metric of evaluations, such as "eval_accuracy".
        higher: whether a higher value is better.
    """

    recipe: dict[str, Any]
    fields: Sequence[Field]
    metric: str
    higher: bool

    def record(self) -> dict[str, Any]:
        """Return the goal as plain values."""
        space = {field.key: field.record() for field in self.fields}
        direction = "higher" if self.higher else "lower"
        values = {"recipe": self.recipe, "space": space, "metric": self.metric, "direction": direction}
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


def check_folder(directory: Path, resume: bool) -> bool:
    """Return whether the folder holds a sweep.

    Raises:
        InputError: it holds a sweep without `resume`, or something else.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"output: {directory} is a file: name a folder.")
    if (directory / MARK).is_file():
        if not resume:
            raise InputError(
                f"output: {directory} holds a sweep: continue it with --resume, or name another folder with --output."
            )
        return True
    if directory.is_dir() and any(not path.name.startswith(".") for path in directory.iterdir()):
        raise InputError(f"output: {directory} is not empty and does not hold a sweep: name another folder.")
    return False


def open_study(
    directory: Path, storage: str | None, name: str, goal: Goal, seed: int, prune: bool, trials: int
) -> tuple[Any, bool]:
    """Open the study in the storage, or create it, and mark the folder as a sweep's.

    Args:
        storage: a URL of a database; None: a SQLite file in the folder.
        trials: a new study of at most so many combinations runs through all of them, none twice.

    Returns:
        The study, and whether it is new.

    Raises:
        InputError: the URL is none, or the study of this name is that of another sweep.
        ResourceError: the storage cannot be reached, or its driver is not installed.
    """
    optuna = need_optuna()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"output: {directory} cannot be written: {error.strerror}.") from error
    url = storage or f"sqlite:///{directory.absolute() / DATABASE}"
    direction = "maximize" if goal.higher else "minimize"
    pruner = optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED) if prune else optuna.pruners.NopPruner()
    try:
        backend = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": _waiting(url)})
        known = name in optuna.get_all_study_names(backend)
        if known:  # its first worker's draws must not be repeated
            seed = (seed + time.time_ns() + os.getpid()) % 2**32
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=STARTUP)
        study = optuna.create_study(
            storage=backend, sampler=sampler, pruner=pruner, study_name=name, direction=None if known else direction,
            load_if_exists=True,
        )  # fmt: skip
        if not known:
            study.set_user_attr(IDENTITY, goal.record())
        recorded = study.user_attrs.get(IDENTITY)
        new = not known
        if not known:
            _enqueue_all(study, goal.fields, trials)
    except Exception as error:
        if not any(directory.iterdir()):
            directory.rmdir()
        raise _unreachable(url, error) from error
    _check_same(recorded, goal, f"study '{name}' in {redact_url(url)}" if storage else f"output: {directory}")
    mark = {"budwood": metadata.version("budwood"), "study": name, "storage": redact_url(url) if storage else DATABASE}
    complete_file(directory / MARK, (json.dumps(mark, indent=2) + "\n").encode())
    return study, new


def _waiting(url: str) -> dict[str, Any]:
    """Return how long a driver waits: for the lock of SQLite, or for a server's answer."""
    if url.startswith("sqlite"):
        return {"timeout": 60}
    return {"connect_timeout": 10} if url.startswith(("postgresql", "mysql")) else {}


def _unreachable(url: str, error: Exception) -> BudwoodError:
    if isinstance(error, BudwoodError):
        return error
    shown, kind = redact_url(url), type(error).__name__
    if isinstance(error, ImportError):
        return ResourceError(
            f"--storage {shown}: its driver is not installed: install one, such as psycopg for PostgreSQL."
        )
    if kind in ("ArgumentError", "NoSuchModuleError") or isinstance(error, ValueError):
        return InputError(
            f"--storage {shown}: is not the URL of a database; write sqlite:///FILE or postgresql://HOST/NAME."
        )
    return ResourceError(f"--storage {shown}: cannot be used: {describe(getattr(error, 'orig', None) or error)}.")


def _check_same(recorded: Any, goal: Goal, where: str) -> None:
    if not isinstance(recorded, dict):
        raise InputError(f"{where} holds a study that Budwood did not create: choose another name with --study.")
    before, now = flat(recorded), flat(goal.record())
    changes = [
        f"{name}: {before.get(name, 'none')} → {now.get(name, 'none')}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if changes:
        more = f" and {len(changes) - 2} more" if len(changes) > 2 else ""
        raise InputError(
            f"{where} holds another sweep ({'; '.join(changes[:2])}{more}): name another folder or --study."
        )


def _enqueue_all(study: Any, fields: Sequence[Field], trials: int) -> None:
    """Put all combinations of a space in the queue, if there are at most `trials`."""
    if combinations(fields) <= trials:
        names = [field.key for field in fields]
        for values in itertools.product(*(field.values() for field in fields)):
            study.enqueue_trial({name: stored(value) for name, value in zip(names, values, strict=True)})


def combinations(fields: Sequence[Field]) -> float:
    """Return the number of combinations; infinite with a range of real numbers."""
    size: float = 1
    for field in fields:
        size *= field.count
    return size


def stored(value: Any) -> Any:
    """Return a value as Optuna stores it: lists and mappings as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def distributions(fields: Sequence[Field]) -> dict[str, Any]:
    """Return Optuna's distribution of each field."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    result: dict[str, Any] = {}
    for field in fields:
        if field.choices:
            result[field.key] = CategoricalDistribution([stored(value) for value in field.choices])
        elif field.whole:
            result[field.key] = IntDistribution(
                int(field.low), int(field.high), log=field.log, step=int(field.step or 1)
            )
        else:
            result[field.key] = FloatDistribution(field.low, field.high, log=field.log, step=field.step)
    return result


def values_of(params: dict[str, Any], fields: Sequence[Field]) -> dict[str, Any]:
    """Return a trial's values as the recipe takes them."""
    result = {}
    for field in fields:
        value = params[field.key]
        result[field.key] = next((choice for choice in field.choices if stored(choice) == value), value)
    return result


def this_worker() -> dict[str, Any]:
    """Return what identifies this process: its host, number and start."""
    return {"host": socket.gethostname(), "process": os.getpid(), "started": psutil.Process().create_time()}


def is_interrupted(trial: Any) -> bool:
    """Return whether the worker of a running trial is gone: not alive on this host, or silent on another."""
    worker = trial.user_attrs.get("worker")
    if not isinstance(worker, dict):  # killed between two writes; a live one writes it at once
        return (time.time() - trial.datetime_start.timestamp()) > 60 if trial.datetime_start else True
    if worker["host"] != socket.gethostname():
        return time.time() - float(trial.user_attrs.get("alive", 0)) > SILENT
    try:
        return abs(psutil.Process(worker["process"]).create_time() - worker["started"]) > 1
    except psutil.Error:
        return True


def requeue_interrupted(study: Any, say: Callable[[str], None]) -> None:
    """Mark trials whose worker is gone as failed, and put their values in the queue again."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if is_interrupted(trial) and requeue(study, trial.number, trial.user_attrs, trial.params):
            say(
                f"trial {trial.number} was interrupted when its worker ended; it is run again, from its last checkpoint"
            )


def requeue(study: Any, number: int, attributes: dict[str, Any], params: dict[str, Any]) -> bool:
    """Mark a trial as failed and put its values in the queue; return whether no other worker did so."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    trial_id = study.get_trials(deepcopy=False)[number]._trial_id
    try:
        study._storage.set_trial_user_attr(trial_id, "outcome", "interrupted")
        study.tell(number, state=TrialState.FAIL)
    except (UpdateFinishedTrialError, ValueError):
        return False
    if params:
        study.enqueue_trial(params, user_attrs={"folder": attributes.get("folder", "")})
    return True
