"""Packed rows for encoders: the body runs on one row, then the model's own head pools each example's outputs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from budwood.contract.examples import Batch

WIDTHS = 32
"""Multiple of the widths of an encoder's packed rows in 16 bit on a CPU."""


def takes_segments(body: nn.Module) -> bool:
    """Return whether the forward of a model's body takes `position_ids`, and passes `segments` on to its attention."""
    parameters = _parameters(type(body).forward)
    return "position_ids" in parameters and any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def is_causal(config: Any) -> bool:
    """Return whether models of a configuration read tokens from left to right only."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as masked

    kind = config.model_type
    return kind in causal and (kind not in masked or bool(getattr(config, "is_decoder", False)))


def is_encoder(config: Any) -> bool:
    """Return whether models of a configuration are text encoders: they read in both directions and generate nothing."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as masked

    encodes = config.model_type in masked and not getattr(config, "is_encoder_decoder", False)
    return encodes and not is_causal(config)


def width_multiple(model: Any) -> int:
    """Return the multiple of tokens to which packed rows of a model are padded.

    In 16 bit on a CPU, oneDNN compiles code for the number of rows of a product. An encoder's micro-batches are so
    short that this takes as long as the product, unless few widths recur.
    """
    narrow = model.dtype in (torch.float16, torch.bfloat16) and model.device.type == "cpu"
    return WIDTHS if narrow and is_encoder(model.config) else 1


@functools.cache
def _parameters(forward: Callable[..., Any]) -> MappingProxyType[str, inspect.Parameter]:
    return inspect.signature(forward).parameters


def encoder_inputs(body: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the arguments of an encoder's body for a packed row, with the positions that it would count itself."""
    from budwood.model.ops.attention import packed_mask  # takes seconds, for nothing if no model runs

    ids, positions = batch.inputs["input_ids"], batch.inputs["position_ids"]
    embeddings: Any = getattr(body, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids"):  # RoBERTa's: padding is not counted
        real = (ids != embeddings.padding_idx) & (batch.example_of_position >= 0)
        before = real.cumsum(1) - real.long()
        starts = torch.tensor(batch.segments[:-1], device=ids.device)
        counted = before - before[:, starts][:, batch.example_of_position]
        positions = torch.where(real, counted + 1, 0) + embeddings.padding_idx
    inputs = {**batch.inputs, "position_ids": positions}
    if "token_type_ids" in _parameters(type(body).forward):
        inputs.setdefault("token_type_ids", torch.zeros_like(ids))
    return {**inputs, "attention_mask": packed_mask(ids.device), "segments": batch.segments}


def padded_rows(hidden: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Lay out the output [T, d] of a packed row as one padded row per example.

    Returns:
        [examples, longest, d], 0 where there is no token, and the `input_ids` and `attention_mask` of these rows.
    """
    lengths, starts = np.diff(batch.segments), np.asarray(batch.segments[:-1])
    position = np.arange(lengths.max())
    real = position < lengths[:, None]
    # The last row of the padded output, which is 0, stands for padding: no other row is read twice.
    index = torch.from_numpy(np.where(real, starts[:, None] + position, len(hidden))).to(hidden.device)
    mask = torch.from_numpy(real).to(hidden.device)
    inputs = {"input_ids": F.pad(batch.inputs["input_ids"][0], (0, 1))[index], "attention_mask": mask}
    rows = F.pad(hidden, (0, 0, 0, 1)).index_select(0, index.flatten())
    return rows.view(*index.shape, -1), inputs
