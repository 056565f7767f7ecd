"""prompt_attention on every backend this machine has, under the one rule of accuracy."""

from functools import partial

import pytest
import torch
import torch._dynamo.testing
from compare import assert_as_accurate
from conftest import DEVICE
from torch.utils.checkpoint import checkpoint

from fastprompt import native
from fastprompt.ops import prompt_attention, reference
from fastprompt.ops.options import Options
from fastprompt.ops.vendors import has_xformers

# here Triton runs under its interpreter
BACKENDS = ["vendor", "triton"]
if DEVICE == "cuda" and has_xformers():
    BACKENDS.append("xformers")
if DEVICE == "cpu" and native.available():
    BACKENDS.append("native")
SHAPES = {  # B, Hq, Hkv, N, M, P, d
    "vit": (2, 3, 3, 33, 33, 10, 16),
    "grouped": (2, 6, 2, 21, 21, 7, 24),
    "multi-query": (1, 4, 1, 9, 9, 1, 8),
    "many prompts": (1, 2, 2, 5, 5, 150, 40),
    "blocks": (1, 2, 1, 130, 140, 20, 64),
    "decode": (3, 4, 2, 1, 50, 5, 32),
    "no prompt": (2, 2, 2, 12, 12, 0, 16),
    "no token": (2, 2, 2, 6, 0, 4, 16),
}
# the interpreter is wrong on bf16 (a known defect of Triton's); GPUs test it
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def ident(x):
    return str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else None


