"""Golden logits: an adapter's logits on a few probes when it was saved, and the distance of other logits from them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from budwood.adapters.manifest import GoldenRecord
from budwood.contract.examples import Example
from budwood.errors import CorruptError, InputError
from budwood.untrusted.formats import read_header

if TYPE_CHECKING:
    from budwood.model.base import Base
    from budwood.model.task import Task

TOLERANCE = 1e-5
"""Largest allowed difference of a logit in a replay in the same setting."""
ROUNDING = 0.05
"""Divergence from a reference, in nats, that 16-bit weights and arithmetic stay well below."""
FP32_ROUNDING = 1e-5
"""Difference of a logit, relative to the largest one, that fp32 accounts for when products are taken in other orders:
about 2^-24 a sum, over some hundred dependent sums."""
NO_EFFECT = 2e-6
"""Change of a logit, relative to the largest one, below which an adapter has no effect: updates that cancel exactly, as
in a weighted sum that is zero, leave about 5e-7."""
KERNEL_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables that select the kernels of oneDNN and MKL, whose results differ in their last bits."""


@dataclass(frozen=True)
class Golden:
    """Probes and their logits.

    Attributes:
        probes: inputs of the model, each with one scored position.
        base: logits of the base alone, [probes, vocabulary or classes] fp32.
        adapter: logits with the adapter, same shape.
    """

    probes: list[Example]
    base: Tensor
    adapter: Tensor

    @classmethod
    def of(cls, probes: Sequence[Example], base: Sequence[Tensor], adapter: Sequence[Tensor]) -> Golden:
        """Combine probes with their logits, one vector [vocabulary or classes] per probe."""
        rows = [torch.stack([row.detach().float().cpu() for row in logits]) for logits in (base, adapter)]
        return cls(list(probes), *rows)

    def save(self, path: Path) -> None:
        """Write as safetensors: `base`, `adapter`, and for probe i `i/position` and `i/inputs/NAME`."""
        from safetensors.torch import save_file

        tensors = {"base": self.base, "adapter": self.adapter}
        for number, probe in enumerate(self.probes):
            tensors[f"{number}/position"] = torch.from_numpy(probe.label_positions[:1].astype(np.int64))
            for name, value in probe.inputs.items():
                tensors[f"{number}/inputs/{name}"] = torch.from_numpy(np.ascontiguousarray(value))
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Read a file written by `save`, or by an earlier version (`prompts` and their `lengths`).

        Raises:
            CorruptError: the file holds no valid golden logits.
        """
        from safetensors.torch import load_file

        infos = read_header(path)
        tensors = load_file(path) if {"base", "adapter"} <= set(infos) else {}
        base, adapter = tensors.pop("base", torch.empty(0)), tensors.pop("adapter", torch.empty(0))
        probes = _read_prompts(tensors) if set(tensors) == {"prompts", "lengths"} else _read_probes(tensors)
        valid = (
            probes
            and base.ndim == 2
            and base.shape == adapter.shape
            and len(base) == len(probes)
            and all(logits.isfinite().all() for logits in (base, adapter))
        )
        if not valid:
            raise CorruptError(f"{path}: holds no golden logits.")
        return cls(probes, base, adapter)


def _read_probes(tensors: dict[str, Tensor]) -> list[Example]:
    """Return the probes in a file's tensors; an empty list if they are invalid."""
    probes: list[Example] = []
    while f"{len(probes)}/position" in tensors:
        prefix = f"{len(probes)}/inputs/"
        position = tensors.pop(f"{len(probes)}/position")
        names = [name for name in tensors if name.startswith(prefix)]
        inputs = {name.removeprefix(prefix): tensors.pop(name).numpy() for name in names}
        if position.shape != (1,) or position.dtype != torch.int64 or int(position) < 0 or not inputs:
            return []
        if any(value.ndim == 0 or not value.size or not np.isfinite(value).all() for value in inputs.values()):
            return []
        if "input_ids" in inputs and not 0 <= int(position) < len(inputs["input_ids"]):
            return []
        probes.append(_probe(inputs, int(position)))
    return [] if tensors else probes


def _read_prompts(tensors: dict[str, Tensor]) -> list[Example]:
    prompts, lengths = tensors["prompts"], tensors["lengths"].tolist()
    valid = all(tensor.dtype == torch.int32 and tensor.ndim == 1 for tensor in tensors.values())
    if not valid or not lengths or min(lengths) < 1 or len(prompts) != sum(lengths):
        return []
    return [_probe({"input_ids": ids.numpy()}, len(ids) - 1) for ids in prompts.split(lengths)]


def _probe(inputs: dict[str, np.ndarray], position: int) -> Example:
    return Example(inputs, np.array([position]), np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.float32))


