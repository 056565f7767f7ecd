"""`ops.rms_norm` and `ops.layer_norm` on every backend here, against the reference."""

from functools import partial

import pytest
import torch
from backends import every_backend, every_pair
from compare import assert_as_accurate
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.kept import saved_bytes
from fastprompt.ops import layer_norm, reference, rms_norm
from fastprompt.ops.checks import MOST_CHANNELS
from fastprompt.ops.layer_norm import backward as layer_backward
from fastprompt.ops.layer_norm import forward as layer_forward
from fastprompt.ops.rms_norm import backward as rms_backward
from fastprompt.ops.rms_norm import forward as rms_forward

EPS = 1e-5
KINDS = ["llama", "gemma", "late", "layer", "no bias", "bare"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def ops(kind):
    """(the op, its definition) of (x, residual, weight, bias) and, of the op, a backend."""
    if kind in ("llama", "gemma", "late"):
        options = dict(offset=float(kind == "gemma"), cast_first=False if kind == "late" else None)

        def of(function):
            return lambda x, r, w, b, **own: function(x, w, EPS, residual=r, **options, **own)

        return of(rms_norm), of(reference.rms_norm)

    def of(function):
        def run(x, r, w, b, **own):
            w, b = (None if kind == "bare" else w, b if kind == "layer" else None)
            return function(x, w, b, EPS, residual=r, **own)

        return run

    return of(layer_norm), of(reference.layer_norm)


def joined(run):
    """Both results of a norm with a residual in one, so that both get gradients."""
    return lambda *inputs: torch.cat(run(*inputs), -1)


def make(shape, dtype, device, weight_dtype=None):
    torch.manual_seed(0)
    # x a view of a longer sequence, the residual laid out otherwise; rows far from mean 0
    wide = 1 + 2 * torch.randn(shape[0], shape[1] + 3, *shape[2:], device=device)
    x = wide.to(dtype)[:, 2:-1]
    r = torch.randn(shape[1], shape[0], *shape[2:], device=device).to(dtype).transpose(0, 1)
    w, b = torch.randn(2, shape[-1], device=device).to(weight_dtype or dtype)
    return x.detach().requires_grad_(), r.detach().requires_grad_(), w, b


SHAPES = [(2, 3, 8), (3, 5, 77), (1, 1, 5), (2, 40, 96), (2, 3, 5, 16)]


@every_kind
@pytest.mark.parametrize("shape", SHAPES)
@every_pair
def test_against_the_reference(backend, dtype, shape, kind, device):
    (ours, want), (x, r, w, b) = ops(kind), make(shape, dtype, device)
    grad = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype)
    alone = [
        lambda x, w, b, run=run: run(x, None, w, b)
        for run in (partial(ours, backend=backend), want)
    ]
    assert_as_accurate(*alone, (x, w, b), grad[..., : shape[-1]])
    assert_as_accurate(joined(partial(ours, backend=backend)), joined(want), (x, r, w, b), grad)


@every_kind
@every_pair
def test_weights_of_another_dtype(backend, dtype, kind, device):
    other = torch.float16 if dtype == torch.float32 else torch.float32
    (ours, want), (x, r, w, b) = ops(kind), make((2, 3, 40), dtype, device, other)
    y, h = ours(x, r, w, b, backend=backend)
    assert y.dtype == h.dtype == dtype
    truth = want(*(t.double() for t in (x, r, w, b)))[0]
    eager = want(x, r, w, b)[0]
    error, limit = ((t.double() - truth).norm() for t in (y, eager))
    assert error <= 2 * limit + 1e-6


