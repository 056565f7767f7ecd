"""`ops.rope` on every backend here, against the reference and transformers."""

from functools import partial

import pytest
import torch
from backends import every_backend, every_pair
from compare import assert_as_accurate
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fastprompt.ops import reference, rope
from fastprompt.ops.rope import backward, forward

SIZES = [  # B, Hq, Hkv, N, d, r
    (2, 4, 4, 5, 16, 16),
    (3, 6, 2, 7, 40, 40),  # half of it no power of two
    (2, 3, 1, 4, 24, 10),  # partial, grouped
    (1, 40, 1, 3, 128, 128),  # more heads than a program holds at once
    (2, 1, 5, 1, 8, 2),
]


def make(sizes, dtype, device, batch=None, angles=None):
    torch.manual_seed(0)
    B, Hq, Hkv, N, d, r = sizes
    # as a block has them: parts of one product's result, heads and rows swapped
    qkv = torch.randn(B, N, (Hq + 2 * Hkv) * d, device=device).to(dtype)
    q = qkv[..., : Hq * d].view(B, N, Hq, d).transpose(1, 2)
    k = qkv[..., Hq * d : (Hq + Hkv) * d].view(B, N, Hkv, d).transpose(1, 2)
    # the halves differ, and the rows are parts of longer ones
    cos, sin = torch.rand(2, B if batch is None else batch, N + 2, r + 3, device=device).to(
        angles or dtype
    )
    cos, sin = (t[:, 1:-1, 2 : r + 2] for t in (cos, sin))
    return q.detach().requires_grad_(), k.detach().requires_grad_(), cos, sin


def joined(run):
    return lambda *inputs: torch.cat(run(*inputs), 1)


def ours(backend):
    return partial(rope, backend=backend)


@pytest.mark.parametrize("sizes", SIZES)
@every_pair
def test_against_the_reference(backend, dtype, sizes, device):
    for batch in {1, sizes[0]}:
        inputs = make(sizes, dtype, device, batch)
        B, Hq, Hkv, N, d, _ = sizes
        grad = torch.randn(B, Hq + Hkv, N, d, device=device).to(dtype)
        assert_as_accurate(joined(ours(backend)), joined(reference.rope), inputs, grad)
        for got, x in zip(rope(*inputs, backend=backend), inputs[:2], strict=True):
            assert got.shape == x.shape and got.transpose(1, 2).is_contiguous()


@every_pair
def test_angles_of_another_dtype(backend, dtype, device):
    other = torch.float16 if dtype == torch.float32 else torch.float32
    inputs = make(SIZES[2], dtype, device, angles=other)
    got = rope(*inputs, backend=backend)
    for y, want in zip(got, reference.rope(*(t.double() for t in inputs)), strict=True):
        assert y.dtype == dtype
        assert (y - want).norm() <= torch.finfo(dtype).eps * want.norm()


@every_backend
def test_this_is_transformers_rotation(backend, device):
    q, k, _, _ = make((2, 4, 2, 6, 16, 16), torch.float32, device)
    angle = torch.arange(6.0, device=device)[:, None] * 10_000 ** (
        -torch.arange(0, 16, 2, device=device) / 16
    )
    angle = torch.cat([angle, angle], -1)[None]
    want = apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    got = rope(q, k, angle.cos(), angle.sin(), backend=backend)
    torch.testing.assert_close(got, want)
    back = backward(*(t.detach() for t in got), angle.cos(), angle.sin(), backend=backend)
    torch.testing.assert_close(back, (q.detach(), k.detach()))  # turned the other way round


@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_gradients_in_float64(backend, device):
    q, k, cos, sin = make(SIZES[2], torch.float64, device)
    run = partial(rope, backend=backend)
    assert torch.autograd.gradcheck(lambda q, k: run(q, k, cos, sin), (q, k))


