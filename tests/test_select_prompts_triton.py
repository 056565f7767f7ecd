"""What is Triton's alone in `select_prompts`: keys shared out to programs, launches, memory."""

import pytest
import torch
from conftest import DEVICE
from test_launches import Counted

from fastprompt.ops import reference, select_prompts
from fastprompt.ops import select_prompts_triton as launcher


@pytest.fixture(params=[0, 4, 64], ids="{} processors".format)
def shares(request, monkeypatch):
    """One share of the keys, some, and one for every tile."""
    monkeypatch.setattr(launcher, "processors", lambda device: request.param)


@pytest.fixture
def launched(monkeypatch):
    names = []
    for name in ("rank", "gather"):
        kernel = getattr(launcher, f"{name}_kernel")
        monkeypatch.setattr(launcher, f"{name}_kernel", Counted(name, kernel, names))
    return names


def signs(*shape: int) -> torch.Tensor:
    """Rows of 16 channels of ±1: their cosines are exact, and few, so that most keys tie."""
    return (torch.randint(0, 2, shape, device=DEVICE) * 2 - 1).float()


@pytest.mark.parametrize(
    ("k", "kind"), [(1, "float32"), (5, "float32"), (5, "float16"), (5, "int8"), (64, "float32")]
)
def test_shares_merge_into_the_exact_order(k, kind, shares, device):
    query, keys, prompts = signs(9, 16), signs(333, 16), torch.randn(333, 6, device=device)
    query[3], keys[::50] = 0, 0
    key_scale = None
    if kind == "int8":
        key_scale = signs(
            333
        )  # a cosine of 0 may be -0.0, here in a whole tile: a tie all the same
        key_scale[:64] = -1
        keys, real = keys.to(torch.int8), keys * key_scale[:, None]
    else:
        query[7, 2], query[8, 0] = torch.nan, torch.inf
        keys[5, 1], keys[70], keys[300:330, 4] = torch.nan, -torch.inf, torch.inf
        query, keys = (x.to(getattr(torch, kind)) for x in (query, keys))
        real = keys
    got = select_prompts(query, keys, prompts, k, key_scale=key_scale, backend="triton")
    want = reference.select_prompts(query.double(), real.double(), prompts.double(), k)
    assert (got[1] == want[1]).all() and torch.allclose(got[2].double(), want[2])
    assert not got[2].signbit()[got[2] == 0].any()
    assert torch.allclose(got[0].double(), want[0], atol=1e-6)


def test_a_later_tile_is_a_little_better(shares, device):
    angle = torch.linspace(0.01, 0.3, 300, device=device)[torch.randperm(300)]
    query, keys = torch.eye(1, 2, device=device), torch.stack([angle.cos(), angle.sin()], 1)
    _, indices, scores = select_prompts(query, keys, keys, 7, rest=None, backend="triton")
    assert (indices[0] == angle.argsort()[:7]).all()
    assert torch.allclose(scores[0], keys[indices[0], 0])


def test_nearly_every_key_is_bad(shares, device):
    query, keys, prompts = signs(3, 16), signs(200, 16), torch.randn(200, 6, device=device)
    keys[:10] = keys[13:] = torch.nan
    _, indices, scores = select_prompts(query, keys, prompts, 20, backend="triton")
    assert (indices[:, :3].sort().values == torch.arange(10, 13, device=device)).all()
    assert (indices[:, 3:] == torch.tensor([*range(10), *range(13, 20)], device=device)).all()
    assert (scores[:, 3:] == -torch.inf).all()


def test_a_key_scores_the_same_wherever_it_lies(shares, device):
    query, keys = torch.randn(5, 50, device=device), torch.randn(37, 50, device=device)
    prompts = torch.zeros(37 * 9, 1, device=device)
    _, indices, scores = select_prompts(query, keys.repeat(9, 1), prompts, 63, backend="triton")
    scores, indices = scores.view(5, 7, 9), indices.view(5, 7, 9)
    assert (scores == scores[..., :1]).all()
    assert (indices == indices[..., :1] + 37 * torch.arange(9, device=device)).all()


def test_lengths_far_apart(device):
    # their squares reach from below the smallest normal float to above a third of the largest
    far = torch.logspace(-20, 18.5, 100, device=device)[:, None]
    query, keys = torch.randn(4, 16, device=device), torch.randn(100, 16, device=device)
    want = reference.cosines(query.double(), keys.double()).sort(descending=True).values
    for q in (query * 1e-20, query, query * 1e18):
        scores = select_prompts(q, keys * far, keys, 64, rest=None, backend="triton")[2]
        assert torch.allclose(scores.double(), want[:, :64], atol=1e-4)
    scores = select_prompts(query, keys * 1e-25, keys, 1, rest=None, backend="triton")[2]
    assert (scores == 0).all()  # their squares are 0


def test_two_launches(launched, device):
    inputs = signs(3, 16), signs(300, 16), torch.randn(300, 2, 6, device=device)
    for options in ({}, dict(rest=None), dict(total=inputs[2].sum(0, dtype=torch.float64))):
        select_prompts(*inputs, 4, **options, backend="triton")
        assert launched == ["rank", "gather"]
        launched.clear()


@pytest.mark.parametrize("C", [1, 37, 1000, 4096])
def test_no_sum_beside_them_up_to_4096_keys(C, monkeypatch, device):
    monkeypatch.setattr(launcher, "processors", lambda device: 132)
    assert all(launcher._chunks(C, n, torch.device(device)) <= 8 for n in (0, 1, 12, 1000))


@pytest.mark.parametrize("chunk", [16, 64])  # 26 partial sums, for torch to add up; 7
def test_partial_sums(chunk, monkeypatch, device):
    monkeypatch.setattr(launcher, "_CHUNK", chunk)
    monkeypatch.setattr(launcher, "processors", lambda device: 64)
    query, keys, prompts = signs(3, 16), signs(403, 16), torch.randn(403, 3, 6, device=device)
    want = reference.select_prompts(query.double(), keys.double(), prompts.double(), 4)
    for rows, channels in ((3, 6), (2, 6), (3, 4)):  # one long row, one too, rows apart
        part = prompts[:, :rows, :channels]
        got = select_prompts(query, keys, part, 4, backend="triton")
        assert torch.allclose(got[0].double(), want[0][:, :, :rows, :channels], atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_no_matrix_of_scores_in_memory():
    B, C = 256, 20_000
    inputs = [
        torch.randn(n, m, device=DEVICE).bfloat16() for n, m in ((B, 512), (C, 512), (C, 768))
    ]
    results = select_prompts(*inputs, 16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    select_prompts(*inputs, 16)
    size = sum(t.numel() * t.element_size() for t in results)
    assert torch.cuda.max_memory_allocated() - before <= size + B * C
