"""The adapter that a recipe continues: its checks before the base loads, and the options that it determines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from budwood.adapters.carried import carry
from budwood.adapters.peft_config import saved_whole_names
from budwood.adapters.store import SavedAdapter, read_adapter
from budwood.contract.loading import build_task, load_strategy
from budwood.errors import BudwoodError, InputError

if TYPE_CHECKING:
    from budwood.recipe.schema import Recipe
    from budwood.recipe.sections import Choice


def read_start(recipe: Recipe) -> SavedAdapter | None:
    """Read and check the adapter that a recipe continues; None if it continues none.

    Raises:
        InputError: it is not an adapter of the recipe's strategy and base, or lies in the output folder; or nothing of
            it goes on in the recipe's task.
        CorruptError: it is damaged.
    """
    if recipe.adapter is None:
        return None
    saved = _read(recipe, hashes=True)
    try:
        if saved.manifest is not None and saved.manifest.task == recipe.base.task:
            _check_origin(recipe, saved)
        return _carried(recipe, saved)
    except BudwoodError as error:
        raise type(error)(f"{recipe.where('adapter')}: adapter: {error}") from error


def _read(recipe: Recipe, hashes: bool) -> SavedAdapter:
    """Read the adapter, and check what needs neither its base nor all bytes of its files."""
    assert recipe.adapter is not None
    where = f"{recipe.where('adapter')}: adapter"
    if recipe.adapter.resolve().is_relative_to(recipe.output.resolve()):
        raise InputError(
            f"{where}: {recipe.adapter} is in the output folder, which --overwrite empties: name another output."
        )
    try:
        saved = read_adapter(recipe.adapter, base_name=recipe.base.model, hashes=hashes)
    except BudwoodError as error:
        is_name = len(recipe.adapter.parts) == 1 and not recipe.adapter.exists()  # `adapter: lora`, as Axolotl has it
        hint = " It names the folder of an adapter that the run continues; a new one is named in strategies."
        raise type(error)(f"{where}: {error}{hint if is_name else ''}") from error
    names = [choice.name for choice in recipe.strategies]
    if saved.adapter_type not in names:
        raise InputError(
            f"{where}: {recipe.adapter} is of type '{saved.adapter_type}', and a run continues only an adapter of its "
            f"own type: add the strategy {saved.adapter_type} in place of its adapter's, or merge the adapter into a "
            "base with `budwood adapter merge`."
        )
    return saved


def _check_origin(recipe: Recipe, saved: SavedAdapter) -> None:
    assert saved.manifest is not None
    base = recipe.base
    if saved.manifest.base.embeddings and not base.resize_embeddings:
        raise InputError(f"{saved.directory} has embeddings of new tokens: set base.resize_embeddings to true.")
    trained = saved.manifest.base.quantization
    if saved.manifest.needs_quantization and base.quantization != trained:
        raise InputError(
            f"{saved.directory} makes up for the error of its base in {trained}: set base.quantization to {trained}."
        )
    if Path(base.model).expanduser().is_dir():
        from budwood.model.base import fingerprint

        check_base_of(saved, base.model, fingerprint(base.model))


def _carried(recipe: Recipe, saved: SavedAdapter) -> SavedAdapter:
    """Return the adapter as the recipe's task takes it; see `carry`."""
    manifest, base = saved.manifest, recipe.base
    if manifest is None or manifest.task == base.task:
        return saved
    _check_origin(recipe, saved)
    from budwood.model.checks import skeleton

    tasks = [build_task(manifest.task, manifest.task_options), build_task(base.task, base.task_options)]
    old, new = (skeleton(base.model, task.auto_class, base.trust_remote_code) for task in tasks)
    return carry(saved, old, new, tasks[1].head_modules(new))


def _with_full_names(saved: SavedAdapter) -> dict[str, Any]:
    """Return an adapter's config; one of stock PEFT names modules that train whole more loosely than a recipe."""
    if saved.manifest is not None or not saved.config.get("modules_to_save"):
        return saved.config
    return {**saved.config, "modules_to_save": saved_whole_names(saved.config, saved.infos)}


def check_base_of(saved: SavedAdapter, name: str, fingerprint: str) -> None:
    """Check that an adapter was trained on this base; one of stock PEFT does not record its base.

    Raises:
        InputError: it was trained on another.
    """
    if saved.manifest is not None and saved.manifest.base.fingerprint != fingerprint:
        raise InputError(
            f"{saved.directory} was trained on the base {saved.manifest.base}, not on '{name}' ({fingerprint[:12]}): "
            "name that base."
        )


def continued_options(recipe: Recipe, choice: Choice) -> dict[str, Any]:
    """Return a strategy's options as written, with those of the adapter that it continues, if it owns it.

    Raises:
        InputError: an option contradicts the adapter, or the strategy cannot continue one.
    """
    if recipe.adapter is None or "adapter" not in (cls := load_strategy(choice.name)[0]).slots:
        return choice.options
    saved = _read(recipe, hashes=False)
    if saved.adapter_type != choice.name:
        return choice.options  # beside the adapter's own strategy, which is a problem of the recipe's
    try:
        saved = _carried(recipe, saved)
        fixed, defaults = cls.continued_options(_with_full_names(saved))
    except BudwoodError as error:
        raise type(error)(f"{recipe.where('adapter')}: adapter: {saved.directory}: {error}") from error
    for name, value in fixed.items():
        if name in choice.options and choice.options[name] != value:
            raise InputError(
                f"{recipe.where('strategies', choice.name, name)}: strategies.{choice.name}.{name}: "
                f"{choice.options[name]!r} contradicts the adapter in {saved.directory}, which has {value!r}: leave "
                "it out."
            )
    return {**defaults, **choice.options, **fixed}
