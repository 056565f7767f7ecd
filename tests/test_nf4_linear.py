"""The 4-bit product: values, gradients, refusals."""

import copy
import importlib
import threading
from types import SimpleNamespace

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Params4bit
from compare import assert_as_accurate

from fastprompt import native
from fastprompt.ops import scratch
from fastprompt.ops.nf4_linear import nf4_linear
from fastprompt.ops.packed import Packed, unpack

ops = importlib.import_module("fastprompt.ops.nf4_linear")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_native = pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))
FORMATS = [(kind, nested) for kind in ("nf4", "fp4") for nested in (False, True)]


@pytest.fixture
def decoding(monkeypatch):
    """Weights are decoded however few the tokens are."""
    monkeypatch.setattr(ops, "FUSED", ())


@pytest.fixture(params=["native", "decoding", "torch"])
def path(request, monkeypatch):
    """With the native part; decoding by it alone; and as if it were not there."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_load", lambda: (None, "not built"))
    elif not native.available():
        pytest.skip(str(native.why_missing()))
    elif request.param == "decoding":
        request.getfixturevalue("decoding")
    return request.param


def quantise(rows, columns, kind="nf4", nested=True, dtype=torch.float32, blocksize=64):
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    return bnb.quantize_4bit(
        dense, quant_type=kind, compress_statistics=nested, blocksize=blocksize
    )


def dense_of(weight, dtype=torch.float32):
    w = weight if isinstance(weight, Packed) else unpack(weight)
    with ops.decoded(w, dtype=dtype) as dense:
        return dense.clone()


def both(f, x, dy):
    y = f(x)
    return y, torch.autograd.grad(y, x, dy)[0]


# ---- the op ----


@pytest.mark.parametrize("kind, nested", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [64, 256])
def test_decoding_is_bitsandbytes(path, kind, nested, dtype, blocksize):
    # a multiple of the blocksize: with others bitsandbytes' own CPU kernel is wrong
    packed, state = quantise(96, 512, kind, nested, dtype, blocksize)
    want = bnb.dequantize_4bit(packed, state)
    assert torch.equal(dense_of((packed, state), dtype), want)


@pytest.mark.parametrize("kind, nested", FORMATS)
@pytest.mark.parametrize("rows, columns", [(5, 3), (7, 70), (96, 160), (64, 32)])
def test_odd_sizes(path, kind, nested, rows, columns):
    packed, state = quantise(rows, columns, kind, nested)
    w = unpack((packed, state))
    absmax = state.absmax
    if nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    values = state.code[nibbles] * absmax.repeat_interleave(64)[: len(nibbles), None].flatten()
    want = values[: rows * columns].view(rows, columns)
    assert torch.equal(dense_of(w), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(192,), (5, 192), (2, 3, 192), (0, 192)])
def test_product_and_gradient(path, dtype, shape):
    weight, bias = quantise(96, 192), torch.randn(96).to(dtype)
    dense = dense_of(weight)
    x = torch.randn(shape).to(dtype).requires_grad_()
    dy = torch.randn(*shape[:-1], 96).to(dtype)
    assert_as_accurate(
        lambda x: nf4_linear(x, weight, bias.to(x.dtype)),
        lambda x: F.linear(x, dense.to(x.dtype), bias.to(x.dtype)),
        [x],
        dy,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(192,), (1, 1, 192)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_single_token(path, dtype, shape, biased):
    """Generation: never worse than decoding to the dtype and multiplying there."""
    weight, bias = quantise(96, 192), torch.randn(96).to(dtype) if biased else None
    dense, x = dense_of(weight), torch.randn(shape).to(dtype)
    want = F.linear(x.double(), dense.double(), bias.double() if biased else None)
    eager, got = F.linear(x, dense.to(dtype), bias), nf4_linear(x, weight, bias)
    assert got.dtype == dtype and got.shape == want.shape
    error, limit = ((y.double() - want).norm() for y in (got, eager))
    assert error <= 2 * limit + 1e-6 * want.norm()


@pytest.mark.parametrize("kind, nested", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 19, 70, 140])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_some_tokens(kind, nested, dtype, tokens, blocksize):
    """On both sides of what the table says, against bitsandbytes' own decoded weight."""
    packed, state = weight = quantise(128, 384, kind, nested, blocksize=blocksize)
    dense, bias = bnb.dequantize_4bit(packed, state), torch.randn(128)
    wide = torch.randn(2, tokens, 500).to(dtype)
    x, dy = wide[..., 50:434].requires_grad_(), torch.randn(128).expand(2, tokens, 128)
    assert_as_accurate(
        lambda x: nf4_linear(x, weight, bias.to(x.dtype)),
        lambda x: F.linear(x, dense.to(x.dtype), bias.to(x.dtype)),
        [x],
        dy,
    )


