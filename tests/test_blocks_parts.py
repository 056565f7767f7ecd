"""The pieces of frozen blocks by themselves: elementwise backward formulas, products."""

from functools import partial
from importlib import import_module

import frozen
import pytest
import tiny
import torch
from torch import nn

from fastprompt import linear4bit
from fastprompt.blocks import elementwise, products
from fastprompt.blocks.parts import LAYER, RMS, RMS_PLUS_ONE, Norm
from fastprompt.blocks.products import project, project_backward
from fastprompt.ops.rope import backward as rope_backward
from fastprompt.ops.rope import forward as rope

nf4_linear = import_module("fastprompt.ops.nf4_linear")  # the package has the op by that name


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def by_autograd(f, inputs, dy):
    inputs = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*inputs), inputs, dy)


NORMS = {
    RMS: lambda x, m: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.eps) * m.weight,
    RMS_PLUS_ONE: lambda x, m: (
        x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.eps) * (1 + m.weight)
    ),
    LAYER: lambda x, m: m(x),
}


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kind", NORMS)
def test_norms(kind, biased):
    torch.manual_seed(0)
    module = nn.LayerNorm(16, eps=0.1, bias=biased, dtype=torch.float64).requires_grad_(False)
    for p in module.parameters():
        p.normal_()
    norm, x, dy, past = Norm(module, kind, module.eps), *normal(3, 2, 5, 16)
    torch.testing.assert_close(
        elementwise.normalize(x, norm, torch.float64), NORMS[kind](x, module)
    )
    (want,) = by_autograd(lambda x: NORMS[kind](x, module), [x], dy)
    torch.testing.assert_close(elementwise.normalize_backward(dy, x, norm, None), want)
    before = past.clone()
    got = elementwise.normalize_backward(dy, x, norm, past)
    torch.testing.assert_close(got, want + past)
    assert torch.equal(past, before)


def test_dtypes_of_norms():
    norm = Norm(nn.LayerNorm(8), LAYER, 1e-5)
    x = torch.randn(2, 8).bfloat16()
    assert elementwise.normalize(x, norm, torch.bfloat16).dtype == torch.bfloat16
    assert elementwise.normalize(x, norm, torch.float32).dtype == torch.float32
    dy = torch.randn(2, 8)
    assert elementwise.normalize_backward(dy, x, norm, None).dtype == torch.bfloat16
    assert elementwise.normalize_backward(x, dy, norm, x).dtype == torch.bfloat16


ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, gated):
    torch.manual_seed(0)
    gate, up, dy = 2 * normal(3, 4, 9)
    inputs = (gate, up) if gated else (gate,)
    before = [x.clone() for x in (gate, up, dy)]

    def definition(gate, up=None):
        return ACTIVATIONS[name](gate) * (1 if up is None else up)

    up = up if gated else None
    torch.testing.assert_close(elementwise.activate(name, gate, up), definition(*inputs))
    got = elementwise.activate_backward(name, dy, gate, up)
    want = by_autograd(definition, inputs, dy)
    assert len(got) == len(want)
    torch.testing.assert_close(got, want)
    assert all(
        torch.equal(a, b) for a, b in zip((gate, up, dy), before, strict=True) if a is not None
    )


@pytest.mark.parametrize("turned", [16, 8])
def test_rotation(turned):
    torch.manual_seed(0)
    x, dy = normal(2, 3, 5, 4, 16)
    cos, sin = normal(2, 1, 5, turned)  # no half like the other: so the formula is the whole of it

    def definition(x):
        own, rest = x[..., :turned], x[..., turned:]
        first, second = own.chunk(2, -1)
        half = torch.cat([-second, first], -1)
        return torch.cat([own * cos[:, :, None] + half * sin[:, :, None], rest], -1)

    for turn, given, want in (
        (rope, x, definition(x)),
        (rope_backward, dy, by_autograd(definition, [x], dy)[0]),
    ):
        heads_first = given.clone().transpose(1, 2)
        got = turn(heads_first, heads_first[:, :1].clone(), cos, sin, out=None)
        torch.testing.assert_close(got[0].transpose(1, 2), want)


