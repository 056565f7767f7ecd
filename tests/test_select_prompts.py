"""`ops.select_prompts` on every backend that is here, against the reference in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate

from fastprompt import native, native_select, ops
from fastprompt.ops import reference
from fastprompt.ops import select_prompts_plain as plain

CUDA = torch.cuda.is_available()
BACKENDS = ["plain", "triton", *(["native"] if native.available() and not CUDA else [])]
# Triton's interpreter is wrong on bfloat16
PAIRS = [
    (backend, dtype)
    for backend, dtype in itertools.product(
        BACKENDS, [torch.float32, torch.float16, torch.bfloat16]
    )
    if CUDA or backend != "triton" or dtype != torch.bfloat16
]
IDS = [f"{backend}-{str(dtype)[6:]}" for backend, dtype in PAIRS]
SHAPES = {  # B, C, D, entry, k
    "all": (3, 5, 7, (4,), 5),
    "all but one": (2, 9, 16, (8,), 8),
    "odd": (17, 37, 33, (25,), 4),
    "rows": (4, 60, 24, (3, 10), 7),
    "one query": (1, 130, 48, (16,), 16),
    "tall": (70, 30, 8, (8,), 1),
    "most": (3, 200, 20, (8,), 64),
}


def make(shape, dtype, device, seed=0):
    B, C, D, entry, k = shape
    torch.manual_seed(seed)
    like = dict(dtype=dtype, device=device)
    return (
        torch.randn(B, D, **like), torch.randn(C, D, **like), torch.randn(C, *entry, **like), k
    )  # fmt: skip


def assert_chosen(got, want, gap=1e-5):
    """Indices and order as in the truth, but where its scores lie closer than rounding."""
    _, indices, scores = got
    _, true_indices, true_scores = want
    assert (scores.double() - true_scores.double()).abs().nan_to_num(0.0).max() < gap
    assert (scores.isinf() == true_scores.isinf()).all()
    elsewhere = indices != true_indices
    assert (scores.double() - true_scores).abs()[elsewhere].max() < gap if elsewhere.any() else True
    assert (indices.sort().values.diff() > 0).all()  # none twice


@pytest.mark.parametrize("rest", ["mean", None])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("backend", "dtype"), PAIRS, ids=IDS)
def test_against_the_reference(backend, dtype, shape, rest, device):
    query, keys, prompts, k = make(shape, dtype, device)
    got = ops.select_prompts(query, keys, prompts, k, rest=rest, backend=backend)
    wide = (query.double(), keys.double(), prompts.double(), k)
    want = reference.select_prompts(*wide, rest=rest)
    assert got[0].dtype == dtype and got[1].dtype == torch.int64 and got[2].dtype == torch.float32
    assert got[0].shape == want[0].shape
    assert_chosen(got, want)
    assert (got[0][:, :k] == prompts[got[1]]).all()
    if rest and k < len(keys):
        mean = torch.stack(
            [
                prompts.double()[[c for c in range(len(keys)) if c not in own]].mean(0)
                for own in got[1].tolist()
            ]
        )
        eager = reference.select_prompts(query, keys, prompts, k)[0][:, k].double()
        err, allowed = (got[0][:, k].double() - mean).norm(), (eager - mean).norm()
        assert err <= 2 * allowed + torch.finfo(dtype).eps * mean.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_index(backend, device):
    query, keys, prompts, _ = make((6, 3, 24, (8,), 1), torch.float32, device)
    keys = keys.repeat(50, 1)  # every key fifty times, in different tiles
    _, indices, scores = ops.select_prompts(query, keys, prompts.repeat(50, 1), 60, backend=backend)
    order = reference.cosines(query.double(), keys[:3].double()).argsort(descending=True)
    want = torch.cat([order[:, :1] + 3 * torch.arange(50, device=device),
                      order[:, 1:2] + 3 * torch.arange(10, device=device)], 1)  # fmt: skip
    assert (indices == want).all()
    assert (scores[:, :50] == scores[:, :1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_length_and_bad_rows(backend, device):
    query, keys, prompts, _ = make((5, 40, 16, (8,), 1), torch.float32, device)
    keys[7] = keys[21] = 0
    keys[3, 2], keys[9, 0], keys[30] = torch.nan, torch.inf, 1e30  # whose square is not finite
    query[1], query[2, 4] = 0, torch.nan
    want = reference.select_prompts(query, keys, prompts, 40)
    got = ops.select_prompts(query, keys, prompts, 40, backend=backend)
    assert not got[2].isnan().any()
    assert_chosen(got, want)
    assert got[1][2].tolist() == list(range(40)) and (got[2][2] == -torch.inf).all()
    good = [c for c in range(40) if c not in (3, 9, 30)]
    assert got[1][1].tolist() == [*good, 3, 9, 30]  # all scores 0, then -inf
    assert (got[1][[0, 3, 4], -3:] == torch.tensor([3, 9, 30], device=device)).all()
    for b in (0, 3, 4):
        assert (got[2][b][(got[1][b] == 7) | (got[1][b] == 21)] == 0).all()


@pytest.mark.parametrize("scale", [1.0, -2.0, 0.0, torch.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_keys(backend, scale, device):
    query, _, prompts, _ = make((5, 40, 24, (8,), 1), torch.float32, device)
    keys = torch.randint(-128, 128, (40, 24), dtype=torch.int8, device=device)
    key_scale = torch.rand(40, device=device) + 0.1
    key_scale[::7] = scale
    got = ops.select_prompts(query, keys, prompts, 9, key_scale=key_scale, backend=backend)
    double = keys.double() * key_scale[:, None].double()
    assert_chosen(got, reference.select_prompts(query.double(), double, prompts.double(), 9))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_mixed_dtypes(backend, device):
    torch.manual_seed(0)
    query = torch.randn(4, 60, device=device)[:, 10:42]
    keys = torch.randn(25, 3, 32, device=device)[:, 1].half()
    prompts = torch.randn(5, 25, 12, device=device).transpose(0, 1)[:, 1:4, :9]
    one = torch.randn(1, 32, device=device).expand(4, -1)
    for q, own in ((query, keys), (one, keys), (query, keys.double()), (query.half(), keys)):
        got = ops.select_prompts(q, own, prompts, 6, backend=backend)
        want = reference.select_prompts(q.double(), own.double(), prompts.double(), 6)
        assert_chosen(got, want)
        assert torch.allclose(got[0].double(), want[0], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_choose_for(backend, device):
    query, keys, prompts, k = make((0, 5, 8, (4,), 2), torch.float32, device)
    tokens, indices, scores = ops.select_prompts(query, keys, prompts, k, backend=backend)
    assert tokens.shape == (0, 3, 4) and indices.shape == scores.shape == (0, 2)


@pytest.mark.parametrize("rest", ["mean", None])
@pytest.mark.parametrize(("backend", "dtype"), PAIRS, ids=IDS)
def test_gradients(backend, dtype, rest, device):
    query, keys, prompts, k = make(SHAPES["rows"], dtype, device)
    query, keys, prompts = (x.requires_grad_() for x in (query, keys, prompts))
    # one output of both: tokens and scores side by side
    options = dict(rest=rest)

    def both(select):
        def run(query, keys, prompts):
            tokens, _, scores = select(query, keys, prompts, k, **options)
            return torch.cat(
                [tokens.flatten(1).to(torch.promote_types(tokens.dtype, scores.dtype)), scores], 1
            )

        return run

    def ours(*tensors, **given):
        return ops.select_prompts(*tensors, **given, backend=backend)

    size = (k + (rest is not None)) * 30 + k
    assert_as_accurate(
        both(ours),
        both(reference.select_prompts),
        (query, keys, prompts),
        torch.randn(4, size, device=device),
    )


def test_gradients_of_bad_rows_are_zero(device):
    query, keys, prompts, _ = make((3, 12, 8, (4,), 1), torch.float32, device)
    query[0], query[1, 2], keys[5], keys[6, 1] = 0, torch.nan, 0, torch.inf
    query, keys = query.requires_grad_(), keys.requires_grad_()
    _, _, scores = ops.select_prompts(query, keys, prompts, 12)
    scores.backward(torch.ones_like(scores))
    assert (query.grad[:2] == 0).all() and query.grad.isfinite().all() and query.grad[2].any()
    assert (keys.grad[5:7] == 0).all() and keys.grad.isfinite().all()


def test_gradcheck(device):
    query, keys, prompts, k = make((3, 9, 6, (2, 3), 4), torch.float64, device)
    inputs = tuple(x.requires_grad_() for x in (query, keys, prompts))

    def differentiable(*tensors):
        tokens, _, scores = ops.select_prompts(*tensors, k)
        return tokens, scores

    assert torch.autograd.gradcheck(differentiable, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_known_total_changes_nothing(backend, device):
    query, keys, prompts, k = make(SHAPES["rows"], torch.float32, device)
    prompts.requires_grad_()
    plainly = ops.select_prompts(query, keys, prompts, k, backend=backend)
    (want,) = torch.autograd.grad(plainly[0].sum(), prompts)
    total = ops.sum_of(prompts)
    known = ops.select_prompts(query, keys, prompts, k, total=total, backend=backend)
    (got,) = torch.autograd.grad(known[0].sum(), prompts)
    assert (plainly[0] - known[0]).abs().max() < 1e-6 and (got == want).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_bit_for_bit(backend, device):
    query, keys, prompts, k = make(SHAPES["odd"], torch.float32, device)
    prompts.requires_grad_()
    runs = []
    for _ in range(2):
        tokens, indices, scores = ops.select_prompts(query, keys, prompts, k, backend=backend)
        (grad,) = torch.autograd.grad(tokens.square().sum(), prompts)
        runs.append((tokens, indices, scores, grad))
    assert all((a == b).all() for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(not native.available(), reason="needs csrc")
@pytest.mark.parametrize("variant", native.variants())
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_every_instruction_set_and_share(variant, threads, dtype):
    query, keys, prompts, k = make((300, 700, 37, (2, 5), 70), torch.float32, "cpu")
    scale = None
    if dtype == torch.int8:
        keys, scale = (keys * 30).round().clamp(-128, 127).to(dtype), torch.full([700], 0.25)
    else:
        keys, prompts = keys.to(dtype), prompts.to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for some in (k, 9):
            got = native_select.select(query, keys, prompts, some, True, scale, variant=variant)
            double = keys.double() if scale is None else keys.double() * 0.25
            want = reference.select_prompts(query.double(), double, prompts.double(), some)
            assert_chosen(got, want)
            same = (got[1] == want[1]).all(1)
            limit = (
                dict(atol=0, rtol=1e-2)
                if prompts.dtype == torch.bfloat16
                else dict(atol=1e-5, rtol=1e-3)
            )
            torch.testing.assert_close(got[0][same].double(), want[0][same], **limit)
    finally:
        torch.set_num_threads(before)


def test_halves_are_read_exactly():
    """Every float16 as a prompt of its own: subnormal, infinite and all others come back."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(torch.float16)
    keys = torch.zeros(len(every), 1)
    fine = every.isfinite()
    # a mean over two, of which one is 0: half of each
    for value in (every[fine][::997], torch.tensor([6e-8, 6.1e-5, 65504.0]).half()):
        for x in value:
            prompts = torch.stack([torch.zeros(1).half(), x[None], torch.zeros(1).half()])
            tokens, _, _ = ops.select_prompts(torch.ones(1, 1), keys[:3], prompts, 1)
            assert tokens[0, 1] == (x.double() / 2).half()


