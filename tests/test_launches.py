"""What a call of `prompt_attention` costs on a GPU beside time: launches and extra memory."""

import pytest
import torch
from conftest import DEVICE
from test_prompt_attention import make

from benchmarks import shapes
from fastprompt.ops import prompt_attention
from fastprompt.ops import prompt_attention_triton as launcher
from fastprompt.ops.options import Options
from fastprompt.ops.prompt_attention_tiles import Tile

KERNELS = ("fwd", "merge", "dq", "dkv", "prompts", "sum")


class Counted:
    """In a kernel's place: notes its name, and launches it."""

    def __init__(self, name, kernel, launched):
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


@pytest.fixture
def launched(monkeypatch):
    names = []
    for name in KERNELS:
        kernel = getattr(launcher, f"{name}_kernel")
        monkeypatch.setattr(launcher, f"{name}_kernel", Counted(name, kernel, names))
    return names


def test_one_kernel_forward_three_and_a_sum_backward(launched):
    inputs = make((2, 4, 2, 40, 40, 3, 16))
    out = prompt_attention(*inputs, causal=True, backend="triton")
    assert launched == ["fwd"]
    torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    assert launched[1:] == ["dq", "dkv", "prompts", "sum"]
    launched.clear()
    frozen = [t.detach() for t in inputs[:3]] + inputs[3:]
    torch.autograd.grad(prompt_attention(*frozen, backend="triton").sum(), inputs[3:])
    assert launched == ["fwd", "prompts"]  # one program is enough: nothing to add up


def test_sets_of_prompts_launch_nothing_more(launched, monkeypatch):
    q, k, v, *_ = make((2, 4, 2, 40, 40, 3, 16))
    prompts = [torch.randn(2, 2, 3, 16, device=DEVICE, requires_grad=True) for _ in range(2)]
    which = torch.tensor([1, 0], device=DEVICE)
    for name in ("sort", "argsort", "bincount", "searchsorted", "arange"):  # as they once did
        monkeypatch.setattr(torch, name, None)
        monkeypatch.setattr(torch.Tensor, name, None, raising=False)
    out = prompt_attention(q, k, v, *prompts, prompt_index=which, backend="triton")
    torch.autograd.grad(out.sum(), (q, k, v, *prompts))
    assert launched[:4] == ["fwd", "dq", "dkv", "prompts"] and launched[4:] in ([], ["sum"])


def test_at_most_two_kernels_to_decode(launched):
    with torch.no_grad():
        prompt_attention(*make((1, 4, 1, 1, 20, 3, 16)), causal=True, backend="triton")
        assert launched == ["fwd"]
        prompt_attention(*make((1, 4, 1, 1, 1100, 3, 16)), causal=True, backend="triton")
    assert launched[1:] == ["fwd", "merge"]


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("name", shapes.attention("cuda", quick=False))
def test_partial_sums_are_at_most_a_twentieth_of_what_is_written(name, tokens, monkeypatch):
    monkeypatch.setattr(launcher, "processors", lambda device: 132)
    s = shapes.attention("cuda", quick=False)[name]
    q = torch.empty(s.B, s.H, s.N, s.d, dtype=torch.bfloat16, device="meta")
    prompt_k = torch.empty(s.Hkv, s.P, s.d, dtype=torch.bfloat16, device="meta")
    o = Options(s.causal, 1.0)
    tile = Tile(64, 64, 4, 3)
    splits, items, per_split, *_ = launcher._shares(o, q, prompt_k, 1, tile, tokens)
    partial, written = 2 * splits * prompt_k.numel() * 4, 2 * q.numel() * (4 if tokens else 1)
    assert splits == 1 or partial <= 0.05 * written  # of one split there is no partial sum
    assert (splits - 1) * per_split < items <= splits * per_split

    sets = prompt_k.new_empty(8, *prompt_k.shape)
    o = o._replace(prompt_index=torch.zeros(s.B, dtype=torch.int64, device="meta"))
    splits, *_, samples, of_rows = launcher._shares(o, q, sets, 8, tile, tokens)
    assert samples == s.B and splits % of_rows == 0
    assert splits == 1 or 2 * splits * sets.numel() * 4 <= 0.05 * written


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_extra_memory_is_the_results_and_a_twentieth():
    inputs = make((16, 12, 12, 197, 197, 50, 64), torch.bfloat16)

    def step():
        out = prompt_attention(*inputs)
        return out, *torch.autograd.grad(out, inputs, out)

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = step()
    size = sum(t.numel() * t.element_size() for t in results)
    size += 2 * 4 * inputs[0].numel() // 64  # log-sum-exp, and the sum of dout · out
    assert torch.cuda.max_memory_allocated() - before <= 1.06 * size
