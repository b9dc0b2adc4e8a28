"""`train.compile`: the CPU's ops compiled to C++ for a run, checked before its base loads."""

from __future__ import annotations

import torch

from budwood.errors import ResourceError
from budwood.model.ops import kernels
from budwood.recipe.schema import Recipe

FIELD = "train.compile"


def compile_ops(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> str:
    """Compile and check the ops of a run that asks for it, and let other runs of this process do without.

    Returns:
        What the run's first line adds: " · compiled ops", or "".

    Raises:
        ResourceError: there is no C++ compiler, it fails, or what it makes computes something else.
    """
    kernels.compile_ops(recipe.train.compile)
    if not recipe.train.compile:
        return ""
    where = f"{recipe.where('train', 'compile')}: {FIELD}"
    missing = _missing_compiler()
    if missing:
        raise ResourceError(f"{where}: needs a C++ compiler, but {missing}: install g++ or clang++, or leave it out.")
    failed = kernels.prepare_compiled(dtype)
    if failed:
        raise ResourceError(f"{where}: {failed[0].removeprefix('note: ')}. Leave it out.")
    return " · compiled ops"


def unused(recipe: Recipe) -> str:
    """Return a note if a run asks for compiled ops and has computed none so far, else ""."""
    if not recipe.train.compile or kernels.has_compiled():
        return ""
    return (
        f"note: {FIELD} changes nothing so far: the first step had no norm, rotary embedding, gated activation or "
        f"cross-entropy that is compiled, on at least {kernels.LEAST:,} numbers: leave it out, or raise "
        "train.micro_tokens"
    )


def _missing_compiler() -> str:
    """Return why torch finds no C++ compiler, or ""."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "torch finds none"
    return ""
