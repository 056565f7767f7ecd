"""`rope` in Triton: one program a token turns all of its heads, queries' then keys'.

The cosines are so read once and not once a head, and a token's heads usually adjoin in memory.
Every pair of channels is read before it is written, so results may lie where inputs lay.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PAIRS = 2048  # of channels that a program holds at once


@triton.jit
def _turn_heads(
    x_ptr, y_ptr, c1, c2, s1, s2, heads, stride_xh, stride_yh,
    D: tl.constexpr, R: tl.constexpr, MOVES: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """The heads of one token, BLOCK_H at a time; MOVES: those channels that do not turn, too."""
    i = tl.arange(0, BLOCK_R)[None, :]
    for first in range(0, heads, BLOCK_H):
        h = (first + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
        live = (h < heads) & (i < R // 2)
        x_at, y_at = x_ptr + h * stride_xh + i, y_ptr + h * stride_yh + i
        low = tl.load(x_at, mask=live, other=0.0).to(tl.float32)
        high = tl.load(x_at + R // 2, mask=live, other=0.0).to(tl.float32)
        tl.store(y_at, (low * c1 - high * s1).to(y_ptr.dtype.element_ty), mask=live)
        tl.store(y_at + R // 2, (high * c2 + low * s2).to(y_ptr.dtype.element_ty), mask=live)
        if MOVES:
            j = R + tl.arange(0, BLOCK_REST)[None, :]
            live = (h < heads) & (j < D)
            rest = tl.load(x_ptr + h * stride_xh + j, mask=live, other=0.0)
            tl.store(y_ptr + h * stride_yh + j, rest, mask=live)


@triton.jit(do_not_specialize=["N", "heads_q", "heads_k"])
def turn_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr,
    q_out_ptr, k_out_ptr,
    N, heads_q, heads_k,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_cb, stride_cn, stride_sb, stride_sn,
    stride_ob, stride_oh, stride_on, stride_pb, stride_ph, stride_pn,
    D: tl.constexpr, R: tl.constexpr, BACK: tl.constexpr,
    MOVES_Q: tl.constexpr, MOVES_K: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    b, n = (tl.program_id(0) // N).to(tl.int64), (tl.program_id(0) % N).to(tl.int64)
    i = tl.arange(0, BLOCK_R)[None, :]
    live = i < R // 2
    cos_at = cos_ptr + b * stride_cb + n * stride_cn + i
    sin_at = sin_ptr + b * stride_sb + n * stride_sn + i
    c1 = tl.load(cos_at, mask=live, other=0.0).to(tl.float32)
    c2 = tl.load(cos_at + R // 2, mask=live, other=0.0).to(tl.float32)
    s1 = tl.load(sin_at, mask=live, other=0.0).to(tl.float32)
    s2 = tl.load(sin_at + R // 2, mask=live, other=0.0).to(tl.float32)
    if BACK:
        s1, s2 = -s2, -s1
    _turn_heads(
        q_ptr + b * stride_qb + n * stride_qn, q_out_ptr + b * stride_ob + n * stride_on,
        c1, c2, s1, s2, heads_q, stride_qh, stride_oh,
        D, R, MOVES_Q, BLOCK_H, BLOCK_R, BLOCK_REST,
    )  # fmt: skip
    _turn_heads(
        k_ptr + b * stride_kb + n * stride_kn, k_out_ptr + b * stride_pb + n * stride_pn,
        c1, c2, s1, s2, heads_k, stride_kh, stride_ph,
        D, R, MOVES_K, BLOCK_H, BLOCK_R, BLOCK_REST,
    )  # fmt: skip


def turn(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    back: bool,
    q_out: Tensor,
    k_out: Tensor,
) -> None:
    """Writes q [B, Hq, N, d] and k [B, Hkv, N, d] turned, or turned back."""
    (B, Hq, N, d), Hkv, r = q.shape, k.shape[1], cos.shape[-1]
    across = triton.next_power_of_2(max(1, r // 2))
    heads = min(triton.next_power_of_2(max(Hq, Hkv)), max(1, _PAIRS // across))
    of_angles = [(t.stride(0) if len(t) > 1 else 0, t.stride(1)) for t in (cos, sin)]
    with torch.cuda.device_of(q):
        turn_kernel[(B * N,)](
            q, k, cos, sin,
            q_out, k_out,
            N, Hq, Hkv,
            *q.stride()[:3], *k.stride()[:3],
            *of_angles[0], *of_angles[1],
            *q_out.stride()[:3], *k_out.stride()[:3],
            D=d, R=r, BACK=back,
            MOVES_Q=r < d and q_out is not q, MOVES_K=r < d and k_out is not k,
            BLOCK_H=heads, BLOCK_R=across, BLOCK_REST=triton.next_power_of_2(max(1, d - r)),
            num_warps=max(1, min(8, heads * across // 256)),
        )  # fmt: skip
