"""`swiglu` and `gelu` in Triton: one kernel each way for all activations, with or without a gate.

Elementwise, so results may lie where inputs lay. Tensors without gaps are one long row; views,
such as the two halves of one [.., 2F], are many.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt.ops.layout import Rows, rows_of
from fastprompt.ops.norms_triton import row_starts

_BLOCK = 2048  # elements a program: 16 a thread


@triton.jit
def activation(x, KIND: tl.constexpr):
    """The activation of float32 ``x``, and its slope.

    x·S(x) each, with S a sigmoid or the normal distribution's; (1 + tanh u) / 2 is sigmoid(2u).
    """
    if KIND == "gelu":
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # 1/sqrt(2)
        slope = tl.exp(-0.5 * x * x) * 0.3989422804014327  # 1/sqrt(2 pi)
    else:
        if KIND == "silu":
            inner, slope = x, 1.0
        elif KIND == "gelu_quick":
            inner, slope = 1.702 * x, 1.702
        else:
            # 2 sqrt(2/pi) = 1.5957691216057308; times 0.044715 and 3 in the slope
            inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
            slope = 1.5957691216057308 + 0.21406444881780073 * x * x
        # the smaller of the two shares to its own last digit, and no exponential overflows
        small = tl.exp(-tl.abs(inner))
        large = 1.0 / (1.0 + small)
        small *= large
        share = tl.where(inner < 0, small, large)
        slope *= small * large
    return x * share, share + x * slope


@triton.jit
def _places(columns, n1, n2, BLOCK: tl.constexpr):
    """This program's row, and its columns and which of them exist."""
    blocks = tl.cdiv(columns, BLOCK)
    row = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, column, column < columns


@triton.jit(do_not_specialize=["n1", "n2"])
def forward_kernel(
    gate_ptr, up_ptr,
    y_ptr,
    columns, n1, n2,
    stride_g0, stride_g1, stride_g2, stride_u0, stride_u1, stride_u2,
    stride_y0, stride_y1, stride_y2,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, live = _places(columns, n1, n2, BLOCK)
    at = row_starts(row, n1, n2, stride_g0, stride_g1, stride_g2) + column
    y = activation(tl.load(gate_ptr + at, mask=live, other=0.0).to(tl.float32), KIND)[0]
    if up_ptr is not None:
        at = row_starts(row, n1, n2, stride_u0, stride_u1, stride_u2) + column
        y *= tl.load(up_ptr + at, mask=live, other=0.0).to(tl.float32)
    at = row_starts(row, n1, n2, stride_y0, stride_y1, stride_y2) + column
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["n1", "n2"])
def backward_kernel(
    dy_ptr, gate_ptr, up_ptr,
    dgate_ptr, dup_ptr,
    columns, n1, n2,
    stride_y0, stride_y1, stride_y2, stride_g0, stride_g1, stride_g2,
    stride_u0, stride_u1, stride_u2, stride_dg0, stride_dg1, stride_dg2,
    stride_du0, stride_du1, stride_du2,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, live = _places(columns, n1, n2, BLOCK)
    at = row_starts(row, n1, n2, stride_y0, stride_y1, stride_y2) + column
    dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
    at = row_starts(row, n1, n2, stride_g0, stride_g1, stride_g2) + column
    gate = tl.load(gate_ptr + at, mask=live, other=0.0).to(tl.float32)
    active, slope = activation(gate, KIND)
    dgate = dy * slope
    if up_ptr is not None:
        at = row_starts(row, n1, n2, stride_u0, stride_u1, stride_u2) + column
        dgate *= tl.load(up_ptr + at, mask=live, other=0.0).to(tl.float32)
        at = row_starts(row, n1, n2, stride_du0, stride_du1, stride_du2) + column
        tl.store(dup_ptr + at, (dy * active).to(dup_ptr.dtype.element_ty), mask=live)
    at = row_starts(row, n1, n2, stride_dg0, stride_dg1, stride_dg2) + column
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=live)


# ---- launches ----


def forward(gate: Tensor, up: Tensor | None, kind: str, y: Tensor) -> None:
    """Writes y = activation(gate), times up if given."""
    rows, columns, grid = _launch(gate, gate if up is None else up, y)
    of_gate, of_up, of_y = rows.strides
    with torch.cuda.device_of(gate):
        forward_kernel[grid](
            gate, up,
            y,
            columns, *rows.sizes[1:],
            *of_gate, *of_up, *of_y,
            KIND=kind, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip


def backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, kind: str, dgate: Tensor, dup: Tensor | None
) -> None:
    """Writes dgate, and dup if there is an up."""
    others = (gate, dgate) if up is None else (up, dup)
    rows, columns, grid = _launch(dy, gate, others[0], dgate, others[1])
    with torch.cuda.device_of(gate):
        backward_kernel[grid](
            dy, gate, up,
            dgate, dup,
            columns, *rows.sizes[1:],
            *(stride for strides in rows.strides for stride in strides),
            KIND=kind, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip


def _launch(*tensors: Tensor) -> tuple[Rows, int, tuple[int]]:
    """Rows, the columns of each, and a grid."""
    if all(t.is_contiguous() for t in tensors):
        tensors = tuple(t.view(-1) for t in tensors)
    rows, columns = rows_of(*tensors), tensors[0].shape[-1]
    return rows, columns, (rows.count * triton.cdiv(columns, _BLOCK),)
