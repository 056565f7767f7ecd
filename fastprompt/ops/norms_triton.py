"""`rms_norm` and `layer_norm` in Triton: one kernel each way, the two differing in the mean alone.

A program holds its rows whole, so that each is read once; a few short rows at a time. Statistics
and sums are float32. Since a program has read its rows before it writes them, results may lie
where inputs lay.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt.ops.layout import Rows, rows_of
from fastprompt.ops.quantize_rows import E4M3, LEAST

_ELEMENTS = 2048  # that a program of short rows holds
_LEAST = tl.constexpr(LEAST)
_SIZES = ["rows", "n1", "n2"]  # nothing is gained from knowing what divides these


@triton.jit
def row_starts(row, n1, n2, stride_0, stride_1, stride_2):
    """Where rows of a tensor whose leading axes are [n0, n1, n2] begin, int64."""
    outer, last = row // n2, row % n2
    first = (outer // n1).to(tl.int64) * stride_0
    return first + (outer % n1).to(tl.int64) * stride_1 + last.to(tl.int64) * stride_2


@triton.jit
def fp8_scale(largest, MOST: tl.constexpr):
    """(scale, 1 / scale) of rows whose largest number is to be fp8's, as `quantize_rows` has it."""
    scale = tl.math.div_rn(tl.maximum(largest, _LEAST), MOST)
    return scale, tl.math.div_rn(1.0, scale)


@triton.jit
def _places(rows, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's rows [BLOCK_R], channels [1, BLOCK_D], and which of the tile exist."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)[None, :]
    return row, d, (row < rows)[:, None] & (d < D)


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr,
    y_ptr, total_ptr, mean_ptr, rstd_ptr, scale_ptr,
    rows, n1, n2, eps, offset,
    stride_x0, stride_x1, stride_x2, stride_r0, stride_r1, stride_r2,
    D: tl.constexpr, CENTER: tl.constexpr, CAST_FIRST: tl.constexpr, MOST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, d, live = _places(rows, D, BLOCK_R, BLOCK_D)
    into = row.to(tl.int64)[:, None] * D + d
    at = row_starts(row, n1, n2, stride_x0, stride_x1, stride_x2)[:, None] + d
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        at = row_starts(row, n1, n2, stride_r0, stride_r1, stride_r2)[:, None] + d
        x += tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32)
        # rounded, as whoever reads the sum later finds it
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + into, total, mask=live)
        x = total.to(tl.float32)
    if CENTER:
        mean = tl.sum(x, 1) / D
        tl.store(mean_ptr + row, mean, mask=row < rows)
        x = tl.where(live, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = x * rstd[:, None]
    if CAST_FIRST:
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
    if weight_ptr is not None:
        y *= offset + tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    if scale_ptr is not None:  # y in fp8: what lies beyond a row is 0
        scale, inverse = fp8_scale(tl.max(tl.abs(y), 1), MOST)
        tl.store(scale_ptr + row, scale, mask=row < rows)
        y *= inverse[:, None]
    tl.store(y_ptr + into, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dtotal_ptr,
    dx_ptr,
    rows, n1, n2, eps, offset,
    stride_y0, stride_y1, stride_y2, stride_x0, stride_x1, stride_x2,
    stride_t0, stride_t1, stride_t2,
    D: tl.constexpr, CENTER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx = rstd (g - mean(g) - z mean(g z)), g = dy (offset + weight); without mean(g) for rms.

    Without rstd_ptr the statistics, mean_ptr's too, are made again: the rows are here anyway.
    """
    row, d, live = _places(rows, D, BLOCK_R, BLOCK_D)
    at = row_starts(row, n1, n2, stride_y0, stride_y1, stride_y2)[:, None] + d
    g = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        g *= offset + tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    at = row_starts(row, n1, n2, stride_x0, stride_x1, stride_x2)[:, None] + d
    z = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    if CENTER:
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        else:
            mean = tl.sum(z, 1) / D
        z = tl.where(live, z - mean[:, None], 0.0)
    if rstd_ptr is not None:
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
    else:
        rstd = 1.0 / tl.sqrt(tl.sum(z * z, 1) / D + eps)[:, None]
    z *= rstd
    dx = g - z * (tl.sum(g * z, 1) / D)[:, None]
    if CENTER:
        dx -= (tl.sum(g, 1) / D)[:, None]
    dx *= rstd
    if dtotal_ptr is not None:
        at = row_starts(row, n1, n2, stride_t0, stride_t1, stride_t2)[:, None] + d
        dx += tl.load(dtotal_ptr + at, mask=live, other=0.0).to(tl.float32)
    into = row.to(tl.int64)[:, None] * D + d
    tl.store(dx_ptr + into, dx.to(dx_ptr.dtype.element_ty), mask=live)


# ---- launches ----


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    y: Tensor,
    total: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    scale: Tensor | None = None,
) -> None:
    """Writes y, total = x + residual (if given), mean (if given: a layer norm) and rstd; with a
    ``scale`` y is in e4m3, and that is written too."""
    rows = rows_of(x) if residual is None else rows_of(x, residual)
    grid, blocks = _tile(x.shape[-1], rows)
    with torch.cuda.device_of(x):
        forward_kernel[grid](
            x, residual, weight, bias,
            y, total, mean, rstd, scale,
            rows.count, *rows.sizes[1:], eps, offset,
            *rows.strides[0], *rows.strides[-1],
            CENTER=mean is not None, CAST_FIRST=cast_first,
            MOST=torch.finfo(E4M3).max, **blocks,
        )  # fmt: skip


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    dtotal: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
    dx: Tensor,
) -> None:
    """Writes dx, with dtotal (the gradient that the sum gets elsewhere) added if given.

    center: of a layer norm. Statistics that are None are made again, with eps.
    """
    rows = rows_of(dy, x) if dtotal is None else rows_of(dy, x, dtotal)
    grid, blocks = _tile(x.shape[-1], rows)
    with torch.cuda.device_of(x):
        backward_kernel[grid](
            dy, x, weight, mean, rstd, dtotal,
            dx,
            rows.count, *rows.sizes[1:], float(eps), offset,
            *rows.strides[0], *rows.strides[1], *rows.strides[-1],
            CENTER=center, **blocks,
        )  # fmt: skip


def _tile(D: int, rows: Rows) -> tuple[tuple[int], dict[str, int]]:
    width = triton.next_power_of_2(D)
    count = min(max(1, _ELEMENTS // width), triton.next_power_of_2(rows.count))
    warps = min(32, max(4, width // 512))
    return (triton.cdiv(rows.count, count),), dict(
        D=D, BLOCK_R=count, BLOCK_D=width, num_warps=warps
    )
