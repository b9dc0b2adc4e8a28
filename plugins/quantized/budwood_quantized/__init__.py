"""Bases that another library has quantised: read as they are, or dequantised as they are read."""

from __future__ import annotations

from budwood_quantized.compressed import CompressedTensors
from budwood_quantized.dequantized import MXFP4, FineGrainedFP8
from budwood_quantized.layouts import GPTQ, HQQ
from budwood_quantized.refused import AWQ
from budwood_quantized.torchao import TorchAO

__all__ = ["AWQ", "GPTQ", "HQQ", "MXFP4", "CompressedTensors", "FineGrainedFP8", "TorchAO"]
