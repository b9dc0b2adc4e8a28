"""A small on-policy strategy: it samples, and rewards samples that contain a word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from budwood import Column, Example, LossTerm, Options, Run, Sample, Step, Strategy, hookimpl

SETS: list[tuple[int, list[int]]] = []
"""(step, indices) of each set requested in this process."""
GAPS: dict[int, float] = {}
"""Largest difference, by step, between the sampler's log-probabilities and those of the step."""


class WordPolicy(Strategy):
    """Policy gradient with a clipped ratio (Schulman et al., 2017, equation 7) on a reward of 1 for a word."""

    api = 2
    requires = ("adapter",)
    updates = 2

    class Options(Options):
        word: str = "e"
        samples: int = 8
        new_tokens: int = 6
        clip: float = 0.2
        fault: str = ""

    @hookimpl
    def planned_examples(self, run: Run) -> Sequence[Example]:
        tokens = [0] * self.options.new_tokens
        sample = Sample(
            run.task.probe(run.examples[0]).inputs["input_ids"].tolist(), tokens, [0.0] * len(tokens), "", "eos"
        )
        return (
            [] if self.options.fault == "plan" else [self._example(run.examples[0], i, sample, 0.0) for i in range(4)]
        )

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        run.task_weight = 0.0
        return model

    @hookimpl
    def next_examples(self, run: Run, indices: Sequence[int]) -> Sequence[Sequence[Example]]:
        SETS.append((run.step, list(indices)))
        prompts = [run.examples[index] for index in indices]
        generated = run.generate(prompts, max_new_tokens=self.options.new_tokens, samples=self.options.samples)
        rewards = np.array([[float(self.options.word in sample.text) for sample in samples] for samples in generated])
        run.log("reward", rewards.mean())
        examples = [
            self._example(prompt, number, sample, reward - row.mean())
            for prompt, samples, row in zip(prompts, generated, rewards, strict=True)
            for number, (sample, reward) in enumerate(zip(samples, row, strict=True))
        ]
        steps = [examples[number :: self.updates] for number in range(self.updates)]
        return self._spoiled(steps) if self.options.fault else steps

    def _example(self, prompt: Example, number: int, sample: Sample, advantage: float) -> Example:
        tokens = np.array(sample.prompt + sample.tokens, dtype=np.int32)
        at = np.arange(len(sample.prompt), len(tokens))
        return Example(
            {"input_ids": tokens}, at - 1, tokens[at], np.ones(len(at), dtype=np.float32),
            key=f"{prompt.key}/{number}", row=prompt.row,
            columns={
                "advantage": Column(np.float32(advantage)),
                "old": Column(np.array(sample.log_probs, dtype=np.float32), "label"),
            },
        )  # fmt: skip

    def _spoiled(self, steps: list[list[Example]]) -> Any:
        """Return invalid steps, as a strategy with a bug might."""
        first = steps[0][0]
        none = np.zeros(0, dtype=np.int64)
        if self.options.fault == "number":
            return steps[:1]
        if self.options.fault == "empty":
            return [steps[0], []]
        if self.options.fault == "labels":
            columns = {**first.columns, "old": Column(none, "label")}
            steps[0][0] = replace(first, label_positions=none, labels=none, weights=none.astype("f4"), columns=columns)
        if self.options.fault == "keys":
            steps[0][1] = replace(steps[0][1], key=first.key)
        if self.options.fault == "column":
            steps[0][0] = replace(first, columns={"advantage": first.columns["advantage"]})
        if self.options.fault == "position":
            steps[0][0] = replace(first, label_positions=first.label_positions + 100)
        return steps

    @hookimpl
    def sequence_terms(self, step: Step, log_probs: Tensor) -> LossTerm:
        batch = step.batch
        advantage, old = batch.columns["advantage"][batch.example_of_label], batch.columns["old"]
        if not step.run.planning:
            gap = float((log_probs.detach() - old).abs().max())
            GAPS[step.run.step] = max(gap, GAPS.get(step.run.step, 0.0))
        ratio = (log_probs - old).exp()
        clipped = ratio.clamp(1 - self.options.clip, 1 + self.options.clip)
        return LossTerm("policy", -(ratio * advantage).minimum(clipped * advantage))
