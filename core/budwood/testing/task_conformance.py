"""The test class that task authors inherit: one test per guarantee."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from budwood.testing import adapter_checks, checks, task_checks
from budwood.testing.conformance import Conformance
from budwood.testing.files import session_folder, tiny_decoder
from budwood.testing.task_bench import TaskBench, TaskSpec


class TaskConformance(Conformance):
    """Base class for conformance tests of a task; name the subclass Test…, and set `task` and `rows`.

    Each test checks one guarantee; a failure names it, with the measured values. All runs take a few steps of LoRA on a
    tiny base, in fp32 on the CPU; do not use dropout.

    Attributes:
        task: name under which the task is installed.
        rows: rows of training data, at least 8, of similar lengths; or override `make_data`.
        held_out: rows to evaluate on; by default the first four of `rows`.
        options: the task's options.
        text: a text that the task answers, if it implements `respond`.
        max_length: tokens at which examples are cut.
        steps: optimizer steps of each run.
    """

    task: ClassVar[str]
    rows: ClassVar[Sequence[Mapping[str, Any]]] = ()
    held_out: ClassVar[Sequence[Mapping[str, Any]]] = ()
    options: ClassVar[Mapping[str, Any]] = {}
    text: ClassVar[str] = "abc def"
    max_length: ClassVar[int] = 32
    steps: ClassVar[int] = 3

    @classmethod
    def make_base(cls, folder: Path) -> Path:
        """Save a base that the task can use in `folder`; by default `tiny_decoder`."""
        return tiny_decoder(folder)

    @classmethod
    def make_data(cls, folder: Path) -> tuple[Path, Path]:
        """Write training and evaluation data to `folder`, and return their paths."""
        if len(cls.rows) < 8:
            pytest.fail(f"{cls.__name__}: set at least 8 rows of training data: rows = [{{…}}, …]", pytrace=False)
        paths = []
        for name, rows in (("train", cls.rows), ("eval", cls.held_out or cls.rows[:4])):
            paths.append(folder / f"{name}.jsonl")
            paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return paths[0], paths[1]

    @classmethod
    def make_bench(cls) -> TaskBench:
        """See `Conformance.make_bench`."""
        if not hasattr(cls, "task"):
            pytest.fail(f'{cls.__name__}: set the task under test: task = "mine"', pytrace=False)
        folder = session_folder() / "tasks" / f"{cls.__module__}.{cls.__name__}"
        folder.mkdir(parents=True)
        base, (train, held_out) = cls.make_base(folder / "base"), cls.make_data(folder)
        spec = TaskSpec(folder.name, cls.task, base, train, held_out, cls.options, cls.max_length, cls.steps)
        return TaskBench(spec)

    def test_declares_what_it_implements(self, request: pytest.FixtureRequest) -> None:
        self._check(request, task_checks.declares)

    def test_examples_are_collated_and_probed(self, request: pytest.FixtureRequest) -> None:
        self._check(request, task_checks.examples_are_valid)

    def test_trains(self, request: pytest.FixtureRequest) -> None:
        self._check(request, task_checks.trains)

    def test_vary_is_keyed(self, request: pytest.FixtureRequest) -> None:
        self._check(request, task_checks.varies_by_key)

    def test_base_unchanged(self, request: pytest.FixtureRequest) -> None:
        self._check(request, functools.partial(checks.base_unchanged, quantizations=("none",)))

    def test_one_batch_equals_several(self, request: pytest.FixtureRequest) -> None:
        self._check(request, task_checks.splits)

    def test_two_processes_equal_one(self, request: pytest.FixtureRequest) -> None:
        self._run_announced(request)
        self._check(request, checks.two_processes)

    def test_resumed_equals_uninterrupted(self, request: pytest.FixtureRequest) -> None:
        self._check(request, checks.resume)

    def test_save_and_load(self, request: pytest.FixtureRequest) -> None:
        self._check(request, adapter_checks.save_and_load)

    def test_saved_adapter_has_the_metrics_of_the_run(self, request: pytest.FixtureRequest) -> None:
        self._check(request, task_checks.saved_is_evaluated)

    def test_attack_raises_the_loss(self, request: pytest.FixtureRequest) -> None:
        self._check(request, task_checks.attacked)

    def test_golden_outputs_replay(self, request: pytest.FixtureRequest) -> None:
        self._check(request, task_checks.verifies)

    def test_stock_peft_opens_it(self, request: pytest.FixtureRequest) -> None:
        self._check(request, task_checks.opens_in_peft)

    def test_merged_equals_unmerged(self, request: pytest.FixtureRequest) -> None:
        self._check(request, adapter_checks.merge)

    def test_runs_on_fake_tensors(self, request: pytest.FixtureRequest) -> None:
        self._check(request, functools.partial(checks.fake_tensors, steps=1))  # a task does not know the step

    def test_plans_without_data(self, request: pytest.FixtureRequest) -> None:
        self._check(request, task_checks.plans_without_data)

    def test_answers_are_json(self, request: pytest.FixtureRequest) -> None:
        self._check(request, functools.partial(task_checks.responds, text=self.text))
