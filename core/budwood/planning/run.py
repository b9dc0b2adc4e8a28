"""`budwood.tune`: a run that is planned before its base loads."""

from __future__ import annotations

from pathlib import Path

from budwood.contract.types import Run
from budwood.planning.admission import admit
from budwood.recipe.schema import Recipe
from budwood.training import loop
from budwood.training.setup import Planner


def tune(
    recipe: Recipe | str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    accept_changes: bool = False,
    profile: bool = False,
    quiet: bool = False,
    before: float = 0.0,
    allow_code: bool = False,
    planner: Planner | None = admit,
) -> Run:
    """Train a recipe and write the adapter, log and plot to its output folder, as the command `budwood tune` does.

    Args:
        recipe: a `Recipe`, or the path of a recipe file.
        overwrite: replace the contents of the output folder.
        resume: resume from the newest valid checkpoint in the output folder. Without a checkpoint the run starts from
            the beginning; a finished run is returned unchanged.
        accept_changes: resume although the recipe, the data or library versions have changed.
        profile: print the time and memory of every strategy's hooks at the end. On CUDA, measuring itself takes time.
        quiet: print nothing.
        before: seconds that the process ran before, which the times of the run include as `startup`.
        allow_code: run Python files that the recipe names, such as rewards.
        planner: estimates memory and time before the base is loaded, refuses what cannot fit, and settles
            `train.micro_tokens` and `train.gradient_checkpointing` where they are auto. None: micro-batches then have
            the usual size of a CPU, and all layers recompute.

    Returns:
        The finished run; `run.metrics` holds the last evaluation, `run.directory` is the output folder.

    Raises:
        BudwoodError: one of its subclasses, each with the command's exit code.
    """
    return loop.tune(
        recipe, overwrite=overwrite, resume=resume, accept_changes=accept_changes, profile=profile, quiet=quiet,
        before=before, allow_code=allow_code, planner=planner,
    )  # fmt: skip
