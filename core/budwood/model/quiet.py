"""Silences the libraries, and keeps them from downloading anything unrequested. Imports none of them."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import warnings

_LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "peft",
    "torch",
    "torch.utils._pytree",  # torch sets the level of its own, but not of this one, when it is imported
    "torchao",
    "transformers",
)


def hide_hub_kernels() -> None:
    """Make the package `kernels` unimportable in this process from now on.

    On a CPU with AVX512-BF16, importing bitsandbytes downloads native code through it without asking, and peft imports
    bitsandbytes. transformers, which may have imported it already, only uses it on request.
    """
    sys.modules["kernels"] = None  # type: ignore[assignment]


def import_bitsandbytes() -> None:
    """Import bitsandbytes, as peft will do, without torch's compiler; does nothing if it cannot be imported.

    On import it compiles two functions that are only used where a device has no kernel. That loads the compiler, for a
    second; the functions run uncompiled as well.
    """
    import torch

    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("nothing is compiled while bitsandbytes is imported")

    hide_hub_kernels()
    logger, compiler = logging.getLogger("bitsandbytes"), torch.compile
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of the kernels that it may not download
    torch.compile = refuse  # type: ignore[assignment]
    try:
        with contextlib.suppress(Exception):  # the quantiser's check reports it
            importlib.import_module("bitsandbytes")
    finally:
        torch.compile = compiler
        logger.setLevel(level)


def silence_libraries(debug: bool | None = None) -> None:
    """Hide the libraries' warnings, hints and progress bars; call it before they are imported.

    Args:
        debug: show them; None: read BUDWOOD_DEBUG. Telemetry and kernels from the hub stay off in either case.
    """
    if debug is None:
        debug = os.environ.get("BUDWOOD_DEBUG", "0") not in ("", "0")
    hide_hub_kernels()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        return
    os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DATASETS_VERBOSITY"] = "error"
    os.environ["HF_HUB_VERBOSITY"] = "error"
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers' bars follow it
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    warnings.simplefilter("ignore")
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:  # it has read its environment already
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
