"""The wiring of attention kernels that this machine may not have.

CUDA's are called on fake tensors, which checks every argument against the operator's schema and
gives shapes but no numbers; xformers by a stand-in of its four names, written in plain PyTorch.
"""

import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprompt.ops import products, prompt_attention, reference, vendors
from fastprompt.ops.prompt_attention import chosen_backend


@pytest.mark.parametrize("mask", [None, "mask"])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cuda_kernels_take_what_they_are_given(dtype, capability, mask, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with FakeTensorMode(), torch.no_grad():
        like = dict(dtype=dtype, device="cuda")
        q = torch.empty(2, 30, 6, 32, **like).transpose(1, 2)
        k, v = torch.empty(2, 2, 41, 2, 32, **like).transpose(2, 3).unbind(0)
        if mask:
            mask = torch.zeros(2, 1, 1, 41, **like)
        else:
            k, v = k[:, :, :30], v[:, :, :30]
        vendor, causal = vendors.OnCuda(), mask is None
        out, lse = vendor.attend(q, k, v, mask, causal, 0.2)
        assert out.shape == q.shape and out.dtype == dtype and lse.shape == (2, 6, 30)
        grads = vendor.gradients(out, q, k, v, out, lse, mask, causal, 0.2)
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def attention(q, k, v, bias, scale):
    """[B, N, H, d] as xformers has it; with the log-sum-exp [B, H, N] in whole blocks of 32."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    if isinstance(bias, types.SimpleNamespace):  # lower triangular
        bias = torch.full(scores.shape[-2:], -torch.inf).triu(1)
    if bias is not None:
        scores = scores + bias
    out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
    return out, scores


@pytest.fixture
def xformers(monkeypatch):
    def forward(q, k, v, attn_bias=None, scale=None):
        out, scores = attention(q, k, v, attn_bias, scale)
        lse = scores.logsumexp(-1)
        return out, F.pad(lse, (0, -lse.shape[-1] % 32))

    def backward(dout, out, lse, q, k, v, attn_bias=None, scale=None):
        _, scores = attention(q, k, v, attn_bias, scale)
        p = (scores - lse[:, :, : q.shape[1], None]).exp()
        delta = (dout * out).sum(-1).transpose(1, 2)[..., None]
        ds = p * (torch.einsum("bnhd,bmhd->bhnm", dout, v) - delta) * scale
        return (
            torch.einsum("bhnm,bmhd->bnhd", ds, k),
            torch.einsum("bhnm,bnhd->bmhd", ds, q),
            torch.einsum("bhnm,bnhd->bmhd", p, dout),
        )

    fmha = types.ModuleType("xformers.ops.fmha")
    fmha.memory_efficient_attention_forward_requires_grad = forward
    fmha.memory_efficient_attention_backward = backward
    fmha.attn_bias = types.SimpleNamespace(LowerTriangularMask=types.SimpleNamespace)
    ops = types.ModuleType("xformers.ops")
    ops.fmha = fmha
    monkeypatch.setattr(vendors, "has_xformers", lambda: True)
    for name, module in (("xformers", types.ModuleType("xformers")), ("xformers.ops", ops)):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("kind", ["full", "causal", "causal key_mask", "attn_mask window"])
def test_xformers_gives_the_same(kind, xformers):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 16) for h in (4, 2, 2))
    inputs = [t.requires_grad_() for t in (q, k, v, *torch.randn(2, 2, 5, 16).unbind(0))]
    key_mask = torch.rand(2, 9) > 0.3
    key_mask[:, 0] = True
    options = {
        "full": {},
        "causal": dict(causal=True),
        "causal key_mask": dict(causal=True, key_mask=key_mask),
        "attn_mask window": dict(attn_mask=torch.randn(2, 1, 9, 9), window=3),
    }[kind]
    ours = partial(prompt_attention, backend="xformers", **options)
    eager = partial(reference.prompt_attention, **options)
    assert_as_accurate(ours, eager, inputs, torch.randn(2, 4, 9, 16))


def test_old_cards_go_to_xformers_where_it_is(monkeypatch):
    q = types.SimpleNamespace(dtype=torch.float16, device=torch.device("cuda"))
    for capability, has, want in [
        ((9, 0), True, "triton"),
        ((8, 0), False, "triton"),
        ((7, 5), True, "xformers"),
        ((7, 5), False, "vendor"),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        monkeypatch.setattr(vendors, "has_xformers", lambda has=has: has)
        assert chosen_backend(q) == want
        assert chosen_backend(q, "vendor") == "vendor"
    assert chosen_backend(torch.empty(0, dtype=torch.float16)) == "vendor"
    assert chosen_backend(torch.empty(0, dtype=torch.float64)) == "reference"


@pytest.mark.parametrize("chunk", [1, 40, 300])
@pytest.mark.parametrize("masks", ["none", "bias", "softcap"])
def test_scores_in_pieces_of_any_size(masks, chunk, monkeypatch):
    """Prompts' scores are made a chunk at a time: some heads, or some rows of one."""
    monkeypatch.setattr(products, "CHUNK", chunk)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 16) for h in (4, 2, 2))
    inputs = [t.requires_grad_() for t in (q, k, v, *torch.randn(2, 2, 5, 16).unbind(0))]
    options = {
        "none": {},
        "bias": dict(prompt_bias=torch.randn(1, 1, 9, 5), attn_mask=torch.randn(1, 4, 9, 9)),
        "softcap": dict(softcap=2.0, causal=True),
    }[masks]
    ours = partial(prompt_attention, backend="vendor", **options)
    eager = partial(reference.prompt_attention, **options)
    assert_as_accurate(ours, eager, inputs, torch.randn(2, 4, 9, 16))
