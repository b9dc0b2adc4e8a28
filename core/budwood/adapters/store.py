"""An adapter on disk: PEFT's layout plus `budwood.json`. Written completely or not at all; treated as untrusted input.

Reading imports torch only to load tensors, so that an invalid adapter is rejected before a model loads.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from budwood import __version__
from budwood.adapters.base_names import named_differently
from budwood.adapters.manifest import (
    FORMAT,
    BaseRecord,
    ChatRecord,
    EvaluationRecord,
    MadeRecord,
    Manifest,
    ParentRecord,
    template_hash,
    tokenizer_hash,
)
from budwood.adapters.weights import Weights, check_dtypes, read_weights
from budwood.contract.discovery import installed
from budwood.contract.loading import adapter_owner
from budwood.errors import CorruptError, InputError
from budwood.untrusted.files import check_inside, complete_directory, sha256
from budwood.untrusted.formats import TensorInfo, invalid_field, json_numbers, read_header, read_json
from budwood.untrusted.redaction import shorten

if TYPE_CHECKING:
    from torch import Tensor

    from budwood.contract.examples import Example
    from budwood.model.base import Base

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MANIFEST = "budwood.json"
GOLDEN = "golden.safetensors"

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
_NAMES_CODE = ("auto_mapping", "auto_map", "megatron_config", "megatron_core", "custom_modules")
"""Fields of a config that make a library import code named in the file (PEFT writes some into every adapter). They are
never passed on."""


@dataclass(frozen=True)
class SavedAdapter:
    """A valid adapter on disk, without its tensors.

    Attributes:
        adapter_type: name of the strategy that attaches it.
        config: adapter_config.json without the fields that name code.
        infos: dtype and shape of every tensor, with PEFT's keys.
        manifest: budwood.json; None for an adapter of stock PEFT.
        notes: messages for the user, one line each.
        weights: the content of adapter_model.safetensors, if it was read.
    """

    directory: Path
    adapter_type: str
    config: dict[str, Any]
    infos: dict[str, TensorInfo]
    manifest: Manifest | None
    notes: list[str] = field(default_factory=list)
    weights: Weights | None = field(default=None, repr=False, compare=False)

    @property
    def bytes(self) -> int:
        """Total bytes of all tensors."""
        return sum(info.bytes for info in self.infos.values())

    @property
    def parameters(self) -> int:
        """Total elements of all tensors."""
        return sum(math.prod(info.shape) for info in self.infos.values())

    @property
    def base_name(self) -> str:
        """Name of its base as it records it, or as PEFT's config does; "" if neither does."""
        name = self.manifest.base.name if self.manifest is not None else self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) else ""

    @cached_property
    def hashes(self) -> ParentRecord:
        """The hashes that identify it, by its budwood.json or, without one, by its files."""
        files = self.manifest.files if self.manifest is not None else {}
        weights, config = (files.get(name) or sha256(self.directory / name) for name in (WEIGHTS, CONFIG))
        return ParentRecord(weights=weights, config=config)

    @property
    def identity(self) -> str:
        """SHA-256 of what the adapter computes: its weights and its config, whatever its name or place.

        Raises:
            CorruptError, ResourceError: see `read_weights`.
        """
        config = json.dumps(self.config, sort_keys=True)
        return hashlib.sha256(f"{self.read().sha256}\n{config}".encode()).hexdigest()

    def read(self) -> Weights:
        """Return the file's content: that which was read with the adapter, or else it is read now.

        Raises:
            CorruptError: the file has changed since the adapter was checked.
            ResourceError: see `read_weights`.
        """
        if self.weights is not None:
            return self.weights
        weights = read_weights(self.directory / WEIGHTS)
        expected = self.manifest.files.get(WEIGHTS) if self.manifest is not None else None
        if expected not in (None, weights.sha256) or _layout(weights.infos) != _layout(self.infos):
            raise CorruptError(f"{weights.path}: was altered after it was saved (its SHA-256 differs from {MANIFEST}).")
        return weights

    def load_tensors(self) -> dict[str, Tensor]:
        """Return all tensors, on the CPU in their stored dtype.

        Raises:
            CorruptError: see `read` and `Weights.tensors`.
            ResourceError: the tensors are larger than the machine's memory.
        """
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily():  # a plan reads the adapter that its run continues
            return self.read().tensors()


