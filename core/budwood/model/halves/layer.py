"""Replaces the forward of a decoder layer by its halves, where these compute what the layer does."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from budwood.model.halves.attention import AttentionHalf
from budwood.model.halves.chain import Chain, Half
from budwood.model.halves.half import Call
from budwood.model.halves.mlp import MlpHalf
from budwood.model.halves.norms import Ahead
from budwood.model.halves.shadows import Shadows
from budwood.model.ops.gated import GatedMLP
from budwood.model.ops.group import Group, Part
from budwood.model.quantizers import quantizer_of

QUERIES = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
GATES = (("gate_proj", "up_proj"), ("gate_up_proj",))


@dataclass(frozen=True)
class Names:
    """Names of a layer's modules.

    Attributes:
        norm, after: the norms of the attention's input and output, or "".
        second, last: those of the MLP.
        drops: modules through which both halves' outputs pass, which must do nothing.
    """

    norm: str = "input_layernorm"
    after: str = ""
    second: str = "post_attention_layernorm"
    last: str = ""
    drops: tuple[str, ...] = ()


PATTERNS = (
    Names(),
    Names("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    Names(drops=("resid_attn_dropout", "resid_mlp_dropout")),
)
"""Llama, Qwen, Mistral and mixtures; Gemma 2 and 3; Phi-3."""


class Halves:
    """The forward of a layer: its halves, or the model's own if something else is in its place.

    Attributes:
        layer: the module.
        original: its own forward.
        names: of its modules.
        number: of the layer in its model.
        shadows: of the model.
        following: the next layer's, which may begin with what this one computed ahead; None: it is the last. Weak,
            so that a copy of a layer does not copy all that follow it.
        evaluates: whether passes without gradients are computed in halves too, see `evaluating`.
        met: why the model's own forward computed in a pass with gradients; None: it did not.
        rows: [L] int64, the only positions of which the next pass shall compute the output; taken away if it does.
    """

    def __init__(self, layer: nn.Module, original: Any, names: Names, number: int, shadows: Shadows) -> None:
        self.layer, self.original, self.names = layer, original, names
        self.number, self.shadows = number, shadows
        self.evaluates = False
        self.rows: Tensor | None = None
        self.met: str | None = None
        self.following: weakref.ref[Halves] | None = None
        self._arrived: tuple[Any, int, Ahead] | None = None

    @property
    def dense(self) -> bool:
        """Whether the layer has an MLP that is a half; otherwise the model's own modules compute it."""
        return isinstance(self.layer.mlp.forward, GatedMLP)  # type: ignore[union-attr]

    def __call__(self, hidden_states: Any, *args: Any, **options: Any) -> Any:
        found = None if args else self.chain(hidden_states, options)
        if found is None:
            self._before(None)
            if self.met is None and torch.is_grad_enabled():
                self.met = self.obstacle()
            return self.original(hidden_states, *args, **options)
        chain, tensors = found
        again = self.layer.gradient_checkpointing and self.layer.training
        with self._keeping(hidden_states) if again else nullcontext():
            y = chain(hidden_states, tensors)
        following = self.following() if self.following is not None else None
        if chain.onward is not None and chain.onward.found is not None and following is not None:
            following._arrived = weakref.ref(y), y._version, chain.onward
        if len(chain.halves) == 2:
            return y
        return self.layer._gradient_checkpointing_func(self._rest, y) if again else self._rest(y)  # type: ignore[operator]

    def chain(self, x: Any, options: dict[str, Any]) -> tuple[Chain, list[Tensor | None]] | None:
        """Return the halves of a pass and the tensors that they take; None: the model's own forward computes.

        Args:
            x: the layer's input.
            options: its keyword arguments.
        """
        layer: Any = self.layer
        trains = torch.is_grad_enabled()
        wanted = trains or self.evaluates
        if not (wanted and isinstance(x, Tensor) and x.dim() == 3) or self.reason() is not None:
            return None
        again = layer.gradient_checkpointing and layer.training
        if again:  # as transformers does
            options = {**options, "use_cache": False, "past_key_values": None}
        parts = self._parts() if options.get("past_key_values") is None else None
        tensors = [t for group in parts or () for part in group for t in part.tensors]
        if parts is None:
            return None
        if trains and not (x.requires_grad or any(t is not None and t.requires_grad for t in tensors)):
            return None
        kind = x.device.type
        narrow = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if narrow else x.dtype
        rows = None
        if trains and not any(part.dropout and part.a is not None for group in parts[1:] for part in group):
            rows, self.rows = self.rows, None  # else, fewer rows would have other masks
        call = Call(x.shape, options, partial(torch.autocast, kind, dtype if narrow else None, narrow), rows)
        # Whoever watches saved tensors may keep copies of them, or make them again: these have no graphs inside.
        alone = again or not trains or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        groups = [Group(part, x, dtype) for part in parts]
        factors = self.shadows.factors(self.number, groups, [[t for p in part for t in p.tensors] for part in parts])
        return Chain(self._halves(groups), factors, call, alone, self._before(x), self._onward()), tensors

    def _before(self, x: Tensor | None) -> Ahead | None:
        """Return the norm of the input that the layer before computed, if the input is its output; else free it."""
        arrived, self._arrived = self._arrived, None
        if arrived is None:
            return None
        output, version, ahead = arrived
        if x is not None and output() is x and version == x._version:
            return ahead
        ahead.found = None  # the graph of the layer before would keep it
        return None

    def _onward(self) -> Ahead | None:
        """Return the norm with which the next layer begins; None: it is not at hand, as where layers are sharded."""
        following = self.following() if self.following is not None else None
        if following is None or not self.dense or type(following.layer) is not type(self.layer):
            return None
        sharded = type(following.layer).__name__.startswith("FSDP")
        return None if sharded else Ahead(getattr(following.layer, following.names.norm))

    def _keeping(self, x: Tensor) -> AbstractContextManager[Any]:
        offload = getattr(self.layer._gradient_checkpointing_func, "offload", None)
        return nullcontext() if offload is None else offload.keeping(x)

    def _rest(self, x: Tensor) -> Tensor:
        """Compute the other half of a layer with the model's own modules."""
        layer, names = self.layer, self.names
        y = layer.mlp(getattr(layer, names.second)(x))  # type: ignore[operator]
        y = y[0] if isinstance(y, tuple) else y
        return x + (getattr(layer, names.last)(y) if names.last else y)

    def reason(self) -> str | None:
        """Return why the model's own forward computes, or None; adapters are asked later."""
        layer: Any = self.layer
        if layer.gradient_checkpointing and type(layer).__call__ is not nn.Module.__call__:  # older transformers
            return "its class recomputes it as a whole, and the halves would do so again"
        if "forward" in layer.self_attn.__dict__:
            return "something replaces the forward of its attention"
        for module in self._watched():
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            if any(hooks) or module._backward_pre_hooks:
                return f"a hook is on its {type(module).__name__}"
        for name in (self.names.norm, self.names.after, self.names.second, self.names.last):
            if name and any(p.requires_grad for p in getattr(layer, name).parameters()):
                return "a norm is trained"
        if any(getattr(layer, name).p and layer.training for name in self.names.drops):
            return "the model drops outputs by chance"
        return None

    def obstacle(self) -> str | None:
        """Return why the model's own forward computes in training, adapters included, or None."""
        return self.reason() or (None if self._parts() is not None else "an adapter computes its own forward")

    def _watched(self) -> Iterator[nn.Module]:
        """Yield the modules whose own calls the halves replace."""
        layer: Any = self.layer
        yield from _two_levels(layer.self_attn)
        names = (self.names.norm, self.names.after, *((self.names.second, self.names.last) if self.dense else ()))
        for name in names:
            if name:
                yield getattr(layer, name)
        if self.dense:
            yield from _two_levels(layer.mlp)

    def _parts(self) -> list[list[Part]] | None:
        """Return the linears of each group and their updates; None: one of them computes its own forward."""
        layer: Any = self.layer
        owners = [(layer.self_attn, queries(layer.self_attn)), (layer.self_attn, ("o_proj",))]
        if self.dense:
            owners += [(layer.mlp, gates(layer.mlp)), (layer.mlp, ("down_proj",))]
        found: list[list[Part]] = []
        for owner, names in owners:
            found.append([])
            for name in names:
                part = part_of(getattr(owner, name))
                if part is None:
                    return None
                found[-1].append(part)
        return found

    def _halves(self, groups: list[Group]) -> list[Half]:
        layer: Any = self.layer
        names = self.names
        after = getattr(layer, names.after) if names.after else None
        attention = layer.self_attn
        norm = getattr(layer, names.norm)
        halves: list[Half] = [AttentionHalf(norm, after, groups[0], groups[1], attention, queries(attention))]
        if len(groups) > 2:
            after = getattr(layer, names.last) if names.last else None
            kind = layer.mlp.forward.kind
            halves.append(MlpHalf(getattr(layer, names.second), after, groups[2], groups[3], kind))
        return halves


