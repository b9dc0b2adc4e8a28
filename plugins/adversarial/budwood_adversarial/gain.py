"""What the perturbation gains: logged each step as `adversarial_gain`, and said once where it gains nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from budwood import Batch, Event, Run, Step
    from budwood_adversarial.noise import PerturbationMask

WINDOW = 20
"""Optimizer steps over which a perturbation must raise the loss, on average."""


class Gain:
    """Perturbed minus clean loss of each optimizer step, from passes that are made anyway.

    FreeLB compares the last pass with the first, whose noise is random; SMART and VAT compare the divergence under the
    noise that they found with that under the noise that they started from.

    Args (on construction):
        about: the strategy and its method, for messages.
    """

    def __init__(self, about: str) -> None:
        self.about = about
        self.total: Tensor | None = None
        self._run: Run | None = None
        self._last: tuple[PerturbationMask, Tensor] | None = None
        self._window: list[float] = []
        self._said = False

    def state(self) -> dict[str, Any]:
        """What was seen of the window under way, and whether it was said already."""
        return {"window": list(self._window), "said": self._said}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._window, self._said = list(state["window"]), bool(state["said"])

    def begin(self, step: Step) -> None:
        """Start the sum of an optimizer step at its first micro-step."""
        import torch

        self._run = step.run
        if self.total is None or step.micro_step == 0:
            self.total, self._last = torch.zeros((), device=step.run.device), None

    def add(self, loss: Tensor | None) -> None:
        """Add a perturbed pass's loss."""
        if loss is not None and self.total is not None:
            self.total = self.total + loss

    def subtract(self, loss: Tensor | None) -> None:
        """Subtract the loss that it is compared with."""
        if loss is not None:
            self.add(-loss)

    def keep(self, mask: PerturbationMask, noise: Tensor) -> None:
        """Remember the last noise and where it may go, in case its cause must be looked for; released at the next step.

        Args:
            mask: of the noise's batch.
            noise: [R, T, d] fp32.
        """
        self._last = None if self._said else (mask, noise.detach())

    def log(self, run: Run) -> None:
        """Log the optimizer step's gain, over all processes."""
        import torch

        total = torch.zeros((), device=run.device) if self.total is None else self.total
        if run.processes > 1:
            torch.distributed.all_reduce(total)
        run.log("adversarial_gain", total)
        self.total = None

    def watch(self, event: Event) -> None:
        """At the end of each window of steps, say it where the mean gain is not above zero; once."""
        if self._said or "adversarial_gain" not in event.values or self._run is None:
            return
        self._window.append(event.values["adversarial_gain"])
        if len(self._window) < min(WINDOW, self._run.steps or WINDOW):
            return
        mean, count = sum(self._window) / len(self._window), len(self._window)
        self._window = []
        if not mean > 0:
            self._said = True
            self._run.say(
                f"warning: {self.about}: the perturbation did not raise the loss in {count} steps "
                f"(mean gain {mean:.1e}); likely cause: {self._cause()}"
            )
        self._last = None

    def _cause(self) -> str:
        import torch

        if self._last is None or self._run is None:
            return "this process had no batch"
        mask, noise = self._last
        if not mask.open.any():
            return "skip_special and skip_masked leave no token that noise may go to"
        if not noise.any():
            return "the loss has no gradient at the embeddings"
        with torch.no_grad():
            embedded = _embedded(self._run, mask.batch)
            arrived = (embedded + noise.to(embedded.dtype) != embedded) & (noise != 0)
        size = float(embedded.float().norm(dim=-1).mean())
        dtype = str(embedded.dtype).removeprefix("torch.")
        beside = f"beside embeddings of norm {size:.3g} a token"
        if int(arrived.sum()) * 2 < int((noise != 0).sum()):
            return f"epsilon is so small {beside} that most of the noise is lost to {dtype}'s rounding; raise epsilon"
        largest = float(noise.norm(dim=-1).max())
        if largest > size:
            return f"noise of norm {largest:.3g} a token {beside} overshoots; lower epsilon or step_size"
        return f"noise of norm {largest:.3g} a token is too small {beside}; raise epsilon"


def _embedded(run: Run, batch: Batch) -> Tensor:
    """What noise is added to: the output of the task's noise module on the batch."""
    found: list[Tensor] = []
    handle = run.task.noise_module(run.model).register_forward_hook(lambda module, args, output: found.append(output))
    try:
        run.task.outputs(run.model, batch)
    finally:
        handle.remove()
    return found[0]
