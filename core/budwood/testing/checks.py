"""The guarantees of every strategy, one check each, which raises `PromiseBroken` if the guarantee does not hold."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from budwood.contract.discovery import PluginError
from budwood.contract.loading import HOOKS, build_strategy, check_hooks, load_strategy
from budwood.errors import BudwoodError, InputError
from budwood.recipe.schema import Recipe, build_composition
from budwood.testing import processes
from budwood.testing.bench import (
    BATCH,
    Bench,
    NotApplicable,
    PromiseBroken,
    explain,
    implements,
    registered,
)
from budwood.testing.expect import expect_equal, expect_state, expect_trained
from budwood.testing.fake import run_on_fake_tensors
from budwood.testing.files import session_folder
from budwood.testing.probe import InjectedError, distance, farthest, same_bytes, state_of

OWNER_HOOKS = ("attach_adapter", "use_adapters", "detach_adapter", "export", "trainable_parameters")


def declares(bench: Bench) -> None:
    """Check that it has a docstring, implements existing hooks, and owns the slots of its hooks."""
    promise, cls = "declares what it implements", bench.spec.strategy
    try:
        check_hooks(cls, f"strategy '{bench.name}'")
        load_strategy(bench.name)
    except BudwoodError as error:
        raise PromiseBroken(f"{promise}: {error}") from error
    hooks = [hook for hook in HOOKS if implements(cls, hook)]
    if not hooks:
        raise PromiseBroken(f"{promise}: it implements no hook. Mark its methods with @hookimpl.")
    if not ((vars(cls).get("__doc__") or "").strip()):
        raise PromiseBroken(f"{promise}: the class has no docstring; `budwood plugins` shows its first line.")
    missing = [hook for hook in OWNER_HOOKS if hook not in hooks]
    if bench.owns_adapter and missing:
        raise PromiseBroken(
            f"{promise}: it owns the slot 'adapter' and implements {len(OWNER_HOOKS) - len(missing)} of the "
            f"{len(OWNER_HOOKS)} required hooks; missing: {', '.join(missing)}."
        )
    if not bench.owns_adapter and implements(cls, "attach_adapter"):
        raise PromiseBroken(f"{promise}: it implements attach_adapter, but its slots {cls.slots} lack 'adapter'.")


def options_round_trip(bench: Bench) -> None:
    """Check that its options survive a YAML round trip, have a JSON schema, and refuse unknown keys."""
    promise, model, given = "options round-trip, unknown keys refused", bench.spec.strategy.Options, bench.spec.options
    try:
        options = model.model_validate(given)
    except ValidationError as error:
        raise PromiseBroken(f"{promise}: the options of the test, {given}, are refused: {error}") from error
    stream, yaml = io.StringIO(), YAML(typ="safe", pure=True)
    yaml.dump(options.model_dump(mode="json"), stream)
    try:
        again = model.model_validate(YAML(typ="safe", pure=True).load(stream.getvalue()))
    except ValidationError as error:
        raise PromiseBroken(f"{promise}: their YAML is refused: {stream.getvalue()!r}: {error}") from error
    for name in model.model_fields:
        before, after = getattr(options, name), getattr(again, name)
        if before != after:
            raise PromiseBroken(f"{promise}: option '{name}' was {before!r} and is {after!r} after a YAML round trip.")
    try:
        schema = model.model_json_schema()
        json.dumps(schema, allow_nan=False)
    except Exception as error:
        raise PromiseBroken(f"{promise}: they have no JSON schema: {explain(error)}") from error
    absent = sorted({field.alias or name for name, field in model.model_fields.items()} - set(schema["properties"]))
    if absent:
        raise PromiseBroken(f"{promise}: the schema lacks {', '.join(absent)}.")
    for model_name, part in {"Options": schema, **schema.get("$defs", {})}.items():
        if "properties" in part and part.get("additionalProperties") is not False:
            raise PromiseBroken(f"{promise}: {model_name} accepts unknown keys (extra is not 'forbid').")
    unknown = "no_such_option"
    try:
        build_strategy(bench.name, {**given, unknown: 1}, "recipe")
    except InputError as error:
        if unknown not in str(error):
            raise PromiseBroken(f"{promise}: the error for '{unknown}' does not name it: {error}") from error
    else:
        raise PromiseBroken(f"{promise}: the unknown key '{unknown}' was silently accepted.")
    if isinstance(options, BaseModel) and not type(options).model_config.get("frozen"):
        raise PromiseBroken(f"{promise}: the options are not frozen, so a run could change the recorded values.")


def zero_effect_at_start(bench: Bench) -> None:
    """Check that before the first step the logits are those of the base."""
    promise = "zero effect at initialisation"
    if not implements(bench.spec.strategy, "prepare_model"):
        raise NotApplicable("it has no prepare_model, so it cannot change the model before the first step")
    probe = bench.run(promise).probe
    gap, size = distance(probe.base_logits, probe.start_logits), float(probe.base_logits.abs().max())
    if gap > 1e-6 * size:
        raise PromiseBroken(
            f"{promise}: before the first step a logit differs from the base's by {gap:.3g} "
            f"(largest logit {size:.3g}, at most {1e-6 * size:.1g} allowed)."
        )


def gradients_where_declared(bench: Bench) -> None:
    """Check that exactly the parameters from trainable_parameters have gradients."""
    promise = "gradients only where declared"
    probe = bench.run(promise).probe
    if probe.strays:
        raise PromiseBroken(f"{promise}: {len(probe.strays)} elsewhere: {'; '.join(probe.strays[:3])}.")
    for name, size in probe.largest.items():
        if not size:
            problem = "no gradient" if size is None else "a gradient of 0"
            raise PromiseBroken(f"{promise}: {name} is declared and had {problem} in all {bench.spec.steps} steps.")


def base_unchanged(bench: Bench, quantizations: Sequence[str] = ("none", "nf4")) -> None:
    """Check that the base stays bitwise identical."""
    promise = "the base does not change"
    for quantization in quantizations:
        try:
            result = bench.run(promise, quantization, quantization=quantization)
        except PromiseBroken:  # another check reports it
            if quantization == "none":
                raise
            continue
        changed = result.probe.changed_base()
        if changed:
            raise PromiseBroken(
                f"{promise}: {len(changed)} tensors of the {quantization} base differ after {bench.spec.steps} steps: "
                f"{', '.join(changed[:3])}."
            )


def same_seed_same_bytes(bench: Bench) -> None:
    """Check that two runs of one recipe are bitwise identical."""
    promise = "same seed, same bytes"
    first, again = bench.run(promise), bench.run(promise, "again")
    name, gap = farthest(first.parameters, again.parameters)
    alike = all(same_bytes(first.parameters[key], again.parameters[key]) for key in first.parameters)
    if gap or not alike:
        raise PromiseBroken(
            f"{promise}: two runs with seed 0 differ by {gap:.3g} in {name} after {bench.spec.steps} steps. "
            "Draw from run.generator(self) or step.generator(self, example)."
        )


def micro_batches(bench: Bench) -> None:
    """Check that one micro-batch of four examples gives the same result as two of two."""
    promise = "1×4 equals 2×2"
    whole, halves = bench.run(promise), bench.run(promise, "halves", micro_tokens=bench.micro_tokens(BATCH // 2))
    ones, twos = whole.probe.micro_batches, halves.probe.micro_batches
    if any(len(step) != 1 for step in ones.values()) or any(len(step) != 2 for step in twos.values()):
        raise NotApplicable(f"its micro-batches have {ones[0]} and {twos[0]} examples instead of 4 and 2 + 2")
    label = f"micro-batches of {ones[0]} and of {twos[0]} examples"
    expect_equal(promise, whole, halves.parameters, label, bench, halves.probe)


def two_processes(bench: Bench) -> None:
    """Check that two processes of one group give the same result as one."""
    promise = f"{processes.PROCESSES} processes equal 1"
    whole = bench.run(promise)
    outcome = in_two_processes(bench)
    if processes.PARALLEL and "train.parallel:" in outcome.error:
        raise NotApplicable(outcome.error.partition("train.parallel: ")[2])
    if outcome.error:
        raise PromiseBroken(f"{promise}: the run in several processes did not finish:\n{outcome.error}")
    if (outcome.processes, outcome.world) != (processes.PROCESSES, processes.PROCESSES):
        raise PromiseBroken(f"{promise}: there are {outcome.world} processes, and the run used {outcome.processes}.")
    from safetensors.torch import load_file

    assert outcome.parameters is not None
    expect_equal(promise, whole, load_file(outcome.parameters), "one process and several", bench)


def resume(bench: Bench) -> None:
    """Check that an interrupted and resumed run is bitwise identical to an uninterrupted one."""
    promise = "interrupted and resumed equals uninterrupted"
    whole, resumed = bench.run(promise), bench.resume(promise)
    if 0 in resumed.probe.micro_batches:
        raise PromiseBroken(f"{promise}: the run started again instead of resuming after step 1.")
    name, gap = farthest(whole.parameters, resumed.parameters)
    if gap or not all(same_bytes(whole.parameters[key], resumed.parameters[key]) for key in whole.parameters):
        raise PromiseBroken(
            f"{promise}: a run resumed after step 1 differs by {gap:.3g} in {name} after {bench.spec.steps} steps. "
            "Save the strategy's state in state_dict, and restore it in load_state_dict."
        )


def runs_on(bench: Bench, quantization: str) -> None:
    """Check that it trains on a base in this quantization: all values finite, some logits changed."""
    promise = f"runs on {'an unquantised base' if quantization == 'none' else quantization.upper()}"
    result = bench.run(promise, quantization, quantization=quantization)
    expect_trained(promise, result)


def fake_tensors(bench: Bench, steps: int | None = None) -> None:
    """Check that its steps run on fake CPU tensors, with run.planning set; `steps`: as many, not those of its runs."""
    promise = "runs on fake CPU tensors"
    try:
        run_on_fake_tensors(bench.recipe("fake", steps=steps or bench.spec.steps))
    except Exception as error:
        raise PromiseBroken(
            f"{promise}: {explain(error)}. If run.planning is set, code that depends on values must assume "
            "the largest case."
        ) from error


def after_an_exception(bench: Bench) -> None:
    """Check that an exception in a step propagates, and that the step leaves no hooks or other changes on the model."""
    promise = "hooks removed after an exception"
    calls = bench.run(promise).probe.calls[1]
    for number in sorted({1, calls}):  # the first and the last forward of a step
        probe, run, error = bench.fail(number)
        if not probe.failed:
            raise PromiseBroken(f"{promise}: a step with {calls} forward passes did not reach number {number}.")
        if error is None:
            raise PromiseBroken(f"{promise}: an exception in forward pass {number} of a step was swallowed.")
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)
        if not any(isinstance(link, InjectedError) for link in chain):
            raise PromiseBroken(f"{promise}: the exception in forward pass {number} was replaced by {explain(error)}")
        expect_state(
            f"{promise}: after an exception in forward pass {number} of a step", probe.snapshot, state_of(run.model)
        )


def composes(bench: Bench, other: str) -> None:
    """Check that it trains together with a first-party strategy, unless one of them declares that it cannot."""
    promise = f"composes with {other}"
    if bench.name == other:
        raise NotApplicable("it is that strategy itself")
    try:
        recipe: Recipe = bench.recipe(f"with-{other}", other)
        build_composition(recipe)
    except PluginError:
        raise
    except InputError as error:
        raise NotApplicable(f"refused before the run: {error}") from error
    if bench.strategies(other) == bench.strategies():  # `other` is its companion anyway
        result = bench.run(promise)
    else:
        result = bench.run(promise, f"with-{other}", other=other)
    expect_trained(promise, result)
    alone = bench.run(promise).probe  # faults without `other` are not reported here
    if result.probe.strays and not alone.strays:
        raise PromiseBroken(f"{promise}: a gradient on a frozen parameter: {'; '.join(result.probe.strays[:3])}.")
    changed = result.probe.changed_base()
    if changed and not alone.changed_base():
        raise PromiseBroken(f"{promise}: the base changed: {', '.join(changed[:3])}.")


_waiting: dict[int, Bench] = {}
_outcomes: dict[int, processes.Outcome] = {}


def wait_for_processes(bench: Bench) -> None:
    """Queue a bench's two-process run for the next start of processes."""
    _waiting[id(bench)] = bench


def in_two_processes(bench: Bench) -> processes.Outcome:
    """Run the bench's recipe in two processes, together with all queued ones; return its outcome."""
    if id(bench) not in _outcomes:
        wait_for_processes(bench)
        benches = [b for key, b in _waiting.items() if key not in _outcomes]
        recipes = [
            b.recipe(f"two-{number}", micro_tokens=b.micro_tokens(BATCH // 2)).to_dict()
            for number, b in enumerate(benches)
        ]
        outcomes = processes.tune_in_processes(recipes, registered(), session_folder())
        _outcomes.update({id(b): outcome for b, outcome in zip(benches, outcomes, strict=True)})
        _waiting.clear()
    return _outcomes[id(bench)]
