"""`prompt_attention` where numbers are extreme, and what it refuses."""

from functools import partial

import numpy as np
import pytest
import torch
from compare import assert_as_accurate
from conftest import DEVICE
from test_prompt_attention import BACKENDS, SHAPES, ident, make

from fastprompt import native
from fastprompt.ops import prompt_attention, reference
from fastprompt.ops.vendors import has_xformers

WITH_REFERENCE = [*BACKENDS, "reference"]


@pytest.mark.parametrize("scale", [-0.3, -2.0, 0.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_0_and_below(backend, causal, scale):
    inputs = make(SHAPES["vit"])
    key_mask = torch.arange(33, device=DEVICE) >= torch.tensor([[0], [5]], device=DEVICE)
    for options in (dict(), dict(key_mask=key_mask)):
        options |= dict(causal=causal, scale=scale)
        ours = partial(prompt_attention, backend=backend, **options)
        eager = partial(reference.prompt_attention, **options)
        assert_as_accurate(ours, eager, inputs, torch.randn(2, 3, 33, 16, device=DEVICE))


@pytest.mark.parametrize("low", [-1e9, -1e30])
@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_a_bias_that_all_keys_share_changes_nothing(backend, low):
    """A log-sum-exp of -1e9 has no place for the logarithm of a sum; the output needs none."""
    q, k, v, prompt_k, prompt_v = make((1, 2, 2, 4, 6, 3, 16))
    nothing = torch.zeros(1, 6, dtype=torch.bool, device=DEVICE)
    bias = torch.full((1, 1, 4, 3), low, device=DEVICE)
    inputs = (q, k, v, prompt_k, prompt_v)
    got = prompt_attention(*inputs, prompt_bias=bias, key_mask=nothing, backend=backend)
    even = prompt_v.mean(1)[None, :, None].expand_as(got)  # scores are nothing beside the bias
    torch.testing.assert_close(got, even)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=ident)
@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_the_lowest_number_in_a_prompt_bias_hides(backend, dtype):
    q, k, v, prompt_k, prompt_v = make((2, 2, 2, 4, 6, 3, 16), dtype)
    bias = torch.zeros(1, 1, 4, 3, dtype=dtype, device=DEVICE)
    bias[..., 1:] = bias[:, :, 2] = torch.finfo(dtype).min
    key_mask = torch.tensor([[True], [False]], device=DEVICE).expand(2, 6)
    options = dict(key_mask=key_mask, backend=backend)
    got = prompt_attention(q, k, v, prompt_k, prompt_v, prompt_bias=bias, **options)
    assert not got[1, :, 2].any()  # it sees no key at all
    one = prompt_attention(q, k, v, prompt_k[:, :1], prompt_v[:, :1], **options)
    rows = [0, 1, 3]
    torch.testing.assert_close(got[:, :, rows], one[:, :, rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ident)
@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_rows_past_the_length_of_a_set_are_not_read(backend, dtype):
    q, k, v, *_ = make((2, 2, 2, 4, 6, 3, 16), dtype)
    sets = torch.randn(2, 2, 2, 5, 16, dtype=dtype, device=DEVICE)
    sets[:, 0, :, 3:] = torch.nan
    sets = [t.requires_grad_() for t in sets]
    index, length = (torch.tensor(x, device=DEVICE) for x in ([0, 1], [3, 5]))
    options = dict(prompt_index=index, prompt_len=length, backend=backend)
    out = prompt_attention(q, k, v, *sets, **options)
    grads = torch.autograd.grad(out.sum(), sets)
    assert out.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert not any(g[0, :, 3:].any() for g in grads)


@pytest.mark.skipif(not native.available() or DEVICE != "cpu", reason="needs csrc/")
@pytest.mark.parametrize("sizes", [(9000, 20), (200, 9000)])
def test_long_rows_of_csrc(sizes):
    M, P = sizes
    inputs = make((1, 4, 4, 33, M, P, 16))
    ours = partial(prompt_attention, backend="native")
    assert_as_accurate(ours, reference.prompt_attention, inputs, torch.randn(1, 4, 33, 16))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [dict(softcap=5.0), dict(window=250), dict(window=3)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_far_more_queries_than_keys(backend, options, packed):
    """Without a window the first see every key, hundreds of rows after them."""
    inputs = make((1, 4, 2, 300, 10, 3, 16))
    if packed:
        ends = [
            torch.tensor(e, dtype=torch.int32, device=DEVICE) for e in ([0, 260, 300], [0, 4, 10])
        ]
        options = dict(options, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1])
    ours = partial(prompt_attention, backend=backend, **options)
    eager = partial(reference.prompt_attention, **options)
    assert_as_accurate(ours, eager, inputs, torch.randn(1, 4, 300, 16, device=DEVICE))


# ---- refusals ----


def refused(message, **changes):
    args = dict(zip(["q", "k", "v", "prompt_k", "prompt_v"], make(SHAPES["grouped"]), strict=True))
    args |= {name: change(args) if callable(change) else change for name, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        prompt_attention(**args)


def test_refusals_say_what_was_wanted_and_what_came():
    ones = torch.ones(2, 21, device=DEVICE)
    refused(r"v: want \[2, 1, 21, 24\], got \[2, 2, 21, 24\]", k=lambda a: a["k"][:, :1])
    refused(r"v: want \[2, 2, 21, 24\], got \[2, 2, 20, 24\]", v=lambda a: a["v"][:, :, 1:])
    refused(
        r"prompt_v: want \[2, 7, 24\], got \[2, 6, 24\]", prompt_v=lambda a: a["prompt_v"][:, 1:]
    )
    refused(
        r"prompt_k: want torch.float32 .* got torch.float16",
        prompt_k=lambda a: a["prompt_k"].half(),
    )
    refused(
        "contiguous last axis", q=lambda a: a["q"].transpose(-1, -2).contiguous().transpose(-1, -2)
    )
    refused(
        r"causal: .* got M 20 and N 21",
        k=lambda a: a["k"][:, :, 1:],
        v=lambda a: a["v"][:, :, 1:],
        causal=True,
    )
    refused("key_mask: want bool, got torch.float32", key_mask=ones)
    refused(r"key_mask: want \[2, 21\], got \[2, 20\]", key_mask=ones[:, 1:].bool())
    refused(r"attn_mask: want \[2 or 1, 6 or 1, 21, 21\]", attn_mask=ones.bool())
    refused(
        "attn_mask: want bool or floating",
        attn_mask=ones.long().expand(1, 1, 2, 21)[:, :, :1].expand(1, 1, 21, 21),
    )
    refused(
        "attn_mask: want it frozen",
        attn_mask=torch.zeros(1, 1, 21, 21, device=DEVICE, requires_grad=True),
    )
    refused("backend: want one of auto, triton", backend="cuda")
    refused("window: want an integer of at least 1, got 0", window=0)
    refused(r"window: want an integer of at least 1, got 2\.5", window=2.5)
    refused(r"softcap: want a finite number above 0, got -1\.0", softcap=-1.0)
    refused("softcap: want a finite number above 0, got inf", softcap=float("inf"))
    refused("v: want a tensor, got NoneType", v=None)
    refused("prompt_v: want rows of d numbers", prompt_v=torch.tensor(1.0, device=DEVICE))
    refused("q: want rows .* a nested", q=torch.nested.nested_tensor([torch.zeros(2, 24)] * 2))
    refused("scale: want a number, got int", scale=10**400)
    refused("scale: want a number, got Tensor", scale=torch.tensor(1j))
    refused("scale: want a finite number", scale=1e300)
    refused("softcap: want a finite number", softcap=1e39)
    refused("q: want a tensor, got list", q=[1.0])
    refused(r"want q \[B, Hq, N, d\]", q=torch.zeros(3))
    refused("d: want a multiple of 8 up to 256, got 0", q=lambda a: a["q"][..., :0])
    refused(r"prompt_k: want \[2, P, 24\], got \[7, 24\]", prompt_k=lambda a: a["prompt_k"][0])
    refused("causal: want True or False, got 'x'", causal="x")
    refused("softcap: want a number, got str", softcap="a")
    refused("softcap: want a number, got bool", softcap=True)
    refused("softcap: want it frozen", softcap=torch.tensor(3.0, requires_grad=True))
    refused("scale: want a number, got list", scale=[1])
    refused("scale: want it frozen", scale=torch.nn.Parameter(torch.tensor(0.3)))
    refused("scale: want a finite number, got nan", scale=float("nan"))
    refused("window: want an integer of at least 1, got True", window=True)
    refused("cu_seqlens_q: want a tensor, got list", cu_seqlens_q=[0, 6], cu_seqlens_k=[0, 6])
    refused(
        "attn_mask: want bool or floating point, got torch.float8_e5m2",
        attn_mask=ones.new_zeros(1, 1, 21, 21).to(torch.float8_e5m2),
    )
    refused(
        "prompt_k: want at least one set",
        prompt_k=lambda a: a["prompt_k"][None][:0],
        prompt_v=lambda a: a["prompt_v"][None][:0],
        prompt_index=torch.zeros(2, dtype=torch.int64, device=DEVICE),
    )
    refused("key_mask: want a tensor, got list", key_mask=[True])
    if DEVICE == "cpu" and not has_xformers():
        refused("backend: want xformers installed", backend="xformers")
    refused(
        "multiple of 8",
        **{n: (lambda a, n=n: a[n][..., :12]) for n in ("q", "k", "v", "prompt_k", "prompt_v")},
    )


def test_numbers_of_numpy_are_numbers():
    inputs = make(SHAPES["grouped"])
    got = prompt_attention(*inputs, window=np.int64(3), scale=np.float32(0.5))
    assert torch.equal(got, prompt_attention(*inputs, window=3, scale=0.5))
