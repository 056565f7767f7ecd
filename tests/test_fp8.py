"""fp8's ops: rows with scales, 4-bit weights in e4m3, their products, on every backend here."""

import importlib
import itertools

import pytest
import torch
from backends import every_backend_but_native as every_backend
from backends import every_pair_but_native as every_pair
from fp8_casts import fp8_casts as fp8_casts
from frozen import NF4

from fastprompt.ops import quantize_rows
from fastprompt.ops.dequantize_4bit import dequantize_4bit
from fastprompt.ops.fp8_linear import decode, fp8_linear, fp8_linear_backward, row_scales, why_not
from fastprompt.ops.layer_norm import forward as layer_norm
from fastprompt.ops.packed import unpack
from fastprompt.ops.quantize_rows import (
    ACTIVATIONS,
    E4M3,
    E5M2,
    Quantized,
    activation,
    activation_backward,
)
from fastprompt.ops.rms_norm import forward as rms_norm

pytestmark = pytest.mark.usefixtures("fp8_casts")
MOST = {E4M3: 448.0, E5M2: 57344.0}
HALF_STEP = {E4M3: 2**-4, E5M2: 2**-3}  # of a number, and least_step / 2 near 0
LEAST_STEP = {E4M3: 2.0**-9, E5M2: 2.0**-16}


def assert_quantized(got: Quantized, want: torch.Tensor, backend, dtype=E4M3):
    """``got`` is ``want`` [..., C] (float32, exact but for a rounding) in rows of fp8."""
    assert got.values.dtype == dtype and got.scale.dtype == torch.float32
    assert got.values.is_contiguous()
    assert got.values.shape == want.shape and got.scale.shape == (*want.shape[:-1], 1)
    scale = want.abs().amax(-1, keepdim=True) / MOST[dtype]
    torch.testing.assert_close(got.scale, scale, rtol=1e-5, atol=1e-30)
    off = (got.values.float() - want / got.scale).abs()
    near = 2e-5 * (want / got.scale).abs()  # of numbers that are not the definition's to the bit
    half = (HALF_STEP[dtype] * got.values.float().abs()).clamp(min=LEAST_STEP[dtype] / 2)
    assert (off <= half + near).all()


def randn(*shape, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return (torch.randn(shape) * torch.logspace(-3, 1, shape[-1])).to(dtype)


@pytest.mark.parametrize("to", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(3, 80), (2, 5, 77), (1, 1), (2, 2, 3, 5000)])
@every_pair
def test_rows(backend, dtype, shape, to):
    x = randn(*shape, dtype=dtype)
    factor = torch.rand(shape[-1]) + 0.1
    got = quantize_rows(x, dtype=to, backend=backend)
    assert_quantized(got, x.float(), backend, to)
    got = quantize_rows(x, factor, dtype=to, backend=backend)
    assert_quantized(got, x.float() * factor, backend, to)


@every_backend
def test_what_fp8_holds_is_exact(backend):
    """Numbers of e4m3, the largest among them, times any power of two."""
    codes = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    x = torch.cat([codes, -codes])[torch.randperm(254)] * torch.tensor([[1.0], [2**-20], [2**30]])
    got = quantize_rows(x, backend=backend)
    assert torch.equal(got.dequantize(), x)
    # rows of zeros, and of numbers that no scale serves
    tiny = torch.tensor([[0.0, 0.0], [1e-38, 0.0], [1e-30, -1e-30]])
    got = quantize_rows(tiny, backend=backend).dequantize()
    assert torch.equal(got[:2], torch.zeros(2, 2)) and torch.allclose(got[2], tiny[2])


@every_backend
def test_what_is_not_finite_is_seen(backend):
    x = torch.ones(3, 40)
    x[0, 3], x[1, 4] = float("nan"), float("inf")
    got = quantize_rows(x, backend=backend).dequantize()
    assert got[:2].isnan().any(-1).all() and torch.equal(got[2], x[2])


@every_backend
def test_views(backend):
    wide = randn(5, 3, 100)
    x = wide.transpose(0, 1)[..., 7:87]
    got = quantize_rows(x, backend=backend)
    assert_quantized(got, x, backend)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("backend, dtype", [("plain", torch.bfloat16), ("triton", torch.float16)])
