"""Adversarial training as a strategy: six methods that add noise to the output of the embeddings.

Torch takes seconds to import, so it is imported in the hooks: invalid options are refused before that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from budwood import InputError, Strategy, hookimpl
from budwood_adversarial.gain import Gain
from budwood_adversarial.options import AdversarialOptions, Scale

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood import Batch, Event, LossTerm, Outputs, Plan, Run, Step
    from budwood_adversarial.noise import PerturbationMask

COMPARING = ("smart", "vat")
"""Methods that compare noisy with clean outputs by a divergence."""


class Adversarial(Strategy):
    """Adversarial training with noise on the embeddings: fgm, pgd, freelb, smart, vat, neftune."""

    Options = AdversarialOptions

    def __init__(self, options: Any = None, name: str = "", distribution: str = "") -> None:
        super().__init__(options, name, distribution)
        self.method: str = self.options.method
        self.gain = Gain(f"{self.name} ({self.method})")
        self.scale = Scale(1.0, 1)

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        if self.options.skip_masked and plan.recipe.base.task == "sequence-classification":
            plan.problem(self, "skip_masked: in a classification no token is a label, so no noise would be left")
        elif self.options.skip_masked and plan.task is not None and not plan.task.has_labelled_positions():
            plan.problem(self, f"skip_masked: for {plan.task} no token is a label, so no noise would be left")
        if self.method in ("smart", "vat") and plan.task is not None and not plan.task.has_log_probs():
            text = f"{self.method} compares distributions over tokens or classes, and {plan.task} has none"
            plan.problem(self, f"{text}: use fgm, pgd, freelb or neftune")
        if plan.model is not None and not has_embeddings(plan.model):
            plan.problem(self, no_embeddings(plan.model))

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        if not has_embeddings(model):
            raise InputError(f"{self}: {no_embeddings(model)}")
        if run.planning or self.method == "neftune":  # no values, or no need of them
            return model
        from budwood_adversarial.noise import measure

        self.scale = measure(run)
        if self.options.epsilon is None:
            run.say(f"{self.gain.label}: epsilon {self.value('epsilon'):.2g}; {describe_scale(self.scale)}")
        return model

    @hookimpl(wrapper=True)
    def backward(self, step: Step) -> Iterator[None]:
        if self.method in ("fgm", "pgd"):
            yield from self._perturbed(step)
        elif self.method == "freelb":
            yield from self._free(step)
        elif self.method == "neftune":
            mask = self.mask(step.run, step.batch)
            uniform = mask.draw(step.zero_noise(), lambda i, like: self._uniform(step, i, like))
            step.noise = self.value("alpha") * mask.per_root(uniform)
            yield
        else:
            self.gain.begin(step)
            yield  # the divergence is a term of the clean pass

    @hookimpl(wrapper=True)
    def forward(self, step: Step) -> Any:
        import torch

        outputs = yield
        if self.method in COMPARING and not step.replaying and torch.is_grad_enabled():
            step.cache[self.name] = self._compare(step, outputs)
        return outputs

    @hookimpl
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> LossTerm | None:
        from budwood import LossTerm

        noisy = step.cache.get(self.name)
        if noisy is None or step.replaying:
            return None
        values = self._divergence()(logits, step.logits(noisy, positions))
        self.gain.add((values.detach() * step.batch.weights[positions]).sum() / step.run.counts["label"])
        return LossTerm(self.method, values, weight=self.value("weight"))

    @hookimpl
    def before_clip(self, run: Run) -> None:
        if self.method != "neftune":  # neftune has no clean pass to compare with
            self.gain.log(run)

    @hookimpl
    def on_event(self, event: Event) -> None:
        self.gain.watch(event)

    @hookimpl
    def state_dict(self, run: Run) -> dict[str, Any]:
        return self.gain.state()

    @hookimpl
    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None:
        self.gain.load(state)

    def value(self, name: str) -> Any:
        """Return an option's value, in absolute units."""
        return self.options.value(name, self.scale)

    def mask(self, run: Run, batch: Batch) -> PerturbationMask:
        """Return the positions of a batch that may carry noise."""
        from budwood_adversarial.noise import PerturbationMask

        return PerturbationMask(run, batch, self.options.skip_special, self.options.skip_masked)

    def _perturbed(self, step: Step) -> Iterator[None]:
        """FGM and PGD: clean_weight · L(x) + weight · L(x + δ), δ from `steps` ascent steps starting at 0."""
        from budwood_adversarial.noise import ascend

        value = self.value
        epsilon, norm, clean = value("epsilon"), value("norm"), value("clean_weight")
        steps, size = (1, epsilon) if self.method == "fgm" else (value("steps"), value("step_size"))
        mask, zeros = self.mask(step.run, step.batch), step.zero_noise()
        self.gain.begin(step)
        if clean:
            step.main_weight, step.track_noise = clean, True
            yield
            first = step.noise_grad
        else:
            first = step.noise_gradient(zeros)
        self.gain.subtract(step.loss)
        noise = ascend(mask, zeros, step.noise_gradient, steps, size, epsilon, norm, first)
        if clean:
            step.replay(noise, value("weight"))
        else:
            step.noise, step.main_weight = noise, value("weight")
            yield
        self.gain.add(step.loss)
        self.gain.keep(mask, noise)

    def _free(self, step: Step) -> Iterator[None]:
        """FreeLB (Zhu et al., 2020, algorithm 1): each ascent pass also contributes 1/K of the parameters' gradient."""
        value = self.value
        epsilon, norm, steps, size = value("epsilon"), value("norm"), value("steps"), value("step_size")
        mask = self.mask(step.run, step.batch)
        uniform = mask.draw(step.zero_noise(), lambda i, like: self._uniform(step, i, like))
        noise = epsilon * (mask.per_root(uniform) if norm == "l2" else uniform)
        self.gain.begin(step)
        step.noise, step.main_weight, step.track_noise = noise, 1 / steps, True
        yield
        self.gain.subtract(step.loss)
        gradient = step.noise_grad
        for number in range(1, steps):
            assert gradient is not None
            noise = mask.project(noise + size * mask.unit(gradient, norm), epsilon, norm)
            gradient = step.replay(noise, 1 / steps, gradient=number < steps - 1)
        self.gain.add(step.loss)
        self.gain.keep(mask, noise)

    def _compare(self, step: Step, clean: Outputs) -> Outputs:
        """SMART and VAT: maximise the divergence from the clean outputs, and run the model with the resulting noise."""
        import torch

        value, mask, zeros = self.value, self.mask(step.run, step.batch), step.zero_noise()
        normal = mask.draw(zeros, lambda i, like: step.generator(self, i).normal_like(like))
        divergence = self._divergence()

        def terms(logits: Tensor, positions: Tensor) -> Tensor:
            with torch.no_grad():
                reference = step.logits(clean, positions)
            return divergence(reference, logits)

        if self.method == "smart":
            noise, norm = value("sigma") * normal, value("norm")
        else:
            noise, norm = value("xi") * mask.unit(normal, "l2"), "l2"
        for number in range(value("steps")):
            unit = mask.unit(step.noise_gradient(noise, terms), norm)
            if number == 0:
                self.gain.subtract(step.loss)
            if self.method == "smart":
                noise = mask.project(noise + value("step_size") * unit, value("epsilon"), norm)
            else:
                last = number == value("steps") - 1
                noise = (value("epsilon") if last else value("xi")) * unit
        self.gain.keep(mask, noise)
        return step.forward(noise)

    def _divergence(self) -> Callable[[Tensor, Tensor], Tensor]:
        from budwood_adversarial.divergence import kl, symmetric_kl

        return symmetric_kl if self.method == "smart" else kl

    def _uniform(self, step: Step, example: int, like: Tensor) -> Tensor:
        return step.generator(self, example).uniform_like(like, -1.0, 1.0)