@every_kind
@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_gradients_in_float64(kind, backend, device):
    x, r, w, b = make((2, 3, 7), torch.float64, device)
    ours = ops(kind)[0]
    assert torch.autograd.gradcheck(lambda x, r: ours(x, r, w, b, backend=backend), (x, r))
    assert torch.autograd.gradcheck(lambda x: ours(x, None, w, b, backend=backend), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls, offset", [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
def test_rounds_where_transformers_does(cls, offset, dtype):
    x, _, w, _ = make((4, 50, 96), dtype, "cpu")
    module = cls(96, EPS).to(dtype)
    module.weight.data = w
    want = module(x)
    assert torch.equal(rms_norm(x, w, EPS, offset=offset, backend="plain"), want)
    # sums in another order: a number in a million or so is rounded the other way
    got = rms_norm(x, w, EPS, offset=offset)
    torch.testing.assert_close(got, want)
    assert dtype == torch.float32 or (got != want).float().mean() < 0.001


@every_kind
@every_backend
def test_one_result_alone_is_used(backend, kind, device):
    (ours, want), (x, r, w, b) = ops(kind), make((2, 3, 8), torch.float32, device)
    for part in (0, 1):
        got, wanted = (
            torch.autograd.grad(run(x, r, w, b)[part].square().sum(), (x, r))
            for run in (partial(ours, backend=backend), want)
        )
        torch.testing.assert_close(got, wanted)
    # the residual alone trains
    y, _ = ours(x.detach(), r, w, b, backend=backend)
    y, wanted = y.sum(), want(x.detach(), r, w, b)[0].sum()  # gradients expanded from one number
    torch.testing.assert_close(
        *(torch.autograd.grad(t, r)[0] for t in (y, wanted)), atol=1e-5, rtol=1e-4
    )


@every_backend
def test_same_tensor_as_its_own_residual(backend, device):
    x, _, w, b = make((2, 3, 8), torch.float32, device)
    for kind in ("llama", "layer"):
        got, want = (
            torch.autograd.grad(run(x, x, w, b)[0].square().sum(), x)[0]
            for run in (partial(ops(kind)[0], backend=backend), ops(kind)[1])
        )
        torch.testing.assert_close(got, want)


# ---- without autograd ----


def raw(kind, backend):
    """(forward(x, r, w, b, **memory) -> (y, h, kept), backward(dy, h, w, kept, **memory))."""
    if kind == "layer":

        def forward(x, r, w, b, **memory):
            y, h, *kept = layer_forward(x, w, b, EPS, residual=r, backend=backend, **memory)
            return y, h, kept

        return forward, lambda dy, h, w, kept, **memory: layer_backward(
            dy, h, w, *kept, backend=backend, **memory
        )
    offset = float(kind == "gemma")

    def forward(x, r, w, b, **memory):
        y, h, rstd = rms_forward(x, w, EPS, residual=r, offset=offset, backend=backend, **memory)
        return y, h, [rstd]

    return forward, lambda dy, h, w, kept, **memory: rms_backward(
        dy, h, w, *kept, offset=offset, backend=backend, **memory
    )


@pytest.mark.parametrize("kind", ["llama", "gemma", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@every_backend
def test_in_place(backend, dtype, kind, device):
    shape = (3, 5, 24)
    forward, backward = raw(kind, backend)
    with torch.no_grad():
        x, r, w, b = (t.detach() for t in make(shape, dtype, device))
        dy, dh = torch.randn(2, *shape, device=device).to(dtype)
        y, h, kept = forward(x, r, w, b)
        assert all(t.dtype == torch.float32 and t.shape == (3, 5, 1) for t in kept)
        dx = backward(dy, h, w, kept, dh=dh)
        assert not dx.isnan().any() and forward(x, None, w, b)[1] is x

        x, r = x.contiguous(), r.contiguous()
        got = forward(x, r, w, b, out=x, total=r)
        assert got[0] is x and got[1] is r and torch.equal(x, y) and torch.equal(r, h)
        assert all(torch.equal(*pair) for pair in zip(got[2], kept, strict=True))
        for place in (dy, dh, h):
            inputs = [t.clone() if t is not place else t for t in (dy, h, dh)]
            before = place.clone()
            out = backward(inputs[0], inputs[1], w, kept, dh=inputs[2], out=place)
            assert out is place and torch.equal(out, dx)
            place.copy_(before)
        with pytest.raises(ValueError, match="out: want contiguous"):
            forward(x, r, w, b, out=dy.mT.contiguous().mT)
        with pytest.raises(ValueError, match=r"total: want \[3, 5, 24\]"):
            forward(x, r, w, b, total=x[:2])


@pytest.mark.parametrize("kind", ["llama", "gemma", "layer"])
@every_backend
def test_statistics_made_again(backend, kind, device):
    forward, backward = raw(kind, backend)
    x, r, w, b = (t.detach() for t in make((3, 5, 24), torch.float32, device))
    x += 3  # a mean to be taken off
    x[0], r[0] = x[0] * 1e-3, r[0] * 1e-3  # where eps counts
    dy, dh = torch.randn(2, 3, 5, 24, device=device)
    _, h, kept = forward(x, r, w, b)
    none = [None] * len(kept)
    for more in (dict(dh=dh), {}):
        want = backward(dy, h, w, kept, **more)
        torch.testing.assert_close(backward(dy, h, w, none, eps=EPS, **more), want)


@pytest.mark.parametrize("kind", ["llama", "gemma", "layer"])
@every_backend
def test_results_in_another_dtype(backend, kind, device):
    forward, backward = raw(kind, backend)
    x, r, w, b = (t.detach() for t in make((3, 5, 24), torch.float32, device))
    dy, dh = torch.randn(2, 3, 5, 24, device=device)
    y, h, kept = forward(x, r, w, b)
    other = torch.bfloat16 if backend == "native" else torch.float16
    out = torch.empty_like(y, dtype=other)
    assert forward(x, r, w, b, out=out)[0] is out and torch.equal(out, y.to(other))
    assert backward(dy, h, w, kept, out=out) is out
    assert torch.equal(out, backward(dy, h, w, kept).to(other))
    assert backward(dy, h, w, kept, dh=dh, out=out) is out
    want = backward(dy, h, w, kept, dh=dh).to(other)
    # csrc adds no dh of another dtype than its result's: torch then does, its sums in another order
    rtol = torch.finfo(other).eps if backend == "native" else 0
    torch.testing.assert_close(out, want, atol=0, rtol=rtol)


@every_backend
def test_little_is_kept(backend, device):
    x, r, w, b = (t.detach() for t in make((4, 8, 64), torch.float32, device))
    x, r = x.contiguous().requires_grad_(), r.contiguous().requires_grad_()
    rows, row = 32, 64 * 4
    for kind, statistics in (("llama", 1), ("layer", 2)):
        kept = saved_bytes(lambda kind=kind: ops(kind)[0](x, r, w, b, backend=backend))
        # torch keeps the statistics in storages of their own, Triton's lie side by side
        assert kept <= rows * row + statistics * rows * 4 + 2 * row


@every_kind
@every_backend
def test_empty(backend, kind, device):
    ours = ops(kind)[0]
    for shape in ((0, 3, 8), (2, 0, 8), (2, 3, 0)):
        x, r, w, b = make(shape, torch.float32, device)
        y, h = ours(x, r, w, b, backend=backend)
        assert y.shape == h.shape == shape
        (y.sum() + h.sum()).backward()
        assert x.grad.shape == shape


@every_kind
@every_backend
def test_wide_rows(backend, kind, device):
    """What no program holds at once is left to torch."""
    ours, want = ops(kind)
    for D in (MOST_CHANNELS, MOST_CHANNELS + 1):
        x, r, w, b = make((1, 1, D), torch.float32, device)
        torch.testing.assert_close(ours(x, r, w, b, backend=backend), want(x, r, w, b))


@every_kind
def test_compiles_whole(kind, device):
    x, r, w, b = make((2, 3, 8), torch.float32, device)

    def step(x, r):
        y, h = ops(kind)[0](x, r, w, b)
        return (y * ops(kind)[0](h, None, w, b)).sum()

    want = torch.autograd.grad(step(x, r), (x, r))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, r), (x, r))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))


