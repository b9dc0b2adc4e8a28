"""The loop of a sweep: asks Optuna for values, runs a trial, tells the result, until trials or target are reached."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from budwood.errors import BudwoodError, CorruptError, DivergedError, InputError, Interrupted, ResourceError
from budwood.sweeps.space import Field
from budwood.sweeps.study import (
    DATABASE,
    MARK,
    Goal,
    combinations,
    distributions,
    requeue,
    requeue_interrupted,
    this_worker,
    values_of,
)
from budwood.sweeps.trial import WHOLE, Outcome, Watch, run_trial
from budwood.training.output import read_manifest
from budwood.untrusted.redaction import redact

TRIALS, LOGS = "trials", "logs"
SAME = 3
"""Failures in a row with the same message after which a sweep stops."""
BEAT = 30
"""Seconds between two signs of life."""
ERRORS = {error.exit_code: error for error in (InputError, ResourceError, CorruptError, DivergedError)}
"""Errors by the exit code of a trial's process."""


@dataclass
class Sweep:
    """A sweep on this worker.

    Attributes:
        recipe: the recipe's file; every trial is this file with overrides.
        overrides: those of the command line.
        directory: the output folder, with a run's folder for every trial.
        trials: number of trials of the study, those that failed included, interrupted ones not.
        target: stop once the metric is at least as good.
    """

    study: Any
    goal: Goal
    recipe: Path
    overrides: Sequence[str]
    directory: Path
    trials: int
    target: float | None
    allow_code: bool
    console: Console
    failures: list[str] = field(default_factory=list)
    error: type[BudwoodError] = BudwoodError
    """The kind of the last failure."""
    _beaten: float = 0.0

    @property
    def fields(self) -> Sequence[Field]:
        """The fields of the space."""
        return self.goal.fields

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(redact(text), markup=False)

    def run(self) -> None:
        """Run trials until there are enough, or one reaches the target.

        Raises:
            InputError: no evaluation gives the metric, the recipe changed, or every trial fails alike.
            Interrupted: a signal; the trial under way is saved and in the queue.
        """
        text = _digest(self.recipe)
        for folder in (self.directory / TRIALS, self.directory / LOGS):
            folder.mkdir(exist_ok=True)
        wanted = min(self.trials, combinations(self.fields))
        while not self.reached():
            requeue_interrupted(self.study, self.say)
            if counted(self.study) >= wanted and not _waiting(self.study):
                break
            if counted(self.study) >= self.trials:
                break
            if _digest(self.recipe) != text:
                raise InputError(
                    f"{self.recipe} changed during the sweep, so trials would not be comparable; {counted(self.study)} "
                    "are complete: restore it and continue with --resume, or begin another sweep."
                )
            self._trial()

    def reached(self) -> bool:
        """Whether the best trial reaches the target."""
        best = best_trial(self.study)
        if self.target is None or best is None:
            return False
        return bool(best.value >= self.target if self.goal.higher else best.value <= self.target)

    def _trial(self) -> None:
        from optuna.trial import TrialState

        with _storage_errors(self.study):
            trial = self.study.ask(distributions(self.fields))
            trial.set_user_attr("worker", this_worker())
            trial.set_user_attr("alive", time.time())
            name = trial.user_attrs.get("folder") or f"{TRIALS}/{trial.number:04d}"
            trial.set_user_attr("folder", name)
        values = values_of(trial.params, self.fields)
        shown = " ".join(f"{key}={_short(value)}" for key, value in values.items())
        total = min(self.trials, combinations(self.fields))
        self.say(f"trial {trial.number} ({counted(self.study)} of {total}): {shown}")
        twin = self._twin(trial)
        if twin is not None:
            trial.set_user_attr("outcome", f"as trial {twin.number}")
            trial.set_user_attr("folder", twin.user_attrs.get("folder"))
            self.study.tell(trial.number, twin.value)
            self.say(f"trial {trial.number}: the values of trial {twin.number}, whose result is the same")
            return
        overrides = [*self.overrides, *(item.override(values[item.key]) for item in self.fields)]
        log = self.directory / LOGS / f"{Path(name).name}.log"
        try:
            with self.console.status("") if self.console.is_terminal else contextlib.nullcontext() as status:
                watch = Watch(self.goal.metric, self._reporter(trial), self._beater(trial, status))
                outcome = run_trial(self.recipe, overrides, self.directory / name, log, watch, self.allow_code)
        except (KeyboardInterrupt, Interrupted) as error:
            requeue(self.study, trial.number, trial.user_attrs, trial.params)
            code = error.exit_code if isinstance(error, Interrupted) else 130
            raise Interrupted(
                f"interrupted in trial {trial.number}, which is saved and in the queue; continue with the same command "
                "and --resume",
                code,
            ) from None
        except InputError:  # the metric
            self.study.tell(trial.number, state=TrialState.FAIL)
            raise
        self._tell(trial, outcome)

    def _tell(self, trial: Any, outcome: Outcome) -> None:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        best = best_trial(self.study)
        try:
            with _storage_errors(self.study):
                trial.set_user_attr("outcome", outcome.state)
                trial.set_user_attr("seconds", round(outcome.seconds, 1))
                if outcome.error:
                    trial.set_user_attr("error", redact(outcome.error))
                if outcome.state == "complete":
                    self.study.tell(trial.number, outcome.value)
                elif outcome.state == "failed":
                    self.study.tell(trial.number, state=TrialState.FAIL)
                else:  # Optuna's model avoids their neighbourhood
                    self.study.tell(trial.number, state=TrialState.PRUNED)
        except UpdateFinishedTrialError:
            self.say(f"warning: trial {trial.number} was silent for so long that another worker repeats it")
            return
        span = f"{outcome.seconds:,.0f} s"
        if outcome.state == "complete":
            self.failures.clear()
            value = outcome.value or 0.0
            better = best is None or (value > best.value if self.goal.higher else value < best.value)
            rest = "the best so far" if better or best is None else f"best: {best.value:.4g} of trial {best.number}"
            self.say(f"trial {trial.number}: {self.goal.metric} {value:.4g} · {rest} · {span}")
        elif outcome.state == "pruned":
            self.say(f"trial {trial.number}: stopped early, behind the median of the others · {span}")
        else:
            what = {"does not fit": "not started", "diverged": "diverged"}.get(outcome.state, "failed")
            self.say(f"trial {trial.number}: {what}: {outcome.error}")
        if outcome.state in ("failed", "does not fit"):
            self._stop_if_hopeless(outcome)

    def _stop_if_hopeless(self, outcome: Outcome) -> None:
        """Raise the error of trials that fail for a reason that does not lie in their values."""
        self.failures.append(outcome.error)
        self.error = ERRORS.get(outcome.code, BudwoodError)
        if best_trial(self.study) is not None and outcome.code != 3:
            return
        alike = self.failures[-SAME:]
        own = any(f"-o {item.key}" in outcome.error or item.key in outcome.error for item in self.fields)
        first = outcome.code in (2, 4) and len(self.failures) == 1 and not own
        if first or (len(alike) == SAME and len(set(alike)) == 1):
            raise self.error(f"every trial fails alike, so the sweep stops: {outcome.error}")

    def _reporter(self, trial: Any) -> Callable[[int, float], bool]:
        def report(share: int, value: float) -> bool:
            with _storage_errors(self.study):
                trial.report(value, share)
                prune = bool(trial.should_prune())
            if share < WHOLE:
                self.say(f"trial {trial.number}: {self.goal.metric} {value:.4g} after {share / WHOLE:.0%} of the run")
            return prune

        return report

    def _beater(self, trial: Any, status: Any) -> Callable[[dict[str, Any], int], None]:
        def beat(record: dict[str, Any], total: int) -> None:
            if status is not None and record:
                loss = f" · loss {record['loss']:.4f}" if "loss" in record else ""
                status.update(f"trial {trial.number} · step {record['step']}/{total}{loss}")
            if time.monotonic() - self._beaten > BEAT:
                self._beaten = time.monotonic()
                with _storage_errors(self.study):
                    trial.set_user_attr("alive", time.time())

        return beat

    def _twin(self, trial: Any) -> Any:
        """Return the complete trial with the same values, if there is one: with the same seed it is the same run."""
        from optuna.trial import TrialState

        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return next((other for other in complete if other.params == trial.params), None)

    def discard(self) -> None:
        """Remove a study without a result that this process created, so that the corrected command can begin anew."""
        import optuna

        with contextlib.suppress(Exception):
            optuna.delete_study(study_name=self.study.study_name, storage=self.study._storage)
        for name in (TRIALS, LOGS):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        for name in (MARK, DATABASE):
            (self.directory / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.directory.rmdir()


@contextlib.contextmanager
def _storage_errors(study: Any) -> Iterator[None]:
    """Report a database that fails during the sweep as a lack of the machine's."""
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except StorageInternalError as error:
        cause = error.__cause__ or error
        raise ResourceError(
            f"the storage of study '{study.study_name}' failed ({str(cause).splitlines()[0]}); what is complete "
            "is kept: continue with --resume."
        ) from error


def best_trial(study: Any) -> Any:
    """Return the best complete trial, the earliest among equals; None if there is none."""
    from optuna.study import StudyDirection
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    return min(complete, key=lambda trial: (sign * trial.value, trial.number), default=None)


def counted(study: Any) -> int:
    """Return the number of trials that count: all that have begun, except those that were interrupted."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    return sum(t.state != TrialState.WAITING and t.user_attrs.get("outcome") != "interrupted" for t in trials)


def check_direction(sweep: Sweep) -> None:
    """Compare the direction with the one that runs know for their best metric.

    Raises:
        InputError: they differ.
    """
    best = best_trial(sweep.study)
    manifest = (read_manifest(sweep.directory / best.user_attrs["folder"]) or {}) if best is not None else {}
    known = manifest.get("best_metric") or {}
    if known.get("name") == sweep.goal.metric and bool(known["higher"]) != sweep.goal.higher:
        better = "higher" if known["higher"] else "lower"
        raise InputError(f"--direction: for {sweep.goal.metric}, {better} is better: begin another sweep without it.")


def _waiting(study: Any) -> bool:
    from optuna.trial import TrialState

    return bool(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
