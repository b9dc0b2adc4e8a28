"""Rewards from a model: the run's base with another adapter, or with a reward model's adapter and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
    from torch import Tensor

    from budwood import Plan, Run, Sample


class AdapterOptions(Options):
    """Options of a reward that is computed by an adapter."""

    adapter: str = Field(min_length=1, description="folder of an adapter of the run's base and adapter type")


class AdapterReward(Reward):
    """Base class: attaches an adapter to the run's base, beside the run's own; there is no second copy of the weights.

    A subclass implements `values`.
    """

    api = 2
    Options: type[Options] = AdapterOptions

    _owner: Any = None
    _name = ""

    def values(self, run: Run, samples: Sequence[Sample]) -> list[float]:
        """Return the rewards; the adapter is on, and the run's own is off."""
        raise NotImplementedError

    def check(self, plan: Plan) -> None:
        """Check the adapter's type and base."""
        saved, base = self.saved(), plan.recipe.base.model
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

    def saved(self) -> Any:
        """Read the adapter's folder."""
        return read_adapter(Path(self.options.adapter).expanduser())

    def parts(self, saved: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the config and tensors to attach."""
        return saved.config, saved.load_tensors()

    def prepare(self, run: Run) -> None:
        """Attach the adapter beside the run's, without activating it."""
        saved = self.saved()
        if saved.manifest is not None and saved.manifest.base.fingerprint != run.base.fingerprint:
            raise InputError(f"the adapter in {saved.directory} was trained on '{saved.manifest.base.name}'.")
        self._owner = next(s for s in run.strategies if "adapter" in s.slots)
        self._name = f"reward{id(self)}"
        try:
            config, tensors = self.parts(saved)
            arguments = {"config": config, "tensors": tensors, "name": self._name}
            ask_owner(self._owner, "attach_adapter", model=run.model, **arguments)
        except BudwoodError as error:
            raise type(error)(f"{saved.directory}: {error}") from error
        use_adapters(self._owner, run.model, [RUN_ADAPTER])

    def score_samples(self, run: Run, samples: Sequence[Sample], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """Run the base with the adapter over prompts and answers."""
        use_adapters(self._owner, run.model, [self._name])
        try:
            return self.values(run, samples)
        finally:
            use_adapters(self._owner, run.model, [RUN_ADAPTER])


class AdapterLogProb(AdapterReward):
    """The answer's log-probability under the run's base with another adapter: per token, or of the whole answer."""

    api = 2

    class Options(AdapterOptions):
        mean: bool = Field(True, description="mean over the answer's tokens; false: their sum")

    def values(self, run: Run, samples: Sequence[Sample]) -> list[float]:
        """See `AdapterReward.values`."""
        from budwood import example_log_probs

        values = example_log_probs(run, [to_example(sample, str(n), 0) for n, sample in enumerate(samples)])
        return [float(np.mean(value) if self.options.mean else np.sum(value)) for value in values]


class RewardModelScore(AdapterReward):
    """The score that a reward model gives the answer: an adapter of the task reward-model on the run's base."""

    api = 2
    TASK = "reward-model"

    _head: dict[str, Tensor] | None = None

    def check(self, plan: Plan) -> None:
        """Check the adapter's task, type and base."""
        saved = self.saved()
        task = saved.manifest.task if saved.manifest is not None else "unknown"
        if task != self.TASK:
            raise InputError(f"the adapter in {saved.directory} was trained for the task '{task}', not '{self.TASK}'.")
        super().check(plan)

    def parts(self, saved: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the adapter without its head, which is applied here: the run's model has another one."""
        heads = saved.config.get("modules_to_save") or []
        tensors = saved.load_tensors()
        head = {key: tensor for key, tensor in tensors.items() if any(name in key.split(".") for name in heads)}
        self._head = {key.rpartition(".")[2]: tensor.float() for key, tensor in head.items()}
        if len(heads) != 1 or not {"weight"} <= self._head.keys() <= {"weight", "bias"} or len(head) != len(self._head):
            found = ", ".join(sorted(head)) or "none"
            raise InputError(f"a reward model saves one linear head; this one saves: {found}.")
        rest = {key: tensor for key, tensor in tensors.items() if key not in head}
        return {**saved.config, "modules_to_save": None}, rest

    def values(self, run: Run, samples: Sequence[Sample]) -> list[float]:
        """See `AdapterReward.values`. The score is read at the answer's last token, as in training."""
        import torch

        from budwood import example_hidden

        examples = [to_example(sample, str(n), 0) for n, sample in enumerate(samples)]
        last = [
            replace(
                e, label_positions=np.array([len(e.inputs["input_ids"]) - 1]), labels=np.zeros(1, dtype=np.int64),
                weights=np.ones(1, dtype=np.float32), columns={},
            )
            for e in examples
        ]  # fmt: skip
        assert self._head is not None
        hidden = torch.from_numpy(np.concatenate(example_hidden(run, last)))
        scores = torch.nn.functional.linear(hidden, self._head["weight"], self._head.get("bias"))
        return [float(score) for score in scores[:, 0]]
