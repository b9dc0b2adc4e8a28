"""Tells a base's limits from its files, where these tell all of them. Imports no model class, which takes seconds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budwood.errors import BudwoodError
from budwood.model.checkpoint import read_tensors, resolve
from budwood.model.checks import load_config

_TABLE = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|tok_embeddings)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_POSITIONS = re.compile(r"pos(ition)?s?(_?embed\w*)?\.|(^|\.)wpe\.")


@dataclass(frozen=True)
class _Table:
    num_embeddings: int


@dataclass(frozen=True)
class Described:
    """Stands for a model's skeleton where only `budwood.model.limits` asks: configuration and token embeddings."""

    config: Any
    table: _Table

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        """Yield the modules of learned positions: such a model has none."""
        return iter(())

    def get_input_embeddings(self) -> _Table:
        return self.table


def describe_base(model: str | Path, auto_class: str, trust_remote_code: bool) -> Described | None:
    """Describe a decoder with rotary positions from its configuration and the headers of its weights.

    Args:
        model: a folder or a hub name.
        auto_class: name of one of transformers' auto classes.

    Returns:
        None if only the model's class can tell, as with learned positions, other modalities or unusual names; also if
        something is wrong with the files, which the skeleton's checks explain.
    """
    if auto_class != "AutoModelForCausalLM" or trust_remote_code:
        return None
    try:
        path = resolve(model, weights=False)
        config = load_config(path, False, {})
        tensors = read_tensors(path)
    except BudwoodError:
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as masked

    known = config.model_type in causal and config.model_type not in masked
    rotary = getattr(config, "rope_parameters", None) and not any(map(_POSITIONS.search, tensors))
    if not known or not rotary or config.get_text_config() is not config:
        return None
    tables = [info.shape for name, info in tensors.items() if _TABLE.search(name)]
    head = getattr(config, "tie_word_embeddings", False) or any(map(_HEAD.search, tensors))
    if not head or tables != [(config.vocab_size, config.hidden_size)]:
        return None
    return Described(config, _Table(config.vocab_size))