def test_some_keys_at_a_time(monkeypatch, device):
    query, keys, prompts, k = make((5, 100, 12, (4,), 6), torch.float32, device)
    whole = ops.select_prompts(query, keys, prompts, k, backend="plain")
    monkeypatch.setattr(plain, "CHUNK", 50)
    pieces = ops.select_prompts(query, keys, prompts, k, backend="plain")
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b)  # a product of another size may round otherwise


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("rest", ["mean", None])
def test_compiles_whole(rest, device):
    query, keys, prompts, k = make(SHAPES["odd"], torch.float32, device)
    query, prompts = query.requires_grad_(), prompts.requires_grad_()

    def step(query, keys, prompts):
        tokens, _, scores = ops.select_prompts(query, keys, prompts, k, rest=rest)
        return tokens.square().sum() + scores.sum()

    want = torch.autograd.grad(step(query, keys, prompts), (query, prompts))
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(query, keys, prompts), (query, prompts))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))
    same = prompts[:, : query.shape[1]].detach()  # keys that are the prompts themselves
    compiled(query, F.pad(same, (0, query.shape[1] - same.shape[1])), prompts)


def test_schema_and_fake(device):
    query, keys, prompts, k = make(SHAPES["rows"], torch.float32, device)
    torch.library.opcheck(
        torch.ops.fastprompt.select_prompts, (query, keys, prompts, k, True, None, None, "auto"),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


REFUSED = {
    "k 0": (dict(k=0), "k: want a whole number from 1 to C = 9, got 0"),
    "k > C": (dict(k=10), "k: want a whole number from 1 to C = 9, got 10"),
    "k a float": (dict(k=2.0), "k: want a whole number"),
    "no classes": (dict(keys=torch.ones(0, 4), prompts=torch.ones(0, 2)), "from 1 to C = 0"),
    "query of another width": (dict(query=torch.ones(2, 5)), r"\[2, 5\] and \[9, 4\]"),
    "one query alone": (dict(query=torch.ones(4)), r"query: want a tensor \[B, D\], got \[4\]"),
    "fewer prompts": (dict(prompts=torch.ones(8, 3)), "one entry for each of 9 keys, got 8"),
    "whole numbers": (dict(prompts=torch.ones(9, 3, dtype=torch.long)), "prompts: want one of"),
    "int8 alone": (dict(keys=torch.ones(9, 4).char()), "key_scale: want it with int8 keys"),
    "a scale alone": (dict(key_scale=torch.ones(9)), "key_scale: want it with int8 keys"),
    "a short scale": (
        dict(keys=torch.ones(9, 4).char(), key_scale=torch.ones(8)),
        r"key_scale: want \[9\]",
    ),
    "a scale that trains": (
        dict(keys=torch.ones(9, 4).char(), key_scale=torch.ones(9, requires_grad=True)),
        "key_scale: want it frozen",
    ),
    "another rest": (dict(rest="sum"), "rest: want 'mean' or None, got 'sum'"),
    "a float32 total": (dict(total=torch.ones(3)), r"total: want \[3\] torch.float64"),
    "another backend": (dict(backend="cuda"), "backend: want one of auto"),
    "columns": (dict(query=torch.ones(4, 2).T), "query: want a contiguous last axis"),
    "too many for triton": (
        dict(k=65, keys=torch.ones(70, 4), prompts=torch.ones(70, 2), backend="triton"),
        "want k up to 64",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(wrong, message):
    given = dict(query=torch.ones(2, 4), keys=torch.ones(9, 4), prompts=torch.ones(9, 3), k=2)
    with pytest.raises(ValueError, match=message):
        ops.select_prompts(**{**given, **wrong})
