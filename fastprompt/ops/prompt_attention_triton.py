"""`prompt_attention` in Triton: tiles, launches and allocations.

Device code: `prompt_attention_kernels` (forward), `prompt_attention_gradients` (backward).

Forward is one kernel. Backward is dq (which also leaves delta = sum_d dout · out), dk/dv, and the
prompts' gradients, whose sum over the batch takes two stages: every program writes its share, one
small kernel adds the shares in a fixed order. No atomics, so two runs agree bit for bit. Where
the tokens need no gradient, only the prompts' two kernels run.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt.ops.prompt_attention_gradients import (
    dkv_kernel,
    dq_kernel,
    prompts_kernel,
    sum_kernel,
)
from fastprompt.ops.prompt_attention_kernels import fwd_kernel

# ---- tiles ----


class Tile(NamedTuple):
    """What one program of a kernel works on, and with what."""

    queries: int
    keys: int
    warps: int
    stages: int


# kernel: [(head dim up to, queries up to, tile), ...], of which the first that fits is taken.
# Measured (H100, bf16): d 64 and 128 from N 197 on, but for "prompts". The rest is what compiles
# without spills in a loop, and fits the smallest card of its kind (tests/compile_targets.py).
_ANY = 1 << 31
_HOPPER = {  # sm_90 and sm_100: 227 KB of shared memory, wgmma from 64 queries on
    "fwd": [
        (128, 16, Tile(16, 64, 4, 3)),  # decoding: the fewest rows that a product takes
        (64, 256, Tile(128, 32, 4, 3)),
        (64, _ANY, Tile(128, 64, 8, 3)),
        (128, 1536, Tile(64, 32, 4, 3)),
        (128, _ANY, Tile(64, 64, 4, 2)),
        (256, _ANY, Tile(128, 32, 8, 2)),
    ],
    "dq": [
        (64, 256, Tile(128, 64, 8, 3)),
        (64, _ANY, Tile(64, 64, 4, 3)),
        (128, _ANY, Tile(64, 64, 4, 2)),
        (256, _ANY, Tile(32, 32, 4, 2)),
    ],
    "dkv": [
        (64, _ANY, Tile(32, 128, 4, 3)),
        (128, _ANY, Tile(64, 64, 4, 2)),
        (256, _ANY, Tile(32, 32, 8, 2)),
    ],
    "prompts": [
        (64, _ANY, Tile(64, 64, 4, 3)),
        (128, _ANY, Tile(64, 32, 4, 2)),
        (256, _ANY, Tile(32, 32, 8, 2)),
    ],
}
# every other card: the least is sm_86's and sm_89's 99 KB; backward's tiles fit that too
_AMPERE = _HOPPER | {
    "fwd": [
        (128, 16, Tile(16, 64, 4, 3)),
        (64, 256, Tile(128, 32, 4, 3)),
        (64, _ANY, Tile(64, 64, 4, 3)),
        (128, 1536, Tile(64, 32, 4, 3)),
        (128, _ANY, Tile(64, 64, 4, 2)),
        (256, _ANY, Tile(64, 32, 8, 2)),
    ],
}
_FLOAT32 = {  # no tensor cores, so operands and sums alike lie in registers; fits every card
    "fwd": [
        (128, 16, Tile(16, 16, 4, 1)),
        (64, _ANY, Tile(64, 32, 8, 1)),
        (128, _ANY, Tile(32, 32, 8, 1)),
        (256, _ANY, Tile(16, 16, 4, 1)),
    ],
    "dq": [
        (64, _ANY, Tile(32, 16, 4, 1)),
        (256, _ANY, Tile(16, 16, 8, 1)),
    ],
    "dkv": [
        (128, _ANY, Tile(16, 32, 4, 1)),
        (256, _ANY, Tile(16, 16, 4, 1)),
    ],
    "prompts": [
        (128, _ANY, Tile(16, 32, 4, 1)),
        (256, _ANY, Tile(16, 16, 4, 1)),
    ],
}
# the interpreter pays per operation, not per element; several blocks of each kind still occur
_INTERPRETER = {name: [(256, _ANY, Tile(64, 32, 4, 1))] for name in ("fwd", "dq", "dkv", "prompts")}


@functools.cache
def capability(device: torch.device) -> int:
    """90 for sm_90; 0 where Triton's interpreter runs."""
    if device.type == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tile(kernel: str, q: Tensor) -> Tile:
    sm, (N, d) = capability(q.device), q.shape[2:]
    if sm == 0:
        table = _INTERPRETER
    elif q.dtype == torch.float32:
        table = _FLOAT32
    else:
        table = _HOPPER if sm // 10 in (9, 10) else _AMPERE
    return next(tile for dims, rows, tile in table[kernel] if d <= dims and rows >= N)


