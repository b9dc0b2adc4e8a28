"""The promises that every strategy makes, one function each: it returns where the promise is kept."""

from __future__ import annotations

import io
import json

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
from budwood.testing.expect import expect_equal, expect_sound, expect_state
from budwood.testing.fake import run_on_fake_tensors
from budwood.testing.files import LONGEST, session_folder
from budwood.testing.probe import InjectedError, distance, farthest, same_bytes, state_of

OWNER_HOOKS = ("attach_adapter", "use_adapters", "detach_adapter", "export", "trainable_parameters")


def declares(bench: Bench) -> None:
    """It says what it is, implements hooks that exist, and owns what it implements."""
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
        raise PromiseBroken(f"{promise}: the class has no docstring; its first line is what `budwood plugins` shows.")
    missing = [hook for hook in OWNER_HOOKS if hook not in hooks]
    if bench.owns_adapter and missing:
        raise PromiseBroken(
            f"{promise}: it owns the slot 'adapter' and implements {len(OWNER_HOOKS) - len(missing)} of the "
            f"{len(OWNER_HOOKS)} hooks that come with it; missing: {', '.join(missing)}."
        )
    if not bench.owns_adapter and implements(cls, "attach_adapter"):
        raise PromiseBroken(f"{promise}: it implements attach_adapter, and its slots {cls.slots} lack 'adapter'.")


def options_round_trip(bench: Bench) -> None:
    """Its options come back from YAML as they were, have a schema, and refuse keys that they do not know."""
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
        raise PromiseBroken(
            f"{promise}: what they are written as is refused: {stream.getvalue()!r}: {error}"
        ) from error
    for name in model.model_fields:
        before, after = getattr(options, name), getattr(again, name)
        if before != after:
            raise PromiseBroken(f"{promise}: option '{name}' was {before!r} and came back from YAML as {after!r}.")
    try:
        schema = model.model_json_schema()
        json.dumps(schema, allow_nan=False)
    except Exception as error:
        raise PromiseBroken(f"{promise}: they give no JSON schema: {explain(error)}") from error
    absent = sorted({field.alias or name for name, field in model.model_fields.items()} - set(schema["properties"]))
    if absent:
        raise PromiseBroken(f"{promise}: the schema lacks {', '.join(absent)}.")
    for where, part in {"Options": schema, **schema.get("$defs", {})}.items():
        if "properties" in part and part.get("additionalProperties") is not False:
            raise PromiseBroken(f"{promise}: {where} takes keys that it does not know (extra is not 'forbid').")
    unknown = "no_such_option"
    try:
        build_strategy(bench.name, {**given, unknown: 1}, "recipe")
    except InputError as error:
        if unknown not in str(error):
            raise PromiseBroken(f"{promise}: the refusal of '{unknown}' does not name it: {error}") from error
    else:
        raise PromiseBroken(f"{promise}: the unknown key '{unknown}' was taken without a word.")
    if isinstance(options, BaseModel) and not type(options).model_config.get("frozen"):
        raise PromiseBroken(f"{promise}: the options are not frozen, so that a run could change what is recorded.")


def zero_effect_at_start(bench: Bench) -> None:
    """Before the first step the model gives the base's logits."""
    promise = "zero effect at initialisation"
    if not implements(bench.spec.strategy, "prepare_model"):
        raise NotApplicable("it has no prepare_model, so it changes no model before the first step")
    probe = bench.run(promise).probe
    gap, size = distance(probe.base_logits, probe.start_logits), float(probe.base_logits.abs().max())
    if gap > 1e-6 * size:
        raise PromiseBroken(
            f"{promise}: before the first step a logit differs from the base's by {gap:.3g} "
            f"(largest logit {size:.3g}, at most {1e-6 * size:.1g} is due)."
        )


def gradients_where_declared(bench: Bench) -> None:
    """What trainable_parameters names has a gradient, and nothing else has."""
    promise = "gradients only where declared"
    probe = bench.run(promise).probe
    if probe.strays:
        raise PromiseBroken(f"{promise}: {len(probe.strays)} elsewhere: {'; '.join(probe.strays[:3])}.")
    for name, size in probe.largest.items():
        if not size:
            what = "no gradient" if size is None else "a gradient of 0"
            raise PromiseBroken(f"{promise}: {name} is declared and had {what} in all {bench.spec.steps} steps.")


