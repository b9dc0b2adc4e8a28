"""Writes an adapter that was derived from others, with golden logits of its own, in fp32 on their base."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from budwood.adapters.golden import Distance, relative_error
from budwood.adapters.manifest import MadeRecord
from budwood.adapters.store import SavedAdapter, write_adapter
from budwood.contract.examples import Example
from budwood.contract.loading import adapter_owner
from budwood.serving.pool import AdapterPool
from budwood.serving.probes import probes_of
from budwood.serving.verify import open_base


@dataclass
class Workbench:
    """A base, and the probes on which derived adapters are compared.

    Attributes:
        origin: the adapter whose task and way of rendering are recorded.
        alone: logits of the base at each probe, [probes, …] fp32.
        needs_quantization: whether one of the adapters is right only on the base as quantised.
    """

    origin: SavedAdapter
    pool: AdapterPool
    probes: list[Example]
    alone: Tensor
    allow_other_base: bool = False
    notes: list[str] = field(default_factory=list)
    needs_quantization: bool = False

    @classmethod
    def open(cls, origin: SavedAdapter, base: str | None, device: str, allow_other_base: bool) -> Workbench:
        """Load the base of an adapter in fp32, quantised as recorded; see `open_base`."""
        loaded, task = open_base(origin, base, precision="fp32", device=device, allow_other_base=allow_other_base)
        manifest = origin.manifest
        if manifest is not None and manifest.chat is not None and manifest.chat.template is not None:
            loaded.tokenizer.chat_template = manifest.chat.template
        pool = AdapterPool(loaded, task=task)
        _, probes = probes_of(origin, pool)
        bound = manifest is not None and manifest.needs_quantization
        return cls(origin, pool, probes, pool.measure(probes), allow_other_base, needs_quantization=bound)

    def logits(self, directory: str | Path) -> Tensor:
        """Return the logits of an adapter at each probe, [probes, …] fp32."""
        saved = self.pool.load("derived", directory, allow_other_base=self.allow_other_base)
        self.notes += [note for note in saved.notes if "no budwood.json" not in note and note not in self.notes]
        self.pool.use("derived")
        try:
            return self.pool.measure(self.probes)
        finally:
            self.pool.unload("derived")

    def logits_of(self, write: Callable[[Path], Any]) -> Tensor:
        """Return the logits of an adapter that `write` writes into the folder it receives."""
        with tempfile.TemporaryDirectory(prefix="budwood-") as folder:
            write(Path(folder))
            return self.logits(folder)

    def compare(self, exact: Tensor, other: Tensor) -> tuple[Distance, float | None]:
        """Return the distance of logits from others, and the same as a fraction of those others' effect, if any."""
        return Distance.between(exact, other), relative_error(self.alone, exact, other)

    def write(self, out: Path, write: Callable[[Path], Any], peft_type: str, made: MadeRecord, logits: Tensor) -> None:
        """Write an adapter, with the logits that `logits_of` returned for it as golden logits."""
        owner, manifest, base = adapter_owner(peft_type), self.origin.manifest, self.pool.base
        write_adapter(
            out,
            write,
            adapter_type=owner.name,
            distribution=owner.owner,
            base=base,
            task=self.pool.task,
            labels=manifest.labels if manifest else (),
            tokenizer=base.tokenizer,
            stop_ids=manifest.stop_ids if manifest else (),
            chat=manifest.chat if manifest else None,
            on_messages=manifest.on_messages if manifest else None,
            needs_quantization=self.needs_quantization,
            made=made,
            probes=self.probes,
            base_logits=list(self.alone),
            adapter_logits=list(logits),
        )
