"""Layer norm with frozen weight and bias, the residual added on the way.

    h  = x + residual                                                   (x itself without one)
    z  = (h - mean(h)) rstd,   rstd = 1 / sqrt(var(h) + eps)            in float32
    y  = z · w + b                                                      rounded once
    dh = rstd (g - mean(g) - z mean(g z)) + dh from elsewhere,   g = dy w

x and the residual get the same gradient. Kept for backward: h, and mean and rstd of each row.
Layer norm: arXiv 1607.06450.
"""

import torch
from torch import Tensor

from fastprompt import native_elementwise
from fastprompt.ops import reference
from fastprompt.ops.checks import (
    AND_NATIVE,
    FLOATS,
    MOST_CHANNELS,
    by_native,
    by_reference,
    by_triton,
    check_backend,
    check_floats,
    check_frozen,
    check_number,
    check_out,
    check_shape,
)
from fastprompt.ops.layout import distinct, placed
from fastprompt.ops.quantize_rows import E4M3, by_torch

# ---- without autograd: what a hand-written backward calls ----


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    total: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, mean, rstd); h is ``x`` itself without a residual, mean and rstd [..., 1] float32.

    ``out`` takes y, in whatever dtype it has, and ``total`` takes h: contiguous, and each may be x
    or residual (if that is not wanted later, and not both the same). With ``scale`` [..., 1]
    float32, which is written too, ``out`` is e4m3: `quantize_rows` of y, which is then not rounded
    before. Else as `layer_norm`, whose checks it leaves out.
    """
    if out is not None or scale is not None:
        check_out("out", out, x, FLOATS if scale is None else (E4M3,))
    h = x
    if residual is not None:
        h = x.new_empty(x.shape) if total is None else total
        check_out("total", h, x)
    in_triton = _by_triton(x, backend)
    if in_triton or by_native(backend, x, residual, out):
        y = x.new_empty(x.shape) if out is None else out
        mean, rstd = (x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) for _ in range(2))
        total = None if residual is None else h
        if in_triton:
            from fastprompt.ops import norms_triton as triton

            triton.forward(x, residual, weight, bias, eps, 0.0, False, y, total, mean, rstd, scale)
        else:
            norm = native_elementwise.norm_forward
            norm(x, residual, weight, bias, eps, 0.0, False, y, total, mean, rstd)
        return y, h, mean, rstd
    if residual is not None:
        torch.add(x, residual, out=h)
    rows, weight, bias = _for_torch(h if scale is None else h.float(), weight, bias)
    y, mean, rstd = torch.native_layer_norm(rows, h.shape[-1:], weight, bias, eps)
    if scale is not None:
        y, found = by_torch(y)
        scale.copy_(found)
    return placed(y, out, h.dtype), h, mean, rstd


def backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    *,
    eps: float = 0.0,
    dh: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The gradient to x, and as well to the residual: that of the norm, plus ``dh`` if given.

    h, mean and rstd as `forward` gave them, or both None: made again from h, with ``eps``. dh is
    the gradient that h gets elsewhere (the stream that goes past the norm). ``out`` is contiguous,
    of whatever dtype, and may be dy, dh or h.
    """
    if out is not None:
        check_out("out", out, h, FLOATS)
    if _by_triton(h, backend):
        from fastprompt.ops import norms_triton as triton

        dx = h.new_empty(h.shape) if out is None else out
        triton.backward(dy, h, weight, mean, rstd, dh, eps, 0.0, True, dx)
        return dx
    dtype = h.dtype if out is None else out.dtype
    if by_native(backend, h, dy, dh, out) and (dh is None or dh.dtype == dtype):
        dx = h.new_empty(h.shape) if out is None else out
        norm = native_elementwise.norm_backward
        norm(dy, h, weight, mean, rstd, dh, eps, 0.0, True, dx)
        return dx
    rows, weight, _ = _for_torch(h, weight, None)
    if rstd is None:
        _, mean, rstd = torch.native_layer_norm(rows, h.shape[-1:], weight, None, eps)
    inputs = (dy.to(rows.dtype), rows, h.shape[-1:], mean, rstd, weight, None)
    g = torch.ops.aten.native_layer_norm_backward(*inputs, (True, False, False))[0]  # dx alone
    return placed(g if dh is None else g.add_(dh), out, h.dtype)