# ---- arguments ----


def _strides(*tensors: Tensor) -> tuple[list[tuple[int, ...]], dict[str, object]]:
    """Strides of (sample, head, row) in units of UNIT elements, and what kernels assume of them."""
    # along an axis of one element a stride means nothing, and may be anything
    strides = [
        tuple(s if n > 1 else 0 for n, s in zip(t.shape[:-1], t.stride(), strict=False))
        for t in tensors
    ]
    unit = 8 if all(s % 8 == 0 for own in strides for s in own) else 1
    # a block is at most 128 rows and 256 channels: below this its offsets are below 2**31
    narrow = all(own[-1] < 2**24 - 2 for own in strides)
    # prompts have no sample axis
    strides = [(0,) * (3 - len(own)) + tuple(s // unit for s in own) for own in strides]
    return strides, dict(UNIT=unit, STEP=tl.int32 if narrow else tl.int64)


def _mask_strides(mask: Tensor | None, *shape: int) -> tuple[int, ...]:
    """Strides by axis, 0 where one element stands for all."""
    return (0,) * len(shape) if mask is None else mask.expand(shape).stride()


def _blocks(
    tile: Tile, layout: dict[str, object], d: int, P: int, mask: Tensor | None
) -> dict[str, object]:
    """Constants and launch options. Few prompts take a narrower block than tokens do."""
    narrow = max(16, min(tile.keys, triton.next_power_of_2(P)))
    blocks = dict(BLOCK_Q=tile.queries, BLOCK_K=tile.keys, BLOCK_P=narrow)
    blocks |= dict(HEAD_DIM=d, BLOCK_D=max(16, triton.next_power_of_2(d)))
    warps, stages = tile.warps, tile.stages
    if layout["UNIT"] == 1 or mask is not None:
        # loads of single elements, and a mask's, take many registers: over more threads
        warps = 8
    if mask is not None:
        # a mask's blocks go through shared memory as well, and may take more of it than keys do
        stages = min(stages, 2 if mask.element_size() <= 4 else 1)
    return blocks | layout | dict(num_warps=warps, num_stages=stages)


# ---- launches ----


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    causal: bool,
    scale: float,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    prompt_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """([B, Hq, N, d] laid out as [B, N, Hq, d], lse [B, Hq, N] float32, natural logarithm)."""
    B, H, N, d = q.shape
    (H_kv, M), P = k.shape[1:3], prompt_k.shape[1]
    out = q.new_empty(B, N, H, d).transpose(1, 2)
    lse = q.new_empty(B, H, N, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    tile = _tile("fwd", q)
    strides, layout = _strides(q, k, v, prompt_k, prompt_v)
    with torch.cuda.device_of(q):
        fwd_kernel[(B * H * triton.cdiv(N, tile.queries),)](
            q, k, v, prompt_k, prompt_v, key_mask, attn_mask, prompt_bias,
            out, lse,
            H, N, M, P, scale,
            *strides,
            _mask_strides(key_mask, B, M),
            _mask_strides(attn_mask, B, H, N, M), _mask_strides(prompt_bias, B, H, N, P),
            CAUSAL=causal, GROUPS=H // H_kv, **_blocks(tile, layout, d, P, attn_mask),
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    causal: bool,
    scale: float,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    prompt_bias: Tensor | None,
    tokens: bool,
    prompts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dprompt_k, dprompt_v); empty tensors for what is not asked."""
    # q, k, v and prompts come with a contiguous last axis; a gradient may be an expanded scalar
    dout, out = (t if t.stride(-1) == 1 else t.contiguous() for t in (dout, out))
    inputs = (dout, out, lse, q, k, v, prompt_k, prompt_v)
    with torch.cuda.device_of(q):
        dq, dk, dv, delta = (t.new_empty(0) for t in (q, k, v, lse))
        if tokens:
            masks = (key_mask, attn_mask, prompt_bias)
            dq, delta = _backward_queries(*inputs, causal, scale, *masks)
            dk, dv = _backward_keys(*inputs[:6], delta, causal, scale, key_mask, attn_mask)
        dpk, dpv = (t.new_empty(0) for t in (prompt_k, prompt_v))
        if prompts:
            dpk, dpv = _backward_prompts(*inputs, delta if tokens else None, scale, prompt_bias)
    return dq, dk, dv, dpk, dpv


def _backward_queries(
    dout, out, lse, q, k, v, prompt_k, prompt_v, causal, scale, key_mask, attn_mask, prompt_bias
):
    B, H, N, d = q.shape
    (H_kv, M), P = k.shape[1:3], prompt_k.shape[1]
    dq, delta = _rows_like(q), torch.empty_like(lse)
    if dq.numel() > 0:
        tile = _tile("dq", q)
        strides, layout = _strides(dout, out, q, k, v, prompt_k, prompt_v)
        dq_kernel[(B * H * triton.cdiv(N, tile.queries),)](
            dout, out, lse, q, k, v, prompt_k, prompt_v, key_mask, attn_mask, prompt_bias,
            dq, delta,
            H, N, M, P, scale,
            *strides,
            _mask_strides(key_mask, B, M),
            _mask_strides(attn_mask, B, H, N, M), _mask_strides(prompt_bias, B, H, N, P),
            CAUSAL=causal, GROUPS=H // H_kv, **_blocks(tile, layout, d, P, attn_mask),
        )  # fmt: skip
    return dq, delta


def _backward_keys(dout, out, lse, q, k, v, delta, causal, scale, key_mask, attn_mask):
    (B, H, N, d), (H_kv, M) = q.shape, k.shape[1:3]
    dk, dv = _rows_like(k), _rows_like(v)
    if dk.numel() > 0:
        tile = _tile("dkv", q)
        strides, layout = _strides(dout, q, k, v)
        blocks = _blocks(tile, layout, d, 0, attn_mask)
        del blocks["BLOCK_P"]
        dkv_kernel[(B * H_kv * triton.cdiv(M, tile.keys),)](
            dout, lse, delta, q, k, v, key_mask, attn_mask,
            dk, dv,
            H, N, M, scale,
            *strides,
            _mask_strides(key_mask, B, M), _mask_strides(attn_mask, B, H, N, M),
            CAUSAL=causal, GROUPS=H // H_kv, **blocks,
        )  # fmt: skip
    return dk, dv


def _backward_prompts(dout, out, lse, q, k, v, prompt_k, prompt_v, delta, scale, prompt_bias):
    (B, H, N, d), (H_kv, P, _) = q.shape, prompt_k.shape
    dpk, dpv = (t.new_empty(t.shape) for t in (prompt_k, prompt_v))
    if dpk.numel() == 0:
        return dpk, dpv
    if q.numel() == 0:
        return dpk.zero_(), dpv.zero_()
    tile = _tile("prompts", q)
    strides, layout = _strides(dout, out, q, prompt_k, prompt_v)
    blocks = _blocks(tile, layout, d, P, prompt_bias)
    del blocks["BLOCK_K"]
    # about two programs a processor, each with as many query blocks as that leaves it
    items, p_blocks = B * (H // H_kv) * triton.cdiv(N, tile.queries), triton.cdiv(P, tile.keys)
    per_split = triton.cdiv(items * H_kv * p_blocks, 2 * _processors(q.device))
    splits = triton.cdiv(items, per_split)
    partial = q.new_empty(2, splits, H_kv, P, d, dtype=torch.float32)
    prompts_kernel[(H_kv * splits * triton.cdiv(P, blocks["BLOCK_P"]),)](
        dout, out, lse, delta, q, prompt_k, prompt_v, prompt_bias,
        partial,
        H, N, P, scale, items, per_split, splits,
        *strides, _mask_strides(prompt_bias, B, H, N, P),
        GROUPS=H // H_kv, **blocks,
    )  # fmt: skip
    block = 256
    sum_kernel[(2 * triton.cdiv(dpk.numel(), block),)](
        partial, dpk, dpv, dpk.numel(), splits, BLOCK=block
    )
    return dpk, dpv


def _rows_like(x: Tensor) -> Tensor:
    """[B, heads, rows, d] laid out as [B, rows, heads, d], as `forward`'s output is."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