def test_activations(kind, gated, backend, dtype):
    both = randn(2, 5, 2 * 60, dtype=dtype)
    gate, up = both.split(60, -1)  # as one product gives them
    up = up if gated else None
    da, factor = randn(2, 5, 60, dtype=dtype, seed=1), torch.rand(120 if gated else 60) + 0.1
    given = [t.double().requires_grad_() for t in ((gate, up) if gated else (gate,))]
    definitions = dict(
        silu=torch.nn.functional.silu,
        gelu=torch.nn.functional.gelu,
        gelu_tanh=lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        gelu_quick=lambda x: x * torch.sigmoid(1.702 * x),
    )
    a = definitions[kind](given[0]) * (given[1] if gated else 1)
    assert_quantized(activation(kind, gate, up, backend=backend), a.detach().float(), backend)
    a.backward(da.double())
    want = (torch.cat([t.grad for t in given], -1) * factor).float()
    got = activation_backward(kind, da, gate, up, factor, backend=backend)
    assert_quantized(got, want, backend)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["llama", "late", "gemma", "layer"])
@every_pair
def test_norms(backend, dtype, kind, residual):
    x, r = randn(2, 5, 96, dtype=dtype), randn(2, 5, 96, dtype=dtype, seed=1)
    w, b = torch.randn(2, 96).to(dtype)
    out, scale = torch.empty(2, 5, 96, dtype=E4M3), torch.empty(2, 5, 1)
    options = dict(out=out, scale=scale, residual=r if residual else None, backend=backend)
    h = (x + r) if residual else x
    if kind == "layer":
        y, total, *_ = layer_norm(x, w, b, 1e-5, **options)
        want = torch.nn.functional.layer_norm(h.double(), (96,), w.double(), b.double(), 1e-5)
    else:
        offset, first = float(kind == "gemma"), kind == "llama"
        y, total, _ = rms_norm(x, w, 1e-5, offset=offset, cast_first=first, **options)
        z = torch.nn.functional.rms_norm(h.double(), (96,), eps=1e-5)
        want = (z.to(dtype) if first else z) * (offset + w.double())
    assert y is out and torch.equal(total, h)
    assert_quantized(Quantized(out, scale), want.float(), backend)


@pytest.mark.parametrize("out", [None, torch.empty(2, 8)])
def test_norms_want_memory_in_fp8(out):
    x, w, scale = torch.ones(2, 8), torch.ones(8), torch.empty(2, 1)
    with pytest.raises(ValueError, match="out: want"):
        rms_norm(x, w, 1e-5, out=out, scale=scale)
    with pytest.raises(ValueError, match="out: want"):
        layer_norm(x, w, None, 1e-5, out=out, scale=scale)


# ---- weights ----


def weights(nested, kind="nf4", blocksize=64, sizes=((48, 256), (160, 256))):
    from bitsandbytes.functional import quantize_4bit

    found = []
    for i, size in enumerate(sizes):
        w = randn(*size, seed=i) * torch.logspace(-2, 2, size[0])[:, None]
        options = dict(blocksize=blocksize, quant_type=kind, compress_statistics=nested)
        packed, state = quantize_4bit(w.bfloat16(), **options)
        found.append((packed, state))
    return found


every_weight = pytest.mark.parametrize(
    "kind, nested, blocksize",
    [(k, n, b) for k, n, b in itertools.product(["nf4", "fp4"], [False, True], [64, 128])]
    + [("nf4", True, 32)],
)
needs_bitsandbytes = pytest.mark.skipif(*NF4.marks[0].args, **NF4.marks[0].kwargs)


@needs_bitsandbytes
@every_weight
@every_backend
def test_weights(backend, kind, nested, blocksize):
    for given in weights(nested, kind, blocksize):
        w, dense = unpack(given), dequantize_4bit(given, dtype=torch.float32)
        scale = row_scales([w], backend=backend)
        torch.testing.assert_close(scale, dense.abs().amax(1) / 448, rtol=1e-6, atol=0)
        whole = torch.zeros(w.columns, w.rows + 16, dtype=E4M3)
        for out in (torch.zeros(w.rows, w.columns, dtype=E4M3), whole[:, 8:-8].mT):
            decode(w, scale, out, backend=backend)
            assert_quantized(Quantized(out.contiguous(), scale[:, None]), dense, backend)
        assert not whole[:, :8].float().any() and not whole[:, -8:].float().any()


