"""Rotary position embedding of queries and keys, in transformers' convention.

Channel i of the first r turns with channel i + r/2 (the halves, not neighbours); those from r on
stay as they are (partial rotation). With c, s the cosines and sines of a token:

    y_i       = x_i c_i - x_{i+r/2} s_i
    y_{i+r/2} = x_{i+r/2} c_{i+r/2} + x_i s_{i+r/2}

Backward turns the other way round (the transposed map, so the two halves of c and s need not be
equal), and needs c and s alone. Computed in float32 and rounded once. RoFormer: arXiv 2104.09864.
"""

import torch
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
from fastprompt.ops.layout import distinct, in_our_layout, pieces, rows_like

# ---- without autograd: what a hand-written backward calls ----


def forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As `rope`, whose checks it leaves out; ``out`` (any strides) may be (q, k) themselves."""
    return _turn(q, k, cos, sin, False, out, backend)


def backward(
    dq: Tensor,
    dk: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Gradients to q and k from those of the results; ``out`` may be (dq, dk) themselves."""
    return _turn(dq, dk, cos, sin, True, out, backend)


def _turn(q, k, cos, sin, back, out, backend):
    out = (rows_like(q), rows_like(k)) if out is None else out
    for name, y, x in zip(("out[0]", "out[1]"), out, (q, k), strict=True):
        check_shape(name, y, x.shape)
    if by_triton(q if q.numel() else k, backend):
        from fastprompt.ops import rope_triton as triton

        triton.turn(q, k, cos, sin, back, *out)
        return out
    if by_native(backend, q, k, *out, alike=True):
        native_elementwise.turn(q, k, cos, sin, back, *out)
        return out
    wide = torch.promote_types(q.dtype, torch.float32)
    angles, half = [t[:, :, None].to(wide) for t in (cos, sin)], cos.shape[-1] // 2
    for x, y in zip((q, k), out, strict=True):
        x, y = x.transpose(1, 2), y.transpose(1, 2)  # [B, N, heads, d], as they mostly lie
        of_heads = (t.expand(*x.shape[:3], -1) for t in angles)
        for x_, y_, cos_, sin_ in pieces(x, y, *of_heads):
            (c1, c2), (s1, s2) = cos_.split(half, dim=-1), sin_.split(half, dim=-1)
            if back:
                s1, s2 = -s2, -s1
            low, high, rest = x_.tensor_split((half, 2 * half), dim=-1)
            # both are made before either is written, since y may be x; not by addcmul_, which the
            # compiler takes apart, with another rounding
            first, second = low * c1, high * c2
            torch.addcmul(first, high, s1, value=-1, out=first)
            torch.addcmul(second, low, s2, out=second)
            y_[..., :half], y_[..., half : 2 * half], y_[..., 2 * half :] = first, second, rest
    return out


# ---- op: schema, fake, autograd ----

torch.library.define(
    "fastprompt::rope",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool back, str backend) -> (Tensor, Tensor)",
)


def _run(q, k, cos, sin, back, backend):
    q, k = (t if not t.numel() or t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    return _turn(q, k, cos, sin, back, None, backend)


for _key in ("CPU", "CUDA"):
    torch.library.impl("fastprompt::rope", _key, _run)


@torch.library.register_fake("fastprompt::rope")
def _results(q, k, cos, sin, back, backend):
    return rows_like(q), rows_like(k)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, backend):
        ctx.save_for_backward(cos, sin)
        ctx.backend = backend
        return torch.ops.fastprompt.rope(q, k, cos, sin, False, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):
        grads = torch.ops.fastprompt.rope(dq, dk, *ctx.saved_tensors, True, ctx.backend)
        needed = (g if w else None for g, w in zip(grads, ctx.needs_input_grad, strict=False))
        return *needed, None, None, None


# ---- public ----


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``x · cos + rotate_half(x) · sin`` for the first r channels of queries and keys.

    Args:
        q: [B, Hq, N, d] float32, float16, bfloat16 or float64. Any strides with a contiguous last
            axis, here and below.
        k: [B, Hkv, N, d], of q's dtype. Hq or Hkv may be 0.
        cos, sin: [B or 1, N, r] any float dtype, r even and at most d, frozen: what transformers'
            rotary modules give. Two-dimensional and multi-axis rotations too, once their axes are
            side by side; pairs of neighbouring channels (GPT-J, Cohere) are another convention.
        backend: "triton" (CUDA; on the CPU its interpreter), "native" (csrc: float32 and bfloat16
            on the CPU), "plain" (torch's operations with a hand-written backward) or "reference".
            "auto" is Triton on CUDA, else native; what either does not take is plain, and float64
            is the reference unless "plain".

    Returns:
        q and k turned, in their dtype, each laid out as [B, N, heads, d]. Gradients go to both.

    Raises:
        ValueError: a shape, stride, dtype or device that the op does not serve, or cosines that
            want a gradient.
    """
    _check(q, k, cos, sin)
    check_backend(backend, q.device, AND_NATIVE)
    if by_reference(q, backend):
        q, k = reference.rope(q, k, cos, sin)
        return in_our_layout(q), in_our_layout(k)
    return _Rope.apply(*distinct(q, k, cos, sin, backend))


def _check(q, k, cos, sin):
    check_floats(q=q, k=k)
    check_floats(cos=cos, sin=sin)
    if q.ndim != 4:
        raise ValueError(f"q: want [B, Hq, N, d], got {list(q.shape)}")
    B, _, N, d = q.shape
    if k.ndim != 4 or k.shape != (B, k.shape[1], N, d):
        raise ValueError(f"k: want [{B}, Hkv, {N}, {d}], got {list(k.shape)}")
    r = cos.shape[-1] if cos.ndim == 3 else 0
    if cos.ndim != 3 or cos.shape[0] not in (1, B) or cos.shape[1] != N or r % 2 or not 0 < r <= d:
        want = f"[{B} or 1, {N}, r], r even and at most {d}"
        raise ValueError(f"cos: want {want}; got {list(cos.shape)}")
    check_shape("sin", sin, cos.shape)
    if cos.device != q.device:
        raise ValueError(f"cos: want it on {q.device}, got {cos.device}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin must be frozen: this op returns no gradient for them")