@contextmanager
def evaluating(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Compute passes without gradients in halves, as those of training, in this context.

    Outside of it, such passes take the model's own forward: golden outputs are compared bit for bit, also with those
    that were recorded before there were halves.
    """
    halves = [own for layer in layers if isinstance(own := layer.__dict__.get("forward"), Halves)]
    for own in halves:
        own.evaluates = True
    try:
        yield
    finally:
        for own in halves:
            own.evaluates = False


def _two_levels(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module, its children, and theirs: the linears and those that adapters wrap."""
    yield module
    for child in module.children():
        yield child
        yield from child.children()


def queries(attention: nn.Module) -> tuple[str, ...]:
    """Return the names of an attention's projections of its input, or ()."""
    return next((names for names in QUERIES if all(hasattr(attention, name) for name in names)), ())


def gates(mlp: nn.Module) -> tuple[str, ...]:
    """Return the names of a gated MLP's projections of its input, or ()."""
    return next((names for names in GATES if all(hasattr(mlp, name) for name in names)), ())


def part_of(linear: nn.Module) -> Part | None:
    """Return a linear and its update, as they compute now; None if they compute something else."""
    own = linear.__dict__.get("forward")
    if own is not None:
        found = getattr(own, "part", None)
        return None if found is None else found()
    quantizer = quantizer_of(linear)
    if quantizer is None or quantizer.weight(linear).requires_grad:
        return None
    return Part(linear)
