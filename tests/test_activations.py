"""`ops.swiglu` and `ops.gelu` on every backend here, against the reference."""

from functools import partial

import pytest
import torch
from backends import every_backend, every_pair
from compare import assert_as_accurate
from transformers.activations import ACT2FN

from benchmarks.kept import saved_bytes
from fastprompt.ops import gelu, reference, swiglu
from fastprompt.ops.gelu import KINDS
from fastprompt.ops.gelu import backward as gelu_backward
from fastprompt.ops.gelu import forward as gelu_forward
from fastprompt.ops.swiglu import ACTIVATIONS
from fastprompt.ops.swiglu import backward as swiglu_backward
from fastprompt.ops.swiglu import forward as swiglu_forward

every_kind = pytest.mark.parametrize("kind", [*ACTIVATIONS, *KINDS])
SHAPES = [(2, 3, 8), (3, 5, 77), (1, 1, 9), (2, 2500), (5,), (2, 3, 4, 16)]
LAYOUTS = ["dense", "halves", "apart"]


def ops(kind, **options):
    """The op and its definition, of one tensor or of gate and up."""
    if kind in ACTIVATIONS:
        return partial(swiglu, activation=kind, **options), partial(
            reference.swiglu, activation=kind
        )
    return partial(gelu, approximate=kind, **options), partial(reference.gelu, approximate=kind)


def make(kind, shape, layout, dtype, device):
    torch.manual_seed(0)
    *lead, F = shape
    both = 3 * torch.randn(*lead, 2 * F, device=device).to(dtype)
    if layout == "halves":
        pair = both.tensor_split(2, -1)
    elif layout == "apart":  # rows far apart, and the two not alike
        pair = torch.cat([both, both], -1)[..., 1 : F + 1], both[..., :F].contiguous()
    else:
        pair = both[..., :F].contiguous(), both[..., F:].contiguous()
    pair = [t.detach().requires_grad_() for t in pair]
    return pair if kind in ACTIVATIONS else pair[:1]


@every_kind
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@every_pair
def test_against_the_reference(backend, dtype, shape, layout, kind, device):
    inputs = make(kind, shape, layout, dtype, device)
    grad = torch.randn(shape, device=device).to(dtype)
    assert_as_accurate(*ops(kind, backend=backend)[:1], ops(kind)[1], inputs, grad)
    out = ops(kind, backend=backend)[0](*inputs)
    assert out.is_contiguous()
    got = torch.autograd.grad(out.sum(), inputs)  # a gradient that is expanded from one number
    want = torch.autograd.grad(ops(kind)[1](*inputs).sum(), inputs)
    tolerance = dict(atol=1e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.2, rtol=0.1)
    torch.testing.assert_close(got, want, **tolerance)


@every_kind
@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_gradients_in_float64(kind, backend, device):
    inputs = make(kind, (2, 3, 5), "halves", torch.float64, device)
    assert torch.autograd.gradcheck(ops(kind, backend=backend)[0], inputs)


@pytest.mark.parametrize(
    "kind, name",
    [("none", "gelu"), ("tanh", "gelu_pytorch_tanh"), ("quick", "quick_gelu"), ("silu", "silu")],
)
def test_these_are_transformers_activations(kind, name):
    inputs = make(kind, (4, 50), "dense", torch.bfloat16, "cpu")
    want = ACT2FN[name](inputs[0]) * (inputs[1] if kind == "silu" else 1)
    assert torch.equal(ops(kind, backend="plain")[0](*inputs), want)


@every_kind
@every_backend
def test_far_out(backend, kind, device):
    """Where exponentials overflow, and where the activation is 0 or the identity."""
    x = torch.tensor([-1e4, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e4], device=device)
    inputs = [x.requires_grad_(), torch.ones_like(x)][: 1 + (kind in ACTIVATIONS)]
    out = ops(kind, backend=backend)[0](*inputs)
    torch.testing.assert_close(out, x.relu(), atol=1e-30, rtol=1e-6)
    dx = torch.autograd.grad(out.sum(), x)[0]
    want = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0], device=device)
    torch.testing.assert_close(dx, want, atol=1e-30, rtol=1e-6)


@every_backend
def test_one_tensor_gates_itself(backend, device):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    got, want = (
        torch.autograd.grad(run(x, x).sum(), x)[0]
        for run in (partial(swiglu, backend=backend), reference.swiglu)
    )
    torch.testing.assert_close(got, want)


@every_backend
def test_only_what_is_asked_for(backend, device):
    gate, up = make("silu", (2, 3, 8), "halves", torch.float32, device)
    for frozen in (0, 1):
        pair = [t.detach() if i == frozen else t for i, t in enumerate((gate, up))]
        wanted = pair[1 - frozen]
        got = torch.autograd.grad(swiglu(*pair, backend=backend).sum(), wanted)[0]
        want = torch.autograd.grad(reference.swiglu(*pair).sum(), wanted)[0]
        torch.testing.assert_close(got, want)


