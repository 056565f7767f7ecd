"""Product with a frozen 4-bit weight, as bitsandbytes stores it (NF4 or FP4, plain or nested).

    y  = x Wᵀ + b        W[i] = code[nibble i] * scale of its block, rounded once to x's dtype
    dx = dy W            W decoded again from the same storage; b and W are frozen

W is decoded into scratch memory that all weights share, so that neither a second copy of the
weights nor anything for backward is ever kept. On the CPU csrc/ decodes (or torch, without it), on
CUDA Triton; the product is torch's own. Where FUSED says so, csrc/ multiplies on the CPU straight
from the 4 bits: in float32 with weights that are not rounded, or by tiles of bfloat16 (AMX,
AVX-512). On a GPU it does so for few tokens (`nf4_linear_cuda`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt import native
from fastprompt.ops import nf4_linear_cuda as cuda
from fastprompt.ops.dequantize_4bit import forward as decode_into
from fastprompt.ops.packed import FLOATS, Packed, in_triton, unpack
from fastprompt.ops.scratch import scratch

# ---- decoding ----


def decode(w: Packed, out: Tensor) -> Tensor:
    """``w`` into contiguous ``out`` [rows, columns], by the quickest way that serves its blocks."""
    return decode_into(w, out, backend="auto" if in_triton(w) else "plain")


@contextmanager
def decoded(*weights: Packed, dtype: torch.dtype) -> Iterator[Tensor]:
    """Weights of as many columns, under one another: [sum of rows, columns], in scratch memory.

    Valid inside ``with`` alone, where no other weight may be decoded by the same thread.
    """
    rows = [w.rows for w in weights]
    first = weights[0]
    with scratch(sum(rows) * first.columns, dtype, first.packed.device) as flat:
        dense = flat.view(sum(rows), first.columns)
        for w, out in zip(weights, dense.split(rows), strict=True):
            decode(w, out)
        yield dense


# ---- products in csrc/ ----

_EVERY, _HALVES = (torch.float32, torch.bfloat16, torch.float16), (torch.bfloat16, torch.float16)
# Numbers of tokens, forward and backward, that csrc/ multiplies sooner than it decodes for torch's
# product; the first row that fits is taken. Measured with a nested 4096 x 4096 weight on one thread
# of a Xeon with AMX, where torch's bfloat16 product is at its best; "avx512_bf16" on two of an AMD
# EPYC (benchmarks/README.md).
FUSED = (
    ("amx", (torch.bfloat16,), range(5, 257), range(9, 257)),
    ("avx512_bf16", (torch.bfloat16,), range(5, 113), range(16, 81)),
    ("avx512", (torch.float32,), range(1, 41), range(1, 41)),
    ("avx512", _HALVES, range(1, 17), range(1, 17)),
    ("avx2", (torch.float32,), range(1, 25), range(1, 25)),
    ("avx2", _HALVES, range(1, 17), range(1, 17)),
    ("neon", _EVERY, range(1, 5), range(1, 5)),  # not measured
    ("portable", _EVERY, range(1, 2), range(1, 2)),  # not measured
)


def _multiplier(x: Tensor, w: Packed, backward: bool) -> str | None:
    """What of csrc/ multiplies `x`, or backward dy, with the weight; None where torch does."""
    served = x.is_cpu and native.multiplies_4bit(w.rows, w.columns, w.blocksize)
    if not served or not native.available():
        return None
    tokens = x.numel() // x.shape[-1]
    for name, dtypes, *counts in FUSED:
        if name in native.multipliers() and x.dtype in dtypes and tokens in counts[backward]:
            return name
    return None


def _multiply(
    x: Tensor, w: Packed, name: str, bias: Tensor | None = None, backward: bool = False
) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1])
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    out = native.product_4bit(
        tokens, w.rows, w.columns, w.packed, w.code, w.absmax, w.blocksize, w.nested,
        bias=None if bias is None else bias.contiguous(), backward=backward, multiplier=name,
    )  # fmt: skip
    return out.view(*x.shape[:-1], out.shape[1])


# ---- ops: schema, fake, implementation ----

_WEIGHT = (
    "Tensor packed, Tensor code, Tensor absmax, Tensor? code2, Tensor? absmax2, Tensor? offset, "
    "int blocksize, int blocksize2, int rows, int columns, str kind"
)
_KERNELS = "CompositeExplicitAutograd"  # one function for every device

torch.library.define("fastprompt::nf4_linear", f"(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor")
torch.library.define("fastprompt::nf4_linear_backward", f"(Tensor dy, {_WEIGHT}) -> Tensor")


@torch.library.register_fake("fastprompt::nf4_linear")
def _fake_forward(x, bias, *weight):
    return x.new_empty(*x.shape[:-1], Packed(*weight).rows)


@torch.library.register_fake("fastprompt::nf4_linear_backward")
def _fake_backward(dy, *weight):
    return dy.new_empty(*dy.shape[:-1], Packed(*weight).columns)


def _forward(x, bias, *weight):
    w = Packed(*weight)
    if cuda.serves_forward(x.shape[:-1].numel(), x.dtype, w):
        return cuda.forward(x, w, bias)
    if name := _multiplier(x, w, backward=False):
        return _multiply(x, w, name, bias)
    with decoded(w, dtype=x.dtype) as dense:
        return F.linear(x, dense, bias)


def _backward(dy, *weight):
    w = Packed(*weight)
    if cuda.serves_backward(dy.shape[:-1].numel(), dy.dtype, w):
        return cuda.backward(dy, w)
    if name := _multiplier(dy, w, backward=True):
        return _multiply(dy, w, name, backward=True)
    with decoded(w, dtype=dy.dtype) as dense:
        return torch.matmul(dy, dense)


torch.library.impl("fastprompt::nf4_linear", _KERNELS, _forward)
torch.library.impl("fastprompt::nf4_linear_backward", _KERNELS, _backward)


# ---- autograd ----


def _save(ctx, inputs, output):
    _, _, *weight = inputs
    ctx.save_for_backward(*weight[:6])
    ctx.sizes = weight[6:]


def _traced_backward(ctx, dy):
    weight = (*ctx.saved_tensors, *ctx.sizes)
    dx = torch.ops.fastprompt.nf4_linear_backward(dy, *weight)
    return dx, None, *[None] * len(weight)


torch.library.register_autograd("fastprompt::nf4_linear", _traced_backward, setup_context=_save)


class _NF4Linear(torch.autograd.Function):
    """The same for eager tensors: cheaper than the dispatcher, and the weight is held by plain
    reference, so that hooks on saved tensors (checkpointing, offload) do not copy it. ``back``:
    dy W, whose gradient is the product itself, as bitsandbytes' can be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Packed, back: bool) -> Tensor:
        ctx.weight, ctx.back = weight, back
        return _backward(x, *weight) if back else _forward(x, bias, *weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _NF4Linear.apply(dy, None, ctx.weight, not ctx.back), None, None, None


# ---- public ----


def nf4_linear(
    x: Tensor,
    weight: Tensor | tuple[Tensor, Any],
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``x Wᵀ + bias`` with a frozen 4-bit weight; the gradient goes to x alone.

    Args:
        x: [..., in] float32, bfloat16, float16 or float64, any strides.
        weight: a bitsandbytes Params4bit [out, in], or (its packed tensor, its QuantState): NF4 or
            FP4, plain or nested absmax, any blocksize. Its state is read anew at every call.
        bias: [out], frozen.
        dtype: what to compute in; by default autocast's dtype, else that of x.

    Returns:
        [..., out] in the dtype computed in.

    Raises:
        ValueError: a size, dtype or device that does not fit, a weight or bias that trains, or a
            weight that `unpack` refuses.
    """
    w = unpack(weight)
    if x.device != w.packed.device:
        raise ValueError(f"x: want the weight's device {w.packed.device}, got {x.device}")
    if dtype is None:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if dtype not in FLOATS or not x.is_floating_point():
        raise ValueError(f"x: want one of {FLOATS}, got {x.dtype}, to be computed in {dtype}")
    if x.ndim == 0 or x.shape[-1] != w.columns:
        raise ValueError(f"x: want [..., {w.columns}], got {tuple(x.shape)}")
    if bias is not None:
        if bias.requires_grad:
            raise ValueError("bias must be frozen: this op returns no gradient for it")
        if bias.shape != (w.rows,) or bias.device != x.device:
            got = f"{tuple(bias.shape)} on {bias.device}"
            raise ValueError(f"bias: want [{w.rows}] on {x.device}, got {got}")
        bias = bias.to(dtype)
    x = x.to(dtype)
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return torch.ops.fastprompt.nf4_linear(x, bias, *w)
    if x.requires_grad and torch.is_grad_enabled():
        return _NF4Linear.apply(x, bias, w, False)
    return _forward(x, bias, *w)


def nf4_linear_backward(dy: Tensor, weight: Tensor | tuple[Tensor, Any]) -> Tensor:
    """dx [..., in] of `nf4_linear`, ``dy W`` in the dtype of dy [..., out]; no autograd of its own.

    Raises:
        ValueError: a weight that `unpack` refuses.
    """
    w = unpack(weight)
    if torch.compiler.is_compiling():
        return torch.ops.fastprompt.nf4_linear_backward(dy, *w)
    return _backward(dy, *w)
