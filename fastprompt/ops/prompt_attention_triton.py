"""`prompt_attention` in Triton: launches and allocations.

Device code: `prompt_attention_kernels` (forward), `prompt_attention_gradients` (backward); tiles:
`prompt_attention_tiles`.

Forward is one kernel; two where few queries meet many keys (decoding): the keys are then shared
out, and the shares merged. Backward is dq (which also leaves delta = sum_d dout · out), dk/dv, and
the prompts' gradients, whose sum over the batch takes two stages: every program writes its share,
one small kernel adds the shares in a fixed order (none where one program is enough). No atomics, so
two runs agree bit for bit. Where the tokens need no gradient, only the prompts' two kernels run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt.ops.layout import rows_like
from fastprompt.ops.options import Options
from fastprompt.ops.prompt_attention_gradients import (
    dkv_kernel,
    dq_kernel,
    prompts_kernel,
    sum_kernel,
)
from fastprompt.ops.prompt_attention_kernels import fwd_kernel, merge_kernel
from fastprompt.ops.prompt_attention_tiles import Tile, best_tile, processors

_MOST_SPLITS = 64  # of the keys, in decoding

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
    # one set of prompts has no sample axis
    strides = [(0,) * (3 - len(own)) + tuple(s // unit for s in own) for own in strides]
    return strides, dict(UNIT=unit, STEP=tl.int32 if narrow else tl.int64)


def _mask_strides(mask: Tensor | None, *shape: int) -> tuple[int, ...]:
    """Strides by axis, 0 where one element stands for all."""
    return (0,) * len(shape) if mask is None else mask.expand(shape).stride()


def _blocks(
    tile: Tile, layout: dict[str, object], d: int, P: int, mask: Tensor | None, o: Options
) -> dict[str, object]:
    """Constants and launch options. Few prompts take a narrower block than tokens do."""
    narrow = max(16, min(tile.keys, triton.next_power_of_2(P)))
    blocks = dict(BLOCK_Q=tile.queries, BLOCK_K=tile.keys, BLOCK_P=narrow)
    blocks |= dict(HEAD_DIM=d, BLOCK_D=max(16, triton.next_power_of_2(d)))
    warps, stages = tile.warps, tile.stages
    if layout["UNIT"] == 1 or mask is not None or o.softcap is not None:
        # loads of single elements, a mask's, and a soft-cap take many registers: over more threads
        warps = 8
    if mask is not None:
        # a mask's blocks go through shared memory as well, and may take more of it than keys do
        stages = min(stages, 2 if mask.element_size() <= 4 else 1)
    return blocks | layout | dict(num_warps=warps, num_stages=stages)


# ---- launches ----


def forward(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, o: Options
) -> tuple[Tensor, Tensor]:
    """([B, Hq, N, d] laid out as [B, N, Hq, d], lse [B, Hq, N] float32, natural logarithm)."""
    B, H, N, _ = q.shape
    out = rows_like(q)
    lse = q.new_empty(B, H, N, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    with torch.cuda.device_of(q):
        if N == 1 and not o.packed:
            _decode(q, k, v, prompt_k, prompt_v, out, lse, o)
        else:
            inputs = (q, k, v, prompt_k, prompt_v, out, lse, o)
            best_tile("fwd", q, lambda tile: _launch_forward(*inputs, tile))
    return out, lse


def _launch_forward(q, k, v, prompt_k, prompt_v, out, lse, o, tile, splits=None):
    B, H, N, d = q.shape
    (H_kv, M), P = k.shape[1:3], prompt_k.shape[-2]
    strides, layout = _strides(q, k, v, prompt_k, prompt_v, out)
    fwd_kernel[(_row_blocks(o, B, N, tile.queries) * H * (splits or 1),)](
        q, k, v, prompt_k, prompt_v, o.key_mask, o.attn_mask, o.prompt_bias,
        o.cu_seqlens_q, o.cu_seqlens_k, o.prompt_index, o.prompt_len,
        out, lse,
        B, H, N, M, P, _sequences(o), splits, o.scale, o.window, o.softcap,
        *strides,
        _mask_strides(o.key_mask, B, M),
        _mask_strides(o.attn_mask, B, H, N, M), _mask_strides(o.prompt_bias, B, H, N, P),
        CAUSAL=o.causal, GROUPS=H // H_kv, **_blocks(tile, layout, d, P, o.attn_mask, o),
    )  # fmt: skip


def _decode(q, k, v, prompt_k, prompt_v, out, lse, o):
    """One query a head. It stands at the last key, so it sees all of them, or the last `window`."""
    (B, H, _, d), (H_kv, M) = q.shape, k.shape[1:3]
    if o.window is not None:
        k, v = (x[:, :, max(0, M - o.window) :] for x in (k, v))
        mask = None if o.key_mask is None else o.key_mask[:, max(0, M - o.window) :]
        bias = None if o.attn_mask is None else o.attn_mask[..., max(0, M - o.window) :]
        o, M = o._replace(key_mask=mask, attn_mask=bias, window=None), k.shape[2]
    o = o._replace(causal=False)
    if o.attn_mask is None and o.prompt_bias is None:
        # the query heads that share a key head become its rows: keys are read once for all
        q, out = (x[:, :, 0].unflatten(1, (H_kv, H // H_kv)) for x in (q, out))
        lse = lse.view(B, H_kv, H // H_kv)
    tile = best_tile("fwd", q)
    programs = q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], tile.queries)
    # about two programs a processor, but none with less than four blocks of keys
    splits = min(2 * processors(q.device) // programs, M // (4 * tile.keys), _MOST_SPLITS)
    if splits < 2:
        _launch_forward(q, k, v, prompt_k, prompt_v, out, lse, o, tile)
        return
    part = out.new_empty(splits * B, *out.shape[1:], dtype=torch.float32)
    part_lse = lse.new_empty(splits, lse.numel())
    _launch_forward(q, k, v, prompt_k, prompt_v, part, part_lse, o, tile, splits)
    merge_kernel[(lse.numel(),)](
        part, part_lse, out, lse, lse.numel(), splits,
        HEAD_DIM=d, BLOCK_D=max(16, triton.next_power_of_2(d)), BLOCK_S=_MOST_SPLITS, num_warps=4,
    )  # fmt: skip


def backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    o: Options,
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
            dq, delta = _backward_queries(*inputs, o)
            dk, dv = _backward_keys(*inputs[:6], delta, o)
        dpk, dpv = (t.new_empty(0) for t in (prompt_k, prompt_v))
        if prompts:
            dpk, dpv = _backward_prompts(*inputs, delta if tokens else None, o)
    return dq, dk, dv, dpk, dpv


def _backward_queries(dout, out, lse, q, k, v, prompt_k, prompt_v, o):
    B, H, N, d = q.shape
    (H_kv, M), P = k.shape[1:3], prompt_k.shape[-2]
    dq, delta = rows_like(q), torch.empty_like(lse)
    strides, layout = _strides(dout, out, q, k, v, prompt_k, prompt_v)

    def launch(tile: Tile) -> None:
        dq_kernel[(_row_blocks(o, B, N, tile.queries) * H,)](
            dout, out, lse, q, k, v, prompt_k, prompt_v, o.key_mask, o.attn_mask, o.prompt_bias,
            o.cu_seqlens_q, o.cu_seqlens_k, o.prompt_index, o.prompt_len,
            dq, delta,
            H, N, M, P, _sequences(o), o.scale, o.window, o.softcap,
            *strides,
            _mask_strides(o.key_mask, B, M),
            _mask_strides(o.attn_mask, B, H, N, M), _mask_strides(o.prompt_bias, B, H, N, P),
            CAUSAL=o.causal, GROUPS=H // H_kv, **_blocks(tile, layout, d, P, o.attn_mask, o),
        )  # fmt: skip

    if dq.numel() > 0:
        best_tile("dq", q, launch)
    return dq, delta


def _backward_keys(dout, out, lse, q, k, v, delta, o):
    (B, H, N, d), (H_kv, M) = q.shape, k.shape[1:3]
    dk, dv = rows_like(k), rows_like(v)
    strides, layout = _strides(dout, q, k, v)

    def launch(tile: Tile) -> None:
        blocks = _blocks(tile, layout, d, 0, o.attn_mask, o)
        del blocks["BLOCK_P"]
        dkv_kernel[(_row_blocks(o, B, M, tile.keys) * H_kv,)](
            dout, lse, delta, q, k, v, o.key_mask, o.attn_mask, o.cu_seqlens_q, o.cu_seqlens_k,
            dk, dv,
            H, N, M, _sequences(o), o.scale, o.window, o.softcap,
            *strides,
            _mask_strides(o.key_mask, B, M), _mask_strides(o.attn_mask, B, H, N, M),
            CAUSAL=o.causal, GROUPS=H // H_kv, **blocks,
        )  # fmt: skip

    if dk.numel() > 0:
        best_tile("dkv", q, launch)
    return dk, dv


def _backward_prompts(dout, out, lse, q, k, v, prompt_k, prompt_v, delta, o):
    (B, H, N, d), (H_kv, P, _) = q.shape, prompt_k.shape[-3:]
    dpk, dpv = (t.new_empty(t.shape) for t in (prompt_k, prompt_v))
    if dpk.numel() == 0:
        return dpk, dpv
    if q.numel() == 0:
        return dpk.zero_(), dpv.zero_()
    tile = best_tile("prompts", q)
    strides, layout = _strides(dout, out, q, prompt_k, prompt_v)
    blocks = _blocks(tile, layout, d, P, o.prompt_bias, o)
    del blocks["BLOCK_K"]
    sets = 1 if o.prompt_index is None else len(prompt_k)
    splits, *shares = _shares(o, q, prompt_k, sets, tile, delta is not None)
    partial = dpk, dpv
    if splits > 1:
        partial = q.new_empty(2, splits, *prompt_k.shape, dtype=torch.float32)
    prompts_kernel[(sets * H_kv * splits * triton.cdiv(P, blocks["BLOCK_P"]),)](
        dout, out, lse, delta, q, prompt_k, prompt_v, o.prompt_bias,
        o.cu_seqlens_q, o.prompt_index, o.prompt_len,
        *partial,
        H, N, P, sets, o.scale, o.softcap, splits, *shares,
        *strides, _mask_strides(o.prompt_bias, B, H, N, P),
        GROUPS=H // H_kv, **blocks,
    )  # fmt: skip
    if splits > 1:
        block = 256
        sum_kernel[(2 * triton.cdiv(dpk.numel(), block),)](
            partial, dpk, dpv, dpk.numel(), splits, BLOCK=block
        )
    return dpk, dpv


def _shares(o, q, prompt_k, sets, tile, tokens) -> tuple[int | None, ...]:
    """(splits, items, items a split, samples, splits of a sample's rows) of the prompts' gradients.

    About two programs a processor, but partial sums of at most 5% of what is written anyway: out
    and, with the tokens' gradients, as much three times more.
    """
    (B, H, N), (H_kv, P) = q.shape[:3], prompt_k.shape[-3:-1]
    groups, p_blocks = H // H_kv, triton.cdiv(P, tile.keys)
    most = max(1, 2 * processors(q.device) // (sets * H_kv * p_blocks))
    written = q.numel() * q.element_size() * (4 if tokens else 1)
    most = min(most, max(1, int(0.05 * written) // (8 * prompt_k.numel())))
    if o.prompt_index is not None:
        samples = o.prompt_index.numel()
        of_items = min(most, triton.cdiv(samples, sets) * groups)
        of_rows = min(most // of_items, triton.cdiv(N, tile.queries))
        return of_items * of_rows, None, None, samples, of_rows
    items = B * groups * triton.cdiv(N, tile.queries)
    per_split = triton.cdiv(items, min(most, items))
    return triton.cdiv(items, per_split), items, per_split, None, None


def _row_blocks(o: Options, B: int, N: int, block: int) -> int:
    """Blocks of rows: of B samples of N, or of packed sequences, each with a part of a block."""
    if o.packed:
        return triton.cdiv(N, block) + _sequences(o)
    return B * triton.cdiv(N, block)


def _sequences(o: Options) -> int | None:
    return o.cu_seqlens_q.numel() - 1 if o.packed else None
