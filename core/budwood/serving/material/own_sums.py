"""Sums of adapters of one type by its owner; and the base of adapters that are combined, loaded when it is needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from budwood.adapters.export import can_be_lora
from budwood.adapters.golden import Distance
from budwood.adapters.manifest import MadeRecord
from budwood.adapters.owner import start_owner
from budwood.adapters.store import CONFIG, WEIGHTS, SavedAdapter
from budwood.contract.calls import ask_owner
from budwood.contract.loading import load_strategy
from budwood.errors import CorruptError, InputError
from budwood.serving.material.derived import Workbench

FP32_MAX = torch.finfo(torch.float32).max

_Result = TypeVar("_Result")


class Parts:
    """The adapters that are combined, and their base, which is loaded when it is first needed.

    Attributes:
        saved: the adapters; the first one's task and way of rendering are recorded.
    """

    def __init__(self, saved: Sequence[SavedAdapter], base: str | None, device: str, allow_other_base: bool) -> None:
        self.saved = list(saved)
        self._arguments = (base, device, allow_other_base)
        self._bench: Workbench | None = None

    @property
    def notes(self) -> list[str]:
        """Messages for the user about the base."""
        return [] if self._bench is None else self._bench.notes

    def open(self) -> Workbench:
        """Return the workbench with the base; see `Workbench.open`.

        Raises:
            InputError, CorruptError: an adapter does not fit its base; the message names its folder.
        """
        if self._bench is None:
            bench = Workbench.open(self.saved[0], *self._arguments)
            bench.needs_quantization = any(
                part.manifest is not None and part.manifest.needs_quantization for part in self.saved
            )
            for part in self.saved:
                self.naming(part, partial(self._try, bench, part))
            self._bench = bench
        return self._bench

    def logits_of(self, write: Callable[[Path], Any]) -> Tensor:
        """Return the logits of the adapter that `write` writes, [probes, …] fp32."""
        return self.open().logits_of(write)

    def model(self) -> nn.Module:
        """Return the base's model."""
        return self.open().pool.model

    def _try(self, bench: Workbench, part: SavedAdapter) -> None:
        bench.pool.load("part", part.directory, allow_other_base=self._arguments[2])
        bench.pool.unload("part")

    @staticmethod
    def naming(part: SavedAdapter, call: Callable[[], _Result]) -> _Result:
        """Return what `call` returns; an error that does not name the adapter's folder is raised with it."""
        try:
            return call()
        except (InputError, CorruptError) as error:
            if str(part.directory) in str(error):
                raise
            raise type(error)(f"{part.directory}: {error}") from error


def has_own_sum(parts: Sequence[SavedAdapter], method: str) -> bool:
    """Return whether the adapters' type combines its own; False: they are LoRA, or convertible to it.

    Raises:
        InputError: they are of several types that have no sum in common; or their type has no sum, or not by `method`.
    """
    first = parts[0]
    classes = {part.adapter_type: load_strategy(part.adapter_type)[0] for part in parts}
    owner = classes[first.adapter_type]
    if len(classes) == 1 and hasattr(owner, "combine_adapters") and owner.adapter_types:
        if method != "linear":
            raise InputError(
                f"--method {method}: is for LoRA; adapters of type '{first.adapter_type}' are combined with "
                "--method linear, exactly."
            )
        return True
    low_rank = [
        part.config.get("peft_type") == "LORA" or hasattr(classes[part.adapter_type], "convert_adapter")
        for part in parts
    ]
    if all(low_rank):
        return False
    if len(classes) > 1:
        other = next(part for part in parts if part.adapter_type != first.adapter_type)
        raise InputError(
            f"{other.directory}: is of type '{other.adapter_type}', but {first.directory} of "
            f"'{first.adapter_type}': adapters of one type can be combined.{_remedy(parts)}"
        )
    raise _no_sum(parts)


def _no_sum(parts: Sequence[SavedAdapter]) -> InputError:
    kind = parts[0].adapter_type
    text = f"{parts[0].directory}: the weighted sum of adapters of type '{kind}' is none of that type."
    return InputError(f"{text}{_remedy(parts)}")


def _remedy(parts: Sequence[SavedAdapter]) -> str:
    """Return how all of them become LoRA, whose sums are LoRA; "" if one cannot."""
    if not all(map(can_be_lora, parts)):
        return ""
    return " Convert each to LoRA first, which is lossy: budwood adapter export DIR OUT --for peft --as lora --rank R."


def too_large() -> InputError:
    """Return the error of weights whose sum has infinite elements."""
    return InputError("--weights: the weighted sum is larger than fp32 can hold: give smaller weights.")


def combine_own(parts: Parts, weights: Sequence[float], out: Path, record: MadeRecord) -> tuple[Distance, int]:
    """Write the sum that the owner of the adapters' type returns.

    Returns:
        The distance of its answers from those that are recorded: none; and the number of modules that it names.

    Raises:
        InputError: the adapters have no sum of their type, or do not fit each other.
    """
    first = parts.saved[0]
    owner = start_owner(first)
    result = ask_owner(owner, "combine_adapters", adapters=parts.saved, weights=list(weights), base=parts.model)
    if result is None:
        raise _no_sum(parts.saved)
    config, tensors = result
    if not all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point()):
        raise too_large()

    def write(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})

    answers = parts.logits_of(write)
    bench = parts.open()
    distance, _ = bench.compare(answers, answers)
    bench.write(out, write, str(config.get("peft_type")), record, answers)
    named = config.get("target_modules")
    return distance, len(named) if isinstance(named, list) else len(tensors)
