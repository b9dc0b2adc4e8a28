"""The weights of a quantised base before it was quantised, read from its checkpoint one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from budwood.errors import InputError
from budwood.model.checkpoint import read_tensors, resolve
from budwood.model.quantizers import linear_shape

if TYPE_CHECKING:
    from torch import Tensor, nn


class OriginalWeights:
    """The unquantised weights of a model's linears, in the checkpoint that it was loaded from.

    Args:
        model: the model, quantised or without weights.
        folder: the base's folder or hub name.

    Raises:
        InputError, CorruptError: see `read_tensors`.
    """

    def __init__(self, model: nn.Module, folder: str | Path) -> None:
        self.model, self.folder = model, folder
        self._tensors = read_tensors(resolve(folder))
        self._files: dict[Path, Any] = {}

    def check(self, path: str) -> str:
        """Return the key of the weight of a linear in the checkpoint.

        Args:
            path: full name of the linear.

        Raises:
            InputError: the checkpoint does not hold it, unquantised and on its own.
        """
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        module = self._linear(path)
        shape = linear_shape(module)
        stored = shape[::-1] if _stored_transposed(module) else shape
        for key in (f"{path}.weight", f"{path.removeprefix(prefix)}.weight"):
            info = self._tensors.get(key)
            if info is not None and info.shape == tuple(stored) and info.dtype in ("F32", "F16", "BF16", "F64"):
                return key
        raise InputError(
            f"the checkpoint of the base '{self.folder}' holds no '{path}.weight' of {list(stored)} in 16 or 32 bit: "
            "name the unquantised base, which stores each linear on its own."
        )

    def read(self, path: str) -> Tensor:
        """Return the weight [out, in] of a linear, fp32, on the CPU.

        Raises:
            InputError: see `check`.
        """
        from safetensors import safe_open

        key = self.check(path)
        file = self._tensors[key].file
        if file not in self._files:
            self._files[file] = safe_open(file, framework="pt")
        weight: Tensor = self._files[file].get_tensor(key).float()
        module = self._linear(path)
        return weight.t() if _stored_transposed(module) else weight

    def _linear(self, path: str) -> Any:
        """Return the base's linear at a path, below an adapter's layer."""
        module: Any = self.model.get_submodule(path)
        return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _stored_transposed(module: nn.Module) -> bool:
    """Return whether the checkpoint holds the weight as [in, out]; a quantised linear keeps the class that it had."""
    return getattr(module, "source_cls", type(module)).__name__ == "Conv1D"
