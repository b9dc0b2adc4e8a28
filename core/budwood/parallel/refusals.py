"""What launchers ask for that a run does not do: other engines, and commands that are one process. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from budwood.errors import InputError, PeerError
from budwood.parallel.processes import Processes

SHARD = "a base that does not fit one device is split by the recipe's train.parallel: shard"
_NAMES = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "use_deepspeed"),
    "ACCELERATE_USE_FSDP": ("accelerate's FSDP", "use_fsdp"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "use_megatron_lm"),
    "ACCELERATE_USE_TP": ("tensor parallelism", "use_tp"),
}
"""The engines that accelerate's launcher asks for by a variable of the environment, and its option."""
_SIZES = {
    "TP": "tensor parallelism", "PP": "pipeline parallelism", "CP": "context parallelism", "SP": "sequence parallelism",
    "EP": "expert parallelism", "DP_SHARD": "accelerate's sharding", "DP_REPLICATE": "accelerate's replication",
}  # fmt: skip
"""What accelerate's parallelism_config asks for by a size above 1."""
_INSTEAD = {
    "sweep": "begin it once per GPU, with the same --storage",
    "serve": "begin one server per GPU, each with its own port",
}


def refuse_engines(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse what accelerate's launcher or its configuration asks for, if a run would ignore it.

    Raises:
        InputError: the message names the engine, and what to use instead.
    """
    asked = [(engine, option) for name, (engine, option) in _NAMES.items() if _is_on(environment.get(name))]
    if _is_on(environment.get("ACCELERATE_USE_PARALLELISM_CONFIG")):
        for key, engine in _SIZES.items():
            size = environment.get(f"PARALLELISM_CONFIG_{key}_SIZE", "1")
            if size not in ("", "None", "0", "1"):
                asked.append((engine, f"parallelism_config's {key.lower()}_size {size}"))
    if environment.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        raise InputError(
            "accelerate's configuration asks for fp8 (mixed_precision), which is not used here: set train.precision in "
            "the recipe (bf16, fp16 or fp32), and mixed_precision to no."
        )
    if asked:
        engines = " and ".join(f"{engine} ({option})" for engine, option in asked)
        raise InputError(
            f"accelerate's configuration asks for {engines}, which is not used here: processes share the batch, and "
            f"{SHARD}. Turn it off in that configuration, or start the run with torchrun."
        )


def without_effect(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return a line for every other setting of accelerate's launcher that has no effect, since the recipe decides."""
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    compiler = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    found = [
        ("mixed_precision", precision, precision not in ("", "no"), "train.precision"),
        ("gradient_accumulation_steps", steps, steps not in ("", "1"), "train.batch_tokens and train.micro_tokens"),
        ("dynamo_backend", compiler, compiler.lower() not in ("", "no"), "nothing is compiled, and the recipe"),
    ]
    return [
        f"accelerate's {name} {value} has no effect: {instead} decide{'' if ' and ' in instead else 's'}"
        for name, value, given, instead in found
        if given
    ]


def refuse_command(name: str, world: Processes) -> None:
    """Refuse a command other than `tune` in several processes, each of which would do all of it.

    Raises:
        InputError: the message says how to run it; a process other than the first raises a silent PeerError.
    """
    if world.size == 1 or name == "tune":
        return
    instead = _INSTEAD.get(name, "run it without torchrun or accelerate's launcher")
    text = f"budwood {name} is one process, and {world.size} were started (WORLD_SIZE): {instead}."
    raise InputError(text) if world.first else PeerError(text, InputError.exit_code, reported=True)


def _is_on(value: str | None) -> bool:
    return (value or "").strip().lower() in ("1", "true", "yes", "y", "on", "t")
