"""prompt_attention with several sets of prompts, sets of unequal length, and packed sequences."""

from functools import partial

import pytest
import torch
from compare import assert_as_accurate
from conftest import DEVICE
from test_prompt_attention import BACKENDS, ident

from fastprompt.ops import prompt_attention, reference

DTYPES = [torch.float32, torch.float16]


def make(B, N, M, dtype, sets=3, Hq=4, Hkv=2, P=7, d=16, seed=0):
    torch.manual_seed(seed)
    like = dict(dtype=dtype, device=DEVICE)
    q = torch.randn(B, N, Hq, d, **like).transpose(1, 2)
    k, v = (x.transpose(1, 2) for x in torch.randn(B, M, 2, Hkv, d, **like).unbind(2))
    prompts = torch.randn(2, *([sets] if sets else []), Hkv, P, d, **like).unbind(0)
    return [t.detach().requires_grad_() for t in (q, k, v, *prompts)]


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def check(backend, inputs, **options):
    grad_out = torch.randn(inputs[0].shape, device=DEVICE)
    ours = partial(prompt_attention, backend=backend, **options)
    assert_as_accurate(ours, partial(reference.prompt_attention, **options), inputs, grad_out)


LENGTHS = {"same": None, "unequal": (7, 0, 3)}


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("masks", ["none", "causal key_mask", "bias softcap"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_sample_has_its_own_set(backend, masks, length, dtype):
    B, N, M = 5, 70, 75
    options = dict(prompt_index=ints(2, 0, 2, 1, 2, dtype=torch.int64))
    if LENGTHS[length]:
        options["prompt_len"] = ints(*LENGTHS[length])
    if masks == "causal key_mask":
        key_mask = torch.rand(B, M, device=DEVICE) > 0.3
        key_mask[3] = False  # with set 1's length of 0 this sample sees nothing at all
        options |= dict(causal=True, key_mask=key_mask)
    if masks == "bias softcap":
        options |= dict(prompt_bias=torch.randn(B, 1, N, 7, device=DEVICE), softcap=2.0)
    check(backend, make(B, N, M, dtype), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_as_each_sample_alone(backend):
    inputs, which = make(3, 9, 9, torch.float32), [1, 0, 1]
    out = prompt_attention(*inputs, prompt_index=ints(*which), backend=backend)
    for i, s in enumerate(which):
        q, k, v = (x[i : i + 1] for x in inputs[:3])
        alone = prompt_attention(q, k, v, inputs[3][s], inputs[4][s], backend=backend)
        torch.testing.assert_close(out[i : i + 1], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_set_that_no_sample_has_gets_zeros(backend):
    inputs = make(2, 9, 9, torch.float32)
    out = prompt_attention(*inputs, prompt_index=ints(2, 0), backend=backend)
    *_, dpk, dpv = torch.autograd.grad(out.square().sum(), inputs)
    assert not dpk[1].any() and not dpv[1].any()
    assert dpk[[0, 2]].any((1, 2, 3)).all() and dpv[[0, 2]].any((1, 2, 3)).all()


ENDS = {  # queries, keys: with a sequence of one query, a long one, and an empty one
    "even": ([0, 20, 40], [0, 20, 40]),
    "ragged": ([0, 1, 90, 90, 100], [0, 30, 121, 121, 140]),
    "no key for some": ([0, 4, 9], [0, 0, 9]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("sets", [0, 3])
@pytest.mark.parametrize("pattern", ["full", "causal", "window", "soft-capped"])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences(backend, ends, pattern, sets, dtype):
    if ends == "no key for some" and pattern == "causal":
        pytest.skip("causal wants at least as many keys as queries")
    ends_q, ends_k = (ints(*e) for e in ENDS[ends])
    inputs = make(1, int(ends_q[-1]), int(ends_k[-1]), dtype, sets=sets)
    options = dict(cu_seqlens_q=ends_q, cu_seqlens_k=ends_k)
    options |= {
        "full": {},
        "causal": dict(causal=True),
        "window": dict(window=6),
        "soft-capped": dict(softcap=3.0),
    }[pattern]
    if sets:
        which = torch.arange(len(ends_q) - 1, device=DEVICE) % 2 * 2
        options |= dict(prompt_index=which, prompt_len=ints(4, 7, 7))
    check(backend, inputs, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_short_sequences(backend):
    """More than one round of the search for a block's sequence."""
    ends = torch.arange(151, dtype=torch.int32, device=DEVICE) * 2
    inputs = make(1, 300, 300, torch.float32, sets=0, Hq=1, Hkv=1, P=2, d=8)
    check(backend, inputs, cu_seqlens_q=ends, cu_seqlens_k=ends, causal=True)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("options", [{}, dict(window=40), dict(softcap=4.0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_shares_the_keys_out(backend, options, groups):
    """One query a head against many keys: two kernels; a fully masked sample among them."""
    B, M = 2, 1100
    inputs = make(B, 1, M, torch.float32, sets=0, Hq=groups, Hkv=1, d=32)
    key_mask = torch.rand(B, M, device=DEVICE) > 0.2
    key_mask[1] = False
    check(backend, inputs, causal=True, key_mask=key_mask, **options)
    bias = torch.randn(1, groups, 1, 7, device=DEVICE)
    attn_mask = torch.randn(B, 1, 1, M, device=DEVICE)
    check(backend, inputs, causal=True, attn_mask=attn_mask, prompt_bias=bias, **options)


@pytest.mark.parametrize(
    ("packed", "splits"),
    [(False, (1, 1)), (False, (2, 1)), (False, (1, 3)), (False, (3, 2)), (True, (3, 2))],
)
def test_triton_shares_out_samples_and_their_rows(monkeypatch, packed, splits):
    """However a set's samples, more than one round of looking for them, are shared out."""
    from fastprompt.ops import prompt_attention_triton as launcher

    def cut(o, *given):
        return splits[0] * splits[1], None, None, o.prompt_index.numel(), splits[1]

    monkeypatch.setattr(launcher, "_shares", cut)
    samples = 130 if packed else 4
    options = dict(prompt_index=torch.arange(samples, device=DEVICE) % 3 % 2)
    if packed:  # one long sequence among short ones
        ends = torch.tensor([0, 150, *range(151, 150 + samples)], dtype=torch.int32)
        options |= dict(cu_seqlens_q=ends.to(DEVICE), cu_seqlens_k=ends.to(DEVICE))
        inputs = make(1, int(ends[-1]), int(ends[-1]), torch.float32, sets=2, Hq=1, Hkv=1, P=5, d=8)
    else:
        inputs = make(samples, 140, 4, torch.float32, Hq=2, Hkv=1, P=5, d=8)
    check("triton", inputs, **options)


def refused(message, inputs=None, **options):
    with pytest.raises(ValueError, match=message):
        prompt_attention(*(inputs or make(2, 6, 6, torch.float32)), **options)


def test_refusals_say_what_was_wanted_and_what_came():
    packed = make(1, 6, 6, torch.float32, sets=0)
    ends = dict(cu_seqlens_q=ints(0, 2, 6), cu_seqlens_k=ints(0, 2, 6))
    refused(r"prompt_index: want \[2\], got \[3\]", prompt_index=ints(0, 1, 2))
    refused("prompt_index: want int32 or int64", prompt_index=ints(0, 1).float())
    refused("prompt_k: want prompt_index beside several sets")
    refused(
        r"prompt_k: want sets \[S, 2, P, 16\] .* got \[2, 7, 16\]", packed, prompt_index=ints(0)
    )
    refused("prompt_len: want prompt_index beside it", packed, prompt_len=ints(1, 2, 3))
    refused(r"prompt_len: want \[3\], got \[2\]", prompt_index=ints(0, 1), prompt_len=ints(1, 2))
    refused("want both or none", packed, cu_seqlens_q=ints(0, 6))
    refused("want packed rows, a batch of 1; got 2", make(2, 6, 6, torch.float32, sets=0), **ends)
    mask = torch.ones(1, 6, dtype=torch.bool, device=DEVICE)
    refused("key_mask: want none beside cu_seqlens_q", packed, key_mask=mask, **ends)
    if DEVICE == "cpu":  # values are looked at where that costs no wait for a device
        refused("prompt_index: want 0 .. 2, got 0 .. 3", prompt_index=ints(0, 3))
        refused(
            "prompt_len: want 0 .. 7, got 1 .. 8",
            prompt_index=ints(0, 1),
            prompt_len=ints(1, 8, 1),
        )
        wrong = dict(cu_seqlens_q=ints(0, 4, 2), cu_seqlens_k=ints(0, 2, 6))
        refused(r"cu_seqlens_q: want 0 .. 6 in rising order, got \[0, 4, 2\]", packed, **wrong)
        fewer = dict(cu_seqlens_q=ints(0, 4, 6), cu_seqlens_k=ints(0, 2, 6))
        refused("as many keys as queries in every sequence", packed, causal=True, **fewer)


def test_triton_shares_out_long_prompts_too(monkeypatch):
    """Two blocks of prompts in four shares each; usually one of the numbers is 1."""
    from fastprompt.ops import prompt_attention_triton as launcher

    monkeypatch.setattr(launcher, "processors", lambda device: 64)
    whole = launcher._shares

    def more(*given):
        _, items, *_ = whole(*given)
        return items, items, 1, None, None

    monkeypatch.setattr(launcher, "_shares", more)
    inputs = make(4, 9, 9, torch.float32, sets=0, Hq=1, Hkv=1, P=60)
    grad = torch.randn(4, 1, 9, 16, device=DEVICE)
    ours = partial(prompt_attention, backend="triton")
    assert_as_accurate(ours, reference.prompt_attention, inputs, grad)
