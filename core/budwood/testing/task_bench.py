"""Short runs of one task with LoRA, each executed once and shared by the checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from budwood.contract.loading import build_task, load_strategy
from budwood.data.build import build_examples
from budwood.model.checks import load_tokenizer
from budwood.model.task import Task
from budwood.recipe.schema import Recipe
from budwood.testing.bench import BATCH, LEARNING_RATE, PROBE, Bench, Spec, register
from budwood.testing.files import Files, session_folder
from budwood.testing.probe import Probe

ADAPTER = {"rank": 2, "alpha": 4}


@dataclass(frozen=True)
class TaskSpec:
    """The settings of a bench.

    Attributes:
        name: name of the class under test, for the folders of its runs.
        task: name under which the task is installed.
        base, train, eval: paths.
        options: the task's options.
        max_length: tokens at which examples are cut.
        steps: optimizer steps of each run.
    """

    name: str
    task: str
    base: Path
    train: Path
    eval: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = 32
    steps: int = 3


class TaskBench(Bench):
    """Runs of one task: LoRA in fp32 on the CPU, 4 groups of examples per optimizer step."""

    def __init__(self, spec: TaskSpec) -> None:
        self.task_spec = spec
        self.spec = Spec(load_strategy("lora")[0], dict(ADAPTER), (), spec.task, spec.steps)
        self.files = Files(session_folder(), spec.base, spec.base, spec.train, spec.eval)
        self.name = register(self.spec.strategy)
        register(Probe, PROBE)
        self._results, self._failed, self._resumed = {}, {}, None
        task = self.build_task()
        task.read_base(spec.base)
        tokenizer = load_tokenizer(spec.base) if task.needs_tokenizer else None
        self.examples = build_examples(spec.train, tokenizer, task, spec.max_length)
        self.longest = int(self.examples.lengths.max())
        self.group = max((self.examples.groups == group).sum() for group in set(self.examples.groups.tolist()))

    def build_task(self) -> Task:
        """Return the task with its options."""
        task: Task = build_task(self.task_spec.task, dict(self.task_spec.options))
        return task

    def micro_tokens(self, groups: int) -> int:
        """Return the limit for micro-batches of this number of groups."""
        return int(groups * self.group * self.longest)

    def recipe(self, output: str, other: str | None = None, quantization: str = "none", **train: Any) -> Recipe:
        """Return a recipe whose result depends only on its arguments; the probe is its first strategy."""
        spec = self.task_spec
        task = {"task": spec.task, "task_options": dict(spec.options)}
        steps = {
            "steps": spec.steps, "batch_examples": BATCH, "micro_tokens": self.micro_tokens(BATCH),
            "learning_rate": LEARNING_RATE, "precision": "fp32", "schedule": "constant", "warmup": 0,
            "eval_generate": 0,
        }  # fmt: skip
        return Recipe.from_dict(
            {
                "base": {"model": str(spec.base), "quantization": quantization, "device": "cpu", **task},
                "data": {"train": str(spec.train), "eval": str(spec.eval), "max_length": self.longest},
                "strategies": [PROBE, {"lora": ADAPTER}],
                "train": steps | train,
                "output": str(session_folder() / "runs" / spec.name / output),
            }
        )