def _layout(infos: Mapping[str, TensorInfo]) -> dict[str, tuple[Any, ...]]:
    return {name: (info.dtype, info.shape, info.start) for name, info in infos.items()}


def write_adapter(
    directory: Path,
    write: Callable[[Path], None],
    *,
    adapter_type: str,
    distribution: str,
    base: Base,
    task: str,
    task_options: Mapping[str, Any] | None = None,
    labels: Sequence[str] = (),
    tokenizer: Any = None,
    metrics: Mapping[str, float] | None = None,
    evaluation: EvaluationRecord | None = None,
    strategies: Sequence[dict[str, Any]] = (),
    stop_ids: Sequence[int] = (),
    chat: ChatRecord | None = None,
    on_messages: bool | None = None,
    needs_quantization: bool = False,
    parent: ParentRecord | None = None,
    grown_from: Sequence[int] | None = None,
    made: MadeRecord | None = None,
    probes: Sequence[Example] = (),
    base_logits: Sequence[Tensor] = (),
    adapter_logits: Sequence[Tensor] = (),
    needs: int = 0,
) -> SavedAdapter:
    """Write an adapter atomically: at any moment the folder is the complete old or the complete new one.

    Args:
        directory: the adapter's folder; an existing adapter is replaced.
        write: writes adapter_config.json, adapter_model.safetensors and any further files into the folder it receives.
        adapter_type: name of the strategy that attaches it.
        distribution: that strategy's distribution and version, such as "budwood 0.1.0".
        base: the base it was trained on.
        task: name of the task.
        task_options: its options, as JSON values.
        labels: class names for classification, in the order of the head's rows.
        tokenizer: its vocabulary and chat template are recorded by hash.
        metrics: results of the adapter's evaluation.
        evaluation: how that evaluation was done.
        strategies: name, distribution and options of every strategy of the run.
        stop_ids: tokens that end an answer in addition to the end-of-sequence token.
        chat: how messages are rendered; None: as the base's chat template says.
        on_messages: whether it was trained on messages.
        needs_quantization: whether it is right only on the base as quantised now.
        parent: the adapter that its run continued.
        grown_from: the lowest and highest rank of that adapter's updates, if the run raised them.
        made: how it was made from others, if it was not trained.
        probes: inputs for the golden logits; without any, `verify` has nothing to replay.
        base_logits: logits of the base alone at each probe, [vocabulary or classes] fp32.
        adapter_logits: logits with the adapter, same shapes.
        needs: expected size in bytes, for the message if the disk is full; 0: unknown.

    Raises:
        InputError: `directory` holds something other than an adapter.
        CorruptError: the written adapter cannot be read back.
        ResourceError: the disk is full or read-only.
    """
    from budwood.adapters.golden import Golden, current_setting

    directory = Path(directory)
    if (
        directory.exists()
        and not (directory / CONFIG).exists()
        and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise InputError(f"{directory} exists and is not an adapter: choose another folder.")
    golden = Golden.of(probes, base_logits, adapter_logits) if probes else None
    with complete_directory(directory, replace=True, needs=needs) as folder:
        write(folder)
        if golden is not None:
            golden.save(folder / GOLDEN)
        files = {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        manifest = Manifest(
            adapter_type=adapter_type,
            distribution=distribution,
            base=BaseRecord.of(base),
            task=task,
            task_options=dict(task_options or {}),
            labels=list(labels),
            tokenizer=tokenizer_hash(tokenizer),
            template=template_hash(tokenizer),
            metrics=json_numbers(metrics or {}),
            evaluation=evaluation,
            strategies=list(strategies),
            stop_ids=list(stop_ids),
            chat=chat,
            on_messages=on_messages,
            needs_quantization=needs_quantization,
            parent=parent,
            grown_from=list(grown_from) if grown_from is not None else None,
            made=made,
            golden=current_setting(base) if golden else None,
            files=files,
            created_by=f"budwood {__version__}",
        )
        (folder / MANIFEST).write_text(sealed(manifest.model_dump(mode="json")), encoding="utf-8")
        saved = read_adapter(folder)
    return SavedAdapter(directory, saved.adapter_type, saved.config, saved.infos, saved.manifest)


def sealed(values: Mapping[str, Any]) -> str:
    """Return the text of budwood.json: `values` plus "sha256", the hash of the text with an empty "sha256"."""
    text = json.dumps({**values, "sha256": ""}, indent=2, ensure_ascii=False) + "\n"
    return text.replace('"sha256": ""', f'"sha256": "{hashlib.sha256(text.encode()).hexdigest()}"')


def _check_seal(path: Path, values: Mapping[str, Any]) -> None:
    stated, data = values.get("sha256"), path.read_bytes()
    if stated is None and values.get("format") == 1:
        return
    if not isinstance(stated, str) or len(stated) != 64:
        raise CorruptError(f"{path}: was altered after it was saved: it does not contain its own hash.")
    if hashlib.sha256(data.replace(stated.encode(), b"")).hexdigest() != stated:
        raise CorruptError(f"{path}: was altered after it was saved (its SHA-256 differs).")


def read_adapter(
    directory: str | Path,
    *,
    base_name: str = "",
    base_fingerprint: str | None = None,
    allow_other_base: bool = False,
    hashes: bool = True,
    weights: bool = False,
) -> SavedAdapter:
    """Read and check an adapter; parses only JSON and a safetensors header.

    Args:
        directory: a folder that Budwood or stock PEFT wrote.
        base_name: name of the base to use, for messages.
        base_fingerprint: that base's fingerprint; None skips the check.
        allow_other_base: accept a different base, with a note.
        hashes: compare every file's hash with budwood.json, which reads the complete files.
        weights: keep what is read of adapter_model.safetensors, so that what was checked is what is used.

    Raises:
        InputError: the folder or the adapter in it does not exist, the base differs, or the type is not installed.
        CorruptError: a file is pickled, truncated, altered, implausible, or differs from budwood.json.
    """
    directory = Path(directory)
    check_there(directory)
    notes: list[str] = []
    _find_weights(directory, notes)
    check_inside(directory, (CONFIG, WEIGHTS, MANIFEST, GOLDEN))
    config = read_json(directory / CONFIG)
    manifest = _read_manifest(directory)
    content = read_weights(directory / WEIGHTS) if weights else None
    infos = content.infos if content is not None else read_header(directory / WEIGHTS)
    if not infos:
        raise CorruptError(f"{directory / WEIGHTS}: holds no tensor.")
    _check_ranks(directory, config, infos)
    named = config.get("modules_to_save")
    whole = [end for end in named if isinstance(end, str) and end] if isinstance(named, list) else []
    check_dtypes(directory / WEIGHTS, infos, whole)
    if manifest is None:
        notes.append("no budwood.json (an adapter of stock PEFT): its base is not checked.")
        base = config.get("base_model_name_or_path")
        if isinstance(base, str) and named_differently(base, base_name):
            notes.append(f"its {CONFIG} names the base '{shorten(base)}', and this base is '{base_name}'.")
    else:
        _check_files(directory, manifest, hashes, content)
        _check_base(directory, manifest, base_name, base_fingerprint, allow_other_base, notes)
    adapter_type = _find_type(directory, config, manifest)
    for name in _NAMES_CODE:
        config.pop(name, None)
    return SavedAdapter(directory, adapter_type, config, infos, manifest, notes, content)


def check_there(directory: Path) -> None:
    """Check that there is such a folder.

    Raises:
        InputError: there is none.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder.")


def _find_weights(directory: Path, notes: list[str]) -> None:
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix.lower() in _PICKLES)
    if not (directory / WEIGHTS).exists():
        if pickles:
            raise InputError(
                f"{directory / pickles[0]}: pickled weights run code when they are opened, and are not accepted. "
                "If you trust the file, load it with PEFT and save it with safe_serialization=True."
            )
        if not (directory / CONFIG).exists():
            inner = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
            hint = f" There is one in {directory / inner[0]}." if len(inner) == 1 else ""
            if len(inner) > 1:
                hint = f" It has {len(inner):,} in its folders, of which name one: {', '.join(inner[:3])}."
            raise InputError(f"{directory}: no adapter: it has neither {CONFIG} nor {WEIGHTS}.{hint}")
        raise CorruptError(f"{directory}: {WEIGHTS} is missing.")
    if not (directory / CONFIG).exists():
        raise CorruptError(f"{directory}: {CONFIG} is missing.")
    notes.extend(f"{name} is a pickle and is ignored." for name in pickles)


def _check_ranks(directory: Path, config: dict[str, Any], infos: dict[str, TensorInfo]) -> None:
    """Reject a rank larger than any tensor dimension, before it is used for an allocation."""
    largest = max((n for info in infos.values() for n in info.shape), default=0)
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    for rank in ranks:
        if isinstance(rank, int | float) and rank > largest:
            raise CorruptError(f"{directory / CONFIG}: rank {str(rank)[:20]}; no tensor is larger than {largest}.")


def _read_manifest(directory: Path) -> Manifest | None:
    path = directory / MANIFEST
    if not path.exists():
        if (directory / GOLDEN).exists():  # stock PEFT does not write it
            raise CorruptError(f"{path}: is missing.")
        return None
    values = read_json(path)
    if values.get("format") not in range(1, FORMAT + 1):
        shown = str(values.get("format"))[:20]
        if shown.isdecimal() and int(shown) > FORMAT:
            raise InputError(f"{path}: format {shown}; this Budwood reads up to {FORMAT}: pip install -U budwood.")
        raise CorruptError(f"{path}: format {shown}; this Budwood reads up to {FORMAT}.")
    _check_seal(path, values)
    if values["format"] < 3 and "kind" in values:
        values["adapter_type"] = values.pop("kind")
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        raise CorruptError(f"{path}: {invalid_field(error)}.") from error


def _check_files(directory: Path, manifest: Manifest, hashes: bool, content: Weights | None) -> None:
    for required in (CONFIG, WEIGHTS, *([GOLDEN] if manifest.golden else [])):
        if required not in manifest.files:
            raise CorruptError(f"{directory / MANIFEST}: has no hash for {required}.")
    check_inside(directory, manifest.files)
    for name, expected in manifest.files.items():
        if not (path := directory / name).is_file():
            raise CorruptError(f"{directory / MANIFEST}: lists {name[:80]!r}, which is not a file of the adapter.")
        if not hashes:
            continue
        if (content.sha256 if content is not None and name == WEIGHTS else sha256(path)) != expected:
            raise CorruptError(f"{path}: was altered after it was saved (its SHA-256 differs from {MANIFEST}).")


def _check_base(
    directory: Path, manifest: Manifest, name: str, fingerprint: str | None, allow: bool, notes: list[str]
) -> None:
    trained_on = manifest.base
    if fingerprint is None or fingerprint == trained_on.fingerprint:
        return
    text = f"was trained on the base {trained_on}, but this base is '{name}' ({fingerprint[:12]})"
    if not allow:
        raise InputError(f"{directory} {text}. Use the base it was trained on, or --allow-other-base.")
    notes.append(f"{text}: allowed by --allow-other-base.")


def _find_type(directory: Path, config: dict[str, Any], manifest: Manifest | None) -> str:
    """Return the adapter's type, which is the name of its owner, an installed strategy."""
    if manifest is not None:
        if manifest.adapter_type not in installed():
            name = manifest.distribution.split(" ")[0]
            raise InputError(
                f"{directory}: adapter type '{manifest.adapter_type}' needs the strategy '{manifest.adapter_type}' of "
                f"{manifest.distribution}, which is not installed: pip install {name}"
            )
        return manifest.adapter_type
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str):
        raise CorruptError(f"{directory / CONFIG}: has no peft_type.")
    try:
        return adapter_owner(peft_type).name
    except InputError as error:
        raise InputError(f"{directory}: {error}") from error