@every_backend
def test_angles_alone_are_kept(backend, device):
    q, k, cos, sin = make(SIZES[0], torch.float32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rope(q, k, cos, sin, backend=backend)
    assert [t.data_ptr() for t in kept] == [cos.data_ptr(), sin.data_ptr()]


@every_backend
def test_one_gradient_alone(backend, device):
    q, k, cos, sin = make(SIZES[1], torch.float32, device)
    for i in (0, 1):
        got, want = (
            torch.autograd.grad(run(q, k, cos, sin)[i].sum(), (q, k)[i])[0]
            for run in (ours(backend), reference.rope)
        )
        torch.testing.assert_close(got, want)
    got, want = (
        torch.autograd.grad(sum(t.square().sum() for t in run(q, q, cos, sin)), q)[0]
        for run in (ours(backend), reference.rope)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES)
@every_backend
def test_in_place(backend, sizes, dtype, device):
    with torch.no_grad():
        q, k, cos, sin = (t.detach() for t in make(sizes, dtype, device))
        for run in (forward, backward):
            want = run(q, k, cos, sin, backend=backend)
            places = q.clone(), k.clone()
            got = run(*places, cos, sin, out=places, backend=backend)
            assert all(a is b for a, b in zip(got, places, strict=True))
            # other views of the same memory, and new memory of other strides
            again = q.clone(), k.clone()
            run(*again, cos, sin, out=tuple(t.view_as(t) for t in again), backend=backend)
            new = [torch.full(t.shape, torch.nan, dtype=dtype, device=device) for t in (q, k)]
            run(q, k, cos, sin, out=tuple(new), backend=backend)
            for results in (got, again, new):
                assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))
        with pytest.raises(ValueError, match=r"out\[1\]: want"):
            forward(q, k, cos, sin, out=(q, k[:, :0]), backend=backend)


@every_backend
def test_empty(backend, device):
    for sizes in ((0, 2, 2, 3, 8, 8), (2, 3, 2, 0, 8, 4), (2, 0, 2, 3, 8, 8), (2, 2, 0, 3, 8, 4)):
        q, k, cos, sin = make(sizes, torch.float32, device)
        got, want = rope(q, k, cos, sin, backend=backend), reference.rope(q, k, cos, sin)
        torch.testing.assert_close(got, want)
        sum(t.sum() for t in got).backward()
        assert q.grad.shape == q.shape and k.grad.shape == k.shape


def test_compiles_whole(device):
    inputs = make(SIZES[2], torch.float32, device)

    def step(q, k, cos, sin):
        q, k = rope(q, k, cos, sin)
        return q.square().sum() + k.exp().sum()

    want = torch.autograd.grad(step(*inputs), inputs[:2])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs[:2])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))


def test_registration(device):
    inputs = [t.detach() for t in make(SIZES[2], torch.float32, device)]
    for back in (False, True):
        torch.library.opcheck(torch.ops.fastprompt.rope, (*inputs, back, "auto"))


def test_refusals():
    q, k, cos, sin = (t.detach() for t in make((2, 4, 2, 3, 8, 8), torch.float32, "cpu"))
    for args, message in [
        ((q[0], k, cos, sin), r"q: want \[B, Hq, N, d\], got \[4, 3, 8\]"),
        ((q, k[:1], cos, sin), r"k: want \[2, Hkv, 3, 8\], got \[1, 2, 3, 8\]"),
        ((q, k.half(), cos, sin), "k: want torch.float32 on cpu, as q"),
        ((q.mT.contiguous().mT, k, cos, sin), "q: want a contiguous last axis"),
        ((q, k, cos[0], sin[0]), r"cos: want \[2 or 1, 3, r\], r even and at most 8; got \[3, 8\]"),
        ((q, k, cos[..., :5], sin[..., :5]), "cos: want"),
        ((q, k, cos[..., :0], sin[..., :0]), "cos: want"),
        ((q[..., :4], k[..., :4], cos, sin), "cos: want"),
        ((q, k, cos[:, :2], sin), "cos: want"),
        ((q, k, cos, sin[..., :4]), r"sin: want \[2, 3, 8\]"),
        ((q, k, cos, sin.half()), "sin: want torch.float32"),
        ((q, k, cos.clone().requires_grad_(), sin), "must be frozen"),
        ((q, k, cos.to("meta"), sin.to("meta")), "cos: want it on cpu, got meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            rope(*args)
    with pytest.raises(ValueError, match="backend: want one of"):
        rope(q, k, cos, sin, backend="cuda")
