"""Traces the operations of an optimizer step: the memory that tensors take, where its peak stands, FLOPs and traffic.

The trace works on fake tensors, as in a plan, and on real ones. It sees every tensor that an operation returns, but the
scratch memory inside a kernel only where it is known here.
"""

from __future__ import annotations

import functools
import gc
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from budwood.garbage import uncollected

_DEVICE = torch.ops.prim.device.default

CUDA_BLOCK = 512
"""Bytes to which CUDA's caching allocator rounds each tensor."""

KEPT, TEMPORARY, ROUNDING = "activations", "temporaries", "allocator's rounding"
"""Parts of the peak: what the backward pass needs later, what the place of the peak allocates for itself, and what the
allocator adds to both and to all others."""


@dataclass(frozen=True)
class Operation:
    """One traced operation: its floating-point operations, the bytes it reads and writes, and its input's dtype."""

    name: str
    flops: int
    moved: int
    dtype: torch.dtype
    in_pass: bool
    """Whether it belongs to a micro-batch, and not to the end of the optimizer step."""


@dataclass(frozen=True)
class Peak:
    """The peak of a traced step.

    Attributes:
        total: bytes, what was registered included.
        parts: bytes per part; they add up to `total`.
        where: the module, hook and strategy that ran.
        largest: bytes of the largest temporary tensor, and the operation that made it.
    """

    total: int
    parts: dict[str, int]
    where: str
    largest: tuple[int, str]


@dataclass
class _Birth:
    bytes: int  # rounded
    part: str | None
    place: str
    op: str
    rounding: int = 0


