"""The base class of attacks for `budwood eval --attack`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from budwood.contract.strategy import Options, Plugin

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood.contract.types import Step


class Attack(Plugin):
    """Perturbs data or model for a second evaluation; registered in the entry point group budwood.attacks.

    A subclass overrides `change`, `noise`, or both.
    """

    group = "budwood.attacks"
    Options: ClassVar[type[BaseModel]] = Options

    def __init__(self, options: Any = None, name: str = "") -> None:
        """Store validated `options`; `name` is the attack as the user wrote it, for messages."""
        self.options: Any = self.Options() if options is None else options
        self.name = name or type(self).__name__

    def check(self, form: str, task: str, model: nn.Module | None) -> None:
        """Check that the attack applies to the data format `form`, the task and the model, before anything is loaded.

        Args:
            model: the base without weights, or None if it is unknown.

        Raises:
            InputError: the attack does not apply.
        """

    def change(self, row: Mapping[str, Any], index: int, form: str) -> Mapping[str, Any]:
        """Return row `index` of the file as the model should read it; the answer must not change."""
        return row

    def noise(self, step: Step) -> Tensor | None:
        """Return noise [R, T, d] fp32 to add to the embeddings' output for `step.batch`, or None.

        `step.noise_gradient(noise)` is the gradient of the batch's mean loss; gradients are enabled.
        """
        return None
