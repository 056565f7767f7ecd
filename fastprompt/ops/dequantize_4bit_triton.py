"""`dequantize_4bit` in Triton: whole blocks of values a program, their scales decoded there too.

A nibble becomes a value by a tree of selects between constants: no table is read, which measured
faster than one on an H100 (DESIGN, section 7). The launch forbids fused multiply-adds, whose single
rounding would differ from bitsandbytes' two in nested scales.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt.ops.packed import Packed

_BYTES = 2048  # a program: 32 values a thread


@triton.jit
def _pick(n, v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15):
    """Value number n, by one bit of n after the other."""
    bit = (n & 1) != 0
    a0, a1, a2, a3 = (
        tl.where(bit, v1, v0), tl.where(bit, v3, v2), tl.where(bit, v5, v4), tl.where(bit, v7, v6)
    )  # fmt: skip
    a4, a5, a6, a7 = (
        tl.where(bit, v9, v8), tl.where(bit, v11, v10),
        tl.where(bit, v13, v12), tl.where(bit, v15, v14),
    )  # fmt: skip
    bit = (n & 2) != 0
    b0, b1 = tl.where(bit, a1, a0), tl.where(bit, a3, a2)
    b2, b3 = tl.where(bit, a5, a4), tl.where(bit, a7, a6)
    bit = (n & 4) != 0
    c0, c1 = tl.where(bit, b1, b0), tl.where(bit, b3, b2)
    return tl.where((n & 8) != 0, c1, c0)


@triton.jit
def value(n, KIND: tl.constexpr):
    """What nibble n stands for, float32: bitsandbytes' own sixteen numbers."""
    if KIND == "nf4":
        return _pick(
            n, -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
            -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
            0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        )  # fmt: skip
    return _pick(
        n, 0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
        0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
        -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    )  # fmt: skip


@triton.jit
def block_scale(block, there, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, blocksize2):
    """What block number ``block``'s values are multiplied by, float32."""
    scale = tl.load(absmax_ptr + block, mask=there, other=0)
    if code2_ptr is not None:
        scale = tl.load(code2_ptr + scale.to(tl.int32), mask=there, other=0.0)
        scale *= tl.load(absmax2_ptr + block // blocksize2, mask=there, other=0.0)
        scale += tl.load(offset_ptr)
    return scale


@triton.jit
def decode_kernel(
    packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr,
    out_ptr,
    values, size, blocksize2,
    KIND: tl.constexpr, BLOCKS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of BYTES bytes, two values each; there are ``size`` bytes in all."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block * (2 * BYTES) < values
    scale = block_scale(block, there, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, blocksize2)
    byte = block[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    pair = tl.load(packed_ptr + byte, mask=byte < size, other=0).to(tl.int32)
    high = value(pair >> 4, KIND) * scale[:, None]
    low = value(pair & 15, KIND) * scale[:, None]
    dtype = out_ptr.dtype.element_ty
    both = tl.interleave(high.to(dtype), low.to(dtype))
    at = block[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
    tl.store(out_ptr + at, both, mask=at < values)


def decode(w: Packed, out: Tensor) -> None:
    """Writes the weight into ``out``, contiguous; w.blocksize is a power of two."""
    bytes_a_block = w.blocksize // 2
    blocks = max(1, _BYTES // bytes_a_block)
    with torch.cuda.device_of(out):
        decode_kernel[(triton.cdiv(out.numel(), 2 * blocks * bytes_a_block),)](
            w.packed, w.absmax, w.code2, w.absmax2, w.offset,
            out,
            out.numel(), (out.numel() + 1) // 2, w.blocksize2,
            KIND=w.kind, BLOCKS=blocks, BYTES=bytes_a_block,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
