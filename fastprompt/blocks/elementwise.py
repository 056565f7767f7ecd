"""What a block does between its products, and the gradients: ops of frozen weights, by its parts.

Each norm is computed in float32 (or float64) and rounded once; where e4m3 is asked for, to rows of
it with scales (`Quantized`), which an fp8 product takes. Backward gives dx alone, and makes
a row's statistics again rather than have them kept. ``into`` names memory that nobody reads any
more, which a result may then take; nothing else is ever written to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.blocks.parts import LAYER, RMS_PLUS_ONE, Norm
from fastprompt.ops.gelu import APPROXIMATE
from fastprompt.ops.gelu import backward as gelu_backward
from fastprompt.ops.gelu import forward as gelu
from fastprompt.ops.layer_norm import backward as layer_norm_backward
from fastprompt.ops.layer_norm import forward as layer_norm
from fastprompt.ops.quantize_rows import E4M3, Quantized
from fastprompt.ops.quantize_rows import activation as quantized_activation
from fastprompt.ops.rms_norm import backward as rms_norm_backward
from fastprompt.ops.rms_norm import forward as rms_norm
from fastprompt.ops.swiglu import ACTIVATIONS as GATED
from fastprompt.ops.swiglu import backward as swiglu_backward
from fastprompt.ops.swiglu import forward as swiglu

# ---- norms ----


def normalize(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor | Quantized:
    """[..., D] -> [..., D] in ``dtype``: x̂ · w, or x̂ · (1 + w) (Gemma's), or x̂ · w + b (LAYER)."""
    return _forward(x, norm, dtype, None, None)[0]


def add_and_normalize(
    x: Tensor, branch: Tensor, norm: Norm, dtype: torch.dtype
) -> tuple[Tensor | Quantized, Tensor]:
    """(the norm of h in ``dtype``, h = x + branch in the wider of their dtypes), [..., D].

    ``branch`` is not wanted any more: h may take its memory.
    """
    if x.dtype == branch.dtype and branch.is_contiguous():
        return _forward(branch, norm, dtype, _rows(x), branch)
    h = add(x, branch)
    return normalize(h, norm, dtype), h


def add(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch, over ``branch`` if it is of the wider dtype."""
    if torch.promote_types(x.dtype, branch.dtype) == branch.dtype:
        return branch.add_(x)
    return x + branch


def _forward(
    x: Tensor, norm: Norm, dtype: torch.dtype, residual: Tensor | None, total: Tensor | None
) -> tuple[Tensor | Quantized, Tensor]:
    x = _rows(x)
    scale = None
    if dtype == E4M3:
        out, scale = Quantized.empty(x, x.shape[-1], dtype)
    else:
        if residual is None:
            x = x.to(torch.promote_types(x.dtype, dtype))
        out = None if dtype == x.dtype else x.new_empty(x.shape, dtype=dtype)
    options = dict(residual=residual, total=total, out=out, scale=scale)
    if norm.kind == LAYER:
        y, h = layer_norm(x, norm.weight, norm.module.bias, norm.eps, **options)[:2]
    else:
        offset = float(norm.kind == RMS_PLUS_ONE)
        options |= dict(offset=offset, cast_first=False)  # as exact as either of transformers' ways
        y, h = rms_norm(x, norm.weight, norm.eps, **options)[:2]
    return (y if scale is None else Quantized(y, scale)), h


def normalize_backward(
    dy: Tensor, x: Tensor, norm: Norm, residual: Tensor | None, *, into: Tensor | None = None
) -> Tensor:
    """dx [..., D], plus ``residual``, in the residual's dtype (without one in that of x).

    ``residual`` is the gradient that comes past the norm on the other way.
    """
    dtype = x.dtype if residual is None else residual.dtype
    dy, x, dh = _rows(dy), _rows(x), None if residual is None else _rows(residual)
    if into is not None and (into.dtype != dtype or not into.is_contiguous()):
        into = None
    out = x.new_empty(x.shape, dtype=dtype) if into is None and dtype != x.dtype else into
    if norm.kind == LAYER:
        return layer_norm_backward(dy, x, norm.weight, None, None, eps=norm.eps, dh=dh, out=out)
    options = dict(offset=float(norm.kind == RMS_PLUS_ONE), eps=norm.eps, dh=dh, out=out)
    return rms_norm_backward(dy, x, norm.weight, None, **options)


def _rows(x: Tensor) -> Tensor:
    """With a contiguous last axis, as kernels trust. The gradient of a sum has none, nor have the
    embeddings of SigLIP's patches."""
    return x if x.stride(-1) == 1 else x.contiguous()


# ---- activations ----


def activate(
    name: str,
    gate: Tensor,
    up: Tensor | None,
    dtype: torch.dtype | None = None,
    *,
    into: Tensor | None = None,
) -> Tensor | Quantized:
    """[..., F]: act(gate) · up, or act(gate), in the dtype of gate, or in e4m3 if ``dtype`` is."""
    if dtype == E4M3:
        return quantized_activation(name, gate, up)
    if up is None:
        return _act(name, gate, into)
    if name in GATED:
        return swiglu(gate, up, activation=name, out=into)
    return _act(name, gate, into).mul_(up)


def activate_backward(
    name: str,
    da: Tensor,
    gate: Tensor,
    up: Tensor | None,
    *,
    into: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """(dgate, dup), or (dgate,): dgate = da · up · act'(gate), dup = da · act(gate).

    ``into`` may be (gate, up).
    """
    da = _rows(da)
    if up is None:
        return (_act_backward(name, da, gate, into and into[0]),)
    if name in GATED:
        return swiglu_backward(da, gate, up, activation=name, into=into)
    dup = _act(name, gate, None).mul_(da)
    return _act_backward(name, da * up, gate, into and into[0]), dup


def _act(name: str, x: Tensor, into: Tensor | None) -> Tensor:
    if name == "silu":
        return F.silu(x)
    return gelu(x, APPROXIMATE[name], out=into)


def _act_backward(name: str, dy: Tensor, x: Tensor, into: Tensor | None) -> Tensor:
    if name == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    return gelu_backward(dy, x, APPROXIMATE[name], out=into)
