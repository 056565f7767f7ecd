"""What a block does between its products, and the gradients, for frozen weights: in plain torch.

Here, and nowhere else in `blocks`, fused kernels are plugged in: a function below becomes a call of
the op of the same meaning, and nothing around it changes. Each norm is computed in float32 (or
float64) and rounded once. Backward gives dx alone; ``residual`` is the gradient that comes past
the norm on the other way, added before the one rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.blocks.parts import LAYER, RMS_PLUS_ONE, Norm

# ---- norms ----


def _unit(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(x̂, 1/s) in float32 or wider: x̂ = x/s with s² = mean x² + eps, centred first for LAYER."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm.kind == LAYER:
        x = x - x.mean(-1, keepdim=True)
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    return x * inverse, inverse


def _weight(norm: Norm, dtype: torch.dtype) -> Tensor:
    weight = norm.weight.to(dtype)
    return weight + 1 if norm.kind == RMS_PLUS_ONE else weight


def normalize(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """[..., D] -> [..., D] in ``dtype``: x̂ · w, or x̂ · (1 + w) (Gemma's), or x̂ · w + b (LAYER)."""
    y, _ = _unit(x, norm)
    y = y * _weight(norm, y.dtype)
    if norm.kind == LAYER and norm.module.bias is not None:
        y += norm.module.bias
    return y.to(dtype)


def normalize_backward(dy: Tensor, x: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
    """dx [..., D], plus ``residual``, in the residual's dtype (without one in that of x).

    g = dy · w;    dx = (g - mean(g)· - x̂ mean(g x̂)) / s        mean(g)· for LAYER alone
    """
    unit, inverse = _unit(x, norm)
    g = dy * _weight(norm, unit.dtype)
    dx = g - unit * (g * unit).mean(-1, keepdim=True)
    if norm.kind == LAYER:
        dx -= g.mean(-1, keepdim=True)
    dx *= inverse
    return dx.to(x.dtype) if residual is None else dx.add_(residual).to(residual.dtype)


# ---- activations ----


def activate(name: str, gate: Tensor, up: Tensor | None) -> Tensor:
    """[..., F]: act(gate) · up, or act(gate)."""
    y = _act(name, gate)
    return y if up is None else y.mul_(up)


def activate_backward(name: str, da: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, ...]:
    """(dgate, dup), or (dgate,): dgate = da · up · act'(gate), dup = da · act(gate)."""
    if up is None:
        return (_act_backward(name, da, gate),)
    return _act_backward(name, da * up, gate), _act(name, gate).mul_(da)


def _act(name: str, x: Tensor) -> Tensor:
    if name == "silu":
        return F.silu(x)
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate=_approximation(name))


def _act_backward(name: str, dy: Tensor, x: Tensor) -> Tensor:
    if name == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    if name == "quick_gelu":
        s = torch.sigmoid(1.702 * x)
        return dy * s * (1 + 1.702 * x * (1 - s))
    return torch.ops.aten.gelu_backward(dy, x, approximate=_approximation(name))


def _approximation(name: str) -> str:
    return {"gelu": "none", "gelu_tanh": "tanh"}[name]


# ---- rotation ----


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, N, H, d] by cos, sin [B or 1, N, r], half-split; channels past r stay as they are.

    y1 = x1 cos1 - x2 sin1,    y2 = x2 cos2 + x1 sin2        rounded to x's dtype, whatever cos's
    """
    (c1, c2), (s1, s2) = _halves(cos), _halves(sin)
    x1, x2, rest = _split(x, cos.shape[-1])
    return torch.cat([x1 * c1 - x2 * s1, x2 * c2 + x1 * s2, *rest], dim=-1).to(x.dtype)


def rotate_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """dx [B, N, H, d]:  dx1 = dy1 cos1 + dy2 sin2,    dx2 = dy2 cos2 - dy1 sin1."""
    (c1, c2), (s1, s2) = _halves(cos), _halves(sin)
    d1, d2, rest = _split(dy, cos.shape[-1])
    return torch.cat([d1 * c1 + d2 * s2, d2 * c2 - d1 * s1, *rest], dim=-1).to(dy.dtype)


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    return x[:, :, None].chunk(2, dim=-1)


def _split(x: Tensor, turned: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    x1, x2 = x[..., :turned].chunk(2, dim=-1)
    return x1, x2, [x[..., turned:]] * (turned < x.shape[-1])
