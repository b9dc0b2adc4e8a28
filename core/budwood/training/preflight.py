"""Early checks of output folder, data rows and base. Imports no torch, so that mistakes are reported immediately."""

from __future__ import annotations

from collections.abc import Sequence

from budwood.contract.strategy import Strategy
from budwood.data.recognition import check_rows
from budwood.data.sources import data_size, label, locate
from budwood.data.unused import columns_read
from budwood.data.use import check_use
from budwood.model.checks import BaseInfo, check_base
from budwood.model.quiet import hide_hub_kernels
from budwood.recipe.device import check_device, stated_kind
from budwood.recipe.schema import Recipe, build_composition, check_code
from budwood.training.output import check_output

NOTHING_TRAINS = "strategies: none has trainable parameters: add an adapter such as lora."
LARGE = 64 << 20
"""Data files larger than this, in bytes, are checked only when they are read for training."""


def preflight(recipe: Recipe, overwrite: bool = False, resume: bool = False) -> BaseInfo:
    """Check output, strategies with their options, data and base, as far as possible from files alone.

    Raises:
        InputError: the output folder is in use, an option is wrong, the strategies cannot be combined, a field has no
            effect on the device, a data file is malformed, or the base is not a model.
        ResourceError: the output cannot be written, a plugin is broken, or the hub cannot be reached.
        CorruptError: a file of the base is damaged.
    """
    check_output(recipe.output, overwrite, resume)
    hide_hub_kernels()  # before a plugin imports peft and thereby bitsandbytes, which would download them
    strategies = build_composition(recipe).strategies
    check_code(recipe, strategies)
    check_device(recipe, stated_kind(recipe.base.device))
    check_data(recipe, strategies)
    return check_base(recipe.base.model, recipe.base.quantization, recipe.base.trust_remote_code)


def check_data(recipe: Recipe, strategies: Sequence[Strategy]) -> None:
    """Check the rows of data files that are not large, unless bad rows are skipped.

    Raises:
        InputError: a row is malformed, or the rows fit no strategy; the message names file and row.
    """
    for data in (recipe.data.train, recipe.data.evaluated) if recipe.data.on_bad_row == "refuse" else ():
        if data is not None and data_size(found := locate(data)) <= LARGE:
            data_format = check_rows(found, recipe.base.task, columns_read(strategies))
            check_use(label(data), data_format, strategies, complete=False)
