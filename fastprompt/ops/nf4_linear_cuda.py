"""`nf4_linear` of few tokens on a GPU, by csrc/cuda: no decoded weight in between.

    y  = x Wᵀ + b    the codes rounded to x's dtype, each block's sum times its scale in float32
    dx = dy W        dy times the scale of each row's block, rounded to bfloat16, times the codes

Codes are multiplied by a gain before they are rounded, and sums divided by it: of the factors in
1 .. 2 the one whose products lie nearest to bfloat16 numbers. Weighed by how often a normal weight
takes them, NF4's codes are off by 0.0008 of their size (0.0014 without it), FP4's by 2e-8 (0.0013).

None of these kernels has run on a card yet: their index arithmetic is tested on the host. So each
card is given a small product of every kernel first (`why_not`).
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fastprompt import native, native_cuda
from fastprompt.ops.packed import Packed, decode_by_torch

GAINS = {"nf4": 1.43671, "fp4": 1.125}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class Way(NamedTuple):
    """How a product of up to ``most`` tokens is made."""

    most: int
    tile: int  # tokens of a thread block
    warps: int  # of a thread block
    across: int  # warps side by side, up to 4, which read the same tokens; the others split the sum


# More tokens take a decoded weight and torch's product. Both tables wait for their measurement:
#     python -m benchmarks nf4_linear --json benchmarks/results/nf4_linear-h100.json
# What there is of FORWARD is a first draft with the same table and fragments: H100, bf16, W
# 11008x4096, in us (cuBLAS with a dense weight / bitsandbytes / decoding alone takes 50):
FORWARD = (
    Way(8, 8, 8, 1),  # M=1: 30 (47 / 28)
    Way(16, 16, 8, 2),  # M=16: 33 (47 / 72)
    Way(32, 32, 8, 2),  # M=32: 40 (45 to 47)
    Way(64, 64, 8, 4),  # M=64: 54 (45 / 104); M=128: 88 (cuBLAS behind decoding: 95 to 100)
)
# Guesses, all of them: the draft had no backward. Above 32 tokens the weight is walked twice.
# In float16 dy times a scale may be a subnormal number, so that goes the other way.
BACKWARD = (
    Way(8, 8, 8, 2),
    Way(16, 16, 8, 2),
    Way(64, 32, 4, 2),
)

# ---- where they serve ----

_found: dict[torch.device, str | None] = {}  # why not, of each GPU that was asked for


def why_not(device: torch.device) -> str | None:
    """Why the kernels do not serve a device; None if they do.

    A GPU's first time each kernel is tried on it; where one fails or is wrong, none is used, and a
    warning says so.
    """
    if device.type != "cuda":
        return f"a {device.type} device"
    if device not in _found:
        if torch.cuda.is_current_stream_capturing():
            return "not tried before this CUDA graph's capture"
        _found[device] = why = native_cuda.why_not(device) or _trial(device)
        if why and why not in (native.OFF, native_cuda.OFF):
            warnings.warn(
                f"fastprompt's CUDA kernels are not usable on {device} ({why}); 4-bit weights are "
                "decoded for torch's products, or go to bitsandbytes: slower for few tokens",
                stacklevel=2,
            )
    return _found[device]


@torch.no_grad()
def _trial(device: torch.device) -> str | None:
    """What is wrong with a product of each kernel; None if nothing is."""
    rows, columns, blocks = 128, 192, 128 * 192 // 64

    def some(*shape: int) -> Tensor:  # in -1 .. 1, without a change to the generators' state
        count = torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device=device)
        return ((count * 12.9898).sin() * 43758.5453).frac().view(shape)

    packed = some(rows * columns // 2).mul(127).add(128).byte()
    second = (some(256), some(blocks // 4), some(1)[0] + 2)
    nested = Packed(packed, some(16), packed[:blocks], *second, 64, 4, rows, columns, "nf4")
    plain = nested._replace(absmax=some(blocks), code2=None, absmax2=None, offset=None)
    cases = [(forward, way, dtype) for dtype in DTYPES for way in FORWARD]
    cases += [(backward, way, torch.bfloat16) for way in BACKWARD]
    for w, bias, missing in ((nested, None, 0), (plain, some(rows), 3)):
        dense = decode_by_torch(w, torch.float64)
        for multiply, way, dtype in cases:
            back, tokens = multiply is backward, way.most - missing
            x = some(tokens, rows if back else columns).to(dtype)
            added = () if back or bias is None else (bias.to(dtype),)
            want = x.double() @ (dense if back else dense.mT) + sum(added)
            # a weight as small as this one would never have its warps side by side
            for across in (1, 2, 4)[: way.across.bit_length()]:
                try:
                    got = multiply(x, w, *added, across=across)
                    right = bool((got.double() - want).norm() <= 0.01 * want.norm())
                except RuntimeError as error:
                    return str(error)
                if not right:
                    return f"{multiply.__name__} of {tokens} tokens in {dtype} is wrong"
    return None


def serves_forward(tokens: int, dtype: torch.dtype, w: Packed) -> bool:
    """Whether `forward` takes as many tokens of the dtype."""
    return 0 < tokens <= FORWARD[-1].most and dtype in DTYPES and _serves(w)


def serves_backward(tokens: int, dtype: torch.dtype, w: Packed) -> bool:
    """Whether `backward` does."""
    return 0 < tokens <= BACKWARD[-1].most and dtype == torch.bfloat16 and _serves(w)


def _serves(w: Packed) -> bool:
    return (
        why_not(w.packed.device) is None
        and w.rows % 64 == 0 < w.rows
        and w.columns % 64 == 0 < w.columns
        and w.blocksize >= 64
        and not w.blocksize & (w.blocksize - 1)
        and not w.blocksize2 & (w.blocksize2 - 1)
        and w.packed.data_ptr() % 8 == 0
    )


# ---- products ----


def forward(
    x: Tensor, w: Packed, bias: Tensor | None = None, *, across: int | None = None
) -> Tensor:
    """x [..., columns] -> [..., rows], where `serves_forward`; bias [rows] in the dtype of x.

    ``across``: of `Way`; by default its own, or less where processors would be idle.
    """
    out = x.new_empty(*x.shape[:-1], w.rows)
    _launch("forward", FORWARD, x, out, bias, w, w.rows // 16, across)
    return out


def backward(dy: Tensor, w: Packed, *, across: int | None = None) -> Tensor:
    """dy [..., rows] -> dx [..., columns], where `serves_backward`; ``across`` as in `forward`."""
    out = dy.new_empty(*dy.shape[:-1], w.columns)
    _launch("backward", BACKWARD, dy, out, None, w, w.columns // 64, across)
    return out


def _launch(
    name: str,
    ways: tuple[Way, ...],
    x: Tensor,
    out: Tensor,
    bias: Tensor | None,
    w: Packed,
    units: int,
    across: int | None,
) -> None:
    """``units``: how many pieces of the output's width a warp takes one of."""
    tokens = x.numel() // x.shape[-1]
    way = next(way for way in ways if tokens <= way.most)
    rows = -(tokens // -way.tile)
    if across is None:
        across = way.across
        while across > 1 and units // across * rows < native_cuda.multiprocessors(x.device):
            across //= 2  # rather tokens read more often than idle processors
    native_cuda.launch(
        f"nf4_{name}_{DTYPES[x.dtype]}_{way.tile}",
        (-(units // -across), rows),
        32 * way.warps,
        (
            _aligned(x), out, None if bias is None else _aligned(bias),
            w.packed, w.code, w.absmax, w.code2, w.absmax2, w.offset,
        ),
        (
            w.rows, w.columns, tokens,
            (w.blocksize // 64).bit_length() - 1, w.blocksize2.bit_length() - 1, across,
        ),
        GAINS[w.kind],
    )  # fmt: skip


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and where 16 bytes can be read at once."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x