def has_embeddings(model: nn.Module) -> bool:
    """Whether noise can be added to what the model's input embeddings return: of a table, or of an image's patches."""
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return False
    weight = getattr(embeddings, "weight", None)
    return weight.ndim == 2 if weight is not None else _embeds_patches(embeddings)


def _embeds_patches(embeddings: Any) -> bool:
    """Whether a module returns [1, patches, d] for an image, found out without values; some also return a size."""
    from torch import Tensor, empty, nn

    projection = getattr(embeddings, "projection", None)
    if not isinstance(projection, nn.Conv2d):
        return False
    size = getattr(embeddings, "image_size", 0)
    height, width = size if isinstance(size, tuple | list) else (size, size)
    try:
        found = copy.deepcopy(embeddings).to("meta")(empty(1, projection.in_channels, height, width, device="meta"))
    except Exception:  # another way to call it
        return False
    return isinstance(found, Tensor) and found.ndim == 3


def describe_scale(scale: Scale) -> str:
    """Return a phrase that says what relative sizes refer to."""
    return f"the base's embeddings have a median norm of {scale.norm:.2g}"


def no_embeddings(model: nn.Module) -> str:
    """Return the error message for a model without input embeddings."""
    return f"{type(model).__name__} has no input embeddings to put noise on; remove the strategy"
