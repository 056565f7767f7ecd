"""Compile the kernels of frozen blocks (norms, activations, rope, decoding) for the cards we serve.

See compile_targets.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from compile_targets import SMEM_LIMIT, CompileOnly, Recorder, compile_all, described, tool
from triton.runtime import driver

from fastprompt.ops import activations_triton, dequantize_4bit_triton, norms_triton, rope_triton
from fastprompt.ops.checks import MOST_CHANNELS
from fastprompt.ops.packed import Packed

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Norm(NamedTuple):
    dtype: torch.dtype
    D: int
    kind: str = "rms"  # "rms", "gemma", "layer", "bare" (a layer norm without weight and bias)
    residual: bool = False
    weight: torch.dtype = FP32
    gap: int = 0  # between rows
    out: torch.dtype | None = None  # of y and dy, where x is a wider residual stream

    def launch(self):
        x, r, dy = rows(3, self.D, self.dtype, self.gap)
        y, total, dx = torch.empty(3, 2, 5, self.D, dtype=self.dtype)
        y, dy = (t.to(self.out or self.dtype) for t in (y, dy))
        weight = bias = mean = None
        if self.kind != "bare":
            weight = torch.empty(self.D, dtype=self.weight)
        if self.kind == "layer":
            bias = torch.empty(self.D, dtype=self.weight)
        if self.kind in ("layer", "bare"):
            mean = torch.empty(2, 5)
        rstd, offset = torch.empty(2, 5), float(self.kind == "gemma")
        r, dr, total = (r, r, total) if self.residual else (None, None, None)
        first = self.kind == "rms"
        norms_triton.forward(x, r, weight, bias, 1e-6, offset, first, y, total, mean, rstd)
        center = mean is not None
        norms_triton.backward(dy, x, weight, mean, rstd, dr, 1e-6, offset, center, dx)
        norms_triton.backward(dy, x, weight, None, None, dr, 1e-6, offset, center, dx)


class Activation(NamedTuple):
    dtype: torch.dtype
    F: int
    kind: str = "silu"
    gated: bool = True
    gap: int = 0

    def launch(self):
        gate, up, dy = rows(3, self.F, self.dtype, self.gap)
        if not self.gated:
            up = None
        activations_triton.forward(gate, up, self.kind, dy)
        activations_triton.backward(dy, gate, up, self.kind, gate, up)


class Rope(NamedTuple):
    dtype: torch.dtype
    Hq: int
    Hkv: int
    d: int
    r: int
    angles: torch.dtype = FP32
    gap: int = 0

    def launch(self):
        q, k = (
            torch.empty(2, 5, h, self.d + self.gap, dtype=self.dtype)[..., : self.d].transpose(1, 2)
            for h in (self.Hq, self.Hkv)
        )
        cos, sin = torch.empty(2, 1, 5, self.r, dtype=self.angles)
        into = torch.empty_like(q), torch.empty_like(k)
        rope_triton.turn(q, k, cos, sin, False, *into)
        rope_triton.turn(q, k, cos, sin, True, q, k)


class Decode(NamedTuple):
    dtype: torch.dtype
    blocksize: int
    kind: str = "nf4"
    nested: bool = False
    columns: int = 4096

    def weight(self) -> Packed:
        n = 3 * self.columns
        blocks = -(n // -self.blocksize)
        second = (None, None, None, 1)
        absmax = torch.empty(blocks)
        if self.nested:
            absmax = absmax.to(torch.uint8)
            second = torch.empty(256), torch.empty(-(blocks // -256)), torch.empty(()), 256
        *tensors, blocksize2 = second
        packed = torch.empty((n + 1) // 2, dtype=torch.uint8)
        sizes = self.blocksize, blocksize2, 3, self.columns, self.kind
        return Packed(packed, torch.empty(16), absmax, *tensors, *sizes)

    def launch(self):
        dequantize_4bit_triton.decode(self.weight(), torch.empty(3, self.columns, dtype=self.dtype))


# every number of warps, each dtype, widths that are powers of two and are not, unaligned rows
CASES = [
    Norm(BF16, 4096, residual=True, weight=BF16),
    Norm(BF16, 4096),
    Norm(BF16, 128, weight=BF16),
    Norm(BF16, 3584, "gemma", residual=True, weight=BF16),
    Norm(FP16, 768, "layer", residual=True),
    Norm(BF16, 1024, "layer", weight=BF16),
    Norm(BF16, 1024, "bare"),
    Norm(FP32, 5120, residual=True),
    Norm(FP32, MOST_CHANNELS, "layer", residual=True),
    Norm(BF16, MOST_CHANNELS, residual=True, weight=BF16),
    Norm(FP16, MOST_CHANNELS - 3, "layer", residual=True, gap=1),
    Norm(FP32, 1, "layer", residual=True, gap=1),
    Norm(BF16, 77, "gemma", residual=True, gap=1),
    *(Norm(FP32, 4096, kind, weight=BF16, out=BF16) for kind in ("rms", "gemma", "layer")),
    Norm(FP32, MOST_CHANNELS, residual=True, weight=FP16, out=FP16),
    Activation(BF16, 11008),
    Activation(BF16, 11008, gap=11008),
    Activation(FP16, 9216, "gelu_tanh", gap=9216),
    Activation(FP32, 577, gap=1),
    Activation(BF16, 4304, "gelu_tanh", gated=False),
    Activation(BF16, 4096, "gelu_quick", gated=False),
    Activation(FP32, 3072, "gelu", gated=False),
    Activation(FP16, 77, "gelu", gated=False, gap=1),
    Rope(BF16, 32, 32, 128, 128),
    Rope(BF16, 32, 8, 128, 128, angles=BF16),
    Rope(BF16, 8, 1, 256, 256),
    Rope(FP16, 32, 32, 80, 32),
    Rope(FP32, 64, 8, 128, 128),
    Rope(FP32, 3, 1, 40, 6, gap=1),
    Rope(BF16, 0, 2, 64, 64),
    *(Decode(BF16, size, nested=nested) for size in (64, 128, 4096) for nested in (False, True)),
    *(Decode(dtype, 64, kind, True) for dtype in (FP16, FP32) for kind in ("nf4", "fp4")),
    *(Decode(BF16, size, "fp4") for size in (32, 256, 512, 1024, 2048)),
    Decode(FP16, 32, nested=True, columns=77),
]
KERNELS = [
    (norms_triton, ("forward_kernel", "backward_kernel")),
    (activations_triton, ("forward_kernel", "backward_kernel")),
    (rope_triton, ("turn_kernel",)),
    (dequantize_4bit_triton, ("decode_kernel",)),
]


def rows(count: int, width: int, dtype: torch.dtype, gap: int) -> list[torch.Tensor]:
    return [torch.empty(2, 5, width + gap, dtype=dtype)[..., :width] for _ in range(count)]


def recorded(sm: int, kernels: list[tuple[ModuleType, tuple[str, ...]]]) -> list:
    """What will have been built once the kernels' launchers are run."""
    built = []
    driver.set_active(CompileOnly(sm))
    for module, names in kernels:
        for name in names:
            kernel = getattr(module, name)
            kernel = kernel.kernel if isinstance(kernel, Recorder) else kernel
            setattr(module, name, Recorder(kernel, built))
    return built


def compile_case(sm: int, case: NamedTuple) -> list[str]:
    """One line for each kernel; those over a limit end in what they are over."""
    built = recorded(sm, KERNELS)
    case.launch()
    lines = described(sm, case, built)
    if isinstance(case, Decode):  # bitsandbytes rounds twice in nested scales
        fused = "FFMA" in tool("cuobjdump", "-sass", built[0][2].asm["cubin"])
        lines = [line + "OVER no fused multiply-add" * fused for line in lines]
    return lines


def main():
    compile_all(compile_case, [(sm, case) for sm in SMEM_LIMIT for case in CASES])


if __name__ == "__main__":
    main()
