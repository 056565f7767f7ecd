"""csrc's norms, activations and rotation on every instruction set that this machine runs.

That the ops are right on ``backend="native"`` at all is what their own tests say; here widths at
the ends of vectors, dtypes that meet, memory and threads.
"""

import itertools
import math
from functools import partial

import pytest
import torch
from compare import assert_as_accurate
from test_activations import make as make_pair
from test_activations import ops as activation
from test_norms import KINDS as NORMS
from test_norms import joined, raw
from test_norms import make as make_rows
from test_norms import ops as norm
from test_rope import make as make_heads

from fastprompt import native, ops
from fastprompt import native_elementwise as own
from fastprompt.ops import reference
from fastprompt.ops.gelu import backward as gelu_backward
from fastprompt.ops.gelu import forward as gelu
from fastprompt.ops.rms_norm import backward as rms_backward
from fastprompt.ops.rms_norm import forward as rms
from fastprompt.ops.rope import forward as rope
from fastprompt.ops.swiglu import backward as swiglu_backward
from fastprompt.ops.swiglu import forward as swiglu

pytestmark = pytest.mark.skipif(not native.available(), reason="csrc is not built")
CALLS = ("norm_forward", "norm_backward", "activate", "activate_backward", "turn")
WIDTHS = (1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 100, 576)
ACTIVATIONS = ["silu", "gelu_tanh", "none", "tanh", "quick"]
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
every_norm = pytest.mark.parametrize("kind", NORMS)
every_activation = pytest.mark.parametrize("kind", ACTIVATIONS)


@pytest.fixture(params=native.variants())
def variant(request, monkeypatch):
    """Makes the ops take one instruction set."""
    for name in CALLS:
        monkeypatch.setattr(own, name, partial(getattr(own, name), variant=request.param))
    return request.param


@pytest.fixture
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- widths ----


@every_dtype
@every_norm
@pytest.mark.parametrize("D", WIDTHS)
def test_norms(variant, D, kind, dtype):
    ours, want = norm(kind)
    grad = torch.randn(2, 5, 2 * D).to(dtype)
    ours = partial(ours, backend="native")
    assert_as_accurate(joined(ours), joined(want), make_rows((2, 5, D), dtype, "cpu"), grad)


@every_dtype
@every_activation
@pytest.mark.parametrize("F", WIDTHS)
@pytest.mark.parametrize("layout", ["dense", "halves"])
def test_activations(variant, layout, F, kind, dtype):
    inputs = make_pair(kind, (2, 3, F), layout, dtype, "cpu")
    ours, want = activation(kind, backend="native")[0], activation(kind)[1]
    assert_as_accurate(ours, want, inputs, torch.randn(2, 3, F).to(dtype))


