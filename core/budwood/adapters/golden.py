"""Golden logits: what an adapter answered to a few prompts when it was saved, and how far another answer is from it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from budwood.adapters.manifest import GoldenRecord
from budwood.errors import CorruptError
from budwood.untrusted.formats import read_header

if TYPE_CHECKING:
    from budwood.model.base import Base

TOLERANCE = 1e-5
"""Largest difference of a logit that a replay in the same setting may show."""


@dataclass(frozen=True)
class Golden:
    """Prompts and the logits after them.

    Attributes:
        prompts: token ids.
        base: [prompts, vocabulary or classes] fp32, of the base alone.
        adapter: the same with the adapter.
    """

    prompts: list[list[int]]
    base: Tensor
    adapter: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], base: Sequence[Tensor], adapter: Sequence[Tensor]) -> Golden:
        """Gather prompts and logits [vocabulary or classes], one of each for a prompt."""
        rows = [torch.stack([row.detach().float().cpu() for row in logits]) for logits in (base, adapter)]
        return cls([list(prompt) for prompt in prompts], *rows)

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        from safetensors.torch import save_file

        flat = torch.tensor([token for prompt in self.prompts for token in prompt], dtype=torch.int32)
        lengths = torch.tensor([len(prompt) for prompt in self.prompts], dtype=torch.int32)
        save_file({"prompts": flat, "lengths": lengths, "base": self.base, "adapter": self.adapter}, path)

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Read what `save` wrote.

        Raises:
            CorruptError: it is no such file.
        """
        from safetensors.torch import load_file

        infos = read_header(path)
        tensors = load_file(path) if set(infos) == {"prompts", "lengths", "base", "adapter"} else {}
        lengths = tensors["lengths"].tolist() if tensors else []
        sound = (
            lengths
            and all(infos[name].dtype == "I32" for name in ("prompts", "lengths"))
            and all(n > 0 for n in lengths)
            and tensors["prompts"].shape == (sum(lengths),)
            and tensors["base"].shape == tensors["adapter"].shape == (len(lengths), tensors["base"].shape[-1])
            and all(tensors[name].isfinite().all() for name in ("base", "adapter"))
        )
        if not sound:
            raise CorruptError(f"{path}: holds no golden logits.")
        prompts = [ids.tolist() for ids in tensors["prompts"].split(lengths)]
        return cls(prompts, tensors["base"], tensors["adapter"])


@dataclass(frozen=True)
class Distance:
    """How far logits are from a reference, over all prompts.

    Attributes:
        largest: largest difference of a logit.
        divergence: mean Kullback-Leibler divergence from the reference's probabilities, in nats.
        agreement: share of prompts whose most probable token or class is the same.
    """

    largest: float
    divergence: float
    agreement: float

    @classmethod
    def between(cls, reference: Tensor, other: Tensor) -> Distance:
        """Compare [prompts, vocabulary or classes] with a reference of the same shape."""
        reference, other = reference.double().cpu(), other.double().cpu()
        log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        agreement = (reference.argmax(-1) == other.argmax(-1)).double().mean()
        return cls(float((reference - other).abs().max()), max(float(divergence), 0.0), float(agreement))

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest:.2g}, divergence {self.divergence:.2g} nats, "
            f"top-1 agreement {self.agreement:.0%}"
        )


def measure(model: nn.Module, prompts: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    """Logits [prompts, vocabulary or classes] fp32 on the CPU after each prompt, one prompt at a time, in eval mode.

    `dtype` is the compute dtype; 16 bit runs under autocast, as training does.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows = []
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            for prompt in prompts:
                ids = torch.tensor([list(prompt)], device=device)
                logits = model(input_ids=ids, use_cache=False).logits
                rows.append((logits[0, -1] if logits.ndim == 3 else logits[0]).float().cpu())
    finally:
        model.train(was_training)
    return torch.stack(rows)


def current_setting(base: Base) -> GoldenRecord:
    """What decides which numbers `measure` gives for a base on this machine."""
    return GoldenRecord(
        device=_device_name(torch.device(base.device)),
        dtype=str(base.dtype).removeprefix("torch."),
        quantization=base.quantization,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"cpu {model} {torch.backends.cpu.get_cpu_capability()}"


def comparable(recorded: GoldenRecord, current: GoldenRecord) -> bool:
    """Whether the same logits are due: same device, dtype and quantization; in 16 bit also the same torch."""
    if any(getattr(recorded, name) != getattr(current, name) for name in ("device", "dtype", "quantization")):
        return False
    return recorded.dtype == "float32" or recorded.torch == current.torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with `count` CPU threads inside the context: how a sum is split decides its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(max(count, 1), os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
