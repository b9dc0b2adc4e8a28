"""Policy gradients on rewards as a strategy: the live model answers prompts, rewards judge the answers.

Torch takes seconds to import, so it is imported in the hooks: invalid options are refused before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from budwood import BudwoodError, InputError, Sample, Strategy, hookimpl
from budwood_grpo.advantages import advantages, deviation
from budwood_grpo.examples import SAMPLES, SampleFile, to_example
from budwood_grpo.options import GRPOOptions
from budwood_grpo.scores import score, show
from budwood_grpo.watch import Watch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood import Batch, Event, Example, LossTerm, Plan, Run, Step

PLAIN = "text"
"""The data format without prompts."""
CHUNK = 256
"""Labels per chunk of the reference's logits."""
RATE = 0.1
"""Multiple of the learning rate of supervised training: an advantage's gradient is noisier than a label's."""


class GRPO(Strategy):
    """Trains on rewards of sampled answers: grpo, dr-grpo, dapo, gspo, rloo, reinforce++."""

    api = 2
    Options = GRPOOptions
    requires = ("adapter",)
    trains_on = ("prompts without answers", "")
    writes = (SAMPLES,)
    shows = ("reward",)
    learning_rate_scale = RATE

    def __init__(self, options: Any = None, name: str = "", distribution: str = "") -> None:
        super().__init__(options, name, distribution)
        o = self.options
        self.rewards = o.build_rewards()
        self.updates = o.iterations * o.minibatches
        self.log_prob_temperature = o.temperature
        self.in_loss = o.kl > 0 and o.value("kl_in") == "loss"
        self.uses_reference = o.reference if self.in_loss else ""
        self.reads_columns = tuple(dict.fromkeys(c for _, _, reward in self.rewards for c in reward.columns))
        self.code_files = tuple(path for _, _, reward in self.rewards for path in reward.code_files)
        grouped = o.value("baseline") != "none"
        self.watch = Watch(str(self), self.rewards, grouped, o.max_new_tokens)
        self.file = SampleFile()
        self._run: Any = None
        self._generated = -1
        """The step for which this process generated samples last."""
        self._sums: dict[str, Tensor] = {}
        self._extremes: list[str] = []
        """Lines about the best and the worst answer of the last set."""

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        if plan.model is not None and not plan.model.can_generate():
            plan.problem(self, f"{plan.task} generates no text to reward: it needs a causal language model")
        positions = getattr(plan.model.config, "max_position_embeddings", None) if plan.model is not None else None
        if positions is not None and self.options.max_new_tokens >= positions:
            plan.problem(
                self, f"max_new_tokens: {self.options.max_new_tokens} fills the base's {positions} positions; lower it"
            )
        for label, _, reward in self.rewards:
            if reward.code_files and not plan.recipe.allows_code:
                continue  # core reports it
            try:
                reward.check(plan)
            except InputError as error:
                plan.problem(self, f"reward '{label}': {error}")

    @hookimpl
    def prepare_examples(self, run: Run, examples: Sequence[Example]) -> Sequence[Example]:
        """Check that the data has prompts, and that an evaluation has something to measure."""
        data: Any = examples
        if getattr(data, "format", "") == PLAIN:
            raise InputError(
                f"{self}: {data.path} has texts without prompts: give the column 'prompt', and those that rewards read."
            )
        if hasattr(data, "stats") and data.stats.weights != [1.0, 1.0]:
            raise InputError(f"{self}: {data.path}: weights of rows have no effect on rewards: remove 'weight'.")
        unmeasured = run.eval_examples is not None and not run.eval_examples.label_counts.any()
        if unmeasured and run.recipe.train.eval_generate == 0:
            raise InputError("train.eval_generate: 0 leaves prompts nothing to be evaluated by: set data.eval: none.")
        return examples

    @hookimpl
    def planned_examples(self, run: Run) -> Sequence[Example]:
        longest = run.examples[int(np.argmax(run.examples.lengths))]
        tokens = [0] * self.options.max_new_tokens
        prompt = run.task.probe(longest).inputs["input_ids"].tolist()
        sample = Sample(prompt, tokens, [0.0] * len(tokens), "", "length")
        count = (run.recipe.train.batch_examples or 1) * self.options.samples // self.options.minibatches
        columns = {name: np.zeros(len(tokens)) for name in self._columns()}
        return [to_example(sample, str(number), 0, columns) for number in range(count)]

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        from budwood import BestMetric

        self._run = run
        run.task_weight = 0.0
        if run.eval_examples is not None and run.recipe.train.eval_generate > 0:
            run.best_metric = BestMetric("eval_reward", higher=True)
        for label, _, reward in self.rewards if not run.planning else ():
            try:
                reward.prepare(run)
            except BudwoodError as error:
                raise type(error)(f"{self}: reward '{label}': {error}") from error
        return model

    @hookimpl
    def next_examples(self, run: Run, indices: Sequence[int]) -> Sequence[Sequence[Example]]:
        o = self.options
        prompts, samples, scores = self._sample(run, indices)
        owners = [prompt for prompt in prompts for _ in range(o.samples)]
        totals = self._totals(scores)
        plain = [
            to_example(s, f"{p.key}/{i % o.samples}", p.row)
            for i, (p, s) in enumerate(zip(owners, samples, strict=True))
        ]
        columns = self._judge(run, plain, samples, totals)
        examples = [to_example(s, e.key, e.row, c) for e, s, c in zip(plain, samples, columns, strict=True)]
        self._record(run, prompts, samples, scores, totals, columns)
        self._generated = run.step
        kept = self._kept(run, totals, samples)
        return self._steps(run, [example for example, keep in zip(examples, kept, strict=True) if keep])

    @hookimpl
    def batch_counts(self, run: Run, batch: Batch) -> dict[str, float]:
        if self.options.value("aggregation") != "constant":
            return {}
        return {self._unit: float(len(batch.keys) * self.options.max_new_tokens)}

    @hookimpl
    def sequence_terms(self, step: Step, log_probs: Tensor) -> list[LossTerm]:
        from budwood_grpo.loss import aggregate, clipped, kl_estimate, log_ratio

        batch, value = step.batch, self.options.value
        column = {name: batch.columns[name].to(log_probs.dtype) for name in self._columns()}
        ratios = log_ratio(log_probs, column["old"], batch, value("ratio"))
        values, stopped = clipped(ratios, column["advantage"], value("clip_low"), value("clip_high"))
        if "importance" in column:
            values = values * column["importance"]
        how = value("aggregation")
        terms = [aggregate(self.name, values, batch, how, self._unit)]
        if self.in_loss:
            divergence = kl_estimate(log_probs, self._reference(step))
            if self.options.unbiased_kl:
                divergence = divergence * ratios.exp()
            terms.append(aggregate(f"{self.name}_kl", divergence, batch, how, self._unit, self.options.kl))
        if not step.replaying and not step.run.planning:
            self._observe(step, (log_probs.detach() - column["old"]).abs(), stopped)
        return terms

    @hookimpl
    def before_clip(self, run: Run) -> None:
        if run.planning:
            return
        shares = run.world.gather({name: float(value) for name, value in self._sums.items()})
        self._sums.clear()
        for name in dict.fromkeys(name for share in shares for name in share):
            value = sum(share.get(name, 0.0) for share in shares) / run.counts["label"]
            run.log(f"{self.name}_{name}", value)
            if name == "mismatch":
                self.watch.compare(value, run.say)

    @hookimpl
    def evaluate(self, run: Run) -> dict[str, float]:
        """Return the rewards of greedy answers to at most `train.eval_generate` evaluation prompts."""
        examples, limit = run.eval_examples, run.recipe.train.eval_generate
        if examples is None or not limit:
            return {}
        chosen = np.unique(np.linspace(0, len(examples) - 1, min(limit, len(examples))).astype(int))
        prompts = [examples[int(index)] for index in run.world.share(chosen)]
        answers = run.generate(
            prompts, max_new_tokens=self.options.max_new_tokens, temperature=0, stop=self.options.stop
        )
        samples = [answer for (answer,) in answers]
        scores = np.concatenate(run.world.gather(self._score(run, examples, prompts, samples)))
        means = scores.mean(axis=0)
        metrics = {"eval_reward": float(means @ [weight for _, weight, _ in self.rewards])}
        if len(self.rewards) > 1:
            metrics |= {f"eval_reward_{r[0]}": float(mean) for r, mean in zip(self.rewards, means, strict=True)}
        return metrics

    @hookimpl
    def on_event(self, event: Event) -> None:
        """At the end, report what could not be learned, and the best and the worst answer of the last set."""
        if event.kind != "end" or self._run.process_index:
            return
        self.watch.report(self._run.say)
        for line in self._extremes:
            self._run.say(line)

    @hookimpl
    def state_dict(self, run: Run) -> dict[str, Any]:
        return {"version": 1, "watch": self.watch.state(), "extremes": self._extremes}

    @hookimpl
    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None:
        self.watch.load(state["watch"])
        self._extremes = state["extremes"]

    @property
    def _unit(self) -> str:
        return f"{self.name}_tokens"

    def _columns(self) -> tuple[str, ...]:
        return ("advantage", "old", *(("importance",) if self.options.importance_cap else ()))

    def _sample(self, run: Run, indices: Sequence[int]) -> tuple[list[Example], list[Sample], np.ndarray]:
        """Return prompts, `samples` answers to each, and their rewards [answers, rewards].

        With `resample`, new prompts are answered in place of those whose answers all have the same reward, until no
        such prompt is left (Yu et al., 2025, section 3.2) or after so many rounds. They are drawn at random, keyed by
        seed and step, from the prompts that the set does not have yet.
        """
        o = self.options
        rounds = o.value("resample") if o.value("zero_variance") == "drop" else 0
        rest = np.zeros(0, dtype=np.int64)
        if rounds:
            taken = [index for share in run.world.gather(list(indices)) for index in share]
            rest = np.random.default_rng([run.seed, run.step]).permutation(len(run.examples))
            rest = rest[~np.isin(rest, taken)]
        prompts: list[Example] = []
        samples: list[Sample] = []
        parts: list[np.ndarray] = []
        missing = len(indices)
        for number in range(rounds + 1):
            new = [run.examples[int(index)] for index in indices]
            generated = run.generate(
                new, max_new_tokens=o.max_new_tokens, temperature=o.temperature, top_p=o.top_p, stop=o.stop,
                samples=o.samples,
            )  # fmt: skip
            answers = [sample for group in generated for sample in group]
            scores = self._score(run, run.examples, [prompt for prompt in new for _ in range(o.samples)], answers)
            prompts, samples, parts = [*prompts, *new], [*samples, *answers], [*parts, scores]
            missing -= int((np.ptp(self._totals(scores), axis=1) > 0).sum())
            everywhere = run.world.gather(missing) if number < rounds else []
            if not sum(everywhere) or not len(rest):
                break
            first = sum(everywhere[: run.process_index])
            indices, rest = rest[first : first + missing].tolist(), rest[sum(everywhere) :]
        return prompts, samples, np.concatenate(parts)

    def _totals(self, scores: np.ndarray) -> np.ndarray:
        """Return the weighted sums [prompts, samples] of rewards [answers, rewards]."""
        totals: np.ndarray = (scores @ [weight for _, weight, _ in self.rewards]).reshape(-1, self.options.samples)
        return totals

    def _score(self, run: Run, data: Any, prompts: Sequence[Example], samples: Sequence[Sample]) -> np.ndarray:
        """Return the rewards [samples, rewards] of one sample for each prompt of `data`."""
        rows = [data.rows[prompt.row] for prompt in prompts]
        where = [data.rows.location(prompt.row) for prompt in prompts]
        return score(run, self.rewards, samples, rows, where)

    def _judge(
        self, run: Run, examples: Sequence[Example], samples: Sequence[Sample], totals: np.ndarray
    ) -> list[dict[str, np.ndarray]]:
        """Return the columns of each sample: advantages, old log-probabilities, importance weights."""
        from budwood import example_log_probs

        o = self.options
        sampled = [np.array(sample.log_probs, dtype=np.float64) for sample in samples]
        old = sampled
        if o.importance_cap:
            old = [values.astype(np.float64) for values in example_log_probs(run, examples, o.temperature)]
            self._compare(run, old, sampled)
        rewards, penalties = totals, None
        if o.kl > 0 and not self.in_loss:
            reference = example_log_probs(run, examples, o.temperature, o.reference)
            divergences = [o.kl * (a - b) for a, b in zip(old, reference, strict=True)]
            if o.value("kl_in") == "reward":
                rewards = totals - np.reshape([float(values.sum()) for values in divergences], totals.shape)
            else:
                penalties = divergences
        elif o.value("kl_in") == "token-reward":
            penalties = [np.zeros(len(values)) for values in old]
        result = advantages(
            rewards, np.array([len(values) for values in old]), o.value("baseline"), o.value("scale"),
            lambda values: np.concatenate(run.world.gather(values)), penalties,
        )  # fmt: skip
        columns = [{"advantage": a, "old": b} for a, b in zip(result, old, strict=True)]
        if o.importance_cap:
            for column, trainer, sampler in zip(columns, old, sampled, strict=True):
                column["importance"] = np.minimum(np.exp(trainer - sampler), o.importance_cap)
        return columns

    def _kept(self, run: Run, totals: np.ndarray, samples: Sequence[Sample]) -> np.ndarray:
        """Return which samples are trained on; all, if too few would be left for the steps of a set."""
        kept = np.ones(totals.shape, dtype=bool)
        if self.options.value("zero_variance") == "drop":
            kept &= np.ptp(totals, axis=1, keepdims=True) > 0
        kept = kept.ravel()
        if self.options.over_long == "drop":
            kept &= np.array([sample.finish_reason != "length" for sample in samples], dtype=bool)
        left = sum(run.world.gather(int(kept.sum())))
        return kept if left >= self.options.minibatches else np.ones_like(kept)

    def _steps(self, run: Run, examples: list[Example]) -> list[list[Example]]:
        """Split the samples of all processes into the parts of each pass; returns this process's samples of each."""
        parts, own = self.options.minibatches, {str(example.key): example for example in examples}
        keys = sorted(key for share in run.world.gather(list(own)) for key in share)
        steps: list[list[Example]] = []
        for number in range(self.options.iterations):
            order = np.random.default_rng([run.seed, run.step, number]).permutation(len(keys))
            steps += [[own[keys[i]] for i in part if keys[i] in own] for part in np.array_split(order, parts)]
        return steps

    def _record(
        self, run: Run, prompts: Sequence[Example], samples: Sequence[Sample], scores: np.ndarray, totals: np.ndarray,
        columns: Sequence[dict[str, np.ndarray]],
    ) -> None:  # fmt: skip
        """Log a set's rewards, watch them, and append the samples of all processes to samples.jsonl."""
        texts = run.tokenizer.batch_decode([s.prompt for s in samples], skip_special_tokens=True)
        labels, count = [label for label, _, _ in self.rewards], self.options.samples
        records = [
            {
                "step": run.step, "row": run.examples.rows.location(prompts[i // count].row), "sample": i % count,
                "prompt": text, "completion": sample.text, "finish_reason": sample.finish_reason,
                "tokens": len(sample.tokens), "rewards": dict(zip(labels, map(float, scores[i]), strict=True)),
                "reward": float(totals.ravel()[i]), "advantage": float(np.mean(columns[i]["advantage"])),
            }
            for i, (text, sample) in enumerate(zip(texts, samples, strict=True))
        ]  # fmt: skip
        gathered = run.world.gather((records, scores, totals))
        records = [record for share, _, _ in gathered for record in share]
        scores, totals = (np.concatenate([share[i] for share in gathered]) for i in (1, 2))
        ended = [record["finish_reason"] != "length" for record in records]
        if run.world.first:
            self.file.write(run.directory, run.step, records)
        self.watch.add(scores, totals, any(ended), run.say)
        by_reward = sorted(records, key=lambda record: float(record["reward"]))
        self._extremes = [
            f"{word} answer of the last {len(records):,} in {SAMPLES}: reward {record['reward']:.3g}: "
            f"{show(record['prompt'], 40)} → {show(record['completion'])}"
            for word, record in (("best", by_reward[-1]), ("worst", by_reward[0]))
        ]
        values = {
            "reward": totals.mean(),
            "reward_std": deviation(totals, axis=1).mean(),
            "zero_variance": (np.ptp(totals, axis=1) == 0).mean(),
            "over_long": 1 - np.mean(ended),
            "answer_tokens": np.mean([record["tokens"] for record in records]),
        }
        if len(labels) > 1:
            values |= {f"reward_{label}": mean for label, mean in zip(labels, scores.mean(axis=0), strict=True)}
        for name, value in values.items():
            run.log(name, float(value))

    def _compare(self, run: Run, trainer: Sequence[np.ndarray], sampler: Sequence[np.ndarray]) -> None:
        """Log the difference between the log-probabilities of trainer and sampler."""
        apart = [np.abs(a - b) for a, b in zip(trainer, sampler, strict=True)]
        values = np.concatenate([np.zeros(0), *(part for share in run.world.gather(apart) for part in share)])
        run.log(f"{self.name}_mismatch", float(values.mean()))
        self.watch.compare(float(values.mean()), run.say)

    def _observe(self, step: Step, apart: Tensor, stopped: Tensor) -> None:
        """Add a micro-batch's sums over labels: clipping, and before the first update the mismatch of the sampler."""
        if step.micro_step == 0:
            self._sums.clear()
        sums = {"clipped": stopped}
        first = step.run.step == self._generated and step.noise is None
        if first and not self.options.importance_cap:
            sums["mismatch"] = apart
        for name, values in sums.items():
            total = values.double().sum()
            self._sums[name] = total + self._sums[name] if name in self._sums else total

    def _reference(self, step: Step) -> Tensor:
        """Return the reference's log-probabilities [L] at the sampling temperature."""
        import torch

        reference = step.reference(self.options.reference)
        if self.options.temperature == 1:
            assert reference.log_probs is not None
            return reference.log_probs
        if self.name not in step.cache:
            labels = step.batch.labels
            with torch.no_grad():
                step.cache[self.name] = torch.cat([
                    step.run.task.log_probs(reference.logits(chunk), labels[chunk], self.options.temperature)
                    for chunk in torch.arange(len(labels), device=labels.device).split(CHUNK)
                ])  # fmt: skip
        result: Tensor = step.cache[self.name]
        return result