def base_unchanged(bench: Bench) -> None:
    """Not a byte of the base changes."""
    promise = "the base's bytes do not change"
    for quantization in ("none", "nf4"):
        try:
            result = bench.run(promise, quantization, quantization=quantization)
        except PromiseBroken:  # of another promise
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
    """Two runs of one recipe give the same bits."""
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
    """One micro-batch of four examples gives what two of two give."""
    promise = "1×4 equals 2×2"
    whole, halves = bench.run(promise), bench.run(promise, "halves", micro_tokens=BATCH // 2 * LONGEST)
    ones, twos = whole.probe.micro_batches, halves.probe.micro_batches
    if any(len(step) != 1 for step in ones.values()) or any(len(step) != 2 for step in twos.values()):
        raise NotApplicable(f"its batches are {ones[0]} and {twos[0]} examples, where 4 and 2 + 2 can be compared")
    expect_equal(promise, whole, halves.parameters, f"micro-batches of {ones[0]} and of {twos[0]} examples", bench)


def two_processes(bench: Bench) -> None:
    """Two processes that torchrun starts give what one gives."""
    promise = "2 processes equal 1"
    whole = bench.run(promise)
    outcome = in_two_processes(bench)
    if outcome.error:
        raise PromiseBroken(f"{promise}: the run in two processes did not finish:\n{outcome.error}")
    if (outcome.processes, outcome.world) != (processes.PROCESSES, processes.PROCESSES):
        raise PromiseBroken(f"{promise}: torchrun made {outcome.world} processes, and the run saw {outcome.processes}.")
    from safetensors.torch import load_file

    assert outcome.parameters is not None
    expect_equal(promise, whole, load_file(outcome.parameters), "one process and two", bench)


def resume(bench: Bench) -> None:
    """A run that was interrupted and resumed gives the bytes of one that was not."""
    promise = "interrupted and resumed equals uninterrupted"
    whole, resumed = bench.run(promise), bench.resume(promise)
    if 0 in resumed.probe.micro_batches:
        raise PromiseBroken(f"{promise}: the run began anew, in place of going on after step 1.")
    name, gap = farthest(whole.parameters, resumed.parameters)
    if gap or not all(same_bytes(whole.parameters[key], resumed.parameters[key]) for key in whole.parameters):
        raise PromiseBroken(
            f"{promise}: a run resumed after step 1 differs by {gap:.3g} in {name} after {bench.spec.steps} steps. "
            "What a strategy remembers belongs into state_dict and load_state_dict."
        )


def runs_on(bench: Bench, quantization: str) -> None:
    """It trains on a base in this quantization: all numbers finite, something learned."""
    promise = f"runs on {'an unquantised base' if quantization == 'none' else quantization.upper()}"
    result = bench.run(promise, quantization, quantization=quantization)
    expect_sound(promise, result)


def fake_tensors(bench: Bench) -> None:
    """Its steps run on fake CPU tensors, with run.planning set."""
    promise = "runs on fake CPU tensors"
    try:
        run_on_fake_tensors(bench.recipe("fake"))
    except Exception as error:
        raise PromiseBroken(
            f"{promise}: {explain(error)}. A decision that depends on values takes the largest case "
            "where run.planning is set."
        ) from error


def after_an_exception(bench: Bench) -> None:
    """An exception in the middle of a step passes through, and nothing that the step put on the model stays there."""
    promise = "hooks removed after an exception"
    calls = bench.run(promise).probe.calls[1]
    for number in sorted({1, calls}):  # the first and the last forward of a step
        probe, run, error = bench.fail(number)
        if not probe.failed:
            raise PromiseBroken(f"{promise}: a step that made {calls} forwards did not reach number {number}.")
        if error is None:
            raise PromiseBroken(f"{promise}: an exception in forward {number} of a step was swallowed.")
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)
        if not any(isinstance(link, InjectedError) for link in chain):
            raise PromiseBroken(f"{promise}: in place of the exception in forward {number} came {explain(error)}")
        expect_state(
            f"{promise}: after an exception in forward {number} of a step", probe.snapshot, state_of(run.model)
        )


def composes(bench: Bench, other: str) -> None:
    """It trains together with a strategy that comes with Budwood, unless one of them declares that it does not."""
    promise = f"composes with {other}"
    if bench.name == other:
        raise NotApplicable("it is that strategy itself")
    try:
        recipe: Recipe = bench.recipe(f"with-{other}", other)
        build_composition(recipe)
    except PluginError:
        raise
    except InputError as error:
        raise NotApplicable(f"refused before anything runs: {error}") from error
    if bench.strategies(other) == bench.strategies():  # its companion is just that one
        result = bench.run(promise)
    else:
        result = bench.run(promise, f"with-{other}", other=other)
    expect_sound(promise, result)
    alone = bench.run(promise).probe  # what it does alone too is no matter of company
    if result.probe.strays and not alone.strays:
        raise PromiseBroken(f"{promise}: a gradient on what does not train: {'; '.join(result.probe.strays[:3])}.")
    changed = result.probe.changed_base()
    if changed and not alone.changed_base():
        raise PromiseBroken(f"{promise}: the base's bytes changed: {', '.join(changed[:3])}.")


_waiting: dict[int, Bench] = {}
_outcomes: dict[int, processes.Outcome] = {}


def wait_for_processes(bench: Bench) -> None:
    """Let a bench's run in two processes share the next start of torchrun."""
    _waiting[id(bench)] = bench


def in_two_processes(bench: Bench) -> processes.Outcome:
    """The bench's recipe in two processes, with all that waits for them."""
    if id(bench) not in _outcomes:
        wait_for_processes(bench)
        benches = [b for key, b in _waiting.items() if key not in _outcomes]
        recipes = [
            b.recipe(f"two-{number}", micro_tokens=BATCH // 2 * LONGEST).to_dict() for number, b in enumerate(benches)
        ]
        found = processes.tune_in_processes(recipes, registered(), session_folder())
        _outcomes.update({id(b): outcome for b, outcome in zip(benches, found, strict=True)})
        _waiting.clear()
    return _outcomes[id(bench)]
