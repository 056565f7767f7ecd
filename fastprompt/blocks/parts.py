"""What one block is made of: everything that its forward and backward need to know of it."""

from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn

RMS, RMS_PLUS_ONE, LAYER = "rms", "rms, 1 + weight", "layer"  # kinds of norms


@dataclass(eq=False)
class Norm:
    """A norm over the last axis: its module (``weight``, for LAYER ``bias``), its kind, epsilon."""

    module: nn.Module
    kind: str
    eps: float

    @property
    def weight(self) -> Tensor:
        return self.module.weight


@dataclass(eq=False)
class Vector:
    """A frozen vector [D], read from its module at each use (it may be moved or replaced)."""

    module: nn.Module
    name: str

    @property
    def value(self) -> Tensor:
        return getattr(self.module, self.name)


@dataclass(eq=False)
class Parts:
    """A pre-norm block, in the order in which its modules run:

        middle = x + scale1 · o_proj(attention(rope(q_norm(q_proj(n))), …)),   n = norm1(x)
        y = middle + scale2 · down(act(gate(m)) · up(m)),                      m = norm2(middle)

    Attributes:
        attention: the module that transformers hands to its attention functions.
        q_proj … down: linear layers, dense or 4-bit; ``up`` None: a plain MLP, ``gate`` its first
            layer.
        activation: of `ops.quantize_rows.ACTIVATIONS`.
        head_dim, scale: channels of a head; what multiplies q·k.
        q_norm, k_norm: norms over the channels of each head, before rotation.
        scale1, scale2: LayerScale's vectors.
        rotary: whether the block is given ``position_embeddings`` (cos, sin).
        dropout_name, window_name: dotted, from ``attention``: the probability with which it drops
            weights in training, the sliding window's length.
        hands_on: whether ``attention`` hands its caller's keywords on (``is_causal``).
        others: modules that the forward above covers without naming them (containers, activation).
    """

    attention: nn.Module
    norm1: Norm
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    norm2: Norm
    gate: nn.Module
    up: nn.Module | None
    down: nn.Module
    activation: str
    head_dim: int
    scale: float
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    scale1: Vector | None = None
    scale2: Vector | None = None
    rotary: bool = False
    dropout_name: str | None = None
    window_name: str | None = None
    hands_on: bool = True
    others: tuple[nn.Module, ...] = ()

    @property
    def attention_dropout(self) -> float:
        return attrgetter(self.dropout_name)(self.attention) if self.dropout_name else 0.0

    @property
    def window(self) -> int | None:
        # looked up at each call, as the model's own forward does
        return attrgetter(self.window_name)(self.attention) if self.window_name else None

    @property
    def qkv(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.q_proj, self.k_proj, self.v_proj

    @property
    def first(self) -> tuple[nn.Module, ...]:
        """The products that begin the MLP."""
        return (self.gate,) if self.up is None else (self.gate, self.up)

    @property
    def groups(self) -> tuple[tuple[nn.Module, ...], ...]:
        """The products, those that share their input together."""
        return self.qkv, (self.o_proj,), self.first, (self.down,)

    @property
    def products(self) -> tuple[nn.Module, ...]:
        return tuple(part for group in self.groups for part in group)

    def dtype(self, x: Tensor) -> torch.dtype:
        """What the block computes in: autocast's dtype, or what its first norm returns."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return torch.promote_types(x.dtype, self.norm1.weight.dtype)
