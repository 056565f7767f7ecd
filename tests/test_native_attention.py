"""csrc's attention on every instruction set that this machine runs."""

import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch
from compare import assert_as_accurate
from test_prompt_attention import make

from fastprompt import native
from fastprompt.ops import prompt_attention, reference

SHAPES = {  # B, Hq, Hkv, N, M, P, d; lanes are queries and channels, so their remainders count
    "whole vectors": (2, 4, 2, 64, 64, 10, 64),
    "narrow": (3, 3, 3, 33, 47, 7, 8),
    "odd channels": (2, 2, 1, 21, 21, 5, 24),
    "channels past a vector": (1, 2, 2, 70, 90, 3, 72),
    "long": (1, 2, 2, 19, 2100, 20, 16),
    "many samples": (70, 2, 2, 3, 3, 2, 16),
    "no prompt": (2, 2, 2, 12, 12, 0, 16),
    "single query": (3, 6, 2, 1, 45, 7, 24),
    "single query, whole rows": (2, 4, 4, 1, 300, 20, 64),
    "single query, one key head": (1, 5, 1, 1, 2100, 3, 72),
}
OPTIONS = {
    "full": {},
    "causal": dict(causal=True, scale=-0.3),
    "window": dict(causal=True, window=9),
    "window both ways": dict(window=5),
    "soft-capped": dict(softcap=1.5, causal=True),
    "soft-capped, hardly": dict(softcap=50.0, window=9),
    "mask": dict(attn_mask="bool"),
    "mask, soft-capped": dict(attn_mask="bool", softcap=1.5, window=9),
    "numbers": dict(attn_mask="numbers", causal=True),
}


def mask_of(kind, B, Hq, N, M, dtype):
    """[B, 1, N, M] or [1, Hq, N, M]; the first query sees nothing."""
    seen = torch.rand(M, N, B, 1).permute(2, 3, 1, 0) > 0.3
    seen[:, :, 0] = False
    if kind == "bool":
        return seen
    numbers = torch.randn(1, Hq, N, M, dtype=dtype)
    numbers[:, :, 1:, ::3] = -torch.inf
    return numbers.masked_fill(~seen[:1], torch.finfo(dtype).min)


@pytest.fixture(params=native.variants())
def variant(request, monkeypatch):
    """Makes the op take one instruction set."""
    monkeypatch.setattr(native, "attention", partial(native.attention, variant=request.param))
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_eager(variant, shape, options, masked, dtype):
    B, Hq, _, N, M, _, d = SHAPES[shape]
    options = dict(OPTIONS[options])
    if masked:
        options["key_mask"] = torch.rand(B, M) > 0.3
        options["key_mask"][-1] = False  # one sample sees no token
    if "attn_mask" in options:
        options["attn_mask"] = mask_of(options["attn_mask"], B, Hq, N, M, dtype)
    ours = partial(prompt_attention, backend="native", **options)
    eager = partial(reference.prompt_attention, **options)
    assert_as_accurate(ours, eager, make(SHAPES[shape], dtype, "cpu"), torch.randn(B, Hq, N, d))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [18, 1])
@pytest.mark.parametrize("Hkv", [1, 2, 4])  # parts that meet in a head, and parts of whole heads
@pytest.mark.parametrize("length", [None, (7, 0, 3, 5)])
def test_sets_of_prompts(variant, length, Hkv, N, dtype):
    """Each sample its own; neighbours of one set, of another; a set that none has."""
    B, Hq, d, which = 40, 4, 24, torch.randint(3, (40,))
    q, k, v, *_ = make((B, Hq, Hkv, N, N + 3, 1, d), dtype, "cpu")
    prompts = torch.randn(2, 4, Hkv, 7, d, dtype=dtype).unbind(0)
    inputs = [q, k, v, *(p.requires_grad_() for p in prompts)]
    options = dict(prompt_index=which.int(), causal=True, key_mask=torch.rand(B, N + 3) > 0.3)
    if length:
        options["prompt_len"] = torch.tensor(length)
    ours = partial(prompt_attention, backend="native", **options)
    eager = partial(reference.prompt_attention, **options)
    assert_as_accurate(ours, eager, inputs, torch.randn(B, Hq, N, d))


