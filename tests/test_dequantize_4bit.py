"""`ops.dequantize_4bit` on every backend here: bit for bit bitsandbytes', into memory given."""

import copy

import bitsandbytes.functional as bnb
import pytest
import torch
from backends import CUDA, DTYPES
from bitsandbytes.nn import Params4bit

from fastprompt import native
from fastprompt.ops import dequantize_4bit, nf4_linear
from fastprompt.ops.dequantize_4bit import forward
from fastprompt.ops.packed import unpack

BACKENDS = ["plain", "without csrc", "reference", "triton"]
FORMATS = [(kind, nested) for kind in ("nf4", "fp4") for nested in (False, True)]
every_format = pytest.mark.parametrize("kind, nested", FORMATS)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param == "without csrc":
        monkeypatch.setattr(native, "_load", lambda: (None, "not built"))
        return "plain"
    return request.param


def dtypes(backend):
    """The interpreter truncates where a cast to bfloat16 should round."""
    return [d for d in DTYPES if CUDA or backend != "triton" or d != torch.bfloat16]


def quantise(shape, device, kind="nf4", nested=True, blocksize=64, dtype=torch.float32):
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return bnb.quantize_4bit(
        dense, quant_type=kind, compress_statistics=nested, blocksize=blocksize
    )


@every_format
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_bit_for_bit_bitsandbytes(backend, kind, nested, blocksize, device):
    # rows of whole blocks: with others bitsandbytes' own CPU kernel is wrong
    packed, state = quantise((3, 8192), device, kind, nested, blocksize)
    for dtype in dtypes(backend):
        state.dtype = dtype
        got = dequantize_4bit((packed, state), backend=backend)
        assert got.dtype == dtype and torch.equal(got, bnb.dequantize_4bit(packed, state))


@every_format
@pytest.mark.parametrize("rows, columns", [(5, 3), (7, 70), (96, 160), (1, 1), (64, 4096)])
def test_odd_sizes(backend, kind, nested, rows, columns, device):
    packed, state = quantise((rows, columns), device, kind, nested)
    absmax = state.absmax
    if nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    values = state.code[nibbles] * absmax.repeat_interleave(64)[: len(nibbles)]
    want = values[: rows * columns].view(rows, columns)
    buffer = torch.full((rows + 2, columns), torch.nan, device=device)
    assert dequantize_4bit((packed, state), out=buffer[1:-1], backend=backend).equal(want)
    assert buffer[0].isnan().all() and buffer[-1].isnan().all()


def test_every_nibble_and_every_scale(backend, device):
    """All bytes, against all nested scales: also those that a quantiser rarely gives."""
    for kind in ("nf4", "fp4"):
        packed, state = quantise((512, 64), device, kind)
        packed = torch.arange(256, device=device).to(torch.uint8).repeat(64)
        state.absmax = torch.arange(512, device=device).to(torch.uint8)
        want = dequantize_4bit((packed, state), dtype=torch.float32, backend="reference")
        got = dequantize_4bit((packed, state), backend=backend)
        assert torch.equal(got, want) and len(want.unique()) > 2000


@every_format
def test_side_by_side(backend, kind, nested, device):
    """As a block does with q, k and v: one buffer, one product."""
    weights = [
        quantise((rows, 192), device, kind, nested, dtype=dtypes(backend)[-1])
        for rows in (96, 32, 32)
    ]
    for dtype in dtypes(backend):
        buffer = torch.full((160, 192), torch.nan, device=device, dtype=dtype)
        parts = buffer.split([96, 32, 32])
        for weight, part in zip(weights, parts, strict=True):
            assert forward(unpack(weight), part, backend=backend) is part
        x = torch.randn(5, 192, device=device).to(dtype)
        for y, weight in zip((x @ buffer.mT).split([96, 32, 32], -1), weights, strict=True):
            torch.testing.assert_close(y, nf4_linear(x, weight), rtol=2e-2, atol=2e-2)


