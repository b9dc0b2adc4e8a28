"""Building blocks for low-rank adapter strategies: PEFT layers in a model, PEFT's file format, and the fused linear.

Importing this module imports neither torch nor PEFT; a name that needs them imports them on first access.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from budwood.adapters.expert_layers import expert_norms as expert_norms
    from budwood.adapters.expert_layers import file_paths as file_paths
    from budwood.adapters.expert_layers import split_targets as split_targets
    from budwood.adapters.expert_layers import stacked as stacked
    from budwood.adapters.live_parts import live_low_rank as live_low_rank
    from budwood.adapters.peft_config import SavedExpertsConfig as SavedExpertsConfig
    from budwood.adapters.peft_config import SavedLowRankConfig as SavedLowRankConfig
    from budwood.adapters.peft_config import continued_selection as continued_selection
    from budwood.adapters.peft_config import parse_saved_config as parse_saved_config
    from budwood.adapters.peft_config import planned_targets as planned_targets
    from budwood.adapters.peft_config import saved_pattern as saved_pattern
    from budwood.adapters.peft_config import saved_targets as saved_targets
    from budwood.adapters.peft_config import saved_whole_modules as saved_whole_modules
    from budwood.adapters.peft_conversion import exact_targets as exact_targets
    from budwood.adapters.peft_conversion import moved_targets as moved_targets
    from budwood.adapters.peft_conversion import name_moved as name_moved
    from budwood.adapters.peft_layers import adapter_layers as adapter_layers
    from budwood.adapters.peft_layers import add_to_weight as add_to_weight
    from budwood.adapters.peft_layers import fan_in_fan_out as fan_in_fan_out
    from budwood.adapters.peft_layers import known_to_peft as known_to_peft
    from budwood.adapters.peft_layers import merge_whole_parts as merge_whole_parts
    from budwood.adapters.peft_layers import register_adapter as register_adapter
    from budwood.adapters.peft_layers import remove_adapter as remove_adapter
    from budwood.adapters.peft_layers import select_adapters as select_adapters
    from budwood.adapters.peft_layers import whole_groups as whole_groups
    from budwood.adapters.peft_layers import whole_tensors as whole_tensors
    from budwood.adapters.starts import difference as difference
    from budwood.adapters.starts import set_starts as set_starts
    from budwood.adapters.starts import update_of as update_of
    from budwood.adapters.tokens import fit_whole as fit_whole
    from budwood.adapters.tokens import is_tied as is_tied
    from budwood.adapters.tokens import new_tokens as new_tokens
    from budwood.adapters.tokens import saved_tokens as saved_tokens
    from budwood.adapters.tokens import wrap_tokens as wrap_tokens
    from budwood.adapters.updates import LowRankUpdate as LowRankUpdate
    from budwood.adapters.whole import check_replaced as check_replaced
    from budwood.adapters.whole import without_base_tensors as without_base_tensors
    from budwood.adapters.whole import wrap_whole as wrap_whole
    from budwood.model.ops.linear import frozen_linear as frozen_linear
    from budwood.model.ops.linear import low_rank_linear as low_rank_linear
    from budwood.model.ops.linear import mixed_low_rank_linear as mixed_low_rank_linear
    from budwood.model.quantizers.experts import experts_of as experts_of

# Public name → module that defines it; imported on first access.
_EXPORTS = {
    "LowRankUpdate": "budwood.adapters.updates",
    "experts_of": "budwood.model.quantizers.experts",
    "live_low_rank": "budwood.adapters.live_parts",
    **dict.fromkeys(("exact_targets", "moved_targets", "name_moved"), "budwood.adapters.peft_conversion"),
    **dict.fromkeys(("expert_norms", "file_paths", "split_targets", "stacked"), "budwood.adapters.expert_layers"),
    **dict.fromkeys(
        (
            "SavedExpertsConfig",
            "SavedLowRankConfig",
            "continued_selection",
            "parse_saved_config",
            "planned_targets",
            "saved_pattern",
            "saved_targets",
            "saved_whole_modules",
        ),
        "budwood.adapters.peft_config",
    ),
    **dict.fromkeys(
        (
            "adapter_layers",
            "add_to_weight",
            "fan_in_fan_out",
            "known_to_peft",
            "merge_whole_parts",
            "register_adapter",
            "remove_adapter",
            "select_adapters",
            "whole_groups",
            "whole_tensors",
        ),
        "budwood.adapters.peft_layers",
    ),
    **dict.fromkeys(("difference", "set_starts", "update_of"), "budwood.adapters.starts"),
    **dict.fromkeys(("fit_whole", "is_tied", "new_tokens", "saved_tokens", "wrap_tokens"), "budwood.adapters.tokens"),
    **dict.fromkeys(("check_replaced", "without_base_tensors", "wrap_whole"), "budwood.adapters.whole"),
    **dict.fromkeys(("frozen_linear", "low_rank_linear", "mixed_low_rank_linear"), "budwood.model.ops.linear"),
}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'budwood.lowrank' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
