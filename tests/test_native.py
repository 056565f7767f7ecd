"""Decoding in csrc/: every variant that this machine runs, every format, every element."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprompt import native

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(numel, blocksize, blocksize2=None, seed=0):
    """Random storage: packed, code, absmax and, with blocksize2, the nested quadruple."""
    rng = torch.Generator().manual_seed(seed)
    blocks = -(numel // -blocksize)
    packed = torch.randint(0, 256, ((numel + 1) // 2,), dtype=torch.uint8, generator=rng)
    code = torch.randn(16, generator=rng)
    if blocksize2 is None:
        return packed, code, torch.randn(blocks, generator=rng), None
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=rng)
    absmax2 = torch.rand(-(blocks // -blocksize2), generator=rng)
    code2, offset = torch.randn(256, generator=rng), torch.randn((), generator=rng)
    return packed, code, absmax, (code2, absmax2, offset, blocksize2)


def truth(numel, packed, code, absmax, blocksize, nested, dtype):
    """The definition, one operation after another."""
    if nested:
        code2, absmax2, offset, blocksize2 = nested
        absmax = code2[absmax.long()] * absmax2.repeat_interleave(blocksize2)[: len(absmax)]
        absmax = absmax + offset
    nibbles = torch.stack([packed >> 4, packed & 15], 1).flatten()[:numel].long()
    return (code[nibbles] * absmax.repeat_interleave(blocksize)[:numel]).to(dtype)


def check(variant, numel, blocksize, blocksize2, dtype, seed=0):
    packed, code, absmax, nested = make(numel, blocksize, blocksize2, seed)
    out = torch.full((numel + 8,), torch.nan, dtype=dtype)
    native.decode_4bit(out[:numel], packed, code, absmax, blocksize, nested, variant)
    want = truth(numel, packed, code, absmax, blocksize, nested, dtype)
    assert torch.equal(out[:numel], want)
    assert out[numel:].isnan().all()  # nothing past the end


@pytest.mark.parametrize("variant", native.variants() if native.available() else [])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    numel=st.integers(0, 3000),
    blocksize=st.sampled_from([1, 7, 32, 64, 65, 128, 256, 4096]),
    blocksize2=st.sampled_from([None, 3, 256]),
    seed=st.integers(0, 99),
)
def test_every_size(variant, dtype, numel, blocksize, blocksize2, seed):
    check(variant, numel, blocksize, blocksize2, dtype, seed)


@pytest.mark.parametrize("variant", native.variants() if native.available() else [])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_outputs_written_past_the_caches(variant, dtype):
    numel = (32 << 20) // dtype.itemsize + 12345
    packed, code, absmax, nested = make(numel, 64, 256)
    want = truth(numel, packed, code, absmax, 64, nested, dtype)
    buffer = torch.empty(numel + 1, dtype=dtype)
    for start in (0, 1):  # on and off the alignment that such stores need
        out = buffer[start : start + numel].fill_(torch.nan)
        assert torch.equal(native.decode_4bit(out, packed, code, absmax, 64, nested, variant), want)


@pytest.mark.parametrize("variant", native.variants() if native.available() else [])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_torchs(variant, dtype):
    """Ties, subnormals, overflow, infinities and NaN, at every exponent."""
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(0))
    ties = torch.arange(-(2**31), 2**31, 0x8000) | 0x1000  # halfway for float16
    scales = torch.cat([bits, bits & ~0x7FFF, ties, ties & ~0x1FFF]).int().view(torch.float32)
    packed = torch.zeros(len(scales) // 2, dtype=torch.uint8)
    out = torch.empty(len(scales), dtype=dtype)
    native.decode_4bit(out, packed, torch.ones(16), scales, 1, None, variant)
    want = scales.to(dtype)
    assert torch.equal(out.isnan(), want.isnan())
    # as integers, so that -0 is not 0
    assert torch.equal(out[~out.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(None, 1_000_001, 64, 256, torch.bfloat16)
    finally:
        torch.set_num_threads(before)


def test_own_threads_where_torch_has_none():
    """Without torch in the process its OpenMP is not found, and threads are started instead."""
    script = """
import sys, importlib.util, numpy as np
spec = importlib.util.spec_from_file_location("fastprompt._native", sys.argv[1])
native = importlib.util.module_from_spec(spec); spec.loader.exec_module(native)
n, rng = 1 << 20, np.random.default_rng(0)
packed = rng.integers(0, 256, n // 2, dtype=np.uint8)
code, absmax = rng.random(16, dtype=np.float32), rng.random(n // 64, dtype=np.float32)
def decode(threads):
    out = np.full(n, np.nan, np.float32)
    address = lambda a: a.ctypes.data
    native.decode(address(packed), address(code), address(absmax), 0, 0, 0, 64, 1, n,
                  address(out), 0, threads, 0)
    return out
assert "torch" not in sys.modules
assert np.array_equal(decode(1), decode(4)) and not np.isnan(decode(3)).any()
"""
    path = sys.modules["fastprompt._native"].__file__
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(out=torch.empty(128, dtype=torch.float64)), "out: want one of"),
        (dict(out=torch.empty(2, 128)[:, ::2]), "out: want contiguous"),
        (dict(packed=torch.zeros(63, dtype=torch.uint8)), "packed: .*at least 64"),
        (dict(packed=torch.zeros(64, dtype=torch.int8)), "packed: want .*uint8"),
        (dict(code=torch.zeros(8)), "code: .*at least 16"),
        (dict(absmax=torch.zeros(1)), "absmax: .*at least 2"),
        (dict(absmax=torch.zeros(2, dtype=torch.bfloat16)), "absmax: want .*float32"),
        (dict(absmax=torch.zeros(2, device="meta")), "absmax: want .*CPU"),
        (dict(blocksize=0), "blocksize: want at least 1"),
        (dict(variant="sse9"), "variant: want one of"),
        (dict(nested=(torch.zeros(9), torch.zeros(1), torch.zeros(()), 256)), "code2: .*256"),
    ],
)
def test_refusals(change, said):
    packed, code, absmax, _ = make(128, 64)
    args = dict(out=torch.empty(128), packed=packed, code=code, absmax=absmax, blocksize=64)
    with pytest.raises(ValueError, match=said):
        native.decode_4bit(**{**args, **change})


def test_a_file_of_the_other_byte_order_is_not_measured(monkeypatch, tmp_path):
    """Its numbers are written the other way round; the loader says what is wrong with it."""
    path = tmp_path / "_native.so"
    monkeypatch.delitem(sys.modules, "fastprompt._native", raising=False)
    monkeypatch.setattr(native, "find_spec", lambda name: SimpleNamespace(origin=path))
    path.write_bytes(b"\x7fELF\x02\x02" + bytes([255]) * 90)
    native._check_file()
    path.write_bytes(b"\x7fELF\x02\x01" + bytes([255]) * 90)
    with pytest.raises(ImportError, match="cut short"):
        native._check_file()
