"""Products with a nested NF4 weight: forward, and with dx.

On the CPU set OMP_WAIT_POLICY=passive on a machine that other processes use too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import check
from benchmarks.registry import Benchmark, Provider, Step, Verdict
from benchmarks.weights import bitsandbytes, nf4
from fastprompt import ops
from fastprompt.ops.nf4_linear import decoded
from fastprompt.ops.packed import unpack

FORWARD, DX = "forward", "forward+backward (dx)"
TOKENS = (1, 8, 32, 128, 512, 2048)


@dataclass(frozen=True)
class Product:
    tokens: int
    rows: int
    columns: int

    def __str__(self) -> str:
        return f"M{self.tokens} W {self.rows}x{self.columns}"


def _shapes(device: str, quick: bool) -> dict[str, Product]:
    if quick:
        return {f"SmolLM2-135M up M{m}": Product(m, 1536, 576) for m in (1, 64)}
    rows, name = (11008, "up") if device == "cuda" else (4096, "q")
    tokens = (*TOKENS, 16, 64, 256, 1024) if device == "cuda" else TOKENS
    return {f"Llama-7B {name} M{m}": Product(m, rows, 4096) for m in sorted(tokens)}


class Case:
    def __init__(self, shape: Product, dtype: torch.dtype, device: str):
        like = dict(dtype=dtype, device=device)
        self.weight = nf4(torch.randn(shape.rows, shape.columns, **like))
        self.dense = bitsandbytes().dequantize_4bit(*self.weight)
        self.x = torch.randn(shape.tokens, shape.columns, **like)
        self.dy = torch.randn(shape.tokens, shape.rows, **like)

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        x, dy, dense = (t.double() for t in (self.x, self.dy, self.dense))
        return dict(y=x @ dense.mT, dx=dy @ dense)

    @cached_property
    def limits(self) -> dict[str, float]:
        """The one rule, with the dense product as eager PyTorch."""
        eager = dict(y=F.linear(self.x, self.dense), dx=self.dy @ self.dense)
        return {name: check.limit(eager[name], want) for name, want in self.truth.items()}


def judge(case: Case, mode: str, results: dict[str, Tensor]) -> Verdict:
    truth = {name: case.truth[name] for name in ("y", "dx")[: 1 + (mode == DX)]}
    return check.judge(results, truth, case.limits, case.x.dtype)


def _way(multiply: Callable[[Case, Tensor], Tensor]) -> Callable[[Case, str], Step]:
    def build(case: Case, mode: str) -> Step:
        x = case.x.detach().requires_grad_(mode == DX)

        def run():
            if mode == FORWARD:
                with torch.no_grad():
                    return (multiply(case, x),)
            y = multiply(case, x)
            return y.detach(), torch.autograd.grad(y, x, case.dy)[0]

        return Step(run, lambda given: dict(zip(("y", "dx"), given, strict=False)))

    return build


def _bitsandbytes(case: Case, x: Tensor) -> Tensor:
    import bitsandbytes

    return bitsandbytes.matmul_4bit(x, *case.weight)


class _Decoded(torch.autograd.Function):
    """Decoded whole, for torch's product, forward and backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        with decoded(weight, dtype=x.dtype) as dense:
            return F.linear(x, dense)

    @staticmethod
    def backward(ctx, dy):
        with decoded(ctx.weight, dtype=dy.dtype) as dense:
            return dy @ dense, None


BENCHMARK = Benchmark(
    name="nf4_linear",
    about="x·Wᵀ with a nested NF4 weight, and dx",
    modes=(FORWARD, DX),
    dtypes=dict(cpu=("bf16", "fp32", "fp16"), cuda=("bf16", "fp16")),
    baseline="dense",
    shapes=_shapes,
    case=Case,
    judge=judge,
    providers={
        "dense": Provider(
            _way(lambda case, x: F.linear(x, case.dense)), "F.linear, the decoded weight kept"
        ),
        "bitsandbytes": Provider(_way(_bitsandbytes), "bitsandbytes.matmul_4bit"),
        "decode": Provider(
            _way(lambda case, x: _Decoded.apply(x, unpack(case.weight))),
            "our decoding, whole, then torch's product",
            ours=True,
        ),
        "fastprompt": Provider(
            _way(lambda case, x: ops.nf4_linear(x, case.weight)), "ops.nf4_linear", ours=True
        ),
    },
)