def test_registration(device):
    x, r, w, b = (t.detach() for t in make((2, 3, 8), torch.float32, device))
    check, own = torch.library.opcheck, torch.ops.fastprompt
    for residual in (None, r):
        check(own.rms_norm, (x, residual, EPS, True, w, 0.0, "auto"))
        check(own.layer_norm, (x, residual, w, b, EPS, "auto"))
        check(own.rms_norm_backward, (x, x, x[..., :1], residual, w, 0.0, "auto"))
        statistics = x[..., :1].contiguous(), x[..., :1].contiguous()
        check(own.layer_norm_backward, (x, x, *statistics, residual, w, "auto"))


@pytest.mark.parametrize(
    "norm", [rms_norm, lambda x, w, eps, **o: layer_norm(x, w, None, eps, **o)]
)
def test_refusals(norm, monkeypatch):
    x, w = torch.ones(2, 4), torch.ones(4)
    for args, options, message in [
        ((x.long(), w), {}, "x: want a tensor of one of"),
        ((x.T, torch.ones(2)), {}, r"x: want a contiguous last axis, got strides \(1, 4\)"),
        ((x[0, 0], w), {}, "want \\[..., D\\]"),
        ((x, torch.ones(3)), {}, r"weight: want \[4\], got \[3\]"),
        ((x, w.clone().requires_grad_()), {}, "weight must be frozen"),
        ((x, w.to("meta")), {}, "weight: want it on cpu, got meta"),
        ((x, w), dict(residual=x[:1]), r"residual: want \[2, 4\], got \[1, 4\]"),
        ((x, w), dict(residual=x.half()), "residual: want torch.float32 on cpu, as x"),
        ((x, w), dict(backend="cuda"), "backend: want one of auto, triton, native, plain"),
    ]:
        with pytest.raises(ValueError, match=message):
            norm(*args, EPS, **options)
    with pytest.raises(ValueError, match="bias must be frozen"):
        layer_norm(x, w, torch.ones(4, requires_grad=True), EPS)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="want CUDA tensors"):
        norm(x, w, EPS, backend="triton")


@every_backend
def test_too_many_axes(backend, device):
    x = torch.randn(2, 2, 2, 2, 2, 2, 2, 2, 3, device=device)[:, ::2, :, ::2, :, ::2, :, ::2]
    w = torch.ones(3, device=device)
    if backend != "triton":
        torch.testing.assert_close(
            rms_norm(x, w, EPS, backend=backend), reference.rms_norm(x, w, EPS)
        )
    else:
        with pytest.raises(ValueError, match="want leading axes that merge into three"):
            rms_norm(x, w, EPS, backend=backend)
