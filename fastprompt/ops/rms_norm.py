"""Root-mean-square norm with a frozen weight, the residual added on the way.

    h  = x + residual                                       (x itself without one)
    z  = h · rstd,   rstd = 1 / sqrt(mean(h²) + eps)        in float32
    y  = z · (offset + w)
    dh = rstd (g - z mean(g z)) + dh from elsewhere,   g = dy (offset + w)

x and the residual get the same gradient. Kept for backward: h, and rstd of each row; z is made
again. Where 16-bit models round differs (transformers' classes): Llama's casts z to x's dtype and
then multiplies (``cast_first``), Gemma's multiplies by 1 + w in float32 and then casts.
Root-mean-square norm: arXiv 1910.07467.
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
from fastprompt.ops.layout import distinct, pieces
from fastprompt.ops.quantize_rows import E4M3, by_torch

# ---- without autograd: what a hand-written backward calls ----


def forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    cast_first: bool | None = None,
    out: Tensor | None = None,
    total: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, rstd); h is ``x`` itself without a residual, rstd [..., 1] in float32 (or float64).

    ``out`` takes y, in whatever dtype it has, and ``total`` takes h: contiguous, and each may be x
    or residual (if that is not wanted later, and not both the same). With ``scale`` [..., 1]
    float32, which is written too, ``out`` is e4m3: `quantize_rows` of y, which is then not rounded
    before. Else as `rms_norm`, whose checks it leaves out.
    """
    y = x.new_empty(x.shape) if out is None else out
    check_out("out", y, x, FLOATS if scale is None else (E4M3,))
    h = x
    if residual is not None:
        h = x.new_empty(x.shape) if total is None else total
        check_out("total", h, x)
    first = offset == 0 if cast_first is None else cast_first
    total = None if residual is None else h
    wide = torch.promote_types(x.dtype, torch.float32)
    rstd = x.new_empty(*x.shape[:-1], 1, dtype=wide)
    if _by_triton(x, backend):
        from fastprompt.ops import norms_triton as triton

        triton.forward(x, residual, weight, None, eps, offset, first, y, total, None, rstd, scale)
        return y, h, rstd
    if by_native(backend, x, residual, y):
        norm = native_elementwise.norm_forward
        norm(x, residual, weight, None, eps, offset, first, y, total, None, rstd)
        return y, h, rstd
    factor = _factor(weight, offset, wide)
    for x_, r_, h_, y_, rstd_, scale_ in pieces(x, residual, h, y, rstd, scale):
        if r_ is not None:
            torch.add(x_, r_, out=h_)
        z = h_.to(wide)
        z = z * rstd_.copy_(_rstd(z, eps))
        z = (z.to(h_.dtype) if first else z) * factor
        if scale_ is not None:
            z, found = by_torch(z)
            scale_.copy_(found)
        y_.copy_(z)
    return y, h, rstd


def backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor | None,
    *,
    eps: float = 0.0,
    offset: float = 0.0,
    dh: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The gradient to x, and as well to the residual: that of the norm, plus ``dh`` if given.

    h and rstd as `forward` gave them, or rstd None: made again from h, with ``eps``. dh is the
    gradient that h gets elsewhere (the stream that goes past the norm). ``out`` is contiguous, of
    whatever dtype, and may be dy, dh or h.
    """
    dx = h.new_empty(h.shape) if out is None else out
    check_out("out", dx, h, FLOATS)
    if _by_triton(h, backend):
        from fastprompt.ops import norms_triton as triton

        triton.backward(dy, h, weight, None, rstd, dh, eps, offset, False, dx)
        return dx
    if by_native(backend, h, dy, dh, dx) and (dh is None or dh.dtype == dx.dtype):
        norm = native_elementwise.norm_backward
        norm(dy, h, weight, None, rstd, dh, eps, offset, False, dx)
        return dx
    wide, D = torch.promote_types(h.dtype, torch.float32), max(1, h.shape[-1])
    factor = _factor(weight, offset, wide)
    for dy_, h_, rstd_, dh_, dx_ in pieces(dy, h, rstd, dh, dx):
        if rstd_ is None:
            rstd_ = _rstd(h_.to(wide), eps)
        g = dy_ * factor
        along = (g * h_).sum(-1, keepdim=True).mul_(rstd_.square() / D)
        g.sub_(along * h_).mul_(rstd_)
        dx_.copy_(g if dh_ is None else g.add_(dh_))
    return dx


def _rstd(z: Tensor, eps: float) -> Tensor:
    return z.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _factor(weight: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    weight = weight.to(torch.promote_types(weight.dtype, dtype))
    return weight + offset if offset else weight


def _by_triton(x: Tensor, backend: str) -> bool:
    return by_triton(x, backend) and x.shape[-1] <= MOST_CHANNELS


# ---- op: schema, fake, autograd ----

_OPTIONS = "Tensor weight, float offset, str backend"
torch.library.define(
    "fastprompt::rms_norm",
    f"(Tensor x, Tensor? residual, float eps, bool cast_first, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fastprompt::rms_norm_backward",
    f"(Tensor dy, Tensor h, Tensor rstd, Tensor? dh, {_OPTIONS}) -> Tensor",
)


def _forward(x, residual, eps, cast_first, weight, offset, backend):
    options = dict(offset=offset, cast_first=cast_first, backend=backend)
    y, h, rstd = forward(x, weight, eps, residual=residual, **options)
    return y, x.new_empty(0) if residual is None else h, rstd  # a result is no argument


def _backward(dy, h, rstd, dh, weight, offset, backend):
    dy, dh = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (dy, dh))
    return backward(dy, h, weight, rstd, offset=offset, dh=dh, backend=backend)


for _key in ("CPU", "CUDA"):
    torch.library.impl("fastprompt::rms_norm", _key, _forward)
    torch.library.impl("fastprompt::rms_norm_backward", _key, _backward)


@torch.library.register_fake("fastprompt::rms_norm")
def _results(x, residual, eps, cast_first, weight, offset, backend):
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), h, x.new_empty(*x.shape[:-1], 1, dtype=wide)


@torch.library.register_fake("fastprompt::rms_norm_backward")
def _gradient(dy, h, rstd, dh, weight, offset, backend):
    return h.new_empty(h.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, eps, cast_first, *options):
        y, h, rstd = torch.ops.fastprompt.rms_norm(x, residual, eps, cast_first, *options)
        ctx.save_for_backward(x if residual is None else h, rstd, options[0])
        ctx.options = options[1:]
        ctx.set_materialize_grads(False)  # no zeros to be read for a result that nobody used
        return y if residual is None else (y, h)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh=None):
        h, rstd, weight = ctx.saved_tensors
        dy = torch.zeros_like(h) if dy is None else dy
        dx = torch.ops.fastprompt.rms_norm_backward(dy, h, rstd, dh, weight, *ctx.options)
        grads = (dx if wanted else None for wanted in ctx.needs_input_grad[:2])
        return *grads, None, None, None, None, None


# ---- public ----


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    cast_first: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``h / sqrt(mean(h²) + eps) · (offset + weight)`` along the last axis, h = x + residual.

    Args:
        x: [..., D] float32, float16, bfloat16 or float64, any strides with a contiguous last axis
            (on CUDA leading axes that merge into three at most).
        weight: [D] any float dtype, frozen.
        eps: added to the mean of squares.
        residual: as x; is added to it, in x's dtype, in the same pass.
        offset: added to the weight: 0 as in Llama, 1 as in Gemma.
        cast_first: round to x's dtype before multiplying by the weight, as Llama does, rather than
            after, as Gemma does; by default where offset is 0.
        backend: "triton" (CUDA; on the CPU its interpreter), "native" (csrc: float32 and bfloat16
            on the CPU), "plain" (torch's operations with a hand-written backward) or "reference".
            "auto" is Triton on CUDA, else native; what either does not take (on CUDA rows of more
            than 16384 channels) is plain, and float64 is the reference unless "plain".

    Returns:
        [..., D] in x's dtype, contiguous; with a residual (that, x + residual). Gradients go to x
        and residual.

    Raises:
        ValueError: a shape, stride, dtype, device or eps that the op does not serve, or a
            weight that trains.
    """
    check_floats(x=x)
    check_backend(backend, x.device, AND_NATIVE)
    if x.ndim == 0:
        raise ValueError("x: want [..., D], got a single number")
    check_number("eps", eps, least=0)
    check_frozen("weight", weight, x.shape[-1:], x.device)
    if residual is not None:
        check_floats(x=x, residual=residual)
        check_shape("residual", residual, x.shape)
    if by_reference(x, backend):
        options = dict(offset=offset, cast_first=cast_first)
        return reference.rms_norm(x, weight, eps, residual=residual, **options)
    first = offset == 0 if cast_first is None else cast_first
    inputs = (x, residual, eps, first, weight, float(offset), backend)
    return _RMSNorm.apply(*distinct(*inputs))