def test_what_csrc_multiplies_without_decoding(monkeypatch):
    halves = (torch.bfloat16, torch.float16)
    table = [
        ("not here", DTYPES, range(99), range(99)),
        ("portable", halves, range(4, 9), range(9)),
        (native.isa(), DTYPES, range(1, 4), range(1, 3)),
    ]
    monkeypatch.setattr(ops, "FUSED", table)

    def chosen(*shape, rows=128, columns=192, blocksize=64, dtype=torch.float32, backward=False):
        weight = quantise(rows, columns, blocksize=blocksize)
        x = torch.ones(*shape, rows if backward else columns, dtype=dtype)
        return ops._multiplier(x, unpack(weight), backward)

    assert chosen() == chosen(1, 3) == chosen(2, backward=True) == chosen(rows=5) == native.isa()
    assert chosen(3, dtype=torch.float16) == native.isa()
    assert chosen(2, 2, dtype=torch.float16) == "portable"
    assert chosen(1, dtype=torch.bfloat16, backward=True) == "portable"
    assert chosen(0) is chosen(2, 2) is chosen(3, backward=True) is None
    assert chosen(1, dtype=torch.float64) is chosen(1, columns=160) is None
    assert chosen(1, columns=320, blocksize=128) is None
    monkeypatch.setattr(native, "_load", lambda: (None, "not built"))
    assert chosen() is None


def test_strided_inputs():
    weight = quantise(96, 192)
    wide, dy = torch.randn(4, 3, 400), torch.randn(96).expand(3, 4, 96)
    x = wide[:, :, 100:292].transpose(0, 1).requires_grad_()
    dense = dense_of(weight)
    assert_as_accurate(
        lambda x: nf4_linear(x, weight), lambda x: F.linear(x, dense.to(x.dtype)), [x], dy
    )


def test_gradient_in_float64(path):
    weight = quantise(6, 10)
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: nf4_linear(x, weight), x)
    assert torch.autograd.gradgradcheck(lambda x: nf4_linear(x, weight).square(), x)


def test_weights_share_one_buffer_and_nothing_is_kept(decoding):
    first, second = quantise(96, 192), quantise(192, 96, "fp4")
    x = torch.randn(4, 192, requires_grad=True)
    kept = []
    scratch.free_scratch()
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        middle = nf4_linear(x, first)
        before = middle.detach().clone()
        out = nf4_linear(middle, second)
    assert kept == [] and torch.equal(middle, before)
    dense = [dense_of(w) for w in (first, second)]
    dx = torch.autograd.grad(out.sum(), x)[0]
    torch.testing.assert_close(dx, torch.ones(4, 192) @ dense[1] @ dense[0])
    # one piece of memory, as large as the largest of the two
    (shared,) = vars(scratch._of_thread).values()
    before = shared.buffer.data_ptr()
    nf4_linear(middle, second), nf4_linear(x, first)
    assert shared.buffer.data_ptr() == before and shared.buffer.nbytes == 4 * 192 * 96
    scratch.free_scratch()
    assert vars(scratch._of_thread) == {}


def test_scratch_on_a_gpu(monkeypatch):
    """A piece for each stream, one user at a time; under graph capture the graph's own memory."""
    monkeypatch.setattr(torch, "empty", lambda *n, dtype, device: torch.zeros(*n, dtype=dtype))
    stream, capturing = SimpleNamespace(cuda_stream=1), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    device = torch.device("cuda", 0)
    scratch.free_scratch()

    def address(n=8):
        with scratch.scratch(n, torch.float32, device) as piece:
            shared = scratch._of_stream.get((device, stream.cuda_stream))
            assert piece.shape == (n,) and (capturing or shared.lock.locked())
            return piece.data_ptr()

    first = address()
    assert address() == address(4) == first
    stream.cuda_stream = 2
    assert address() != first
    capturing.append(1)
    stream.cuda_stream = 1
    assert address() != first
    scratch.free_scratch()
    assert not scratch._of_stream


