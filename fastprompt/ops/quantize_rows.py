"""Rows of fp8 numbers with one scale each, as an fp8 product takes them.

    scale_r = max_c |y_rc| / most         most = 448 (e4m3) or 57344 (e5m2)
    q_rc    = fp8(y_rc / scale_r)         so that y ≈ scale · q

of y = x · factor, or made on the way, so that y itself is never written:

    y = act(gate) · up                                                     the input of down_proj
    y = [da · up · act'(gate) · f1 | da · act(gate) · f2],  f1 | f2 = factor  the MLP's gradients

``factor`` is what the other side's rows were divided by: in dx = dy W the sum runs over W's rows,
so that their scales belong to dy's columns (see `fp8_linear`). e4m3 rounds to 1/16 at most, of
numbers down to scale/64; no op here has a gradient. FP8 formats: arXiv 2209.05433.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.ops.checks import by_triton, check_backend, check_floats, check_shape
from fastprompt.ops.gelu import APPROXIMATE
from fastprompt.ops.gelu import backward as gelu_backward
from fastprompt.ops.gelu import forward as gelu

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LEAST = 1e-30  # what a row's largest number counts as at least: the scale of zeros is not zero
ACTIVATIONS = ("silu", *APPROXIMATE)


class Quantized(NamedTuple):
    """values [..., C] fp8, scale [..., 1] float32: y ≈ scale · values."""

    values: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, like: Tensor, columns: int, dtype: torch.dtype) -> "Quantized":
        rows = like.shape[:-1]
        return cls(
            like.new_empty(*rows, columns, dtype=dtype),
            like.new_empty(*rows, 1, dtype=torch.float32),
        )

    def dequantize(self) -> Tensor:
        """[..., C] float32."""
        return self.values.float() * self.scale


def by_torch(y: Tensor, dtype: torch.dtype = E4M3) -> Quantized:
    """The definition, of float32 rows."""
    largest = y.abs().amax(-1, keepdim=True).clamp(min=LEAST)
    scale = largest / torch.finfo(dtype).max
    return Quantized((y * (1 / scale)).to(dtype).contiguous(), scale)


# ---- without checks: what a frozen block calls ----


def forward(
    x: Tensor,
    factor: Tensor | None = None,
    *,
    dtype: torch.dtype = E4M3,
    backend: str = "auto",
) -> Quantized:
    """As `quantize_rows`."""
    if by_triton(x, backend):
        from fastprompt.ops import quantize_rows_triton as triton

        return triton.quantize(x, None, factor, "none", dtype)
    y = x.float()
    return by_torch(y if factor is None else y * factor, dtype)


def activation(
    kind: str, gate: Tensor, up: Tensor | None, *, dtype: torch.dtype = E4M3, backend: str = "auto"
) -> Quantized:
    """Of act(gate) · up (or act(gate)); ``kind`` of `ACTIVATIONS`, gate and up [..., F]."""
    if by_triton(gate, backend):
        from fastprompt.ops import quantize_rows_triton as triton

        return triton.quantize(gate, up, None, kind, dtype)
    y = _act(kind, gate.float())
    return by_torch(y if up is None else y * up, dtype)


def activation_backward(
    kind: str,
    da: Tensor,
    gate: Tensor,
    up: Tensor | None,
    factor: Tensor,
    *,
    dtype: torch.dtype = E4M3,
    backend: str = "auto",
) -> Quantized:
    """Of the gradients of gate and up beside one another, times ``factor`` [2F], float32.

    Without ``up`` of gate's alone, and factor is [F].
    """
    if by_triton(gate, backend):
        from fastprompt.ops import quantize_rows_triton as triton

        return triton.activation_backward(da, gate, up, factor, kind, dtype)
    da, gate = da.float(), gate.float()
    if up is None:
        return by_torch(_act_backward(kind, da, gate) * factor, dtype)
    both = _act_backward(kind, da * up, gate), _act(kind, gate) * da
    return by_torch(torch.cat(both, -1) * factor, dtype)


def _act(kind: str, x: Tensor) -> Tensor:
    return F.silu(x) if kind == "silu" else gelu(x, APPROXIMATE[kind], backend="plain")


def _act_backward(kind: str, dy: Tensor, x: Tensor) -> Tensor:
    if kind == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    return gelu_backward(dy, x, APPROXIMATE[kind], backend="plain")


# ---- public ----


def quantize_rows(
    x: Tensor,
    factor: Tensor | None = None,
    *,
    dtype: torch.dtype = E4M3,
    backend: str = "auto",
) -> Quantized:
    """Each row of ``x`` in fp8, with a scale that makes its largest number fp8's largest.

    Args:
        x: [..., C] float32, float16 or bfloat16, any strides with a contiguous last axis (on CUDA
            leading axes that merge into three at most).
        factor: [C] float32, contiguous; multiplies x before.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        backend: "triton" (CUDA; on the CPU its interpreter, which truncates where it should
            round), "plain" or "reference" (torch). "auto" is Triton on CUDA, else plain.

    Returns:
        (values [..., C] in ``dtype``, contiguous; scale [..., 1] float32), without a gradient.

    Raises:
        ValueError: a shape, stride, dtype or device that the op does not serve.
    """
    check_floats(x=x)
    check_backend(backend, x.device)
    if x.dtype == torch.float64 or x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: want [..., C] of at most float32, got {list(x.shape)} {x.dtype}")
    if dtype not in (E4M3, E5M2):
        raise ValueError(f"dtype: want {E4M3} or {E5M2}, got {dtype}")
    if factor is not None:
        check_shape("factor", factor, x.shape[-1:])
        dense = factor.is_contiguous()
        if factor.dtype != torch.float32 or factor.device != x.device or not dense:
            want = f"contiguous torch.float32 on {x.device}"
            got = f"{factor.dtype} on {factor.device} with strides {factor.stride()}"
            raise ValueError(f"factor: want {want}, got {got}")
    with torch.no_grad():
        return forward(x, factor, dtype=dtype, backend=backend)
