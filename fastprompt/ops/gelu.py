"""GELU, exact and in its two approximations.

    none    y = x Φ(x)                 Φ the normal distribution, by erf
    tanh    y = x s(2t)                s the logistic sigmoid, t = sqrt(2/π) (x + 0.044715 x³)
    quick   y = x s(1.702 x)           CLIP's
    dx = dy (S + x S')                 S what x is multiplied by

Computed in float32 and rounded once; x alone is kept. GELU: arXiv 1606.08415.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt import native_elementwise
from fastprompt.ops import reference
from fastprompt.ops.checks import (
    AND_NATIVE,
    by_native,
    by_reference,
    by_triton,
    check_backend,
    check_floats,
    check_shape,
)
from fastprompt.ops.layout import placed

# as torch names them -> as kernels and blocks do, and back: no other spelling anywhere
KINDS = {"none": "gelu", "tanh": "gelu_tanh", "quick": "gelu_quick"}
APPROXIMATE = {kind: approximate for approximate, kind in KINDS.items()}

# ---- without autograd: what a hand-written backward calls ----


def forward(
    x: Tensor, approximate: str = "none", *, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """As `gelu`, whose checks it leaves out; ``out`` (any strides) may be x itself."""
    if out is not None:
        check_shape("out", out, x.shape)
    if by_triton(x, backend):
        from fastprompt.ops import activations_triton as triton

        y = x.new_empty(x.shape) if out is None else out
        triton.forward(x, None, KINDS[approximate], y)
        return y
    # torch's own erf is quicker, at less accuracy far below 0
    wanted = approximate != "none" or backend == "native"
    if wanted and by_native(backend, x, out, alike=True):
        y = x.new_empty(x.shape) if out is None else out
        native_elementwise.activate(x, None, KINDS[approximate], y)
        return y
    if approximate == "quick":
        return placed((1.702 * x).sigmoid_().mul_(x), out, x.dtype)
    if out is None or out.dtype != x.dtype or torch.compiler.is_compiling():
        return placed(F.gelu(x, approximate=approximate), out, x.dtype)
    return torch.ops.aten.gelu.out(x, approximate=approximate, out=out)


def backward(
    dy: Tensor,
    x: Tensor,
    approximate: str = "none",
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """dx; ``out`` (any strides) may be dy or x itself."""
    if out is not None:
        check_shape("out", out, x.shape)
    if by_triton(x, backend):
        from fastprompt.ops import activations_triton as triton

        dx = x.new_empty(x.shape) if out is None else out
        triton.backward(dy, x, None, KINDS[approximate], dx, None)
        return dx
    if by_native(backend, x, dy, out, alike=True):
        dx = x.new_empty(x.shape) if out is None else out
        native_elementwise.activate_backward(dy, x, None, KINDS[approximate], dx, None)
        return dx
    if approximate == "quick":
        # silu of 1.702 x, divided by 1.702: the slope is silu's
        return placed(torch.ops.aten.silu_backward(dy, 1.702 * x), out, x.dtype)
    return placed(torch.ops.aten.gelu_backward(dy, x, approximate=approximate), out, x.dtype)


# ---- op: schema, fake, autograd ----

torch.library.define("fastprompt::gelu", "(Tensor x, str approximate, str backend) -> Tensor")
torch.library.define(
    "fastprompt::gelu_backward", "(Tensor dy, Tensor x, str approximate, str backend) -> Tensor"
)


def _forward(x, approximate, backend):
    return forward(x, approximate, backend=backend)


def _backward(dy, x, approximate, backend):
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    return backward(dy, x, approximate, backend=backend)


for _key in ("CPU", "CUDA"):
    torch.library.impl("fastprompt::gelu", _key, _forward)
    torch.library.impl("fastprompt::gelu_backward", _key, _backward)


@torch.library.register_fake("fastprompt::gelu")
def _result(x, approximate, backend):
    return x.new_empty(x.shape)


@torch.library.register_fake("fastprompt::gelu_backward")
def _gradient(dy, x, approximate, backend):
    return x.new_empty(x.shape)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, approximate, backend):
        ctx.save_for_backward(x)
        ctx.options = approximate, backend
        return torch.ops.fastprompt.gelu(x, approximate, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return torch.ops.fastprompt.gelu_backward(dy, *ctx.saved_tensors, *ctx.options), None, None


# ---- public ----


def gelu(x: Tensor, approximate: str = "none", *, backend: str = "auto") -> Tensor:
    """``x · Φ(x)``, elementwise, or one of its approximations.

    Args:
        x: [..., F] float32, float16, bfloat16 or float64, any strides with a contiguous last axis
            (on CUDA leading axes that merge into three at most).
        approximate: "none" (by erf: ViT, DINOv2), "tanh" (SigLIP) or "quick"
            (``x · sigmoid(1.702 x)``: CLIP).
        backend: "triton" (CUDA; on the CPU its interpreter), "native" (csrc: float32 and bfloat16
            on the CPU), "plain" (torch's operations with a hand-written backward) or "reference".
            "auto" is Triton on CUDA, else native but for "none" forward, where torch's own is
            quicker; what either does not take is plain, float64 the reference unless "plain".

    Returns:
        [..., F] in x's dtype, contiguous.

    Raises:
        ValueError: a stride, dtype, device or approximation that the op does not serve.
    """
    check_floats(x=x)
    check_backend(backend, x.device, AND_NATIVE)
    if approximate not in KINDS:
        raise ValueError(f"approximate: want one of {', '.join(KINDS)}; got {approximate!r}")
    if x.ndim == 0:
        raise ValueError("x: want [..., F], got a single number")
    return (
        reference.gelu(x, approximate)
        if by_reference(x, backend)
        else _GELU.apply(x, approximate, backend)
    )
