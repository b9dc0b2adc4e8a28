"""Rewards from a model: the run's base with another adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from budwood import (
    RUN_ADAPTER,
    BudwoodError,
    InputError,
    Options,
    Reward,
    ask_owner,
    fingerprint,
    read_adapter,
    use_adapters,
)
from budwood_grpo.examples import to_example

if TYPE_CHECKING:
    from budwood import Plan, Run, Sample


class AdapterLogProb(Reward):
    """The answer's log-probability under the run's base with another adapter: per token, or of the whole answer."""

    api = 2

    class Options(Options):
        adapter: str = Field(min_length=1, description="folder of an adapter of the run's base and adapter type")
        mean: bool = Field(True, description="mean over the answer's tokens; false: their sum")

    _owner: Any = None
    _name = ""

    def check(self, plan: Plan) -> None:
        """Check the adapter's type and base."""
        saved, base = read_adapter(Path(self.options.adapter).expanduser()), plan.recipe.base.model
        owner = next((s for s in plan.strategies if "adapter" in s.slots), None)
        if owner is not None and saved.adapter_type != owner.name:
            raise InputError(
                f"the adapter in {saved.directory} is of type '{saved.adapter_type}' and the run's of type "
                f"'{owner.name}': name one of the run's type."
            )
        known = saved.manifest is not None and Path(base).expanduser().is_dir()
        if known and saved.manifest.base.fingerprint != fingerprint(base):
            raise InputError(
                f"the adapter in {saved.directory} was trained on the base '{saved.manifest.base.name}', not on "
                f"'{base}': name one of the run's base."
            )

    def prepare(self, run: Run) -> None:
        """Attach the adapter beside the run's, without activating it."""
        saved = read_adapter(Path(self.options.adapter).expanduser())
        if saved.manifest is not None and saved.manifest.base.fingerprint != run.base.fingerprint:
            raise InputError(f"the adapter in {saved.directory} was trained on '{saved.manifest.base.name}'.")
        self._owner = next(s for s in run.strategies if "adapter" in s.slots)
        self._name = f"reward{id(self)}"
        try:
            arguments = {"config": saved.config, "tensors": saved.load_tensors(), "name": self._name}
            ask_owner(self._owner, "attach_adapter", model=run.model, **arguments)
        except BudwoodError as error:
            raise type(error)(f"{saved.directory}: {error}") from error
        use_adapters(self._owner, run.model, [RUN_ADAPTER])

    def score_samples(self, run: Run, samples: Sequence[Sample], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """Run the base with the adapter over prompts and answers."""
        from budwood import example_log_probs

        examples = [to_example(sample, str(number), 0) for number, sample in enumerate(samples)]
        use_adapters(self._owner, run.model, [self._name])
        try:
            values = example_log_probs(run, examples)
        finally:
            use_adapters(self._owner, run.model, [RUN_ADAPTER])
        return [float(np.mean(value) if self.options.mean else np.sum(value)) for value in values]