@dataclass
class Trace(TorchDispatchMode):
    """A context in which every operation is traced. Enter it inside the mode of the fake tensors.

    Attributes:
        current: returns the owner and the hook that run.
        block: bytes to which each tensor is rounded.
        on_cpu: whether the kernels are those of the CPU, which copy operands to a common dtype.
        operations: those since the last step began, in order.
        host_peak: most bytes of the host's memory that tensors took at once.
    """

    current: Callable[[], tuple[str, str]] = lambda: ("", "")
    block: int = 1
    on_cpu: bool = True
    operations: list[Operation] = field(default_factory=list)
    in_pass: bool = True
    attention_pairs: int = 0
    """Pairs of query and key per head in a row of packed segments, for kernels that do not show them in shapes."""

    def __post_init__(self) -> None:
        super().__init__()
        self._births: dict[int, _Birth] = {}
        self._alive: dict[int, int] = {}
        """Number of the birth by address of the storage."""
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._events: list[tuple[int, str, int]] = []
        """(number, place, change in bytes), in order."""
        self._number = 0
        self._starts: list[int] = []
        self._paths: list[str] = []
        self._stack: list[str] = []
        self._names: dict[nn.Module, str] = {}
        self._handles: list[Any] = []
        self._hosting = False
        self._on_host = self.host_peak = 0

    def name_modules(self, model: nn.Module) -> None:
        """Use the names of a model's modules for places."""
        self._names |= {module: name for name, module in model.named_modules()}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it would run at each of 10,000 calls a step

    def __enter__(self) -> Trace:
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # more than half of all calls in a step on fake tensors
            return args[0].fake_device
        kwargs = kwargs or {}
        inside = _inside(func)
        if inside is not None:
            super().__enter__()  # trace the operations inside instead
            try:
                return inside(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        result = func(*args, **kwargs)
        inputs = [*_tensors(args), *_tensors(kwargs.values())]
        outputs = [*_tensors((result,))]
        place = None
        for tensor in outputs:
            if tensor.untyped_storage()._cdata not in self._alive:
                place = place or self.place()
                self._born(tensor, place, func.__name__)
        scratch = (_scratch if self.on_cpu else _cuda_scratch)(func, inputs, outputs)
        if scratch:
            number = self._number = self._number + 1
            place = place or self.place()
            self._births[number] = _Birth(scratch, TEMPORARY, place, func.__name__)
            self._events += [(number, place, scratch), (number, "", -scratch)]
        self._count(func, inputs, outputs, args, kwargs, result)
        return result

    def place(self) -> str:
        """Describe where in the step the code runs."""
        node = torch._C._current_autograd_node()
        module = self._stack[-1] if self._stack else ""
        if node is not None:
            number = bisect_right(self._starts, node._sequence_nr()) - 1
            origin = self._paths[number] if number >= 0 else ""
            module = (
                f"recomputation of {module}"
                if module
                else f"backward of {origin}"
                if origin
                else "backward of the loss"
            )
        owner, hook = self.current()
        running = f"hook {hook} of {owner}" if owner not in ("", "core") else ""
        return ", ".join(text for text in (module, running) if text) or "core"

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(module)
        if name is not None:
            self._stack.append(name or type(module).__name__)
            self._mark(self._stack[-1])

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._names and self._stack:
            self._stack.pop()
            self._mark(self._stack[-1] if self._stack else "")

    def _mark(self, path: str) -> None:
        """Record that the nodes of the graph from now on belong to the module `path`."""
        number = torch._C._autograd._get_sequence_nr()
        if not self._starts or number > self._starts[-1]:
            self._starts.append(number)
            self._paths.append(path)
        elif number == self._starts[-1]:
            self._paths[-1] = path

    def _born(self, tensor: Tensor, place: str, op: str) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        number = self._number = self._number + 1
        self._alive[address] = number
        if self._hosting:
            self._births[number] = _Birth(0, None, place, op)
            self._on_host += size
            self.host_peak = max(self.host_peak, self._on_host)
            self._watch(storage, number, lambda: self._left_host(address, number, size))
            return
        self._births[number] = _Birth(size, None, place, op, size - storage.nbytes())
        self._events.append((number, place, size))
        self._watch(storage, number, lambda: self._died(address, number, size))

    def _watch(self, storage: torch.UntypedStorage, number: int, gone: Callable[[], None]) -> None:
        """Call a function when a storage is freed. The reference is the trace's own, so that both can be collected."""

        def call(_: Any) -> None:
            del self._watched[number]
            gone()

        self._watched[number] = weakref.ref(storage, call)

    def _died(self, address: int, number: int, size: int) -> None:
        if self._alive.get(address) == number:
            del self._alive[address]
            self._events.append((number, "", -size))

    def _left_host(self, address: int, number: int, size: int) -> None:
        self._on_host -= size
        self._died(address, number, 0)

    @contextmanager
    def hosting(self) -> Iterator[None]:
        """Count tensors that are made in this context in `host_peak`, and not among the device's."""
        self._hosting = True
        try:
            yield
        finally:
            self._hosting = False

    def _count(self, func: Any, inputs: list[Tensor], outputs: list[Tensor], args: Any, kwargs: Any, out: Any) -> None:
        packet = func._overloadpacket
        name = str(packet).replace("aten.", "").replace("bitsandbytes.", "")
        if func.is_view or name in _FREE or not (outputs or func in _LISTS):
            return
        if func in _LISTS and not _is_one_kernel(*args[:2]):
            each = name.removeprefix("_foreach_")
            for pair in zip(*args[:2], strict=True):
                self.operations.append(Operation(each, 0, sum(map(_bytes, pair)), pair[0].dtype, self.in_pass))
            return
        flops = 0
        if name.startswith("torch_attn"):
            heads, size = inputs[0].shape[-2:]
            flops = (4 if "backward" not in name else 10) * int(heads) * int(size) * self.attention_pairs
        elif name in ("int8_linear_matmul", "int8_scaled_mm"):
            flops = 2 * outputs[0].numel() * inputs[0].shape[-1]
        elif (formula := _formula(packet)) is not None:
            flops = int(formula(*args, **kwargs, out_val=out))
        seen = {id(tensor): _bytes(tensor) for tensor in (*inputs, *outputs)}
        wide = max(inputs or outputs, key=lambda tensor: tensor.numel())
        self.operations.append(Operation(name, flops, sum(seen.values()), wide.dtype, self.in_pass))

    def part_of(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Count living tensors as `part`, those made before the trace included; one that has a part keeps it."""
        for tensor in tensors:
            self._born(tensor, "", "")
            birth = self._births[self._alive[tensor.untyped_storage()._cdata]]
            birth.part = birth.part or part

    def rest_is(self, part: str) -> None:
        """Count every tensor that is alive and in no part yet as `part`."""
        for number in self._alive.values():
            if self._births[number].part is None:
                self._births[number].part = part

    def live_bytes(self) -> int:
        """Return the bytes of all tensors that are known and alive."""
        return sum(change for _, _, change in self._events)

    def mark(self) -> int:
        """Return the present position in the trace, for `peak`."""
        return len(self._events)

    def peak(self, start: int = 0) -> Peak:
        """Return the highest point since `start`.

        What stays alive to the end of the trace but was born after the peak, such as the optimizer's state in the first
        step, is there in every later step, and therefore added to earlier points.
        """
        dead = {number for number, _, change in self._events if change < 0}
        later = sum(change for number, _, change in self._events[start:] if change > 0 and number not in dead)
        level, best, at = sum(change for _, _, change in self._events[:start]), -1, start
        for index, (number, _, change) in enumerate(self._events[start:], start):
            level += change
            if change > 0 and number not in dead:
                later -= change
            if level + later > best:
                best, at = level + later, index
        return self._describe(best, at, dead)

    def _describe(self, total: int, at: int, dead: set[int]) -> Peak:
        live: dict[int, None] = {}
        for number, _, change in self._events[: at + 1]:
            if change > 0:
                live[number] = None
            else:
                live.pop(number, None)
        late = [number for number, _, change in self._events[at + 1 :] if change > 0 and number not in dead]
        place = self._events[at][1] if self._events else ""
        parts: dict[str, int] = {}
        largest = (0, "")
        for number in (*live, *late):
            birth = self._births[number]
            part = birth.part
            if part is None:
                part = TEMPORARY if birth.place == place else KEPT
                if part == TEMPORARY and birth.bytes > largest[0]:
                    largest = (birth.bytes, birth.op)
            parts[part] = parts.get(part, 0) + birth.bytes - birth.rounding
            if birth.rounding:
                parts[ROUNDING] = parts.get(ROUNDING, 0) + birth.rounding
        return Peak(total, parts, place, largest)


@contextmanager
def without_collection() -> Iterator[None]:
    """Let no collection of garbage fall into what is traced, whose peak would depend on it."""
    gc.collect()
    with uncollected():
        yield


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among an operation's arguments or results, which may be lists of tensors."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _gemm_4bit(
    x: Tensor, weight: Tensor, shape: list[int], absmax: Tensor, blocksize: int, kind: str,
    bias: Tensor | None = None, absmax_8bit: Tensor | None = None, code: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Dequantise and multiply, as bitsandbytes does for more rows than its fused kernels take."""
    ops: Any = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        absmax = ops.dequantize_blockwise.default(absmax_8bit, absmax, code, 256, torch.float32) + offset
    dense = ops.dequantize_4bit.default(weight, absmax, blocksize, kind, shape, x.dtype)
    rows = x.flatten(0, -2)
    y = torch.addmm(bias, rows, dense.t()) if bias is not None else rows @ dense.t()
    return y.view(*x.shape[:-1], -1)


_INSIDE: dict[str, Callable[..., Tensor]] = {"bitsandbytes.gemm_4bit.default": _gemm_4bit}
"""Operations whose kernels are made of others."""


_DROPOUT = (torch.ops.aten.native_dropout.default, torch.ops.aten.native_dropout_backward.default)


def _scratch(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Return the bytes of the copies that an elementwise CPU kernel makes of operands and results of other dtypes."""
    if func in _DROPOUT:  # multiply by their mask, cast to the input's dtype
        return inputs[0].numel() * inputs[0].element_size()
    if (
        str(func) == "bitsandbytes.optimizer_update_32bit.default"
    ):  # the gradient, a denominator and the update, in fp32
        return 3 * 4 * inputs[0].numel()
    operands = [tensor for tensor in inputs if tensor.dim()]
    if len({tensor.dtype for tensor in operands}) < 2 or torch.Tag.pointwise not in func.tags:
        return 0
    common = functools.reduce(torch.promote_types, (tensor.dtype for tensor in operands))
    results = [tensor for tensor in outputs if tensor.dtype != torch.bool]  # comparisons write theirs directly
    copied = {id(tensor): tensor for tensor in (*operands, *results) if tensor.dtype != common}
    return sum(tensor.numel() * common.itemsize for tensor in copied.values())


def _flash_backward(inputs: list[Tensor]) -> int:
    """`mha_varlen_bwd` in ATen/native/transformers/cuda/flash_attn/flash_api.cpp, without deterministic algorithms.

    In fp32, with 128 rows more a segment: the gradient of the queries, and a sum of each row. With grouped heads, also
    the gradients of keys and values for each head of the queries.
    """
    query, key, bounds = inputs[1], inputs[2], inputs[6]
    tokens, heads, size = query.shape
    multiple = 32 if size <= 128 else 64
    wide = 4 * (tokens + 128 * (len(bounds) - 1)) * heads * (-(-size // multiple) * multiple + 1)
    return wide + (2 * len(key) * heads * size * key.element_size() if key.shape[1] != heads else 0)


_CUDA_SCRATCH: dict[str, Callable[[list[Tensor]], int]] = {"torch_attn._varlen_attn_backward.default": _flash_backward}
"""Bytes that operations allocate inside on CUDA, and free before they end, by their inputs."""


def _cuda_scratch(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    found = _CUDA_SCRATCH.get(str(func))
    return found(inputs) if found is not None else 0


@functools.cache
def _inside(func: Any) -> Callable[..., Any] | None:
    """Return the function that an operation without a kernel of its own consists of; None if it has a kernel."""
    if str(func) in _INSIDE:
        return _INSIDE[str(func)]
    own = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU") if func.namespace == "aten" else True
    return func.decompose if not own and func._can_decompose() else None


@functools.cache
def _formula(packet: Any) -> Callable[..., Any] | None:
    """Return the FLOPs of an operation by its arguments; in place, it is the operation that returns a new tensor."""
    plain = getattr(torch.ops.aten, str(packet).removeprefix("aten.").removesuffix("_"), None)
    return flop_registry.get(packet) or flop_registry.get(plain)


def _is_one_kernel(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> bool:
    """Return whether one kernel copies or adds all tensors on CUDA (`foreach_tensor_copy_list_kernel_cuda_` of ATen).

    Each target is then dense and lies as its source does; otherwise, each tensor is taken by itself.
    """
    alike = all(a.stride() == b.stride() and _is_dense(a) for a, b in zip(targets, sources, strict=True))
    return alike and all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in (targets, sources))


def _is_dense(tensor: Tensor) -> bool:
    size = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1 and stride != size:
            return False
        size *= length
    return True


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh",
    "_unsafe_view", "resize_",
}  # fmt: skip
"""Operations that move no data."""
_LISTS = (torch.ops.aten._foreach_copy_.default, torch.ops.aten._foreach_add_.List)
"""Operations that copy or add a list of tensors to another, in place."""
