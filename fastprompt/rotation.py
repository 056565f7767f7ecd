"""Rotary positions of prompts: -P .. -1, just before the first token."""

import torch
from torch import Tensor, nn


def rotate(k: Tensor, rotary: nn.Module, first: int | None = None) -> Tensor:
    """Rotate prompt keys [Hkv, P, d] (half-split layout, as transformers' text models have it).

    The first stands at position ``first``, by default at -P.

    Scores depend on differences of positions alone, so this equals giving the prompts 0 .. P-1 and
    the tokens P and on. The rotary module is not called: dynamic and long-context ones change
    state by the positions they are shown. Its frequencies and scaling are used as its last call on
    tokens left them.
    """
    cos, sin = _cos_sin(k, rotary, -k.shape[-2] if first is None else first)
    scaling = rotary.attention_scaling
    return _turned(k, cos * scaling, sin * scaling)


def unrotate(k: Tensor, rotary: nn.Module, first: int) -> Tensor:
    """The keys that `rotate` makes into ``k`` [Hkv, P, d]."""
    cos, sin = _cos_sin(k, rotary, first)
    scaling = rotary.attention_scaling
    return _turned(k, cos / scaling, -sin / scaling)


def _cos_sin(k: Tensor, rotary: nn.Module, first: int) -> tuple[Tensor, Tensor]:
    # as wide as transformers computes them, and in float64 when the model's own buffer is
    wide = torch.promote_types(rotary.inv_freq.dtype, torch.float32)
    positions = torch.arange(first, first + k.shape[-2], device=k.device, dtype=wide)
    angles = positions[:, None] * rotary.inv_freq.to(device=k.device, dtype=wide)
    return angles.cos(), angles.sin()


def _turned(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (torch.cat([x, x], dim=-1).to(k.dtype) for x in (cos, sin))
    turned, rest = k[..., : cos.shape[-1]], k[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1)