@dataclass(frozen=True)
class Distance:
    """Distance of logits from a reference, over all prompts.

    Attributes:
        largest: largest difference of a logit.
        divergence: mean Kullback-Leibler divergence from the reference's probabilities, in nats.
        agreement: fraction of prompts with the same most probable token or class.
    """

    largest: float
    divergence: float
    agreement: float

    @classmethod
    def between(cls, reference: Tensor, other: Tensor) -> Distance:
        """Compare [prompts, vocabulary or classes] with a reference of the same shape."""
        reference, other = (_as_logits(values.double().cpu()) for values in (reference, other))
        log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        agreement = (reference.argmax(-1) == other.argmax(-1)).double().mean()
        return cls(float((reference - other).abs().max()), max(float(divergence), 0.0), float(agreement))

    def is_another_model(self, setting: Distance | None = None) -> bool:
        """Return whether the divergence is more than rounding, and a setting that changes the base too, account for.

        Args:
            setting: the same distance of the base alone, if the settings differ.
        """
        return not self.divergence <= ROUNDING + (4 * setting.divergence if setting is not None else 0)

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest:.2g}, divergence {self.divergence:.2g} nats, "
            f"top-1 agreement {self.agreement:.0%}"
        )


def _as_logits(values: Tensor) -> Tensor:
    """Return [prompts, classes]; a single score, of a reward or a regression, becomes a logit beside one of 0."""
    return torch.nn.functional.pad(values, (0, 1)) if values.shape[-1] == 1 else values


def relative_error(base: Tensor, exact: Tensor, other: Tensor) -> float | None:
    """Return |other - exact| / |exact - base|: an error as a fraction of an adapter's effect.

    The norms are those of logits in fp32, [prompts, vocabulary or classes], less each row's mean, which no probability
    depends on. Of an adapter with new tokens, the effect is that on the base's tokens.

    Returns:
        The fraction; None: the adapter changes no logit by more than rounding, so there is nothing to lose.

    Raises:
        InputError: a logit is not finite.
    """
    if not all(logits.isfinite().all() for logits in (base, exact, other)):
        raise InputError("the adapter's logits on its golden prompts are not finite: its answers cannot be compared.")

    def difference(one: Tensor, two: Tensor) -> Tensor:
        given = (_as_logits(logits.double().cpu()) for logits in (one, two))
        first, second = (logits - logits.mean(-1, keepdim=True) for logits in given)
        return first - second

    effect = difference(base, exact[:, : base.shape[1]])
    if is_rounding(float(effect.abs().max()), exact, NO_EFFECT):
        return None
    return float(difference(exact, other).norm() / effect.norm())


def is_rounding(difference: float, logits: Tensor, limit: float = FP32_ROUNDING) -> bool:
    """Return whether fp32's rounding accounts for the largest difference of a logit from these."""
    return difference <= limit * max(1.0, float(logits.abs().max()))


def share_text(error: float | None, of: str = "the adapter") -> str:
    """Return "1.2% of the adapter's effect" for what `relative_error` returns, or that there is no effect."""
    return f"{of} changes no answer" if error is None else f"{error:.1%} of {of}'s effect"


def measure(task: Task, model: nn.Module, tokenizer: Any, probes: Sequence[Example], dtype: torch.dtype) -> Tensor:
    """Return the logits at each probe's position, [probes, …] fp32 on the CPU.

    The model's own forward computes them in evaluation mode, one probe at a time. `dtype` is the compute dtype; 16 bit
    runs under autocast, as in training.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows = []
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)),
        ):
            for probe in probes:
                batch = task.collate([probe], model, tokenizer, False).to(device)
                rows.append(task.own_logits(model, batch)[0].float().cpu())
    finally:
        model.train(was_training)
    return torch.stack(rows)


def current_setting(base: Base) -> GoldenRecord:
    """Return the setting that determines the results of `measure` for a base on this machine."""
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
    limits = [f"{name}={os.environ[name]}" for name in KERNEL_LIMITS if name in os.environ]
    return " ".join(["cpu", model, torch.backends.cpu.get_cpu_capability(), *limits])


def comparable(recorded: GoldenRecord, current: GoldenRecord) -> bool:
    """Whether logits must agree: same device, dtype and quantization; in 16 bit also the same torch version."""
    if any(getattr(recorded, name) != getattr(current, name) for name in ("device", "dtype", "quantization")):
        return False
    return recorded.dtype == "float32" or recorded.torch == current.torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with `count` CPU threads inside the context, since the split of a sum affects its last bits."""
    previous = torch.get_num_threads()
    torch.set_num_threads(min(max(count, 1), os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(previous)
