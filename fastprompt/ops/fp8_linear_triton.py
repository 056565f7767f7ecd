"""4-bit weights to e4m3 in Triton: each row's scale, and tiles of decoded values.

A tile is 64 columns of some rows, inside one block of values in each, so that a row's scale is
read once a tile. It is written by whatever strides the output has, [in, out] as well as [out, in].
As in `dequantize_4bit_triton` launches forbid fused multiply-adds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt.ops.dequantize_4bit_triton import block_scale, value
from fastprompt.ops.norms_triton import fp8_scale
from fastprompt.ops.packed import Packed
from fastprompt.ops.quantize_rows import E4M3

_ROWS, _COLUMNS = 128, 64
_SCALES = 2048  # that a program of `row_scales` goes through at once


@triton.jit
def row_scales_kernel(
    absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr,
    scale_ptr,
    rows, blocks, blocksize2,
    MOST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of ``blocks`` blocks each; BLOCK is no less."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    block = tl.arange(0, BLOCK)[None, :]
    live = (row < rows)[:, None] & (block < blocks)
    at = row[:, None] * blocks + block
    scale = block_scale(at, live, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, blocksize2)
    largest = tl.max(tl.where(live, tl.abs(scale), 0.0), 1)
    tl.store(scale_ptr + row, fp8_scale(largest, MOST)[0], mask=row < rows)


@triton.jit
def decode_kernel(
    packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, scale_ptr,
    out_ptr,
    rows, columns, blocksize, blocksize2,
    stride_r, stride_c,
    KIND: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile; blocksize and columns are multiples of BLOCK_C."""
    tiles = columns // BLOCK_C
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = (tl.program_id(0) % tiles) * BLOCK_C
    live = row < rows
    block = (row * columns + first) // blocksize
    own = block_scale(block, live, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, blocksize2)
    inverse = tl.math.div_rn(1.0, tl.load(scale_ptr + row, mask=live, other=1.0))[:, None]
    at = (row * columns + first)[:, None] // 2 + tl.arange(0, BLOCK_C // 2)[None, :]
    pair = tl.load(packed_ptr + at, mask=live[:, None], other=0).to(tl.int32)
    high = value(pair >> 4, KIND) * own[:, None] * inverse
    low = value(pair & 15, KIND) * own[:, None] * inverse
    dtype = out_ptr.dtype.element_ty
    both = tl.interleave(high.to(dtype), low.to(dtype))
    column = first + tl.arange(0, BLOCK_C)[None, :].to(tl.int64)
    tl.store(out_ptr + row[:, None] * stride_r + column * stride_c, both, mask=live[:, None])


# ---- launches ----


def row_scales(w: Packed, out: Tensor) -> None:
    blocks = w.columns // w.blocksize
    width = triton.next_power_of_2(blocks)
    count = max(1, _SCALES // width)
    with torch.cuda.device_of(out):
        row_scales_kernel[(triton.cdiv(w.rows, count),)](
            w.absmax, w.code2, w.absmax2, w.offset,
            out,
            w.rows, blocks, w.blocksize2,
            MOST=torch.finfo(E4M3).max, BLOCK_R=count, BLOCK=width,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def decode(w: Packed, scale: Tensor, out: Tensor) -> None:
    """Writes W8 into ``out`` [rows, columns] of any strides."""
    width = min(_COLUMNS, w.blocksize)
    with torch.cuda.device_of(out):
        decode_kernel[(triton.cdiv(w.rows, _ROWS) * (w.columns // width),)](
            w.packed, w.absmax, w.code2, w.absmax2, w.offset, scale,
            out,
            w.rows, w.columns, w.blocksize, w.blocksize2,
            *out.stride(),
            KIND=w.kind, BLOCK_R=_ROWS, BLOCK_C=width,
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
