"""Distillation as a strategy: loss terms at the labels from a live teacher or its cache.

Torch takes seconds to import, so it is imported in the hooks: invalid options are refused before that.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budwood import (
    RUN_ADAPTER,
    BudwoodError,
    InputError,
    Strategy,
    ask_owner,
    hookimpl,
    read_adapter,
    use_adapters,
)
from budwood_distillation.options import BASE, DEFAULT_TOP_K, DistillationOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood import Example, LossTerm, Outputs, Plan, Reference, Run, Step
    from budwood_distillation.cache import TeacherCache
    from budwood_distillation.checks import TeacherInfo
    from budwood_distillation.teacher import Teacher

CHUNK = 256
"""Labels per chunk of teacher logits when a cache is filled."""
WINDOW = 10
"""Steps after the warm-up within which student and teacher must differ."""
FORMAT = 2
"""Version of the cache, raised if the content for the same key changes."""


class Distillation(Strategy):
    """Trains on a teacher's distribution at every label, in addition to the task's loss (Hinton et al., 2015)."""

    Options = DistillationOptions
    slots = ("teacher",)
    after = ("adapter",)

    def __init__(self, options: Any = None, name: str = "", distribution: str = "") -> None:
        super().__init__(options, name, distribution)
        self.info: TeacherInfo | None = None
        self.teacher: Teacher | None = None
        self.cache: TeacherCache | None = None
        self.size = 0
        """Number of logits in use: the shared vocabulary, or the classes."""
        self._checked: Any = None
        self._differed: Tensor | None = None
        """Whether student and teacher have differed so far, on the device; None once the check is complete."""

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        from budwood_distillation.checks import check_teacher

        if self.info is not None:
            return
        generates = next((s for s in plan.strategies if hasattr(s, "next_examples")), None)
        if self.options.cache is not None and generates is not None:
            plan.problem(self, f"cache: holds outputs for the data, but {generates} generates its examples: remove it")
            return
        if plan.task is not None and not plan.task.has_log_probs():
            plan.problem(self, f"{plan.task} has no distribution over tokens or classes that could be taught")
            return
        try:
            self.info = check_teacher(self.options, plan)
        except InputError as error:
            plan.problem(self, str(error))

    @hookimpl
    def prepare_examples(self, run: Run, examples: Sequence[Example]) -> Sequence[Example]:
        """Check classes and cache key before the base loads; examples are returned unchanged."""
        if hasattr(examples, "labels"):  # an earlier strategy may have returned a plain list
            self._check_data(run, examples)
        return examples

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        import torch

        self._check_data(run, run.examples)
        run.task_weight *= 1 - self.options.weight
        assert self.info is not None
        longest = int(run.examples.lengths.max())
        if 0 < self.info.positions < longest:
            run.say(
                f"warning: teacher {self.options.teacher}: its config allows {self.info.positions} tokens, and the "
                f"longest example has {longest}: lower data.max_length, unless the model supports more"
            )
        if self.options.cache is None:
            self.teacher = self._load(run, model)
            if self.options.teacher == BASE:
                self.uses_reference = "base"  # shared with other strategies that compare with the base
        else:
            self._prepare_cache(run, model)
        self._differed = torch.zeros((), dtype=torch.bool, device=run.device)
        return model

    @hookimpl
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> LossTerm:
        from budwood import LossTerm
        from budwood_distillation.divergence import bucketed, divergence, log_probabilities

        options, target = self.options, self._target(step)
        if not isinstance(target, tuple):
            log_p = log_probabilities(target.logits(positions), self.size, options.temperature)
            log_q = log_probabilities(logits, self.size, options.temperature)
        else:
            ids, log_p = (column[positions] for column in target)
            log_q = bucketed(logits, self.size, options.temperature, ids)
        if self._differed is not None and not step.replaying:
            self._differed = self._differed | (log_p != log_q.detach()).any()
        values = divergence(log_p, log_q, options.divergence, options.beta or 0.5)
        return LossTerm(self.name, values * options.temperature**2, weight=options.weight)

    @hookimpl
    def loss_terms(self, step: Step, outputs: Outputs) -> LossTerm | None:
        """The hidden-state term: the weighted mean over the labels of each example."""
        if self.options.hidden_weight == 0:
            return None
        import torch
        import torch.nn.functional as F

        from budwood import LossTerm

        batch, target = step.batch, self._target(step)
        assert not isinstance(target, tuple)  # a cache and this term exclude each other
        dtype = torch.promote_types(outputs.hidden.dtype, torch.float32)
        ours, theirs = outputs.hidden.flatten(0, 1)[batch.label_positions].to(dtype), target.hidden.to(dtype)
        if self.options.hidden_distance == "cosine":
            distances = 1 - F.cosine_similarity(ours, theirs, dim=-1)
        else:
            distances = (ours - theirs).square().mean(-1)
        owner, zeros = batch.example_of_label, distances.new_zeros(len(batch.keys))
        weights = batch.weights.to(distances.dtype)
        sums, labels = zeros.index_add(0, owner, distances * weights), zeros.index_add(0, owner, weights)
        values = sums / labels.clamp(min=torch.finfo(labels.dtype).tiny)  # not bincount, whose shape depends on values
        return LossTerm(f"{self.name}_hidden", values, "example", self.options.hidden_weight)

    @hookimpl
    def after_optimizer_step(self, run: Run) -> None:
        """Warn once if student and teacher outputs are bitwise identical up to `WINDOW` steps after the warm-up."""
        if self._differed is None or run.planning:
            return
        warmup, steps, done = run.recipe.train.warmup, run.steps or 1, run.step + 1
        warmup = int(warmup) if warmup >= 1 else round(warmup * steps)
        if bool(self._differed):
            self._differed = None
        elif done >= min(warmup + WINDOW, steps):
            self._differed = None
            run.say(
                f"warning: {self}: after {done} steps the outputs of teacher and student are still bitwise identical, "
                f"so its term is zero: the adapter does not change, or '{self.options.teacher}' is the student"
            )

    @hookimpl
    def state_dict(self, run: Run) -> dict[str, Any]:
        return {"differed": self._differed is None or bool(self._differed)}

    @hookimpl
    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None:
        if state["differed"]:
            self._differed = None

    def _target(self, step: Step) -> Reference | tuple[Tensor, Tensor]:
        """Return the teacher's outputs for the batch, computed once per micro-step, also if it is replayed."""
        if self.uses_reference:
            return step.reference("base")
        if self.name not in step.cache:
            if self.cache is not None:
                step.cache[self.name] = self.cache.read(step.batch)
            else:
                assert self.teacher is not None
                step.cache[self.name] = self.teacher.read(step.run, step.batch)
        target: Reference | tuple[Tensor, Tensor] = step.cache[self.name]
        return target

    def _load(self, run: Run, model: nn.Module) -> Teacher:
        """Load the teacher, and report its size."""
        from budwood import load_frozen
        from budwood_distillation.teacher import TEACHER_ADAPTER, Teacher

        name = self.options.teacher
        if self.options.own_model:
            base = load_frozen(run, name, self.options.quantization)
            run.say(f"teacher {name}: " + "; ".join(base.notes))
            return Teacher(base.model)
        owner: Any = next(s for s in run.strategies if "adapter" in s.slots)
        if self.options.adapter is None:
            if run.base.new:
                raise InputError(f"{self}: teacher: the base has no weights for {run.base.new[0]}: it cannot teach.")
            run.say("teacher: this base with the adapter disabled, no second copy")
            return Teacher(model, owner)
        saved = read_adapter(self.options.adapter)
        if saved.manifest is not None and saved.manifest.base.fingerprint != run.base.fingerprint:
            raise InputError(
                f"{self}: teacher: {saved.directory} was trained on the base '{saved.manifest.base.name}'."
            )
        try:
            tensors = saved.load_tensors()
            ask_owner(owner, "attach_adapter", model=model, config=saved.config, tensors=tensors, name=TEACHER_ADAPTER)
        except BudwoodError as error:
            raise type(error)(f"{self}: teacher: {saved.directory}: {error}") from error
        use_adapters(owner, model, [RUN_ADAPTER])
        size = f"{saved.bytes / 1e6:.1f} MB, no second copy of the base"
        run.say("; ".join([f"teacher: this base with the adapter in {saved.directory}, {size}", *saved.notes]))
        return Teacher(model, owner, (TEACHER_ADAPTER,))

    def _check_data(self, run: Run, examples: Any) -> None:
        """Check the classes of the data and the key of the cache.

        Raises:
            InputError: the classes differ, or the cache is from a different run.
        """
        from budwood_distillation.cache import TeacherCache
        from budwood_distillation.checks import check_labels

        info = self.info
        assert info is not None  # check_plan found no problem
        if examples is self._checked:
            return
        self._checked = examples
        labels = list(examples.labels)
        self.size = info.vocabulary or len(labels)
        try:
            if info.labels:
                check_labels(self.options.teacher, info.labels, labels)
            if self.options.cache is not None and run.task.varies():
                raise InputError(
                    f"cache: {run.task} varies examples in each epoch, and the cache holds one answer to "
                    "each: leave it out."
                )
            if self.options.cache is not None:
                self.cache = TeacherCache(Path(self.options.cache).expanduser(), self._key(run, examples), examples)
        except BudwoodError as error:
            raise type(error)(f"{self}: {error}") from error

    def _key(self, run: Run, examples: Any) -> dict[str, Any]:
        """Return everything that affects the content of a cache."""
        from budwood import fingerprint

        assert self.info is not None
        content = hashlib.sha256()
        for e in examples:
            content.update(f"{e.key} {len(e.labels)} ".encode() + e.label_positions.tobytes() + e.labels.tobytes())
            for name in sorted(e.inputs):
                content.update(name.encode() + e.inputs[name].tobytes())
        vocabulary = json.dumps(sorted(run.tokenizer.get_vocab().items()) if run.tokenizer is not None else [])
        return {
            "format": FORMAT,
            "teacher": fingerprint(self.options.teacher if self.options.own_model else run.recipe.base.model),
            "adapter": self.info.adapter or ("off" if self.options.teacher == BASE else "none"),
            "quantization": self.info.quantization,
            "double_quantization": run.recipe.base.double_quantization,
            "precision": str(run.dtype).removeprefix("torch."),
            "task": run.task.name,
            "labels": list(examples.labels),
            "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "data": examples.sha256,
            "max_length": examples.max_length,
            "examples": content.hexdigest(),
            "vocabulary": self.size,
            "temperature": self.options.temperature,
            "top_k": min(self.options.top_k or DEFAULT_TOP_K, self.size - 1),
        }

    def _prepare_cache(self, run: Run, model: nn.Module) -> None:
        """Complete the cache: run the teacher for missing shards and release it; if none is missing, do not load it."""
        cache = self.cache
        assert cache is not None
        missing = cache.missing()
        run.world.barrier()
        if missing:
            if run.world.first:
                cache.begin()
            run.say(
                f"teacher cache {cache.directory}: {len(missing)} of {len(cache.shards)} shards to compute, "
                f"top {cache.k} and the rest for {cache.labels:,} labels"
            )
            run.world.barrier()
            self._fill(run, model, cache, missing[run.process_index :: run.processes])
            run.world.barrier()
        else:
            run.say(f"teacher cache {cache.directory}: {cache.labels:,} labels; the teacher is not loaded")
        cache.verify()

    def _fill(self, run: Run, model: nn.Module, cache: TeacherCache, shards: Sequence[int]) -> None:
        """Load the teacher, run it over the examples of `shards`, and release it."""
        from budwood_distillation.teacher import TEACHER_ADAPTER

        if not shards:
            return
        packed, teacher = run.packed, self._load(run, model)
        for done, shard in enumerate(shards, 1):
            self._fill_shard(run, teacher, cache, shard)
            if 4 * done // len(shards) > 4 * (done - 1) // len(shards):
                run.say(f"teacher cache: {done} of {len(shards)} shards done")
        if teacher.adapters:
            ask_owner(teacher.owner, "detach_adapter", model=model, name=TEACHER_ADAPTER)
        run.packed = packed  # as in a run that only reads the cache
        del teacher
        gc.collect()

    def _fill_shard(self, run: Run, teacher: Teacher, cache: TeacherCache, shard: int) -> None:
        import numpy as np
        import torch

        from budwood import batches_of
        from budwood_distillation.divergence import bucketed

        first, last = cache.shards[shard]
        start, rows = int(cache.offsets[first]), int(cache.offsets[last] - cache.offsets[first])
        ids, log_probs = np.empty((rows, cache.k), np.int32), np.empty((rows, cache.k + 1), np.float32)
        for batch in batches_of(run, range(first, last)):
            outputs, positions = teacher.read(run, batch), cache.rows(batch) - start
            for chunk in torch.arange(len(positions), device=run.device).split(CHUNK):
                logits = outputs.logits(chunk)
                top = logits[:, : self.size].float().topk(cache.k).indices
                rows_of_chunk = positions[chunk.cpu().numpy()]
                ids[rows_of_chunk] = top.cpu().numpy()
                log_probs[rows_of_chunk] = bucketed(logits, self.size, self.options.temperature, top).cpu().numpy()
        if not np.isfinite(log_probs).all():
            raise InputError(f"{self}: teacher: the outputs of '{self.options.teacher}' are not finite on this data.")
        cache.write(shard, ids, log_probs)
