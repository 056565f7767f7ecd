"""Products with 4-bit weights in csrc/: every instruction set that this machine runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import make, truth

from benchmarks.check import FLOOR
from fastprompt import native

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))
MULTIPLIERS = native.multipliers() if native.available() else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def new_memory_is_nan(monkeypatch):
    """What is not written is seen."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda t, *size, **k: new_empty(t, *size, **k).fill_(torch.nan)
    )


def drawn(tokens, width, dtype, seed=0, stride=0):
    """[tokens, width], its rows ``stride`` further apart, with NaN between them."""
    rng = torch.Generator().manual_seed(seed)
    wide = torch.full((tokens, width + stride), torch.nan, dtype=dtype)
    wide[:, :width] = torch.randn(tokens, width, generator=rng)
    return wide[:, :width]


def check(multiplier, dtype, rows, blocks, blocksize, blocksize2, tokens, backward, biased, seed=0):
    """Under the one rule of accuracy."""
    if multiplier in native.TILES:
        dtype = torch.bfloat16
    columns = blocks * blocksize
    packed, code, absmax, nested = make(rows * columns, blocksize, blocksize2, seed)
    w = truth(rows * columns, packed, code, absmax, blocksize, nested, torch.float32)
    w = w.view(rows, columns)
    x = drawn(tokens, rows if backward else columns, dtype, seed, stride=seed % 3)
    bias = drawn(1, rows, dtype, seed + 1)[0] if biased and not backward else None
    got = native.product_4bit(
        x, rows, columns, packed, code, absmax, blocksize, nested,
        bias=bias, backward=backward, multiplier=multiplier,
    )  # fmt: skip
    dense = w if backward else w.T
    # a copy: bfloat16 products of torch read, and are spoiled by, what lies between rows
    eager, exact = x.contiguous() @ dense.to(dtype), x.double() @ dense.double()
    if bias is not None:
        eager, exact = eager + bias, exact + bias.double()
    assert got.dtype == dtype and got.shape == exact.shape
    error, limit = (got.double() - exact).norm(), 2 * (eager.double() - exact).norm()
    assert error <= limit + FLOOR[dtype] * exact.norm()


@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize("backward", [False, True])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 80),
    blocks=st.integers(1, 20),
    blocksize=st.sampled_from([32, 64, 128, 512]),
    blocksize2=st.sampled_from([None, 3, 256]),
    tokens=st.integers(0, 40),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_size(multiplier, backward, **drawn):
    check(multiplier, backward=backward, **drawn)


@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, 49])
def test_many_rows_and_columns(multiplier, dtype, backward, tokens):
    """More of both than any piece has: chunks of columns, pieces of rows, rows of many blocks."""
    check(multiplier, dtype, 600, 150, 64, 256, tokens, backward, biased=True)
    check(multiplier, dtype, 3, 3, 4096, None, tokens, backward, biased=False)


@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize("backward", [False, True])
def test_threads_change_no_bit(multiplier, backward):
    columns, rows, before = 192 * 7, 300, torch.get_num_threads()
    packed, code, absmax, nested = make(rows * columns, 64, 256)
    x = drawn(11, rows if backward else columns, torch.bfloat16)
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            weight = (rows, columns, packed, code, absmax, 64, nested)
            y = native.product_4bit(x, *weight, backward=backward, multiplier=multiplier)
            found.append(y)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize("backward", [False, True])
def test_infinite_tokens_spoil_no_others(multiplier, backward):
    packed, code, absmax, nested = make(96 * 192, 64)
    x = drawn(3, 96 if backward else 192, torch.bfloat16)
    weight = (96, 192, packed, code, absmax, 64, nested)
    want = native.product_4bit(x, *weight, backward=backward, multiplier=multiplier)
    x[1] = torch.inf
    got = native.product_4bit(x, *weight, backward=backward, multiplier=multiplier)
    assert torch.equal(got[::2], want[::2]) and not got[1].isfinite().any()


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(columns=96, x=torch.ones(2, 96)), r"weight: want rows of whole blocks.*\[4, 96\]"),
        (dict(blocksize=48, columns=96), "weight: want rows of whole blocks"),
        (dict(blocksize=16), "weight: want rows of whole blocks"),
        (dict(blocksize=0), "weight: want rows of whole blocks"),
        (dict(rows=0), "weight: want rows of whole blocks"),
        (dict(x=torch.ones(2, 64)), r"x: want \[tokens, 128\]"),
        (dict(x=torch.ones(128)), r"x: want \[tokens, 128\]"),
        (dict(x=torch.ones(2, 128).double()), "x: want .*float64"),
        (dict(x=torch.ones(2, 128, device="meta")), "x: want .*meta"),
        (dict(x=torch.ones(128, 2).T), "x: want a contiguous last axis"),
        (dict(bias=torch.ones(3)), "bias: want .*at least 4"),
        (dict(bias=torch.ones(4).half()), "bias: want .*float32"),
        (dict(backward=True, x=torch.ones(2, 4), bias=torch.ones(4)), "bias: want none backward"),
        (dict(packed=torch.zeros(255, dtype=torch.uint8)), "packed: .*at least 256"),
        (dict(absmax=torch.zeros(7)), "absmax: .*at least 8"),
        (dict(multiplier="sse9"), "multiplier: want one of"),
    ],
)
def test_refusals(change, said):
    packed, code, absmax, _ = make(4 * 128, 64)
    args = dict(x=torch.ones(2, 128), rows=4, columns=128, packed=packed, code=code)
    with pytest.raises(ValueError, match=said):
        native.product_4bit(**{**args, "absmax": absmax, "blocksize": 64, **change})


@pytest.mark.parametrize("multiplier", native.TILES)
def test_tiles_take_bfloat16_alone(multiplier):
    if multiplier not in MULTIPLIERS:
        pytest.skip(f"no {multiplier} here")
    packed, code, absmax, _ = make(4 * 128, 64)
    weight = (4, 128, packed, code, absmax, 64)
    said = rf"x: want torch\.bfloat16 for {multiplier}, got torch\.float32"
    with pytest.raises(ValueError, match=said):
        native.product_4bit(torch.ones(2, 128), *weight, multiplier=multiplier)
    first = next(name for name in MULTIPLIERS if name not in native.TILES)
    next_best = native.product_4bit(torch.ones(2, 128), *weight, multiplier=first)
    assert torch.equal(native.product_4bit(torch.ones(2, 128), *weight), next_best)


@pytest.mark.skipif("amx" not in MULTIPLIERS, reason="needs AMX")
def test_amx_leaves_torchs_own_as_it_was():
    """Both configure the tiles of one thread."""
    packed, code, absmax, _ = make(96 * 192, 64)
    a, b = (torch.randn(192, 192).bfloat16() for _ in range(2))
    want = a @ b
    for _ in range(3):
        native.product_4bit(a, 96, 192, packed, code, absmax, 64, multiplier="amx")
        assert torch.equal(a @ b, want)
