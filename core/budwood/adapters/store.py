"""An adapter on disk: PEFT's layout plus `budwood.json`; written whole or not at all, read without trust.

Reading imports no torch until tensors are asked for, so that a bad adapter is refused before a model loads.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from budwood import __version__
from budwood.adapters.manifest import FORMAT, BaseRecord, ChatRecord, EvaluationRecord, Manifest
from budwood.contract.discovery import installed
from budwood.contract.loading import adapter_owner
from budwood.errors import CorruptError, InputError, ResourceError
from budwood.untrusted.files import check_inside, complete_directory, sha256
from budwood.untrusted.formats import TensorInfo, json_numbers, read_header, read_json

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
"""Fields of a config by which a library would import what the file names (PEFT writes some into every adapter); they
are never handed on."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter that was found sound on disk, without its tensors.

    Attributes:
        adapter_type: name of the strategy that attaches it.
        config: adapter_config.json without the fields that name code.
        infos: dtype and shape of every tensor, in PEFT's key layout.
        manifest: budwood.json; None for an adapter of stock PEFT.
        notes: what the user should know, one line each.
    """

    directory: Path
    adapter_type: str
    config: dict[str, Any]
    infos: dict[str, TensorInfo]
    manifest: Manifest | None
    notes: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.bytes for info in self.infos.values())

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(info.shape) for info in self.infos.values())

    def load_tensors(self) -> dict[str, Tensor]:
        """Read every tensor, on the CPU in its own dtype.

        Raises:
            CorruptError: the file changed since, or holds NaN or infinity.
            ResourceError: it is larger than memory.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.directory / WEIGHTS
        if self.bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):  # a sparse file claims what it likes
            raise ResourceError(f"{path}: {self.bytes:,} bytes of tensors are more than this machine's memory.")
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CorruptError(f"{path}: {error}.") from error
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise CorruptError(f"{path}: tensor '{name}' holds NaN or infinity.")
        return tensors


