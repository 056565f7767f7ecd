"""`quantize_rows` in Triton: a program has a row, and goes through it twice, the second time in
the cache: for its largest number, and to write it. So rows of any width are served."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt.ops.activations_triton import activation
from fastprompt.ops.layout import rows_of
from fastprompt.ops.norms_triton import fp8_scale, row_starts
from fastprompt.ops.quantize_rows import Quantized

_BLOCK = 4096  # columns at once


@triton.jit
def _value(x_ptr, up_ptr, factor_ptr, column, live, KIND: tl.constexpr):
    """act(x) · up · factor, float32."""
    y = tl.load(x_ptr + column, mask=live, other=0.0).to(tl.float32)
    if KIND != "none":
        y = activation(y, KIND)[0]
    if up_ptr is not None:
        y *= tl.load(up_ptr + column, mask=live, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        y *= tl.load(factor_ptr + column, mask=live, other=0.0)
    return y


@triton.jit(do_not_specialize=["n1", "n2"])
def quantize_kernel(
    x_ptr, up_ptr, factor_ptr,
    values_ptr, scale_ptr,
    columns, n1, n2,
    stride_x0, stride_x1, stride_x2, stride_u0, stride_u1, stride_u2,
    KIND: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    x_ptr += row_starts(row, n1, n2, stride_x0, stride_x1, stride_x2)
    if up_ptr is not None:
        up_ptr += row_starts(row, n1, n2, stride_u0, stride_u1, stride_u2)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        y = _value(x_ptr, up_ptr, factor_ptr, column, column < columns, KIND)
        largest = tl.maximum(largest, tl.abs(y))
    scale, inverse = fp8_scale(tl.max(largest, 0), MOST)
    tl.store(scale_ptr + row, scale)
    values_ptr += row.to(tl.int64) * columns
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        y = _value(x_ptr, up_ptr, factor_ptr, column, column < columns, KIND) * inverse
        tl.store(values_ptr + column, y.to(values_ptr.dtype.element_ty), mask=column < columns)


@triton.jit
def _gradients(da_ptr, gate_ptr, up_ptr, factor_ptr, column, live, columns, KIND: tl.constexpr):
    """(dgate, dup) times their factors, float32; dup is 0 without an up."""
    da = tl.load(da_ptr + column, mask=live, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + column, mask=live, other=0.0).to(tl.float32)
    active, slope = activation(gate, KIND)
    dgate = da * slope * tl.load(factor_ptr + column, mask=live, other=0.0)
    dup = tl.zeros_like(da)
    if up_ptr is not None:
        dgate *= tl.load(up_ptr + column, mask=live, other=0.0).to(tl.float32)
        dup = da * active * tl.load(factor_ptr + columns + column, mask=live, other=0.0)
    return dgate, dup


@triton.jit(do_not_specialize=["n1", "n2"])
def activation_backward_kernel(
    da_ptr, gate_ptr, up_ptr, factor_ptr,
    values_ptr, scale_ptr,
    columns, n1, n2,
    stride_y0, stride_y1, stride_y2, stride_g0, stride_g1, stride_g2,
    stride_u0, stride_u1, stride_u2,
    KIND: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    da_ptr += row_starts(row, n1, n2, stride_y0, stride_y1, stride_y2)
    gate_ptr += row_starts(row, n1, n2, stride_g0, stride_g1, stride_g2)
    width = columns
    if up_ptr is not None:
        up_ptr += row_starts(row, n1, n2, stride_u0, stride_u1, stride_u2)
        width = 2 * columns
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        dgate, dup = _gradients(
            da_ptr, gate_ptr, up_ptr, factor_ptr, column, column < columns, columns, KIND
        )
        largest = tl.maximum(largest, tl.maximum(tl.abs(dgate), tl.abs(dup)))
    scale, inverse = fp8_scale(tl.max(largest, 0), MOST)
    tl.store(scale_ptr + row, scale)
    values_ptr += row.to(tl.int64) * width
    dtype = values_ptr.dtype.element_ty
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < columns
        dgate, dup = _gradients(da_ptr, gate_ptr, up_ptr, factor_ptr, column, live, columns, KIND)
        tl.store(values_ptr + column, (dgate * inverse).to(dtype), mask=live)
        if up_ptr is not None:
            tl.store(values_ptr + columns + column, (dup * inverse).to(dtype), mask=live)


# ---- launches ----


def quantize(
    x: Tensor, up: Tensor | None, factor: Tensor | None, kind: str, dtype: torch.dtype
) -> Quantized:
    """Of act(x) · up · factor, ``kind`` "none" without an activation."""
    rows, columns = rows_of(x, x if up is None else up), x.shape[-1]
    out = Quantized.empty(x, columns, dtype)
    with torch.cuda.device_of(x):
        quantize_kernel[(rows.count,)](
            x, up, factor,
            *out,
            columns, *rows.sizes[1:],
            *rows.strides[0], *rows.strides[1],
            KIND=kind, **_tile(columns, dtype),
        )  # fmt: skip
    return out


def activation_backward(
    da: Tensor, gate: Tensor, up: Tensor | None, factor: Tensor, kind: str, dtype: torch.dtype
) -> Quantized:
    rows, columns = rows_of(da, gate, gate if up is None else up), gate.shape[-1]
    out = Quantized.empty(gate, columns if up is None else 2 * columns, dtype)
    with torch.cuda.device_of(gate):
        activation_backward_kernel[(rows.count,)](
            da, gate, up, factor,
            *out,
            columns, *rows.sizes[1:],
            *rows.strides[0], *rows.strides[1], *rows.strides[2],
            KIND=kind, **_tile(columns, dtype),
        )  # fmt: skip
    return out


def _tile(columns: int, dtype: torch.dtype) -> dict[str, float]:
    block = min(_BLOCK, triton.next_power_of_2(columns))
    return dict(MOST=torch.finfo(dtype).max, BLOCK=block, num_warps=8 if block > 1024 else 4)