# ---- without autograd ----


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@every_backend
def test_gate_and_up_in_place(backend, dtype, kind, device):
    shape, options = (3, 5, 24), dict(activation=kind, backend=backend)
    with torch.no_grad():
        both = torch.randn(3, 5, 48, device=device).to(dtype)
        gate, up = both.tensor_split(2, -1)
        dy = torch.randn(shape, device=device).to(dtype)
        y = swiglu_forward(gate, up, **options)
        dgate, dup = swiglu_backward(dy, gate, up, **options)
        assert dgate.untyped_storage().data_ptr() == dup.untyped_storage().data_ptr()
        assert dgate.stride() == dup.stride() == (5 * 48, 48, 1)

        def fresh():
            copy = both.clone()
            return copy, *copy.tensor_split(2, -1), dy.clone()

        copy, g, u, d = fresh()
        got = swiglu_backward(d, g, u, **options, into=(g, u))
        assert got[0] is g and torch.equal(copy, torch.cat([dgate, dup], -1))
        for into in ((0, 2), (2, 0), (2, 1)):  # either may be dy
            _, *places = fresh()
            out = [places[i] for i in into]
            swiglu_backward(places[2], *places[:2], **options, into=tuple(out))
            assert torch.equal(out[0], dgate) and torch.equal(out[1], dup)
        for place in (0, 1):
            _, *places = fresh()
            assert swiglu_forward(*places[:2], **options, out=places[place]) is places[place]
            assert torch.equal(places[place], y)
        with pytest.raises(ValueError, match=r"out: want \[3, 5, 24\], got \[3, 5, 48\]"):
            swiglu_forward(gate, up, **options, out=both)
        with pytest.raises(ValueError, match=r"into\[1\]: want"):
            swiglu_backward(dy, gate, up, **options, into=(gate, both))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@every_backend
def test_gelu_in_place(backend, dtype, kind, device):
    with torch.no_grad():
        x, dy = torch.randn(2, 3, 50, device=device).to(dtype)
        y = gelu_forward(x, kind, backend=backend)
        dx = gelu_backward(dy, x, kind, backend=backend)
        for place in (0, 1):
            pair = [dy.clone(), x.clone()]
            assert torch.equal(gelu_backward(*pair, kind, out=pair[place], backend=backend), dx)
            assert not torch.equal(pair[place], (dy, x)[place])
        assert gelu_forward(x, kind, out=x, backend=backend) is x and torch.equal(x, y)
        with pytest.raises(ValueError, match="out: want"):
            gelu_forward(x, kind, out=x[:1], backend=backend)


@every_backend
def test_results_are_not_kept(backend, device):
    size = 3 * 50 * 4
    gate, up = make("silu", (3, 50), "dense", torch.float32, device)
    assert saved_bytes(lambda: swiglu(gate, up, backend=backend)) == 2 * size
    assert saved_bytes(lambda: gelu(gate, backend=backend)) == size


@every_kind
@every_backend
def test_empty(backend, kind, device):
    for shape in ((0, 3), (2, 0)):
        inputs = make(kind, shape, "halves", torch.float32, device)
        out = ops(kind, backend=backend)[0](*inputs)
        assert out.shape == shape
        out.sum().backward()
        assert all(t.grad.shape == shape for t in inputs)


@every_kind
def test_compiles_whole(kind, device):
    both = torch.randn(2, 3, 16, device=device, requires_grad=True)

    def step(both):
        gate, up = both.tanh().tensor_split(2, -1)
        return ops(kind)[0](*(gate, up)[: 1 + (kind in ACTIVATIONS)]).square().sum()

    want = torch.autograd.grad(step(both), both)[0]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.allclose(torch.autograd.grad(compiled(both), both)[0], want, atol=1e-6)


def test_registration(device):
    x = torch.randn(2, 3, 8, device=device)
    check, own = torch.library.opcheck, torch.ops.fastprompt
    check(own.swiglu, (x, x + 1, "silu", "auto"))
    check(own.swiglu_backward, (x, x + 1, x + 2, "gelu_tanh", "auto"))
    check(own.gelu, (x, "quick", "auto"))
    check(own.gelu_backward, (x, x + 1, "none", "auto"))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: swiglu(x.long(), x), "gate: want a tensor of one of"),
        (lambda x: swiglu(x, x[:1]), r"up: want \[2, 4\], got \[1, 4\]"),
        (
            lambda x: swiglu(x, x.half()),
            "up: want torch.float32 on cpu, as gate; got torch.float16",
        ),
        (lambda x: swiglu(x, x.T.contiguous().T), r"up: want a contiguous last axis.* \(1, 2\)"),
        (lambda x: swiglu(x, x, activation="relu"), "activation: want one of silu, gelu_tanh"),
        (lambda x: swiglu(x[0, 0], x[0, 0]), "want \\[..., F\\]"),
        (lambda x: swiglu(x, x, backend="cuda"), "backend: want one of"),
        (lambda x: gelu(None), "x: want a tensor of one of .* got NoneType"),
        (lambda x: gelu(x, "sigmoid"), "approximate: want one of none, tanh, quick; got 'sigmoid'"),
        (lambda x: gelu(x[0, 0]), "want \\[..., F\\]"),
        (lambda x: gelu(x, backend="cuda"), "backend: want one of"),
    ],
)
def test_refusals(run, message):
    with pytest.raises(ValueError, match=message):
        run(torch.ones(2, 4))
