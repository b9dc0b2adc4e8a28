"""Checks of the adapter that a run continues against its data and its loaded base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from budwood.adapters.carried import CarriedAdapter
from budwood.adapters.match import mismatch
from budwood.adapters.peft_config import MisfitError
from budwood.adapters.store import SavedAdapter
from budwood.adapters.targets import whole_modules
from budwood.contract.calls import ask_owner
from budwood.contract.strategy import RUN_ADAPTER
from budwood.contract.types import Run
from budwood.errors import BudwoodError, CorruptError, InputError
from budwood.recipe.continued import check_base_of
from budwood.recipe.data import recipe_skeleton


def check_classes(run: Run) -> None:
    """Check that the data has the classes of the adapter that the run continues, before the base loads.

    Raises:
        InputError: they differ, or are in another order.
    """
    saved = run.start_adapter
    if saved is None or saved.manifest is None or isinstance(saved, CarriedAdapter):
        return
    if saved.manifest.labels == run.examples.labels:
        return
    theirs, ours = (", ".join(labels) or "none" for labels in (saved.manifest.labels, run.examples.labels))
    raise InputError(
        f"adapter: {saved.directory} was trained on the classes {theirs}, and the data has {ours}: they must be the "
        "same, in the same order."
    )


def check_fit(run: Run) -> None:
    """Attach the adapter that the run continues to the base without weights, as the run will to the loaded one.

    An adapter of another task is left out: modules of the loaded base complete it.

    Raises:
        InputError, CorruptError: its tensors do not fit the base or its config, or are not finite.
    """
    saved, task = run.start_adapter, run.task
    if saved is None or isinstance(saved, CarriedAdapter):
        return
    kwargs = task.model_kwargs(run.examples.labels)
    model = recipe_skeleton(run.recipe, task.auto_class, run.tokenizer, **kwargs)
    owner = next(s for s in run.strategies if s.name == saved.adapter_type)
    with naming_start(saved):
        tensors = saved.load_tensors()
        try:
            ask_owner(owner, "attach_adapter", model=model, config=saved.config, tensors=tensors, name=RUN_ADAPTER)
            ask_owner(owner, "detach_adapter", model=model, name=RUN_ADAPTER)
        except (InputError, CorruptError):
            raise
        except BudwoodError:
            return  # a strategy that needs the base's values finds what does not fit once it is loaded


def check_start(run: Run, saved: SavedAdapter) -> None:
    """Check that the loaded base is that of the adapter which the run continues, and report the adapter.

    Raises:
        InputError: it is another base, or has new embeddings that the adapter lacks.
    """
    check_base_of(saved, run.base.name, run.base.fingerprint)
    if run.base.added and saved.manifest is not None and saved.manifest.base.embeddings != run.base.added.stop:
        raise InputError(
            f"adapter: {saved.directory} has {saved.manifest.base.embeddings:,} embeddings, and the base with "
            f"base.resize_embeddings has {run.base.added.stop:,}: use the tokenizer that it was trained with."
        )
    size = f"{saved.parameters:,} parameters, SHA-256 {saved.hashes.weights[:12]}"
    notes = [note.rstrip(".") for note in saved.notes]
    if isinstance(saved, CarriedAdapter):
        notes.append(saved.describe())
    run.say("; ".join([f"adapter {saved.directory}: continued, {size}", *notes]))


@contextmanager
def naming_start(saved: SavedAdapter | None, fingerprint: str = "") -> Iterator[None]:
    """Name the adapter that the run continues in errors about its tensors.

    Args:
        fingerprint: of the base; empty before it is loaded.

    Raises:
        InputError, CorruptError: see `mismatch`.
    """
    try:
        yield
    except CorruptError as error:
        if saved is None or str(saved.directory) in str(error):
            raise
        if isinstance(error, MisfitError) and mismatch(saved, fingerprint) is InputError:
            files = ", or its complete files" if saved.manifest is None else ""  # otherwise they are as saved
            raise InputError(
                f"adapter: {saved.directory}: {error} Give the base that it was trained on{files}."
            ) from error
        raise type(error)(f"adapter: {saved.directory}: {error}") from error


def complete_start(run: Run) -> None:
    """Give an adapter of another task what is new in the run's: its heads, and modules that the checkpoint lacks."""
    if isinstance(run.start_adapter, CarriedAdapter):
        whole = whole_modules(run.base.model, [], run.task, run.base)
        run.start_adapter = run.start_adapter.with_new(run.base.model, whole)
