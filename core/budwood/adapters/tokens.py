"""Embedding rows that an adapter trains, as PEFT's `trainable_token_indices`; the base's tables do not change.

PEFT copies the whole table in every forward pass, and its backward pass computes the gradient of the whole table. Here
only the trained rows are computed, and replace the base's. They may lie beyond the base's table, so an adapter with new
tokens runs on a base that was not resized, together with other adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from budwood.adapters.peft_config import MERGE, PREFIX, SavedLowRankConfig
from budwood.adapters.targets import base_modules
from budwood.errors import CorruptError, InputError
from budwood.model.embeddings import head_of, table_of
from budwood.untrusted.redaction import shorten

if TYPE_CHECKING:
    from budwood.model.base import Base

KEY = "token_adapter.trainable_tokens_delta"
"""Key of an adapter's rows in PEFT's file. Despite its name, the tensor holds the rows, not a difference."""


@dataclass(frozen=True)
class _Ids:
    """Token ids of an adapter's rows: sorted, on the device of the base's module; `inside` of them lie in its table."""

    sorted: Tensor
    order: Tensor
    inside: int
    count: int


class TokenRows(nn.Module):
    """An embedding table or a head in which each adapter may have its own rows.

    Attributes:
        base_layer: the base's module.
        rows: each adapter's rows [n, d] fp32; those of a tied head are the embeddings'.
        tied: names of adapters whose rows are those of the tied input embeddings.
        active: the adapter in use; None: the base's module alone.
    """

    base_layer: Any  # nn.Embedding or nn.Linear

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rows = nn.ParameterDict()
        self.ids: dict[str, _Ids] = {}
        self.tied: set[str] = set()
        self.active: str | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    @property
    def num_embeddings(self) -> int:
        """Number of token ids that the module currently accepts."""
        size = len(self.base_layer.weight)
        return size if self.active is None else max(size, self.ids[self.active].count)

    def add(self, name: str, ids: Sequence[int], shared: nn.Parameter | None = None) -> None:
        """Give the adapter `name` rows for these token ids: copies of the base's, or `shared` with tied embeddings."""
        weight, chosen = self.base_layer.weight, torch.tensor(ids)
        found, order = chosen.sort()
        inside = sum(i < len(weight) for i in ids)  # on the host: in planning, tensors have no values
        device = weight.device
        self.ids[name] = _Ids(found.to(device), order.to(device), inside, max(ids) + 1)
        if shared is None:
            known = chosen.clamp(max=len(weight) - 1).to(device)
            shared = nn.Parameter(weight.detach()[known].float())
        else:
            self.tied.add(name)
        self.rows[name] = shared

    def remove(self, name: str) -> None:
        """Remove the adapter `name`, if it has rows here."""
        if name in self.rows:
            self.rows.pop(name)
            self.ids.pop(name)
            self.tied.discard(name)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the base's module with the active adapter's rows."""
        if self.active is None:
            y: Tensor = self.base_layer(x)
            return y
        ids = self.ids[self.active]
        rows = self.rows[self.active][ids.order].to(self.base_layer.weight.dtype)
        beyond = ids.inside < len(rows)
        if isinstance(self.base_layer, nn.Embedding):
            y = self.base_layer(x.clamp(max=len(self.base_layer.weight) - 1) if beyond else x)
            return self._replaced(x, y, ids.sorted, rows)
        y = self.base_layer(x)
        own = F.linear(x, rows).to(y.dtype)
        if ids.inside:
            y.index_copy_(-1, ids.sorted[: ids.inside], own[..., : ids.inside])  # in place: y holds many logits
        return torch.cat([y, own[..., ids.inside :]], -1) if beyond else y

    def _replaced(self, x: Tensor, y: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        at = torch.searchsorted(ids, x.long()).clamp_(max=len(ids) - 1)
        own = F.embedding(at, rows)
        scale = getattr(self.base_layer, "embed_scale", None)
        if scale is not None:
            own = own * (scale.to(own.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where((ids[at] == x)[..., None], own.to(y.dtype), y)


def new_tokens(model: Any, base: Base | None, whole: Collection[str] = ()) -> dict[str, list[int]]:
    """Return the rows that a run must train because its base was resized: token ids by module name.

    Args:
        base: the model's base; None before it is loaded.
        whole: full names of fully trained modules, which include the new rows.

    Raises:
        InputError: only one of two tied modules is fully trained.
    """
    ids = list(base.added) if base is not None else []
    if not ids:
        return {}
    ends = [path for path in ends_of(model) if path is not None]
    rest = [path for path in ends if not any(f"{path}.".startswith(f"{name}.") for name in whole)]
    if not is_tied(model):
        return dict.fromkeys(rest, ids)
    if len(rest) == 1 and len(ends) == 2:
        other = next(path for path in ends if path not in rest)
        raise InputError(
            f"modules_to_save: '{other}' is tied to '{rest[0]}', whose new rows train (base.resize_embeddings): "
            "name both, or neither."
        )
    return dict.fromkeys(rest[:1], ids)


def saved_tokens(
    model: Any, saved: SavedLowRankConfig, tensors: Mapping[str, Tensor], whole: Collection[str] = ()
) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Return the rows of a saved adapter: token ids by full module name, and its tensors with these rows.

    PEFT saves whole tables with an adapter whose base was resized; rows beyond this base's are the adapter's too.

    Args:
        tensors: the file's tensors.
        whole: full names of modules that the adapter replaces.

    Raises:
        CorruptError: the model has none of the modules; a token id is negative or named twice; or the number of
            rows in the file differs.
        InputError: a module is neither the embeddings nor the head.
    """
    embedding, head = ends_of(model)
    tied, own, found = is_tied(model), dict(tensors), _given(model, saved)
    keys = {path: f"{PREFIX}{path}." for path in (embedding, head) if path is not None}
    for path, ids in found.items():
        rows = own.get(keys[path] + KEY)
        if rows is None or rows.shape[:1] != (len(ids),):
            count = 0 if rows is None or not rows.ndim else len(rows)
            where = "adapter_config.json: trainable_token_indices"
            raise CorruptError(f"{where}: {len(ids):,} rows of '{path}', but the file has {count:,}.")
    if tied and embedding in found and head not in found:  # PEFT repeats them if it saves whole tables
        _drop_equal(own, keys[str(head)] + KEY, own[keys[str(embedding)] + KEY])
    tables = {}
    for path in keys:
        if path in whole:
            if tied and saved.trainable_token_indices:
                raise InputError(f"'{path}' is tied and replaced, but rows of it are trained too: {MERGE}.")
            _drop_equal(own, f"{keys[path]}modules_to_save.weight", own.get(f"{keys[path]}weight"))
            if (original := own.get(f"{keys[path]}original_module.weight")) is not None and original.ndim == 2:
                own[f"{keys[path]}original_module.weight"] = original[: len(model.get_submodule(path).weight)]
            continue
        size = len(model.get_submodule(path).weight)
        for key in (keys[path] + inner + "weight" for inner in ("", "base_layer.", "token_adapter.base_layer.")):
            if key not in own or own[key].ndim != 2 or len(own[key]) <= size:
                continue
            table = tables[path] = own[key]
            own[key] = table[:size]
            if tied and path == head and embedding in tables:
                if table.equal(tables[embedding]):
                    continue
                raise InputError(f"'{key}' is not tied to the embeddings, but the base's is: {MERGE}.")
            rest = sorted(set(range(size, len(table))) - set(found.get(path, ())))
            if rest:
                found[path] = [*found.get(path, ()), *rest]
                given = own.get(keys[path] + KEY, table[:0])
                own[keys[path] + KEY] = torch.cat([given, table[rest].to(given.dtype)])
    return found, own