@every_dtype
@pytest.mark.parametrize("angles", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d, r", [(2, 2), (8, 4), (30, 22), (64, 64), (80, 64), (70, 66)])
def test_rotation(variant, d, r, angles, dtype):
    inputs = make_heads((2, 3, 2, 5, d, r), dtype, "cpu", angles=angles)

    def turned(run):
        return lambda *given: torch.cat(run(*given), 1)

    grad = torch.randn(2, 5, 5, d).to(dtype)
    wide = [t.float() for t in inputs[2:]]  # eager would round the angles to q's dtype
    ours = turned(lambda q, k: ops.rope(q, k, *inputs[2:], backend="native"))
    want = turned(lambda q, k: reference.rope(q, k, *(t.to(q.dtype) for t in wide)))
    assert_as_accurate(ours, want, inputs[:2], grad)


# ---- dtypes ----


@pytest.mark.parametrize("kind", ["llama", "gemma", "layer"])
@pytest.mark.parametrize("made_again", [False, True])
def test_dtypes_that_meet_in_a_norm(variant, made_again, kind):
    """A float32 stream under bfloat16 products, say: each tensor is read as what it is."""
    forward, backward = raw(kind, "native")
    dtypes = (torch.float32, torch.bfloat16)
    for of_h, of_y, of_dy, of_dx in itertools.product(dtypes, repeat=4):
        x, r, w, b = (t.detach() for t in make_rows((3, 5, 21), of_h, "cpu"))
        out = torch.full(x.shape, torch.nan, dtype=of_y)
        y, h, kept = forward(x, r, w, b, out=out)
        want, total, _ = forward(x.float(), r.float(), w, b)
        torch.testing.assert_close(h, total.to(of_h), atol=0, rtol=0)
        error = (y - forward(h.float(), None, w, b)[0]).norm() / want.norm()
        rounds = torch.bfloat16 in (of_y, of_h if kind == "llama" else None)
        assert y is out and error < (4e-3 if rounds else 1e-6)
        dy, dh = torch.randn(3, 5, 21).to(of_dy), torch.randn(3, 5, 21).to(of_dx)
        dx = torch.full(x.shape, torch.nan, dtype=of_dx)
        more = dict(eps=1e-5) if made_again else {}
        backward(dy, h, w, [None] * len(kept) if made_again else kept, dh=dh, out=dx, **more)
        want = backward(dy.float(), h.float(), w, kept, dh=dh.float())
        assert (dx - want).norm() < (4e-3 if of_dx == torch.bfloat16 else 1e-6) * want.norm()


def test_sums_round_as_torchs(variant):
    """x + residual of every pair of exponents, ties, infinities and NaN, by bits."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    x, r = every.view(-1, 64), every[torch.randperm(2**16)].view(-1, 64)
    r = torch.where(torch.rand(x.shape) < 0.5, r, x * (1 + torch.rand(x.shape)).bfloat16())
    total = torch.full_like(x, torch.nan)
    rms(x, torch.ones(64), 1e-5, residual=r, total=total, backend="native")
    want = x + r
    assert torch.equal(total.isnan(), want.isnan())
    fine = ~want.isnan()
    assert torch.equal(total[fine].view(torch.int16), want[fine].view(torch.int16))


# ---- memory ----


def fenced(shape, dtype):
    """NaN of this shape inside longer memory of -1s, which nothing may touch."""
    n = math.prod(shape)
    memory = torch.full((n + 64,), -1.0, dtype=dtype)
    inside = memory[31 : 31 + n].view(shape)
    inside.fill_(torch.nan)

    def untouched():
        return (memory[:31] == -1).all() and (memory[31 + n :] == -1).all()

    return inside, untouched


@every_dtype
@pytest.mark.parametrize("D", [5, 16, 43])
def test_nothing_else_is_written(variant, D, dtype):
    torch.manual_seed(0)
    x, r, dy, w = torch.randn(4, 3, D).to(dtype)
    w, options = w[0], dict(backend="native")
    fences = [fenced((3, D), dtype) for _ in range(4)]
    (a, _), (b, _), (c, _), (d, _) = fences

    def check(*results):
        for result, want in results:
            torch.testing.assert_close(result, want, rtol=0.02, atol=0.02)
            assert all(untouched() for _, untouched in fences)

    y, h, rstd = rms(x, w, 1e-5, residual=r, out=a, total=b, **options)
    wanted = reference.rms_norm(x, w, 1e-5, residual=r)
    check((y, wanted[0]), (h, wanted[1]))
    rms_backward(dy, h, w, rstd, out=c, **options)
    check((c, rms_backward(dy, h, w, rstd, backend="plain")))
    swiglu(x, r, out=a, **options)
    swiglu_backward(dy, x, r, into=(b, c), **options)
    gelu(x, out=d, **options)
    plain = dict(backend="plain")
    dgate, dup = swiglu_backward(dy, x, r, **plain)
    check((a, swiglu(x, r, **plain)), (b, dgate), (c, dup), (d, gelu(x, **plain)))
    gelu_backward(dy, x, out=d, **options)
    check((d, gelu_backward(dy, x, **plain)))
    q, k, cos, sin = (t.detach() for t in make_heads((1, 3, 1, D, 11, 6), dtype, "cpu"))
    (qo, q_left), (ko, k_left) = fenced(q.shape, dtype), fenced(k.shape, dtype)
    rope(q, k, cos, sin, out=(qo, ko), **options)
    for result, want in zip((qo, ko), rope(q, k, cos, sin, **plain), strict=True):
        torch.testing.assert_close(result, want, rtol=0.02, atol=0.02)
    assert q_left() and k_left()


@every_norm
@pytest.mark.parametrize("axes", [1, 2, 5, 9])
def test_rows_however_they_lie(variant, axes, kind):
    """Gaps at every axis, rows expanded from one, and residuals that lie otherwise."""
    lead = (2, 3, 2, 2, 1, 2, 2, 1, 2)[:axes]
    torch.manual_seed(0)
    memory = torch.randn(*(n + 1 for n in lead), 9)
    x = memory[(*(slice(n) for n in lead), slice(1, 8))]
    r = torch.randn(*reversed(lead), 7).permute(*reversed(range(axes)), axes)
    dy = torch.randn(*lead[:-1], 1, 7).expand(*lead, 7)
    w, b = torch.randn(2, 7)
    results = []
    for backend in ("native", "plain"):
        x_, r_ = (t.detach().requires_grad_() for t in (x, r))
        out = norm(kind)[0](x_, r_, w, b, backend=backend)
        results.append((*out, *torch.autograd.grad(out, (x_, r_), (dy, dy))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["silu", "none"])
def test_halves_and_expanded_gradients(variant, kind):
    both = torch.randn(2, 3, 4, 50)[:, :, ::2]
    inputs = [t.detach().requires_grad_() for t in both.tensor_split(2, -1)]
    inputs = inputs if kind == "silu" else inputs[:1]
    dy = torch.randn(2, 1, 1, 25).expand(2, 3, 2, 25)
    got, want = (
        torch.autograd.grad(activation(kind, backend=backend)[0](*inputs), inputs, dy)
        for backend in ("native", "plain")
    )
    torch.testing.assert_close(got, want)


@every_dtype
def test_in_place(variant, dtype):
    torch.manual_seed(0)
    x, r, dy, dh = torch.randn(4, 5, 37).to(dtype)
    w, options = torch.randn(37), dict(backend="native")
    y, h, rstd = rms(x, w, 1e-5, residual=r, **options)
    for out, total in ((0, 1), (1, 0), (None, 0), (0, None)):
        places = [x.clone(), r.clone()]
        memory = dict(
            out=None if out is None else places[out], total=None if total is None else places[total]
        )
        got = rms(*places[:1], w, 1e-5, residual=places[1], **memory, **options)
        assert all(map(torch.equal, got, (y, h, rstd)))
    dx = rms_backward(dy, h, w, None, eps=1e-5, dh=dh, **options)
    for i in range(3):
        given = [dy.clone(), h.clone(), dh.clone()]
        got = rms_backward(*given[:2], w, None, eps=1e-5, dh=given[2], out=given[i], **options)
        assert got is given[i] and torch.equal(got, dx)
    want = swiglu_backward(dy, x, r, **options)
    for i, j in itertools.permutations(range(3), 2):
        given = [dy.clone(), x.clone(), r.clone()]
        got = swiglu_backward(*given, into=(given[i], given[j]), **options)
        assert all(map(torch.equal, got, want))


# ---- threads ----


@every_dtype
def test_any_number_of_threads_gives_the_same_bits(variant, dtype, threads_as_before):
    """More elements than a part has, and rows that parts do not divide."""
    torch.manual_seed(0)
    x, r, dy, dh = torch.randn(4, 131, 777).to(dtype)
    w, b = torch.randn(2, 777)
    q, k, cos, sin = (t.detach() for t in make_heads((2, 9, 3, 67, 64, 64), dtype, "cpu"))

    def run(**options):
        found = []
        for kind in ("gemma", "layer"):
            forward, backward = raw(kind, options.get("backend", "native"))
            y, h, kept = forward(x, r, w, b)
            found += [y, h, *kept, backward(dy, h, w, kept, dh=dh)]
        found += [swiglu(x, r, **options), *swiglu_backward(dy, x, r, **options)]
        found += [gelu(x, **options), gelu_backward(dy, x, **options)]
        gate, up = torch.cat([x, r], 1)[:, 1:-3].tensor_split(2, -1)  # rows apart
        pulled = swiglu_backward(dy[:, 2:], gate, up, **options)
        found += [swiglu(gate, up, **options), *pulled, *rope(q, k, cos, sin, **options)]
        swiglu(gate, up, out=gate, **options)
        return [*found, gate]

    torch.set_num_threads(1)
    want = run()
    torch.testing.assert_close(want, run(backend="plain"), rtol=0.03, atol=0.03)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run(), want))


# ---- which runs ----


def test_auto_is_native_where_csrc_serves(monkeypatch):
    called = []
    for name in CALLS:
        run = getattr(own, name)
        monkeypatch.setattr(
            own, name, lambda *a, run=run, name=name, **k: (called.append(name), run(*a, **k))[1]
        )

    def all_ops(dtype, **options):
        called.clear()
        x = torch.randn(3, 8).to(dtype).requires_grad_()
        w, b = torch.randn(2, 8)
        q = torch.randn(1, 2, 3, 8).to(dtype).requires_grad_()
        angles = torch.rand(2, 1, 3, 8)
        outs = [
            ops.rms_norm(x, w, 1e-5, **options),
            ops.layer_norm(x, w, b, 1e-5, **options),
            ops.swiglu(x, x, **options),
            ops.gelu(x, **options),
            *ops.rope(q, q, *angles, **options),
        ]
        torch.autograd.backward(outs, [torch.ones_like(t) for t in outs])
        return set(called)

    for dtype in own.DTYPES:
        assert all_ops(dtype) == set(CALLS)
        assert all_ops(dtype, backend="native") == set(CALLS)
        assert not all_ops(dtype, backend="plain")
    for dtype in (torch.float16, torch.float64):
        assert not all_ops(dtype) and not all_ops(dtype, backend="native")
    x = torch.randn(3, 8)

    def traced(x):
        return swiglu(x, x)

    called.clear()
    torch.compile(traced, fullgraph=True, backend="eager")(x)
    assert not called  # traced through: the compiler fuses torch's operations
    monkeypatch.setattr(native, "available", lambda: False)
    assert not all_ops(torch.float32)


def test_native_wants_the_cpu():
    x = torch.ones(2, 4, device="meta")
    with pytest.raises(ValueError, match='want tensors on the CPU for "native", got them on meta'):
        ops.gelu(x, backend="native")


def refusals():
    x, w, s = torch.ones(2, 4), torch.ones(4), torch.ones(2, 1)
    q, a = torch.ones(1, 2, 3, 4), torch.ones(1, 3, 4)

    def forward(x=x, r=None, w=w, b=None, y=x, total=None, mean=None, rstd=s, **more):
        own.norm_forward(x, r, w, b, 1e-5, 0.0, False, y, total, mean, rstd, **more)

    def backward(dy=x, h=x, mean=None, rstd=s, dh=None, centers=False, dx=x):
        own.norm_backward(dy, h, w, mean, rstd, dh, 1e-5, 0.0, centers, dx)

    half = x.bfloat16()
    return [
        (partial(forward, r=x[:1]), r"residual: want \[2, 4\]"),
        (partial(forward, r=half), "residual: want .* torch.float32 rows"),
        (partial(forward, w=w[:3]), r"weight: want \[4\]"),
        (partial(forward, b=w[:3]), r"bias: want \[4\]"),
        (partial(forward, y=torch.ones(4, 2).T), "y: want"),
        (partial(forward, y=torch.ones(2, 8)[:, :4]), "y: want it contiguous"),
        (partial(forward, y=x.half()), "y: want .* float32 or bfloat16"),
        (partial(forward, total=half), "total: want"),
        (partial(forward, mean=s.double()), "mean: want"),
        (partial(forward, rstd=torch.ones(2)), r"rstd: want \[2, 1\]"),
        (partial(forward, variant="sse9"), "variant: want one of"),
        (partial(backward, dy=x[:1]), "dy: want"),
        (partial(backward, dh=half), "dh: want"),
        (partial(backward, dx=torch.ones(2, 8)[:, :4]), "dx: want it contiguous"),
        (partial(backward, centers=True), "mean: want it beside rstd"),
        (partial(backward, rstd=torch.ones(1, 1)), "rstd: want"),
        (lambda: own.activate(x, x[:1], "silu", x), "up: want"),
        (lambda: own.activate(x, None, "silu", half), "y: want"),
        (lambda: own.activate_backward(x, x, x, "silu", x, None), "up and dup: want both"),
        (lambda: own.activate_backward(x[:1], x, None, "silu", x, None), "dy: want"),
        (lambda: own.turn(q, q[:, :, :2], a, a, False, q, q), "k: want"),
        (lambda: own.turn(q, q, a, a, False, q[:, :1], q), "q_out: want"),
        (lambda: own.turn(q, q, a, a[:, :2], False, q, q), "sin: want"),
        (lambda: own.turn(q, q, a[..., :3], a[..., :3], False, q, q), "cos: want .* r even"),
        (lambda: own.turn(q, q, *[torch.ones(1, 3, 6)] * 2, False, q, q), "cos: want .* r even"),
    ]


@pytest.mark.parametrize(("run", "message"), refusals())
def test_refusals(run, message):
    with pytest.raises(ValueError, match=message):
        run()
