"""The base class of every attack that `budwood eval --attack` can make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from budwood.contract.strategy import Options, Plugin

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood.contract.types import Step


class Attack(Plugin):
    """What is done to data or model before it is measured again; comes through the entry point group budwood.attacks.

    A subclass overrides `change`, or `noise`, or both.
    """

    group = "budwood.attacks"
    Options: ClassVar[type[BaseModel]] = Options

    def __init__(self, options: Any = None, name: str = "") -> None:
        """Hold validated `options`; `name` is how the user wrote the attack, for messages."""
        self.options: Any = self.Options() if options is None else options
        self.name = name or type(self).__name__

    def check(self, form: str, task: str, model: nn.Module | None) -> None:
        """Look at the data's form, the task and the base's modules without weights (None: unknown), before it loads.

        Raises:
            InputError: the attack makes no sense on them.
        """

    def change(self, row: Mapping[str, Any], index: int, form: str) -> Mapping[str, Any]:
        """Return the row, number `index` of its file, as the model shall read it; never with another answer."""
        return row

    def noise(self, step: Step) -> Tensor | None:
        """Return noise [R, T, d] fp32 for the embeddings' output of `step.batch`, or None.

        `step.noise_gradient(noise)` is the gradient of the batch's mean loss; gradients are enabled.
        """
        return None