def _given(model: Any, saved: SavedLowRankConfig) -> dict[str, list[int]]:
    """Return the config's token ids by full module name, without a tied head."""
    given, where = saved.trainable_token_indices, "adapter_config.json: trainable_token_indices"
    if not given:
        return {}
    embedding, head = ends_of(model)
    wanted = given if isinstance(given, dict) else {embedding or "embed_tokens": given}
    modules = [name for name, _ in base_modules(model) if name]
    found: dict[str, list[int]] = {}
    for end, ids in wanted.items():
        names = [name for name in modules if name.endswith(end)]
        if not names or not ids:
            raise CorruptError(f"{where}: the model has no '{shorten(end)}', or the list of token ids is empty.")
        if min(ids) < 0 or len(set(ids)) < len(ids):
            raise CorruptError(f"{where}: '{shorten(end)}' has a negative or repeated token id.")
        for name in names:
            if name not in (embedding, head):
                raise InputError(f"{where}: '{name}' is neither the input embeddings nor the head: {MERGE}.")
            found[name] = ids
    if embedding in found and found.get(str(head)) == found[str(embedding)] and is_tied(model):
        del found[str(head)]
    return found


def _drop_equal(tensors: dict[str, Tensor], key: str, other: Tensor | None) -> None:
    """Drop a tensor that the file holds twice.

    Raises:
        InputError: the two differ, as when the base ties them and the adapter does not.
    """
    if key in tensors:
        if other is None or not tensors[key].equal(other):
            raise InputError(f"'{key}' differs from a tensor in the same file that it should equal: {MERGE}.")
        del tensors[key]


