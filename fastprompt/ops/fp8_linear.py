"""Products with frozen 4-bit weights in fp8: bitsandbytes' storage decoded straight to e4m3.

    s_o = max over row o's blocks of |block's scale| / 448       W ≈ diag(s) W8
    W8  = e4m3(W / s)                                            from float32: no bfloat16 between
    y   = x Wᵀ + b = (x8 W8ᵀ) · (scale of x8's row) · s_o + b
    dx  = dy W     = (dy · s)8 W8 · (scale of (dy · s)8's row)

One W8 serves both directions, so that dx is the gradient of the very product that ran. In dx the
sum runs over W's rows and no scale can stand behind it: s goes into dy, before dy's rows are
quantised. The largest of a block's sixteen values is 1, so s is exact and needs no pass over W.

Tensor cores take fp8 operands with the summed axis contiguous alone (sm_89, sm_90): W8 is decoded
as [out, in] for y and as [in, out] for dx, into the scratch memory that all decoded weights share.

On CUDA the product is `torch._scaled_mm`, with its fast accumulation (partial sums of some 14
bits); on the CPU the same numbers multiplied in float32. Both return bfloat16.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastprompt.ops.checks import by_triton
from fastprompt.ops.nf4_linear import decode as decode_dense
from fastprompt.ops.packed import Packed, block_scales
from fastprompt.ops.quantize_rows import E4M3, LEAST, Quantized
from fastprompt.ops.scratch import scratch

OUT = torch.bfloat16  # what row-scaled products return on every card
MULTIPLE = 16  # of rows and columns, which fp8 products want


def why_not(rows: int, columns: int, blocksize: int) -> str | None:
    """What keeps a 4-bit weight of this shape from an fp8 product."""
    if rows % MULTIPLE or columns % MULTIPLE:
        return f"[{rows}, {columns}], fp8 wants multiples of {MULTIPLE}"
    if blocksize & (blocksize - 1) or not 32 <= blocksize <= 4096:
        return f"blocks of {blocksize}, fp8 wants a power of two from 32 to 4096"
    if columns % blocksize:
        return f"rows of {columns}, fp8 wants whole blocks of {blocksize}"
    return None


# ---- decoding ----


def row_scales(weights: Sequence[Packed], *, backend: str = "auto") -> Tensor:
    """s [sum of rows] float32 of weights under one another."""
    out = weights[0].code.new_empty(sum(w.rows for w in weights))
    for w, part in zip(weights, out.split([w.rows for w in weights]), strict=True):
        if by_triton(part, backend):
            from fastprompt.ops import fp8_linear_triton as triton

            triton.row_scales(w, part)
        else:
            blocks = block_scales(w)[: w.rows * w.columns // w.blocksize]
            largest = blocks.view(w.rows, -1).abs().amax(1)
            part.copy_(largest.clamp_(min=LEAST) / torch.finfo(E4M3).max)
    return out


def decode(w: Packed, scale: Tensor, out: Tensor, *, backend: str = "auto") -> None:
    """W8 into ``out`` [rows, columns] e4m3 of any strides; ``scale`` [rows]."""
    if by_triton(out, backend):
        from fastprompt.ops import fp8_linear_triton as triton

        triton.decode(w, scale, out)
        return
    dense = decode_dense(w, torch.empty(out.shape, dtype=torch.float32, device=out.device))
    out.copy_(dense.mul_((1 / scale)[:, None]))


@contextmanager
def decoded(weights: Sequence[Packed], scales: Tensor, transposed: bool) -> Iterator[Tensor]:
    """W8 of weights under one another: [sum of rows, columns], or [columns, sum of rows].

    Valid inside ``with`` alone, as `nf4_linear.decoded`.
    """
    rows, columns = [w.rows for w in weights], weights[0].columns
    with scratch(sum(rows) * columns, E4M3, scales.device) as flat:
        whole = flat.view(columns, -1) if transposed else flat.view(-1, columns)
        parts = (whole.mT if transposed else whole).split(rows)
        for w, scale, out in zip(weights, scales.split(rows), parts, strict=True):
            decode(w, scale, out)
        yield whole


_kept_ones: dict[tuple[int, torch.device], Tensor] = {}


def _ones(n: int, device: torch.device) -> Tensor:
    """What a product's columns are scaled by where nothing is to be scaled."""
    kept = _kept_ones.get((n, device))
    if kept is None:
        with torch.inference_mode(False):
            kept = torch.ones(n, device=device)
        # memory of a CUDA graph that is captured is not to be used outside it
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _kept_ones[n, device] = kept
    return kept