@needs_bitsandbytes
@pytest.mark.parametrize("biased", [False, True])
def test_products(biased):
    """The very product of what was quantised, rounded to bfloat16 once; dx is its gradient."""
    opened = [unpack(given) for given in weights(True)]
    x, dy = randn(2, 5, 256, dtype=torch.bfloat16), randn(2, 5, 208, dtype=torch.bfloat16, seed=1)
    bias = torch.randn(208).bfloat16() if biased else None
    scales = row_scales(opened)
    dense = torch.zeros(208, 256, dtype=E4M3)
    for w, s, out in zip(opened, scales.split([48, 160]), dense.split([48, 160]), strict=True):
        decode(w, s, out)
    dense = dense.double() * scales[:, None]
    x8 = quantize_rows(x)
    want = x8.dequantize().double() @ dense.mT + (bias if biased else 0)
    y = fp8_linear(x8, opened, scales, bias)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 5, 208)
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=1e-4)
    dy8 = quantize_rows(dy, scales)
    dx = fp8_linear_backward(dy8, opened, scales)
    want = (dy8.dequantize().double() / scales) @ dense
    assert dx.dtype == torch.bfloat16
    torch.testing.assert_close(dx.double(), want, rtol=2**-8, atol=1e-5)
    off = (dx.double() - dy.double() @ dense).norm() / dx.double().norm()
    assert 0.005 < off < 0.04
    ops = torch.ops.fastprompt  # as the compiler calls them
    tensors = [t for w in opened for t in w[:6]]
    sizes, kinds = [n for w in opened for n in w[6:10]], [w.kind for w in opened]
    for op, inputs in (
        (ops.fp8_linear, (*x8, scales, bias)),
        (ops.fp8_linear_backward, (*dy8, scales)),
    ):
        given = (*inputs, tensors, sizes, kinds)  # the schema's test multiplies fp8, torch cannot
        torch.library.opcheck(op.default, given, test_utils="test_faketensor")
    assert torch.equal(ops.fp8_linear(*x8, scales, bias, tensors, sizes, kinds), y)


def test_which_weights():
    assert why_not(4096, 11008, 64) is None
    assert why_not(1152, 4304, 64) == "rows of 4304, fp8 wants whole blocks of 64"
    assert why_not(100, 128, 64) == "[100, 128], fp8 wants multiples of 16"
    assert "power of two" in why_not(96, 96, 48)


@pytest.mark.parametrize(
    "x, options, message",
    [
        (torch.ones(2, 3).double(), {}, "at most float32"),
        (torch.ones(2, 0), {}, r"want \[..., C\]"),
        (torch.ones(2, 3).int(), {}, "x: want a tensor of one of"),
        (torch.ones(3, 2).T, {}, "contiguous last axis"),
        (torch.ones(2, 3), dict(dtype=torch.float16), "dtype: want"),
        (torch.ones(2, 3), dict(factor=torch.ones(2)), r"factor: want \[3\]"),
        (torch.ones(2, 3), dict(factor=torch.ones(3).double()), "factor: want .*torch.float32"),
        (torch.ones(2, 3), dict(factor=torch.ones(6)[::2]), r"factor: want contiguous .*\(2,\)"),
        (torch.ones(2, 3), dict(backend="cuda"), "backend: want one of"),
    ],
)
def test_refusals(x, options, message):
    with pytest.raises(ValueError, match=message):
        quantize_rows(x, **options)


def test_what_a_graph_captures_is_not_kept(monkeypatch):
    """A graph's memory is its own: what is made in it would be used by others as well."""
    linear = importlib.import_module("fastprompt.ops.fp8_linear")
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch, "ones", lambda n, device: torch.full((n,), 1.0))
    asked = 4321, torch.device("cuda", 0)
    assert linear._ones(*asked) is not linear._ones(*asked)
    capturing[0] = False
    kept = linear._ones(*asked)
    capturing[0] = True
    assert linear._ones(*asked) is kept
    linear._kept_ones.pop(asked)