def write_adapter(
    directory: Path,
    write: Callable[[Path], None],
    *,
    adapter_type: str,
    distribution: str,
    base: Base,
    task: str,
    labels: Sequence[str] = (),
    tokenizer: Any = None,
    metrics: Mapping[str, float] | None = None,
    evaluation: EvaluationRecord | None = None,
    strategies: Sequence[dict[str, Any]] = (),
    stop_ids: Sequence[int] = (),
    chat: ChatRecord | None = None,
    probes: Sequence[Example] = (),
    base_logits: Sequence[Tensor] = (),
    adapter_logits: Sequence[Tensor] = (),
    needs: int = 0,
) -> SavedAdapter:
    """Write an adapter; whoever looks, or kills the process, finds the old folder or the new one, never half of one.

    Args:
        directory: where it goes; an adapter that is there is replaced.
        write: writes adapter_config.json, adapter_model.safetensors and whatever else into the folder it is given.
        adapter_type: name of the strategy that attaches it.
        distribution: that strategy's distribution and version, "budwood 0.1.0".
        base: the base it was trained on.
        task: name of the task.
        labels: classes of a classification, in the order of the head's rows.
        tokenizer: whose vocabulary and chat template are recorded by hash.
        metrics: of the evaluation that measured it.
        evaluation: how that was done.
        strategies: name, distribution and options of every strategy of the run.
        stop_ids: tokens that end an answer, beside the end-of-sequence token.
        chat: how messages are rendered, where that is not as the base says.
        probes: what golden outputs are taken of; empty leaves `verify` nothing to replay.
        base_logits: [vocabulary or classes] fp32 at each probe, of the base alone.
        adapter_logits: the same with the adapter.
        needs: bytes that it will take, for the message where the disk is full; 0: not known.

    Raises:
        InputError: `directory` holds something that is no adapter.
        CorruptError: what was written does not read back.
        ResourceError: the disk is full or read-only.
    """
    from budwood.adapters.golden import Golden, current_setting

    directory = Path(directory)
    if (
        directory.exists()
        and not (directory / CONFIG).exists()
        and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise InputError(f"{directory} exists and is no adapter: choose another folder.")
    golden = Golden.of(probes, base_logits, adapter_logits) if probes else None
    with complete_directory(directory, replace=True, needs=needs) as folder:
        write(folder)
        if golden is not None:
            golden.save(folder / GOLDEN)
        files = {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        manifest = Manifest(
            adapter_type=adapter_type,
            distribution=distribution,
            base=BaseRecord(
                name=base.name,
                fingerprint=base.fingerprint,
                revision=base.revision,
                quantization=base.quantization,
                double_quantization=base.double_quantization,
                dtype=str(base.dtype).removeprefix("torch."),
            ),
            task=task,
            labels=list(labels),
            tokenizer=tokenizer_hash(tokenizer),
            template=template_hash(tokenizer),
            metrics=json_numbers(metrics or {}),
            evaluation=evaluation,
            strategies=list(strategies),
            stop_ids=list(stop_ids),
            chat=chat,
            golden=current_setting(base) if golden else None,
            files=files,
            created_by=f"budwood {__version__}",
        )
        (folder / MANIFEST).write_text(sealed(manifest.model_dump(mode="json")), encoding="utf-8")
        saved = read_adapter(folder)
    return SavedAdapter(directory, saved.adapter_type, saved.config, saved.infos, saved.manifest)


def sealed(values: Mapping[str, Any]) -> str:
    """The text of budwood.json: `values`, and as "sha256" the hash of that text with an empty one in its place."""
    text = json.dumps({**values, "sha256": ""}, indent=2, ensure_ascii=False) + "\n"
    return text.replace('"sha256": ""', f'"sha256": "{hashlib.sha256(text.encode()).hexdigest()}"')


def _check_seal(path: Path, values: Mapping[str, Any]) -> None:
    stated, data = values.get("sha256"), path.read_bytes()
    if stated is None and values.get("format") == 1:
        return
    if not isinstance(stated, str) or len(stated) != 64:
        raise CorruptError(f"{path}: was altered after it was saved: it holds no hash of itself.")
    if hashlib.sha256(data.replace(stated.encode(), b"")).hexdigest() != stated:
        raise CorruptError(f"{path}: was altered after it was saved (its SHA-256 differs).")


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's whole definition; "" where there is none."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def template_hash(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's chat template; "" where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else ""


def read_adapter(
    directory: str | Path,
    *,
    base_name: str = "",
    base_fingerprint: str | None = None,
    allow_other_base: bool = False,
    hashes: bool = True,
) -> SavedAdapter:
    """Read and check an adapter without opening anything but JSON and a safetensors header.

    Args:
        directory: a folder that Budwood or stock PEFT wrote.
        base_name: of the base that it is for, in messages.
        base_fingerprint: of that base; None checks nothing.
        allow_other_base: attach to another base all the same; a note says so.
        hashes: compare every file with its hash in budwood.json, which reads them whole.

    Raises:
        InputError: no such folder, no adapter in it, an adapter of another base, or of a type that is not installed.
        CorruptError: pickled, truncated, altered, absurd, or not what budwood.json says.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder.")
    notes: list[str] = []
    _find_weights(directory, notes)
    check_inside(directory, (CONFIG, WEIGHTS, MANIFEST, GOLDEN))
    config = read_json(directory / CONFIG)
    manifest = _read_manifest(directory)
    infos = read_header(directory / WEIGHTS)
    if not infos:
        raise CorruptError(f"{directory / WEIGHTS}: holds no tensor.")
    _check_ranks(directory, config, infos)
    if manifest is None:
        notes.append("no budwood.json (an adapter of stock PEFT): its base is not checked.")
    else:
        _check_files(directory, manifest, hashes)
        _check_base(directory, manifest, base_name, base_fingerprint, allow_other_base, notes)
    adapter_type = _find_type(directory, config, manifest)
    for name in _NAMES_CODE:
        config.pop(name, None)
    return SavedAdapter(directory, adapter_type, config, infos, manifest, notes)


def _find_weights(directory: Path, notes: list[str]) -> None:
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix.lower() in _PICKLES)
    if not (directory / WEIGHTS).exists():
        if pickles:
            raise CorruptError(
                f"{directory / pickles[0]}: pickled weights run code when they are opened, and are refused. "
                "Where you trust it, load it with PEFT and save it with safe_serialization=True."
            )
        if not (directory / CONFIG).exists():
            raise InputError(f"{directory}: no adapter: it has neither {CONFIG} nor {WEIGHTS}.")
        raise CorruptError(f"{directory}: {WEIGHTS} is missing.")
    if not (directory / CONFIG).exists():
        raise CorruptError(f"{directory}: {CONFIG} is missing.")
    notes.extend(f"{name} is a pickle and is ignored." for name in pickles)


def _check_ranks(directory: Path, config: dict[str, Any], infos: dict[str, TensorInfo]) -> None:
    """Refuse a rank that no tensor has room for, before anybody allocates by it."""
    largest = max((n for info in infos.values() for n in info.shape), default=0)
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    for rank in ranks:
        if isinstance(rank, int | float) and rank > largest:
            raise CorruptError(f"{directory / CONFIG}: rank {str(rank)[:20]}; no tensor is larger than {largest}.")


def _read_manifest(directory: Path) -> Manifest | None:
    path = directory / MANIFEST
    if not path.exists():
        if (directory / GOLDEN).exists():  # which stock PEFT does not write
            raise CorruptError(f"{path}: is missing.")
        return None
    values = read_json(path)
    if values.get("format") not in range(1, FORMAT + 1):
        raise CorruptError(f"{path}: format {str(values.get('format'))[:20]}; this Budwood reads up to {FORMAT}.")
    _check_seal(path, values)
    if values["format"] < 3 and "kind" in values:
        values["adapter_type"] = values.pop("kind")
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise CorruptError(f"{path}: field '{'.'.join(map(str, problem['loc']))}': {problem['msg']}.") from error


def _check_files(directory: Path, manifest: Manifest, hashes: bool) -> None:
    for required in (CONFIG, WEIGHTS, *([GOLDEN] if manifest.golden else [])):
        if required not in manifest.files:
            raise CorruptError(f"{directory / MANIFEST}: gives no hash for {required}.")
    check_inside(directory, manifest.files)
    for name, expected in manifest.files.items():
        if not (path := directory / name).is_file():
            raise CorruptError(f"{directory / MANIFEST}: lists {name[:80]!r}, which is no file of the adapter.")
        if hashes and sha256(path) != expected:
            raise CorruptError(f"{path}: was altered after it was saved (its SHA-256 differs from {MANIFEST}).")


def _check_base(
    directory: Path, manifest: Manifest, name: str, fingerprint: str | None, allow: bool, notes: list[str]
) -> None:
    made_for = manifest.base
    if fingerprint is None or fingerprint == made_for.fingerprint:
        return
    text = (
        f"was trained on the base '{made_for.name}' ({made_for.fingerprint[:12]}), "
        f"and this base is '{name}' ({fingerprint[:12]})"
    )
    if not allow:
        raise InputError(f"{directory} {text}. Use the base it was trained on, or --allow-other-base.")
    notes.append(f"{text}: allowed by --allow-other-base.")


def _find_type(directory: Path, config: dict[str, Any], manifest: Manifest | None) -> str:
    """Return the adapter's type, the name of the strategy that owns it; it must be installed."""
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
        raise CorruptError(f"{directory / CONFIG}: names no peft_type.")
    try:
        return adapter_owner(peft_type).name
    except InputError as error:
        raise InputError(f"{directory}: {error}") from error


def copy_adapter_tensors(slots: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Copy an adapter's tensors into their places on a model, once they are checked to be exactly those.

    Args:
        slots: the live tensor of each key on disk.
        tensors: what the adapter holds.

    Raises:
        CorruptError: see `check_adapter_tensors`; nothing is copied then.
    """
    check_adapter_tensors({key: tuple(slot.shape) for key, slot in slots.items()}, tensors)
    for key, slot in slots.items():
        slot.copy_(tensors[key])


def check_adapter_tensors(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Any], where: str = "adapter"
) -> None:
    """Check that an adapter's tensors are exactly those that the model and its config call for.

    Call it before anything is put on the model or allocated.

    Args:
        expected: shape of every tensor by its key on disk.
        tensors: what the adapter holds; anything with a `shape`.

    Raises:
        CorruptError: names what is missing, not expected (with the nearest expected key), or of another shape.
    """
    missing = [name for name in expected if name not in tensors]
    surplus = [name for name in tensors if name not in expected]
    if missing or surplus:
        parts = []
        if surplus:
            near = difflib.get_close_matches(surplus[0], missing[:2000], n=1, cutoff=0.5)
            parts.append(f"{_some(surplus)} not expected" + (f" (nearest: '{near[0]}')" if near else ""))
        if missing:
            parts.append(f"{_some(missing)} missing")
        raise CorruptError(f"the adapter's tensors do not fit config and base: {'; '.join(parts)}.")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != tuple(shape):
            found = list(tensors[name].shape)
            raise CorruptError(f"the adapter's tensor '{name}' is {found}; config and base call for {list(shape)}.")


def _some(names: list[str]) -> str:
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