def make(shape, dtype=torch.float32, device=DEVICE, seed=0):
    """q, k, v as views of one [B, T, heads, d] tensor where they can be: a model's own strides."""
    B, Hq, Hkv, N, M, P, d = shape
    torch.manual_seed(seed)
    like = dict(dtype=dtype, device=device)
    q = torch.randn(B, N, Hq, d, **like)
    k, v = torch.randn(B, M, 2, Hkv, d, **like).unbind(2)
    if N == M and Hq == Hkv:
        q, k, v = torch.randn(B, N, 3, Hq, d, **like).unbind(2)
    prompts = torch.randn(2, Hkv, P, d, **like).unbind(0)
    return [
        t.requires_grad_() for t in (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    ] + [t.detach().requires_grad_() for t in prompts]


def options_for(kind, shape, device=DEVICE, seed=1):
    B, Hq, _, N, M, P, _ = shape
    rng = torch.Generator().manual_seed(seed)
    key_mask = torch.rand(B, M, generator=rng) > 0.3
    if kind == "left":
        key_mask = torch.arange(M) >= torch.arange(B)[:, None] + M // 3
    if B > 1:
        key_mask[-1] = False  # one row of the batch sees no token at all
    additive = torch.randn(B, Hq, N, M, generator=rng)
    additive[0, 0, : N // 2] = -torch.inf
    allowed = torch.rand(B, 1, N, M, generator=rng) > 0.5
    options = {
        "full": {},
        "causal": dict(causal=True),
        "key_mask": dict(key_mask=key_mask),
        "left": dict(key_mask=key_mask, causal=True),
        "bool": dict(attn_mask=allowed),
        "additive": dict(attn_mask=additive, prompt_bias=torch.randn(1, Hq, N, P, generator=rng)),
        "everything": dict(
            causal=True,
            key_mask=key_mask,
            attn_mask=allowed,
            prompt_bias=torch.randn(B, 1, N, P, generator=rng),
            scale=0.3,
        ),
        "window": dict(window=5, causal=True),
        "window both ways": dict(window=4, key_mask=key_mask),
        "soft-capped": dict(softcap=1.5, scale=0.7),
        "soft-capped window": dict(
            softcap=5.0,
            scale=-0.4,
            causal=True,
            window=7,
            key_mask=key_mask,
            prompt_bias=torch.randn(B, 1, N, P, generator=rng),
        ),
    }[kind]
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


KINDS = [
    "full", "causal", "key_mask", "left", "bool", "additive", "everything",
    "window", "window both ways", "soft-capped", "soft-capped window",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_accurate_as_eager(backend, shape, kind, dtype):
    B, Hq, _, N, M, _, d = shape
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter is wrong on bfloat16")
    options = options_for(kind, shape)
    if options.get("causal") and M < N:
        pytest.skip("causal wants at least as many keys as queries")
    grad_out = torch.randn(B, Hq, N, d, device=DEVICE)
    ours = partial(prompt_attention, backend=backend, **options)
    eager = partial(reference.prompt_attention, **options)
    assert_as_accurate(ours, eager, make(shape, dtype), grad_out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["full", "left", "additive", "soft-capped window"])
def test_prompts_alone_get_the_same_gradient(backend, kind):
    shape = SHAPES["grouped"]
    inputs, options = make(shape), options_for(kind, shape)
    both = torch.autograd.grad(
        prompt_attention(*inputs, backend=backend, **options).square().sum(), inputs
    )
    frozen = [t.detach() for t in inputs[:3]] + inputs[3:]
    alone = torch.autograd.grad(
        prompt_attention(*frozen, backend=backend, **options).square().sum(), inputs[3:]
    )
    torch.testing.assert_close(alone, both[3:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_inputs(backend):
    for shape in [(0, 2, 2, 4, 4, 3, 16), (2, 2, 2, 0, 4, 3, 16), (2, 2, 2, 4, 0, 0, 16)]:
        inputs = make(shape)
        out = prompt_attention(*inputs, backend=backend)
        assert out.shape == inputs[0].shape and not out.any()
        for grad, x in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
            assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    """Expanded batches, sliced prompts, an output gradient of stride zero."""
    q, k, v, pk, pv = (t.detach() for t in make((1, 4, 2, 9, 9, 12, 16)))
    k, v = k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)
    q = torch.randn(3, 4, 18, 16, device=DEVICE)[:, :, ::2]
    inputs = [t.requires_grad_() for t in (q, k, v, pk[:, ::3], pv[:, ::3])]
    grad_out = torch.ones(1, device=DEVICE).expand(3, 4, 9, 16)
    ours, eager = (
        torch.autograd.grad(fn(*inputs, causal=True), inputs, grad_out)
        for fn in (partial(prompt_attention, backend=backend), reference.prompt_attention)
    )
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("kind", ["full", "left", "everything", "soft-capped window", "sets"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_bit_for_bit(backend, kind):
    shape = SHAPES["blocks"]
    inputs = make(shape)
    if kind == "sets":
        inputs[3:] = [torch.stack([x.detach(), -x.detach()]).requires_grad_() for x in inputs[3:]]
        options = dict(prompt_index=torch.arange(shape[0], device=DEVICE) % 2, causal=True)
    else:
        options = options_for(kind, shape)
    grad = torch.randn(inputs[0].shape, device=DEVICE)
    runs = []
    for _ in "12":
        out = prompt_attention(*inputs, backend=backend, **options)
        runs.append((out, *torch.autograd.grad(out, inputs, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_element_is_written(backend, monkeypatch):
    """With memory that starts as NaN, an element left unwritten shows."""
    inputs, options = make(SHAPES["grouped"]), options_for("left", SHAPES["grouped"])
    torch.use_deterministic_algorithms(True)  # fills every empty tensor with NaN
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        out = prompt_attention(*inputs, backend=backend, **options)
        grads = torch.autograd.grad(out.sum(), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in (out, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_heads_and_samples_than_a_grid_axis_holds(backend):
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("70,000 programs take the interpreter minutes")
    inputs = make((35_000, 2, 1, 2, 2, 3, 8))
    grad_out = torch.randn(inputs[0].shape, device=DEVICE)
    ours = partial(prompt_attention, backend=backend)
    assert_as_accurate(ours, reference.prompt_attention, inputs, grad_out)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_long_rows_and_many_prompts():
    """32k tokens and 3,000 prompts: Triton against the vendor's kernel."""
    inputs = make((1, 2, 1, 32768, 32768, 3000, 64), torch.float16)
    results = []
    for backend in ("triton", "vendor"):
        out = prompt_attention(*inputs, causal=True, backend=backend)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_output_reshapes_without_a_copy():
    out = prompt_attention(*make(SHAPES["grouped"]))
    rows = out.transpose(1, 2)
    assert rows.reshape(*rows.shape[:2], -1).data_ptr() == out.data_ptr()


_ENDS = torch.tensor([0, 1, 3])
GRADCHECKED = {
    "causal": dict(causal=True),
    "window, soft-cap": dict(window=2, softcap=0.9),
    "key_mask": dict(key_mask=torch.tensor([[True, False, True]])),
    "biases": dict(attn_mask=torch.randn(1, 2, 3, 3), prompt_bias=torch.randn(1, 2, 3, 2)),
    "scale below 0": dict(scale=-0.4, causal=True),
    "packed sets": dict(
        cu_seqlens_q=_ENDS, cu_seqlens_k=_ENDS, causal=True,
        prompt_index=torch.tensor([2, 0]), prompt_len=torch.tensor([2, 0, 1]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", GRADCHECKED)
def test_float64_is_the_reference_and_passes_gradcheck(options):
    options = {
        k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x
        for k, x in GRADCHECKED[options].items()
    }
    inputs = [t.detach().double() for t in make((1, 2, 1, 3, 3, 2, 8))]
    if "prompt_index" in options:
        inputs[3:] = [torch.stack([x, 2 * x, -x]) for x in inputs[3:]]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(partial(prompt_attention, **options), inputs)


@pytest.mark.parametrize("kind", ["full", "left", "everything", "soft-capped window"])
def test_registration(kind):
    shape = SHAPES["grouped"]
    inputs = [t.detach() for t in make(shape)]
    options = options_for(kind, shape)
    options = Options(**{"causal": False, "scale": 0.25, **options})
    args = (*inputs, *options)
    torch.library.opcheck(torch.ops.fastprompt.prompt_attention, args)
    out, lse = torch.ops.fastprompt.prompt_attention(*args)
    for needs in [(True, True), (False, True)]:
        backward = (torch.ones_like(out), out, lse, *args, *needs)
        torch.library.opcheck(torch.ops.fastprompt.prompt_attention_backward, backward)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    torch._dynamo.reset()
    options = dict(causal=True, window=6, softcap=20.0)
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        partial(prompt_attention, **options), fullgraph=True, dynamic=dynamic, backend=frames
    )
    for shape in [(4, 6, 2, 20, 22, 7, 24), (3, 6, 2, 17, 19, 9, 24), (5, 6, 2, 30, 33, 8, 24)]:
        inputs = make(shape)
        got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
        want = torch.autograd.grad(prompt_attention(*inputs, **options).square().sum(), inputs)
        torch.testing.assert_close(got, want)
    assert frames.frame_count <= (2 if dynamic else 3)


def test_packed_sets_compile_with_the_same_tensor_given_twice():
    torch._dynamo.reset()
    q, k, _, pk, _ = (t.detach() for t in make((1, 6, 2, 20, 20, 7, 24)))
    pk = torch.stack([pk, pk + 1]).requires_grad_()
    ends = torch.tensor([0, 8, 20], dtype=torch.int32, device=DEVICE)
    which = torch.tensor([1, 0], device=DEVICE)

    def call(pk):
        packed = dict(cu_seqlens_q=ends, cu_seqlens_k=ends, prompt_index=which)
        return prompt_attention(q, k, k, pk, pk, causal=True, **packed)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(pk).square().sum(), pk)
    torch.testing.assert_close(got, torch.autograd.grad(call(pk).square().sum(), pk))


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sums_stay_accurate(backend):
    """Gradients of keys and prompts add up over every query of every head that shares them."""
    if backend == "triton" and DEVICE == "cpu":
        shape = (1, 16, 1, 128, 128, 10, 16)
    else:
        shape = (1, 16, 1, 2048, 2048, 10, 32)
    ours = partial(prompt_attention, backend=backend)
    grad_out = torch.ones(shape[0], shape[1], shape[3], shape[6], device=DEVICE)
    assert_as_accurate(ours, reference.prompt_attention, make(shape), grad_out)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_changes_nothing(backend, reentrant):
    inputs, options = make(SHAPES["grouped"]), options_for("left", SHAPES["grouped"])
    op = partial(prompt_attention, backend=backend, **options)
    want = torch.autograd.grad(op(*inputs).square().sum(), inputs)
    checkpoint(op, *inputs, use_reentrant=reentrant).square().sum().backward()
    for t, grad in zip(inputs, want, strict=True):
        torch.testing.assert_close(t.grad, grad)


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_a_number_is_not_hidden(backend, which):
    inputs = make(SHAPES["grouped"])
    first = (0,) * inputs[which].ndim
    with torch.no_grad():
        inputs[which][first] = torch.nan
    out = prompt_attention(*inputs, backend=backend)
    assert out.isnan().any()
    grads = torch.autograd.grad(out.sum(), inputs)
    assert grads[0].isnan().any() and grads[3].isnan().any()


@pytest.mark.parametrize("window", [21, 22, 2**31 - 1, 2**62])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_as_wide_as_the_row_hides_nothing(backend, causal, window):
    inputs = make(SHAPES["grouped"])
    options = dict(causal=causal, backend=backend)
    got = prompt_attention(*inputs, window=window, **options)
    assert torch.equal(got, prompt_attention(*inputs, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=ident)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lowest_number_in_a_mask_hides(backend, dtype):
    q, k, v, *_ = make(SHAPES["no prompt"], dtype)
    none = k.new_empty(2, 0, 16)
    mask = torch.zeros(2, 1, 12, 12, dtype=dtype, device=DEVICE)
    mask[..., 5:] = mask[0, :, 3] = torch.finfo(dtype).min
    got = prompt_attention(q, k, v, none, none, attn_mask=mask, backend=backend)
    assert not got[0, :, 3].any()
    want = prompt_attention(q, k, v, none, none, attn_mask=mask == 0, backend=backend)
    torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("kind", ["full", "causal", "everything", "sets", "decode"])
def test_forward_and_backward_are_captured_in_a_cuda_graph(kind):
    shape = (2, 4, 2, 1, 3000, 20, 64) if kind == "decode" else SHAPES["blocks"]
    inputs = make(shape, torch.float16)
    options = dict(causal=kind != "full")
    if kind == "everything":
        options = options_for(kind, shape)
    if kind == "sets":
        inputs[3:] = [torch.stack([x.detach(), -x.detach()]).requires_grad_() for x in inputs[3:]]
        options["prompt_index"] = torch.arange(shape[0], device=DEVICE) % 2

    def step():
        out = prompt_attention(*inputs, **options)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    with torch.no_grad():
        for t in inputs:
            t.copy_(torch.randn_like(t))
    graph.replay()
    torch.testing.assert_close(got, step())