def test_buffers_made_in_inference_mode_serve_training(path):
    weight = quantise(96, 192)
    scratch.free_scratch()
    with torch.inference_mode():
        want = nf4_linear(torch.ones(2, 192), weight)
    x = torch.ones(2, 192, requires_grad=True)
    y = nf4_linear(x, weight)
    y.sum().backward()
    assert torch.equal(y, want.clone())


def test_threads_do_not_share_buffers(path):
    weights = [quantise(256, 256, kind) for kind in ("nf4", "fp4")]
    x = torch.randn(8, 256)
    want = [nf4_linear(x, w) for w in weights]
    wrong = []

    def work(i):
        for _ in range(50):
            if not torch.allclose(nf4_linear(x, weights[i]), want[i], atol=1e-4):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_registration():
    packed, state = quantise(96, 192)
    w = unpack((packed, state))
    x = torch.randn(2, 192, requires_grad=True)
    torch.library.opcheck(torch.ops.fastprompt.nf4_linear, (x, torch.randn(96), *w))
    torch.library.opcheck(torch.ops.fastprompt.nf4_linear_backward, (torch.randn(2, 96), *w))


def test_autocast_decides_the_dtype():
    weight, x = quantise(96, 192), torch.randn(3, 192, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = nf4_linear(x, weight)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert nf4_linear(x, weight, dtype=torch.float16).dtype == torch.float16


def test_refusals():
    packed, state = weight = quantise(96, 192)
    x, bias = torch.randn(2, 192), torch.randn(96)

    trains = packed.view(-1).view(torch.float32).requires_grad_()

    def changed(**attributes):
        other = copy.copy(state)
        vars(other).update(attributes)
        return packed, other

    for args, said in [
        ((x[:, :8], weight), r"x: want \[..., 192\]"),
        ((x.long(), weight), "x: want one of"),
        ((x.to("meta"), weight), "weight's device cpu, got meta"),
        ((x, weight, bias[:5]), r"bias: want \[96\] on cpu, got \(5,\)"),
        ((x, weight, bias.to("meta")), r"bias: want \[96\] on cpu, got \(96,\) on meta"),
        ((x, weight, torch.zeros(96, requires_grad=True)), "bias must be frozen"),
        ((x, packed), "without state"),
        ((x, Params4bit(torch.randn(96, 192))), "without state"),
        ((x, changed(quant_type="int4")), "quant_type in"),
        ((x, changed(shape=torch.Size([192]))), r"shape \[out, in\]"),
        ((x, changed(shape=torch.Size([96, 193]))), "9216 bytes"),
        ((x, changed(absmax=state.absmax.bfloat16())), "absmax in torch.uint8"),
        ((x, changed(packing_format_for_cpu=True)), "ordinary storage"),
        ((x, changed(absmax=state.absmax[:5])), "want 288 values of absmax, got 5"),
        ((x, changed(code=state.code[:8])), "want 16 values of code, got 8"),
        ((x, (trains, state)), "weight must be frozen"),
    ]:
        with pytest.raises(ValueError, match=said):
            nf4_linear(*args)


def test_empty_weights():
    packed, state = quantise(96, 192)
    for shape in ([0, 192], [96, 0]):
        empty = copy.copy(state)
        empty.shape = torch.Size(shape)
        for rows in (1, 2):
            x = torch.ones(rows, shape[1])
            assert torch.equal(nf4_linear(x, (packed[:0], empty)), torch.zeros(rows, shape[0]))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_other_storage_dtypes(storage):
    packed, state = quantise(96, 192)
    x = torch.randn(2, 192)
    want = nf4_linear(x, (packed, state))
    assert torch.equal(nf4_linear(x, (packed.view(-1).view(storage)[:, None], state)), want)
    assert torch.equal(nf4_linear(x, unpack((packed, state))), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    dense = torch.randn(96, 192, device="cuda", dtype=torch.bfloat16)
    packed, state = bnb.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    x = torch.randn(4, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y, dx = both(lambda x: nf4_linear(x, (packed, state)), x, torch.ones_like(x[:, :96]))
    w = bnb.dequantize_4bit(packed, state)
    torch.testing.assert_close((y, dx), (x @ w.T, torch.ones_like(y) @ w))