@pytest.mark.parametrize("bias", [True, False])
def test_products(bias):
    torch.manual_seed(0)
    parts = [nn.Linear(6, n, bias, dtype=torch.float64).requires_grad_(False) for n in (6, 4, 5)]
    x, wide = normal(2, 3, 6), normal(2, 3, 15)
    want = [part(x) for part in parts]
    torch.testing.assert_close(project(x, parts, False), want)
    grads = wide.split([6, 4, 5], dim=-1)  # views of one tensor

    def together(x):
        return torch.cat([part(x) for part in parts], -1)

    before = wide.clone()
    torch.testing.assert_close(
        project_backward(grads, parts, False), by_autograd(together, [x], wide)[0]
    )
    # an expanded gradient, as the one of a sum is
    ones = [torch.ones((), dtype=torch.float64).expand(2, 3, p.out_features) for p in parts]
    torch.testing.assert_close(
        project_backward(ones, parts, False),
        by_autograd(together, [x], torch.ones_like(wide))[0],
    )
    assert torch.equal(wide, before)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_a_4bit_product_is_computed_in(autocast, monkeypatch):
    """The module's compute_dtype, as bitsandbytes has it; under autocast what autocast says."""
    Linear4bit = pytest.importorskip("bitsandbytes.nn").Linear4bit
    part = Linear4bit(64, 32, compute_dtype=torch.float32).to("cpu").requires_grad_(False)
    linear4bit.adopt(part)
    seen = []
    forward, backward = products.nf4_linear, products.nf4_linear_backward

    def watched(x, weight, bias, dtype):
        seen.append(dtype)
        return forward(x, weight, bias, dtype=dtype)

    def watched_backward(dy, weight):
        seen.append(dy.dtype)
        return backward(dy, weight)

    monkeypatch.setattr(products, "nf4_linear", watched)
    monkeypatch.setattr(products, "nf4_linear_backward", watched_backward)
    x, dy = torch.randn(3, 64).bfloat16(), torch.randn(3, 32).bfloat16()
    (y,), dx = project(x, [part], autocast), project_backward([dy], [part], autocast)
    assert y.dtype == dx.dtype == torch.bfloat16
    assert seen == [torch.bfloat16 if autocast else torch.float32] * 2


@pytest.fixture(params=["plain", "triton"])
def side_by_side(request, monkeypatch):
    """As on CUDA: 4-bit weights that share x are multiplied as one; decoded as here, or there."""
    monkeypatch.setattr(products, "side_by_side", lambda x: True)
    if request.param == "triton":
        by_triton = partial(nf4_linear.decode_into, backend="triton")
        monkeypatch.setattr(nf4_linear, "decode", lambda w, out: by_triton(w, out))


def four_bit(*widths, bias, compute=torch.float32):
    Linear4bit = pytest.importorskip("bitsandbytes.nn").Linear4bit
    made = []
    for i, n in enumerate(widths):
        part = Linear4bit(64, n, bias in (True, i), compute_dtype=compute, quant_type="nf4")
        made.append(part.to("cpu").requires_grad_(False))
        linear4bit.adopt(made[-1])
    return made


@pytest.mark.parametrize("bias", [True, False, 1])
def test_4bit_weights_multiplied_as_one(bias, side_by_side, monkeypatch):
    torch.manual_seed(0)
    parts = four_bit(48, 16, 32, bias=bias)
    x, wide = torch.randn(2, 3, 64), torch.randn(2, 3, 96)
    grads = wide.split([48, 16, 32], dim=-1)
    ys, dx = project(x, parts, False), project_backward(grads, parts, False)
    apart = project_backward([g.clone() for g in grads], parts, False)
    assert ys[0].untyped_storage().data_ptr() == ys[2].untyped_storage().data_ptr()
    # products of another width are summed in another order
    monkeypatch.setattr(products, "side_by_side", lambda x: False)
    torch.testing.assert_close(ys, project(x, parts, False))
    torch.testing.assert_close(dx, project_backward(grads, parts, False))
    assert torch.equal(dx, apart)


@pytest.mark.parametrize("policy", ["speed", "balanced"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "dinov2"])
def test_blocks_of_weights_multiplied_as_one(name, policy, monkeypatch):
    pytest.importorskip("bitsandbytes")
    ours, theirs = frozen.pair(name, policy, "nf4")
    given = tiny.inputs(name, torch.float64)
    want = frozen.run(name, theirs, given)
    monkeypatch.setattr(products, "side_by_side", lambda x: True)
    got = frozen.run(name, ours, given)
    assert frozen.is_fused(ours)
    assert all(frozen.relative(a, b) < 1e-10 for a, b in zip(got, want, strict=True))


def test_weights_of_other_dtypes_are_multiplied_apart(side_by_side):
    parts = four_bit(48, bias=True) + four_bit(16, bias=True, compute=torch.bfloat16)
    x = torch.randn(2, 3, 64)
    for y, part in zip(project(x, parts, False), parts, strict=True):
        assert torch.equal(y, part(x))
    dense = [nn.Linear(64, 8).requires_grad_(False), parts[0]]
    assert torch.equal(project(x, dense, False)[0], dense[0](x))


def test_gradients_that_lie_side_by_side_are_not_copied():
    wide = torch.randn(4, 3, 12)
    both = wide.split([8, 4], dim=-1)
    assert products.joined(both).data_ptr() == wide.data_ptr()
    assert torch.equal(products.joined(both), wide)
    for others in (
        both[::-1],
        [t.clone() for t in both],
        wide.split(6, -1)[:1] * 2,
        wide.unbind(1)[:2],  # in one storage, of one stride, but not along the last axis
        wide.view(4, 36)[:, :24].unflatten(1, (2, 12)).unbind(1),
        torch.arange(8.0).view(2, 4).unbind(0),
    ):
        assert torch.equal(products.joined(others), torch.cat(list(others), -1))