def _multiply(x: Quantized, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """[..., n] bfloat16 of x [..., k] and ``weight`` [n, k] e4m3, whose rows have ``scale`` [n]."""
    (values, rows), lead = (t.flatten(0, -2) for t in x), x.values.shape[:-1]
    if values.is_cuda:
        y = torch._scaled_mm(
            values, weight.t(), scale_a=rows, scale_b=scale[None], bias=bias,
            out_dtype=OUT, use_fast_accum=True,
        )  # fmt: skip
    else:
        y = (values.float() @ weight.float().t()).mul_(rows).mul_(scale)
        y = (y if bias is None else y.add_(bias)).to(OUT)
    return y.unflatten(0, lead)


def _product(
    x: Quantized, weights: Sequence[Packed], scales: Tensor, bias: Tensor | None
) -> Tensor:
    with decoded(weights, scales, transposed=False) as dense:
        return _multiply(x, dense, scales, bias)


def _product_backward(dy: Quantized, weights: Sequence[Packed], scales: Tensor) -> Tensor:
    with decoded(weights, scales, transposed=True) as dense:
        return _multiply(dy, dense, _ones(len(dense), dense.device), None)


# ---- ops for the compiler, which need not look into them ----

_WEIGHTS = "Tensor?[] tensors, int[] sizes, str[] kinds"
torch.library.define(
    "fastprompt::fp8_linear",
    f"(Tensor values, Tensor scale, Tensor scales, Tensor? bias, {_WEIGHTS}) -> Tensor",
)
torch.library.define(
    "fastprompt::fp8_linear_backward",
    f"(Tensor values, Tensor scale, Tensor scales, {_WEIGHTS}) -> Tensor",
)


def _flat(weights: Sequence[Packed]) -> tuple[list, list, list]:
    tensors = [t for w in weights for t in w[:6]]
    return tensors, [n for w in weights for n in w[6:10]], [w.kind for w in weights]


def _opened(tensors: list, sizes: list, kinds: list) -> list[Packed]:
    return [
        Packed(*tensors[6 * i : 6 * i + 6], *sizes[4 * i : 4 * i + 4], kind)
        for i, kind in enumerate(kinds)
    ]


def _forward(values, scale, scales, bias, *weights):
    return _product(Quantized(values, scale), _opened(*weights), scales, bias)


def _backward(values, scale, scales, *weights):
    return _product_backward(Quantized(values, scale), _opened(*weights), scales)


torch.library.impl("fastprompt::fp8_linear", "CompositeExplicitAutograd", _forward)
torch.library.impl("fastprompt::fp8_linear_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("fastprompt::fp8_linear")
def _result(values, scale, scales, bias, *weights):
    return values.new_empty(*values.shape[:-1], scales.shape[0], dtype=OUT)


@torch.library.register_fake("fastprompt::fp8_linear_backward")
def _gradient(values, scale, scales, *weights):
    return values.new_empty(*values.shape[:-1], _opened(*weights)[0].columns, dtype=OUT)


# ---- what a frozen block calls ----


def fp8_linear(
    x: Quantized, weights: Sequence[Packed], scales: Tensor, bias: Tensor | None
) -> Tensor:
    """x Wᵀ + b, [..., sum of rows] bfloat16, of weights that share ``x``; no autograd of its own.

    Args:
        x: [..., in], of `quantize_rows`.
        weights: opened by `packed.unpack`, of as many columns; `why_not` has nothing against them.
        scales: their `row_scales`.
        bias: [sum of rows] bfloat16.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastprompt.fp8_linear(*x, scales, bias, *_flat(weights))
    return _product(x, weights, scales, bias)


def fp8_linear_backward(dy: Quantized, weights: Sequence[Packed], scales: Tensor) -> Tensor:
    """dx [..., in] bfloat16: the sum of dy W over the weights.

    ``dy`` [..., sum of rows]: the gradients beside one another, quantised with ``factor=scales``.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastprompt.fp8_linear_backward(*dy, scales, *_flat(weights))
    return _product_backward(dy, weights, scales)