def _for_torch(
    h: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows and parameters such that torch's statistics are float32 (of float64 rows, float64).

    On the CPU 16-bit rows with float32 parameters; elsewhere torch does not take the two together.
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    if h.is_cpu and weight is None and h.dtype != wide:
        weight = h.new_ones(h.shape[-1], dtype=wide)
    weight, bias = (p if p is None else p.to(wide) for p in (weight, bias))
    return h if h.is_cpu else h.to(wide), weight, bias


def _by_triton(x: Tensor, backend: str) -> bool:
    return by_triton(x, backend) and x.shape[-1] <= MOST_CHANNELS


# ---- op: schema, fake, autograd ----

torch.library.define(
    "fastprompt::layer_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fastprompt::layer_norm_backward",
    "(Tensor dy, Tensor h, Tensor mean, Tensor rstd, Tensor? dh, Tensor? weight, str backend)"
    " -> Tensor",
)


def _forward(x, residual, weight, bias, eps, backend):
    y, h, *statistics = forward(x, weight, bias, eps, residual=residual, backend=backend)
    return y, x.new_empty(0) if residual is None else h, *statistics  # a result is no argument


def _backward(dy, h, mean, rstd, dh, weight, backend):
    dy, dh = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (dy, dh))
    return backward(dy, h, weight, mean, rstd, dh=dh, backend=backend)


for _key in ("CPU", "CUDA"):
    torch.library.impl("fastprompt::layer_norm", _key, _forward)
    torch.library.impl("fastprompt::layer_norm_backward", _key, _backward)


@torch.library.register_fake("fastprompt::layer_norm")
def _results(x, residual, weight, bias, eps, backend):
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.new_empty(0 if residual is None else x.shape)
    mean, rstd = (x.new_empty(*x.shape[:-1], 1, dtype=wide) for _ in range(2))
    return x.new_empty(x.shape), h, mean, rstd


@torch.library.register_fake("fastprompt::layer_norm_backward")
def _gradient(dy, h, mean, rstd, dh, weight, backend):
    return h.new_empty(h.shape)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, *options):
        y, h, mean, rstd = torch.ops.fastprompt.layer_norm(x, residual, *options)
        ctx.save_for_backward(x if residual is None else h, mean, rstd, options[0])
        ctx.backend = options[-1]
        ctx.set_materialize_grads(False)  # no zeros to be read for a result that nobody used
        return y if residual is None else (y, h)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh=None):
        h, mean, rstd, weight = ctx.saved_tensors
        dy = torch.zeros_like(h) if dy is None else dy
        dx = torch.ops.fastprompt.layer_norm_backward(dy, h, mean, rstd, dh, weight, ctx.backend)
        grads = (dx if wanted else None for wanted in ctx.needs_input_grad[:2])
        return *grads, None, None, None, None


# ---- public ----


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``(h - mean(h)) / sqrt(var(h) + eps) · weight + bias`` along the last axis, h = x + residual.

    Args:
        x: [..., D] float32, float16, bfloat16 or float64, any strides with a contiguous last axis
            (on CUDA leading axes that merge into three at most).
        weight, bias: [D] any float dtype, frozen; None where there is none.
        eps: added to the variance.
        residual: as x; is added to it, in x's dtype, in the same pass.
        backend: "triton" (CUDA; on the CPU its interpreter), "native" (csrc: float32 and bfloat16
            on the CPU), "plain" (torch's operations with a hand-written backward) or "reference".
            "auto" is Triton on CUDA, else native; what either does not take (on CUDA rows of more
            than 16384 channels) is plain, and float64 is the reference unless "plain".

    Returns:
        [..., D] in x's dtype, contiguous; with a residual (that, x + residual). Gradients go to x
        and residual.

    Raises:
        ValueError: a shape, stride, dtype, device or eps that the op does not serve, or a
            weight or bias that trains.
    """
    check_floats(x=x)
    check_backend(backend, x.device, AND_NATIVE)
    if x.ndim == 0:
        raise ValueError("x: want [..., D], got a single number")
    check_number("eps", eps, least=0)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_frozen(name, parameter, x.shape[-1:], x.device)
    if residual is not None:
        check_floats(x=x, residual=residual)
        check_shape("residual", residual, x.shape)
    if by_reference(x, backend):
        return reference.layer_norm(x, weight, bias, eps, residual=residual)
    return _LayerNorm.apply(*distinct(x, residual, weight, bias, eps, backend))
