"""`cosine_logits` in Triton, for tokens of a batch: each is read once forward and once backward.

A program works on some tokens of one sample. Its share of the gradient to CLS is written for
itself, and the shares are added by one sum: no atomics, so two runs agree bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 8192  # that a program holds: 32 registers a thread of 256


@triton.jit
def _place(C, BLOCK_C: tl.constexpr):
    """This program's sample, and its tokens."""
    blocks = tl.cdiv(C, BLOCK_C)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    return b, tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _load(
    cls_ptr, tokens_ptr, C, cls_row, tokens_sample, tokens_row,
    D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """CLS [BLOCK_D] and tokens [BLOCK_C, BLOCK_D], zeros past C and D, and their cosines' parts."""
    b, c = _place(C, BLOCK_C)
    i = tl.arange(0, BLOCK_D)
    cls = tl.load(cls_ptr + b * cls_row + i, mask=i < D, other=0.0).to(tl.float32)
    at = tokens_ptr + b * tokens_sample + c.to(tl.int64)[:, None] * tokens_row + i[None, :]
    tokens = tl.load(at, mask=(c < C)[:, None] & (i < D)[None, :], other=0.0).to(tl.float32)
    return cls, tokens, _factor(tl.sum(cls * cls, 0)), _factor(tl.sum(tokens * tokens, 1))


@triton.jit
def _factor(square):
    """1 / length; 0 for a row of length 0; NaN where the squared length is not finite."""
    factor = tl.where(square > 0, 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
    return tl.where(square - square == 0, factor, float("nan"))


@triton.jit(do_not_specialize=["C"])
def forward_kernel(
    cls_ptr, tokens_ptr, out_ptr, C, cls_row, tokens_sample, tokens_row,
    D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    cls, tokens, cls_factor, factors = _load(
        cls_ptr, tokens_ptr, C, cls_row, tokens_sample, tokens_row, D, BLOCK_C, BLOCK_D
    )
    cosines = tl.sum((cls * cls_factor)[None, :] * tokens, 1) * factors
    b, c = _place(C, BLOCK_C)
    tl.store(out_ptr + b * C + c, cosines, mask=c < C)


@triton.jit(do_not_specialize=["C"])
def backward_kernel(
    cls_ptr, tokens_ptr, dout_ptr, dcls_ptr, dtokens_ptr, C, cls_row, tokens_sample, tokens_row,
    D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dtokens [B, C, D], and this program's row of dcls [B, programs, D] float32."""
    cls, tokens, cls_factor, factors = _load(
        cls_ptr, tokens_ptr, C, cls_row, tokens_sample, tokens_row, D, BLOCK_C, BLOCK_D
    )
    b, c = _place(C, BLOCK_C)
    i = tl.arange(0, BLOCK_D)
    # a bad row counts as one of length 0 here: what is not asked for must not make others NaN
    cls_fine, fine = cls_factor == cls_factor, factors == factors
    cls_factor, factors = tl.where(cls_fine, cls_factor, 0.0), tl.where(fine, factors, 0.0)
    cls = tl.where(cls_fine, cls, 0.0) * cls_factor
    tokens = tl.where(fine[:, None], tokens, 0.0) * factors[:, None]
    cosines = tl.sum(cls[None, :] * tokens, 1)
    dout = tl.load(dout_ptr + b * C + c, mask=c < C, other=0.0)
    dcls = tl.sum(dout[:, None] * (tokens - cosines[:, None] * cls[None, :]), 0) * cls_factor
    dtokens = dout[:, None] * (cls[None, :] - cosines[:, None] * tokens) * factors[:, None]
    share = tl.program_id(0).to(tl.int64)
    tl.store(dcls_ptr + share * D + i, dcls, mask=i < D)
    rows = dtokens_ptr + (b * C + c)[:, None] * D + i[None, :]
    tl.store(
        rows, dtokens.to(dtokens_ptr.dtype.element_ty), mask=(c < C)[:, None] & (i < D)[None, :]
    )


def forward(cls: Tensor, tokens: Tensor) -> Tensor:
    """[B, C] float32 cosines of ``cls`` [B, D] to ``tokens`` [B, C, D]."""
    out = cls.new_empty(tokens.shape[:2], dtype=torch.float32)
    with torch.cuda.device_of(cls):
        grid, arguments, blocks = _launch(cls, tokens)
        forward_kernel[grid](cls, tokens, out, *arguments, **blocks)
    return out


def backward(dout: Tensor, cls: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(dcls [B, D], dtokens [B, C, D]) in the dtypes of ``cls`` and ``tokens``."""
    dtokens = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(cls):
        grid, arguments, blocks = _launch(cls, tokens)
        shares = cls.new_empty(len(cls), grid[0] // len(cls), cls.shape[1], dtype=torch.float32)
        backward_kernel[grid](
            cls, tokens, dout.float().contiguous(), shares, dtokens, *arguments, **blocks
        )
    return shares.sum(1).to(cls.dtype), dtokens


def _launch(cls: Tensor, tokens: Tensor) -> tuple[tuple[int], tuple[int, ...], dict[str, int]]:
    B, C, D = tokens.shape
    width = triton.next_power_of_2(D)
    count = max(1, min(_ELEMENTS // width, triton.next_power_of_2(C)))
    arguments = (C, cls.stride(0), *tokens.stride()[:2])
    blocks = dict(D=D, BLOCK_C=count, BLOCK_D=width, num_warps=8)
    return (B * triton.cdiv(C, count),), arguments, blocks
