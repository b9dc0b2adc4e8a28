"""The inputs on which adapters of one base are compared."""

from __future__ import annotations

from budwood.adapters.golden import Golden
from budwood.adapters.store import GOLDEN, SavedAdapter
from budwood.contract.examples import Example
from budwood.errors import CorruptError
from budwood.model.text_tasks import as_probe
from budwood.serving.pool import AdapterPool

SENTENCES = ("The", "In the beginning there was", "def main():\n    ", "1, 2, 3, 4,")
"""Probes for an adapter without golden logits."""


def probes_of(saved: SavedAdapter, pool: AdapterPool) -> tuple[Golden | None, list[Example]]:
    """Return an adapter's golden logits, None if it has none, and their probes or those of `SENTENCES`.

    Raises:
        CorruptError: the pool's model cannot process a probe.
    """
    recorded = saved.manifest.golden if saved.manifest is not None else None
    if recorded is None:
        return None, [as_probe(pool.tokenizer(text)["input_ids"]) for text in SENTENCES]
    golden = Golden.load(saved.directory / GOLDEN)
    problem = next(filter(None, (pool.task_plugin.check_inputs(pool.model, probe) for probe in golden.probes)), "")
    if problem:
        raise CorruptError(f"{saved.directory / GOLDEN}: {problem}.")
    return golden, golden.probes