def test_float64_and_the_original_dtype(backend, device):
    weight = quantise((6, 64), device, dtype=torch.float16)
    single = dequantize_4bit(weight, dtype=torch.float32, backend=backend)
    assert torch.equal(
        dequantize_4bit(weight, dtype=torch.float64, backend=backend), single.double()
    )
    assert dequantize_4bit(weight, backend=backend).dtype == torch.float16


def test_other_storages(backend, device):
    packed, state = quantise((96, 192), device)
    want = dequantize_4bit((packed, state))
    for storage in (torch.bfloat16, torch.float32):
        assert dequantize_4bit((packed.view(-1).view(storage), state), backend=backend).equal(want)
    parameter = Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
    assert dequantize_4bit(parameter, backend=backend).equal(want)


def test_nothing_is_read_past_an_end(backend, device):
    """Storage and results that end in the middle of a program's share."""
    packed, state = quantise((65, 64), device)
    got = dequantize_4bit((packed, state), backend=backend)
    assert got.equal(dequantize_4bit((packed, state), backend="reference"))


def test_empty_weights(backend, device):
    packed, state = quantise((96, 192), device)
    for shape in ((0, 192), (96, 0)):
        state = copy.copy(state)
        state.shape = torch.Size(shape)
        assert dequantize_4bit((packed[:0], state), backend=backend).shape == shape


def test_compiles_whole(device):
    packed, state = quantise((96, 192), device)
    w = unpack((packed, state))
    x = torch.randn(3, 192, device=device)

    def new(x):
        return x @ torch.ops.fastprompt.dequantize_4bit(*w, torch.float32, "auto").mT

    def into(x):
        buffer = x.new_empty(192, 192)
        for half in buffer.split(96):
            torch.ops.fastprompt.dequantize_4bit_into(half, *w, "auto")
        return (x @ buffer.mT)[:, 96:]

    def public(x):
        return x @ dequantize_4bit((packed, state)).mT

    for run in (new, into, public):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), nf4_linear(x, (packed, state)))


def test_registration(device):
    check, own = torch.library.opcheck, torch.ops.fastprompt
    for nested in (False, True):
        w = unpack(quantise((96, 192), device, nested=nested))
        check(own.dequantize_4bit, (*w, torch.bfloat16, "auto"))
        check(own.dequantize_4bit_into, (torch.empty(96, 192, device=device), *w, "auto"))


def test_refusals(device):
    packed, state = weight = quantise((96, 192), device)

    def changed(**attributes):
        other = copy.copy(state)
        vars(other).update(attributes)
        return packed, other

    out = torch.empty(96, 192, device=device)
    long = torch.empty(96, 200, device=device)
    trains = torch.empty(96, 192, device=device, requires_grad=True)
    for args, options, message in [
        (packed, {}, "without state"),
        (changed(quant_type="int4"), {}, "quant_type in"),
        (changed(shape=torch.Size([96, 193])), {}, "9216 bytes"),
        (changed(absmax=state.absmax[:5]), {}, "want 288 values of absmax, got 5"),
        (changed(code=state.code[:8]), {}, "want 16 values of code, got 8"),
        (changed(code=state.code.half()), {}, "want code in torch.float32, got torch.float16"),
        (changed(absmax=state.absmax.to("meta")), {}, "want absmax on .*, got meta"),
        (changed(blocksize=96), dict(backend="triton"), "a power of two, 32 to 4096; got 96"),
        (changed(blocksize=8192), dict(backend="triton"), "32 to 4096; got 8192"),
        (changed(blocksize=0), {}, "want a blocksize of at least 1, got 0 and"),
        (weight, dict(dtype=torch.int8), "dtype: want one of"),
        (weight, dict(out=out.view(192, 96)), r"out: want \[96, 192\] torch.float32 .*\[192, 96\]"),
        (weight, dict(out=out.to("meta")), "out: want .* got .* on meta"),
        (weight, dict(out=out, dtype=torch.float16), "out: want .* torch.float16"),
        (weight, dict(out=long[:, :192]), r"out: want it contiguous .* strides \(200, 1\)"),
        (weight, dict(out=trains), "requires_grad True"),
        (weight, dict(backend="cuda"), "backend: want one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            dequantize_4bit(args, **options)
