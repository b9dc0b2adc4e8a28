"""The base class of rewards, which judge answers that a model generates during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from budwood.contract.strategy import Options, Plugin

if TYPE_CHECKING:
    from budwood.contract.samples import Sample
    from budwood.contract.types import Plan, Run

Row = Mapping[str, Any]


class Reward(Plugin):
    """Judges answers; registered in the entry point group budwood.rewards.

    A subclass implements `score`, or `score_samples` if it needs tokens or the run's model.
    """

    group = "budwood.rewards"
    Options: ClassVar[type[BaseModel]] = Options
    columns: tuple[str, ...] = ()
    """Columns of a row that it reads, beyond the prompt; an instance may set them by its options."""
    code_files: tuple[str, ...] = ()
    """See `Strategy.code_files`."""

    def __init__(self, options: Any = None) -> None:
        """Store validated `options`."""
        self.options: Any = self.Options() if options is None else options

    def check(self, plan: Plan) -> None:
        """Check, before the base loads, what files alone can show: an installed extra, the folder of a model.

        Raises:
            InputError, ResourceError: the reward cannot be used.
        """

    def prepare(self, run: Run) -> None:
        """Prepare for the run's model, for instance attach an adapter; called once, in `prepare_model`."""

    def score(self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]) -> Sequence[float]:
        """Return the reward of each completion.

        Args:
            prompts: text of each completion's prompt, without special tokens.
            completions: text of each answer, without special tokens.
            rows: the prompt's row of the data for each completion, restricted to `columns`.
        """
        raise NotImplementedError

    def score_samples(self, run: Run, samples: Sequence[Sample], rows: Sequence[Row]) -> Sequence[float]:
        """Return the reward of each sample; by default `score` of its texts. Called without gradients."""
        prompts = run.tokenizer.batch_decode([sample.prompt for sample in samples], skip_special_tokens=True)
        return self.score(prompts, [sample.text for sample in samples], rows)
