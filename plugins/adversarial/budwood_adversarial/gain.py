"""The increase in loss from the perturbation, logged as `adversarial_gain`, with one warning if there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from budwood import Batch, Event, Run, Step
    from budwood_adversarial.noise import PerturbationMask

WINDOW = 20
"""Optimizer steps over which a perturbation must raise the loss, on average."""


class Gain:
    """Perturbed minus clean loss of each optimizer step, without additional passes.

    FreeLB compares the last pass with the first, whose noise is random; SMART and VAT compare the divergence under the
    final noise with that under the initial noise.

    Args (on construction):
        label: the strategy and its method, for messages.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.total: Tensor | None = None
        self._run: Run | None = None
        self._last: tuple[PerturbationMask, Tensor] | None = None
        self._window: list[float] = []
        self._warned = False

    def state(self) -> dict[str, Any]:
        """Return the gains of the current window, and whether the warning was issued."""
        return {"window": list(self._window), "said": self._warned}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the result of `state`."""
        self._window, self._warned = list(state["window"]), bool(state["said"])

    def begin(self, step: Step) -> None:
        """Reset the sum at the first micro-step of an optimizer step."""
        import torch

        self._run = step.run
        if self.total is None or step.micro_step == 0:
            self.total, self._last = torch.zeros((), device=step.run.device), None

    def add(self, loss: Tensor | None) -> None:
        """Add the loss of a perturbed pass."""
        if loss is not None and self.total is not None:
            self.total = self.total + loss

    def subtract(self, loss: Tensor | None) -> None:
        """Subtract the loss of the reference pass."""
        if loss is not None:
            self.add(-loss)

    def keep(self, mask: PerturbationMask, noise: Tensor) -> None:
        """Store the last noise and its mask until the next step, to diagnose a missing gain.

        Args:
            mask: mask of the noise's batch.
            noise: [R, T, d] fp32.
        """
        self._last = None if self._warned else (mask, noise.detach())

    def log(self, run: Run) -> None:
        """Log the gain of the optimizer step, summed over all processes."""
        import torch

        total = torch.zeros((), device=run.device) if self.total is None else self.total
        run.world.sum([total])
        run.log("adversarial_gain", total)
        self.total = None

    def watch(self, event: Event) -> None:
        """At the end of each window of steps, warn once if the mean gain is not above zero."""
        if self._warned or "adversarial_gain" not in event.values or self._run is None:
            return
        self._window.append(event.values["adversarial_gain"])
        if len(self._window) < min(WINDOW, self._run.steps or WINDOW):
            return
        mean, count = sum(self._window) / len(self._window), len(self._window)
        self._window = []
        if not mean > 0:
            self._warned = True
            self._run.say(
                f"warning: {self.label}: the perturbation did not raise the loss in {count} steps "
                f"(mean gain {mean:.1e}); likely cause: {self._cause()}"
            )
        self._last = None

    def _cause(self) -> str:
        import torch

        if self._last is None or self._run is None:
            return "this process had no batches"
        mask, noise = self._last
        if not mask.open.any():
            return "skip_special and skip_masked exclude all tokens from noise"
        if not noise.any():
            return "the loss has no gradient at the embeddings"
        with torch.no_grad():
            embedded = _embedded(self._run, mask.batch)
            effective = (embedded + noise.to(embedded.dtype) != embedded) & (noise != 0)
        size = float(embedded.float().norm(dim=-1).mean())
        dtype = str(embedded.dtype).removeprefix("torch.")
        reference = f"embeddings of norm {size:.3g} per token"
        if int(effective.sum()) * 2 < int((noise != 0).sum()):
            return f"epsilon is so small relative to {reference} that {dtype} rounds off most noise; raise epsilon"
        largest = float(noise.norm(dim=-1).max())
        if largest > size:
            return (
                f"noise of norm {largest:.3g} per token overshoots relative to {reference}; lower epsilon or step_size"
            )
        return f"noise of norm {largest:.3g} per token is too small relative to {reference}; raise epsilon"


def _embedded(run: Run, batch: Batch) -> Tensor:
    """Return the tensor that noise is added to: the output of the task's noise module on the batch."""
    outputs: list[Tensor] = []
    handle = run.task.noise_module(run.model).register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        run.task.outputs(run.model, batch)
    finally:
        handle.remove()
    return outputs[0]
