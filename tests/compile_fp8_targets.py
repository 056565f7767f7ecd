"""Compile the kernels behind fp8 products for the cards that have fp8. See compile_targets."""

from typing import NamedTuple

import torch
from compile_block_targets import BF16, FP16, FP32, Decode, recorded, rows
from compile_targets import SMEM_LIMIT, compile_all, described

from fastprompt.ops import fp8_linear_triton, norms_triton, quantize_rows_triton
from fastprompt.ops.checks import MOST_CHANNELS
from fastprompt.ops.quantize_rows import E4M3, E5M2


class Norm(NamedTuple):
    dtype: torch.dtype
    D: int
    kind: str = "rms"  # "rms", "layer", "bare" (a layer norm without weight and bias)
    residual: bool = False
    weight: torch.dtype = BF16
    first: bool = False  # rounded before the weight comes
    gap: int = 0

    def launch(self):
        x, r = rows(2, self.D, self.dtype, self.gap)
        total = torch.empty(2, 5, self.D, dtype=self.dtype)
        y = torch.empty(2, 5, self.D, dtype=E4M3)
        weight, (rstd, mean, scale) = torch.empty(self.D, dtype=self.weight), torch.empty(3, 2, 5)
        bias = weight if self.kind == "layer" else None
        weight = None if self.kind == "bare" else weight
        mean = None if self.kind == "rms" else mean
        r, total = (r, total) if self.residual else (None, None)
        norms_triton.forward(x, r, weight, bias, 1e-6, 0.0, self.first, y, total, mean, rstd, scale)


class Quantize(NamedTuple):
    dtype: torch.dtype
    C: int
    kind: str = "none"
    gated: bool = False
    gap: int = 0
    to: torch.dtype = E4M3

    def launch(self):
        x, up, dy = rows(3, self.C, self.dtype, self.gap)
        up = up if self.gated else None
        factor = torch.empty(2 * self.C if self.gated else self.C)
        if self.kind == "none":
            quantize_rows_triton.quantize(x, None, None, "none", self.to)
            quantize_rows_triton.quantize(x, None, factor, "none", self.to)
            return
        quantize_rows_triton.quantize(x, up, None, self.kind, self.to)
        quantize_rows_triton.activation_backward(dy, x, up, factor, self.kind, self.to)


class Decode8(NamedTuple):
    blocksize: int
    kind: str = "nf4"
    nested: bool = False
    columns: int = 4096
    transposed: bool = False

    def launch(self):
        weight = Decode(BF16, self.blocksize, self.kind, self.nested, self.columns).weight()
        scale = torch.empty(weight.rows)
        fp8_linear_triton.row_scales(weight, scale)
        out = torch.empty(weight.rows, self.columns, dtype=E4M3)
        if self.transposed:  # beside another weight of 16 rows
            out = torch.empty(self.columns, weight.rows + 16, dtype=E4M3)[:, :-16].mT
        fp8_linear_triton.decode(weight, scale, out)


CASES = [
    Norm(BF16, 4096, residual=True),
    Norm(BF16, 4096, weight=FP32),
    Norm(BF16, 4096, residual=True, first=True),
    Norm(BF16, 1024, "layer"),
    Norm(BF16, 1024, "bare"),
    Norm(FP32, MOST_CHANNELS, "layer", residual=True, weight=FP32),
    Norm(FP32, 4096, weight=FP32),
    Norm(FP16, 80, residual=True, weight=FP16, gap=1),
    Quantize(BF16, 4096),
    Quantize(FP32, 77, gap=1),
    Quantize(BF16, 4096, to=E5M2),
    Quantize(BF16, 11008, "silu", gated=True, gap=11008),
    Quantize(BF16, 11008, "silu", gated=True, gap=11008, to=E5M2),
    Quantize(BF16, 9216, "gelu_tanh", gated=True, gap=9216),
    Quantize(BF16, 4304, "gelu_tanh"),
    Quantize(FP16, 29568, "gelu_tanh", gated=True),
    Quantize(FP32, 4096, "gelu_quick"),
    Quantize(BF16, 3072, "gelu"),
    *(
        Decode8(64, kind, nested, 11008, transposed)
        for kind in ("nf4", "fp4")
        for nested in (False, True)
        for transposed in (False, True)
    ),
    *(Decode8(size, nested=True, transposed=True) for size in (32, 128, 4096)),
]
KERNELS = [
    (norms_triton, ("forward_kernel",)),
    (quantize_rows_triton, ("quantize_kernel", "activation_backward_kernel")),
    (fp8_linear_triton, ("row_scales_kernel", "decode_kernel")),
]


def compile_case(sm: int, case: NamedTuple) -> list[str]:
    """One line for each kernel; those over a limit end in what they are over."""
    built = recorded(sm, KERNELS)
    case.launch()
    return described(sm, case, built)


def main():
    cards = [sm for sm in SMEM_LIMIT if sm >= 89]
    compile_all(compile_case, [(sm, case) for sm in cards for case in CASES])


if __name__ == "__main__":
    main()