@pytest.mark.parametrize("kind", ["bool", "numbers"])
def test_masked_single_query(variant, kind):
    """Which the op leaves to torch, csrc itself serves."""
    B, Hq, _, _, M, *_ = shape = SHAPES["single query"]
    q, k, v, *prompts = (t.detach() for t in make(shape, torch.float32, "cpu"))
    mask = torch.rand(B, Hq, 1, M) > 0.3
    mask = mask if kind == "bool" else torch.randn(mask.shape).masked_fill(~mask, -torch.inf)
    out, lse = torch.empty_like(q), torch.empty(B, Hq, 1)
    native.attention(q, k, v, *prompts, out, lse, causal=True, scale=0.2, attn_mask=mask)
    want = reference.prompt_attention(q, k, v, *prompts, causal=True, scale=0.2, attn_mask=mask)
    torch.testing.assert_close(out, want)


def test_scores_too_large_for_an_exponential(variant):
    """Scores of 1e4: all but the largest vanish, nothing overflows."""
    inputs = make(SHAPES["narrow"], torch.float32, "cpu")
    with torch.no_grad():
        inputs[0].mul_(3e3)
    out = prompt_attention(*inputs, backend="native")
    eager = reference.prompt_attention(*inputs)
    truth = reference.prompt_attention(*(t.double() for t in inputs))
    assert (out - truth).norm() <= 2 * (eager - truth).norm() + 1e-6 * truth.norm()
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(g.isfinite().all() for g in grads)


@pytest.fixture
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("Hkv", [1, 2, 3, 4, 6])
def test_any_number_of_threads(variant, threads_as_before, Hkv, threads):
    torch.set_num_threads(threads)
    ours = partial(prompt_attention, backend="native", causal=True)
    eager = partial(reference.prompt_attention, causal=True)
    inputs = make((70, Hkv, Hkv, 3, 3, 2, 16), torch.float32, "cpu")
    assert_as_accurate(ours, eager, inputs, torch.randn(70, Hkv, 3, 16))


def test_no_two_parts_add_to_one_sum(threads_as_before):
    """Which a race would show only now and then, and on one thread never."""
    cases = itertools.product(
        (1, 2, 7, 64), (1, 2, 3, 4, 8, 9, 12), (1, 2, 3, 16), (0, 2**20, 2**30)
    )
    for B, Hkv, threads, share_bytes in cases:
        torch.set_num_threads(threads)
        parts, shares = native.attention_parts(B, Hkv, share_bytes)
        units = B * Hkv
        assert 1 <= parts <= 2 * threads
        assert shares == 1 or shares * share_bytes <= 2**27
        met = [
            {u // B for u in range(units * p // parts, units * (p + 1) // parts)}
            for p in range(parts)
        ]
        if shares == 1:  # heads come first in the order of units
            assert sum(map(len, met)) == len(set().union(*met))
        else:
            assert shares == parts
    torch.set_num_threads(16)
    assert native.attention_parts(64, 12, 8 * 1000 * 12 * 20 * 64) == (12, 1)


def test_refusals():
    if not native.available():
        pytest.skip("the native part is missing")
    q, k, v, pk, pv = (t.detach() for t in make(SHAPES["narrow"], torch.float32, "cpu"))
    out, lse = torch.empty_like(q), torch.empty(3, 3, 33)
    call = partial(native.attention, causal=False, scale=1.0)
    with pytest.raises(ValueError, match=r"want torch.float32 rows .* got torch.float64"):
        call(q, k.double(), v, pk, pv, out, lse)
    with pytest.raises(ValueError, match=r"q: want float32 or bfloat16, got torch.float16"):
        call(*(t.half() for t in (q, k, v, pk, pv, out)), lse)
    with pytest.raises(ValueError, match=r"lse: want contiguous torch.float32"):
        call(q, k, v, pk, pv, out, lse.double())
    with pytest.raises(ValueError, match=r"prompt_index: want contiguous torch.int64"):
        call(q, k, v, pk, pv, out, lse, prompt_index=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="prompt_grads: want 4 shares for 4 parts, got 2"):
        call(q, k, v, pk, pv, out, lse, prompt_grads=torch.zeros(2, 2, *pk.shape), parts=4)
    with pytest.raises(ValueError, match="variant: want one of"):
        call(q, k, v, pk, pv, out, lse, variant="sse9")


def test_a_lack_of_memory_is_an_error():
    """Not an end of the process: in one of its own, with 40 MB to spare, 100 are asked for."""
    code = """
import resource, torch
from fastprompt.ops import prompt_attention
torch.set_num_threads(1)
x = torch.randn(1, 1, 2, 64)
prompt_attention(x, x, x, x[0], x[0], backend="native")
long, few = torch.randn(2, 1, 1, 60000, 64), torch.randn(1, 3, 64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), -1))
try:
    prompt_attention(x, *long, few, few, backend="native")
except MemoryError:
    print("raised")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "raised\n", done.stderr
