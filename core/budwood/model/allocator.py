"""How torch's allocator keeps a GPU's memory. Does not import torch."""

from __future__ import annotations

import os
import sys

SETTING = "expandable_segments:True"


def use_expandable_segments() -> None:
    """Let segments of a GPU's memory grow, since micro-batches of ever other sizes then leave fewer holes.

    Settings of the user's own stay. torch reads the environment when it is imported; afterwards it is told itself.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" in os.environ or "PYTORCH_ALLOC_CONF" in os.environ:
        return
    os.environ["PYTORCH_ALLOC_CONF"] = SETTING
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch._C._accelerator_setAllocatorSettings(SETTING)
