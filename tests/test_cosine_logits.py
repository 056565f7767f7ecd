"""`ops.cosine_logits` on every backend that is here, against the reference."""

import itertools

import pytest
import torch
from compare import assert_as_accurate

from fastprompt import ops
from fastprompt.ops import reference

CUDA = torch.cuda.is_available()
# Triton's interpreter is wrong on bfloat16
PAIRS = [
    pair
    for pair in itertools.product(
        ["plain", "triton"], [torch.float32, torch.float16, torch.bfloat16]
    )
    if CUDA or pair != ("triton", torch.bfloat16)
]
IDS = [f"{backend}-{str(dtype)[6:]}" for backend, dtype in PAIRS]


def make(B, C, D, dtype, device, shared=False):
    torch.manual_seed(0)
    # a view of a longer sequence, as a model's output is
    hidden = torch.randn(B, C + 4, D, dtype=dtype, device=device)
    tokens = hidden[0, 2:-2] if shared else hidden[:, 2:-2]
    return hidden[:, 0].detach().requires_grad_(), tokens.detach().requires_grad_()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sizes", [(3, 5, 24), (2, 37, 100), (1, 1, 8), (2, 40, 384)])
@pytest.mark.parametrize(("backend", "dtype"), PAIRS, ids=IDS)
def test_against_the_reference(backend, dtype, sizes, shared, device):
    inputs = make(*sizes, dtype, device, shared)
    grad = torch.randn(sizes[:2], device=device)
    assert_as_accurate(
        lambda *x: ops.cosine_logits(*x, 7.0, backend=backend),
        lambda *x: reference.cosine_logits(*x, 7.0),
        inputs,
        grad,
    )
    scale = torch.tensor(2.0, device=device, requires_grad=True)  # a temperature may train
    out = ops.cosine_logits(*inputs, scale, backend=backend)
    assert out.dtype == torch.float32
    out.backward(grad)
    assert torch.allclose(scale.grad, (out / 2 * grad).sum(), atol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("backend", ["plain", "triton", "reference"])
def test_rows_without_length_and_bad_rows(backend, shared, device):
    cls, tokens = (x.detach() for x in make(4, 6, 16, torch.float32, device, shared))
    cls[1], tokens[..., 2, :], cls[2, 3], tokens[..., 4, 1] = 0, 0, torch.nan, torch.inf
    cls, tokens = cls.requires_grad_(), tokens.requires_grad_()
    out = ops.cosine_logits(cls, tokens, 3.0, backend=backend)
    bad = torch.zeros(4, 6, dtype=torch.bool, device=device)
    bad[2], bad[:, 4] = True, True
    assert (
        (out.isnan() == bad).all() and (out[~bad[:, 0], 2] == 0).all() and (out[1, :4] == 0).all()
    )
    out[:, :4].masked_fill(bad[:, :4], 0.0).sum().backward()
    assert (cls.grad[1] == 0).all() and (tokens.grad[..., 2, :].nan_to_num(0.0) == 0).all()
    assert cls.grad[0].isfinite().all() and cls.grad[0].any()


def test_gradcheck_and_empty(device):
    cls, tokens = make(3, 4, 6, torch.float64, device)
    assert torch.autograd.gradcheck(lambda a, b: ops.cosine_logits(a, b, 5.0), (cls, tokens))
    for B, C in ((0, 3), (2, 0)):
        cls, tokens = make(B, C, 8, torch.float32, device)
        out = ops.cosine_logits(cls, tokens)
        assert out.shape == (B, C)
        out.sum().backward()


def test_compiles_whole(device):
    cls, tokens = make(3, 4, 8, torch.float32, device)

    def step(cls, tokens, scale):
        return ops.cosine_logits(cls, tokens, scale).square().sum()

    want = torch.autograd.grad(step(cls, tokens, 4.0), (cls, tokens))
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(cls, tokens, 4.0), (cls, tokens))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("cls", "tokens", "options", "message"),
    [
        (torch.ones(2, 4), torch.ones(3, 5, 4), {}, r"want cls \[B, D\].*got \[2, 4\]"),
        (torch.ones(2, 4), torch.ones(5, 3), {}, "want cls"),
        (torch.ones(4), torch.ones(5, 4), {}, "want cls"),
        (torch.ones(2, 4).long(), torch.ones(5, 4), {}, "cls: want a tensor of one of"),
        (torch.ones(4, 2).T, torch.ones(5, 4), {}, "cls: want a contiguous last axis"),
        (torch.ones(2, 4), torch.ones(5, 4), dict(scale=torch.ones(2)), "scale: want a single"),
        (torch.ones(2, 4), torch.ones(5, 4), dict(backend="cuda"), "backend: want one of"),
    ],
)
def test_refusals(cls, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        ops.cosine_logits(cls, tokens, **options)