def wrap_tokens(model: Any, tokens: Mapping[str, list[int]], name: str) -> None:
    """Give the adapter `name` its own rows in these modules, inactive; a tied head shares those of the embeddings.

    Args:
        tokens: token ids by full module name.

    Raises:
        InputError: another adapter uses such a module, or PEFT would compute something else there.
    """
    embedding, head = ends_of(model)
    tied = is_tied(model)
    for path, ids in tokens.items():
        rows = _wrapped(model, path)
        check_rows(path, ids, rows.base_layer)
        rows.add(name, ids)
        if path == embedding and tied and head is not None and head not in tokens and not _replaces(model, head, name):
            _wrapped(model, head).add(name, ids, rows.rows[name])


def check_rows(path: str, ids: Sequence[int], module: Any) -> None:
    """Refuse rows beyond a table unless they follow it without a gap."""
    size = len(module.weight)
    beyond = sorted(i for i in ids if i >= size)
    if beyond != [*range(size, size + len(beyond))]:
        raise InputError(
            f"trainable_token_indices: '{path}' has {size:,} rows, and the adapter has row {beyond[-1]:,} but not "
            f"all before it: it needs a base that was resized to at least {beyond[-1] + 1:,} rows. Save that base."
        )


def token_rows(model: nn.Module, name: str) -> Iterator[tuple[str, TokenRows]]:
    """Yield each module in which the adapter `name` has rows, including tied heads, with its path."""
    for path, module in model.named_modules():
        if isinstance(module, TokenRows) and name in module.rows:
            yield path, module


def token_tensors(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the rows of the adapter `name`, keyed as in PEFT's file; those of a tied head are not repeated."""
    return {f"{PREFIX}{path}.{KEY}": m.rows[name] for path, m in token_rows(model, name) if name not in m.tied}


def select_tokens(model: nn.Module, names: Collection[str], single: str | None) -> None:
    """Activate the rows of the adapter `single`, which computes every row of the next batches; None: of no adapter.

    Raises:
        InputError: an adapter in `names` has rows, but would share a batch with others.
    """
    wrappers = [module for module in model.modules() if isinstance(module, TokenRows)]
    for module in wrappers if single is None else ():
        for name in set(names) & set(module.rows):
            raise InputError(f"adapter '{name}' has its own rows of embeddings and cannot share a batch with others.")
    for module in wrappers:
        module.active = single if single is not None and single in module.rows else None


def remove_tokens(model: Any, name: str) -> None:
    """Remove the rows of the adapter `name`; a module without rows of other adapters becomes the base's own again."""
    for path, module in list(model.named_modules()):
        if isinstance(module, TokenRows):
            module.remove(name)
            if not module.rows:
                parent, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(parent), leaf, module.base_layer)


@torch.no_grad()
def merge_tokens(model: Any, name: str) -> None:
    """Overwrite the base's rows with those of the adapter `name`; the base must have as many."""
    for _, module in token_rows(model, name):
        if name not in module.tied:
            ids, weight = module.ids[name], module.base_layer.weight
            weight[ids.sorted] = module.rows[name][ids.order].to(weight.dtype)
            module.ids[name] = replace(ids, inside=len(ids.sorted))


def _wrapped(model: Any, path: str) -> TokenRows:
    """Return the wrapper of a module, adding one if it has none.

    Raises:
        InputError: the module does not support an adapter's own rows.
    """
    parent, _, leaf = path.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, TokenRows):
        return module
    if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper):
        raise InputError(
            f"'{path}' is adapted or replaced while some of its rows are trained, which is not supported: "
            "leave it out of the targets and modules_to_save, unload the other adapter first, or merge a saved one "
            "with PEFT (merge_and_unload)."
        )
    check_plain(path, module)
    wrapper = TokenRows(module)
    setattr(model.get_submodule(parent), leaf, wrapper)
    return wrapper


def check_plain(path: str, module: Any) -> None:
    """Refuse a module that does not support an adapter's own rows."""
    plain = isinstance(module, nn.Embedding) and (
        type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    )
    if not plain and (type(module) is not nn.Linear or module.bias is not None):
        raise InputError(
            f"'{path}' is neither a plain embedding table nor a linear without bias ({type(module).__name__}), so "
            f"training rows of it is not supported: {MERGE}."
        )


def ends_of(model: Any) -> tuple[str | None, str | None]:
    """Return the full names of the input embeddings and of the head, None if the model has none."""
    ends = (table_of(model), head_of(model))
    paths = {id(module): path for path, module in model.named_modules()}
    return paths.get(id(ends[0])), paths.get(id(ends[1]))


def _replaces(model: Any, path: str, name: str) -> bool:
    """Return whether the adapter `name` replaces the whole module."""
    module = model.get_submodule(path)
    return isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save


def fit_whole(model: Any, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Enlarge the embeddings and the head that the adapter `name` replaces to the number of rows in its file.

    Args:
        tensors: the file's tensors.
    """
    for path in filter(None, ends_of(model)):
        if not _replaces(model, path, name):
            continue
        module: Any = model.get_submodule(path).modules_to_save[name]
        saved = tensors.get(f"{PREFIX}{path}.weight")
        if saved is None or saved.ndim != 2 or len(saved) <= len(module.weight):
            continue
        for key, value in list(module.named_parameters(recurse=False)):
            more = value.new_zeros(len(saved) - len(value), *value.shape[1:])
            setattr(module, key, nn.Parameter(torch.cat([value.detach(), more]), value.requires_grad))
        setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", len(saved))


def rows_needed(model: Any, name: str) -> int:
    """Return the number of token embeddings that the adapter `name` computes with; 0 if it has none of its own."""
    counts = [module.ids[name].count for _, module in token_rows(model, name)]
    for path in filter(None, ends_of(model)):
        if _replaces(model, path, name):
            counts.append(len(model.get_submodule(path).modules_to_save[name].weight))
    return max(counts, default=0)


def is_tied(model: Any) -> bool:
    """Return whether a model's head has the weight of its embeddings."""
    head: Any = head_of(model)
    weight = getattr(head, "weight", None)
    return weight is not None and weight is getattr(table_of(model), "weight", None)
