"""`ops.linear_cross_entropy` against `F.cross_entropy` of whole logits."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate
from torch.utils._python_dispatch import TorchDispatchMode

from fastprompt.ops import linear_cross_entropy

own = importlib.import_module("fastprompt.ops.linear_cross_entropy")
V, D = 50, 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(own, "CHUNK", 3 * V)  # three rows at once


def make(dtype=torch.float64, rows=(2, 11), ignored=0.5):
    torch.manual_seed(0)
    h = torch.randn(*rows, D).to(dtype).requires_grad_()
    w, b = torch.randn(V, D).to(dtype), torch.randn(V).to(dtype)
    labels = torch.randint(V, rows).masked_fill(torch.rand(rows) < ignored, -100)
    return h, w, b, labels


def definition(h, w, labels, bias=None, scale=1.0, softcap=None, **options):
    z = F.linear(h, w, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z.flatten(0, -2), labels.flatten(), **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(scale=0.3),
        dict(softcap=2.0),
        dict(label_smoothing=0.1),
        dict(softcap=1.5, scale=2.0, label_smoothing=0.3),
        dict(label_smoothing=1.0),
    ],
    ids=str,
)
def test_loss_and_gradient(options, biased, reduction):
    h, w, b, labels = make()
    options = dict(options, bias=b if biased else None, reduction=reduction)
    found = []
    for loss in (linear_cross_entropy, definition):
        y = loss(h, w, labels, **options)
        found.append((y, *torch.autograd.grad(3 * y, h)))
    (got, dh), (want, expected) = found
    assert got.dtype == torch.float64 and (got - want).abs() < 1e-10 * want.abs()
    assert (dh - expected).norm() < 1e-10 * expected.norm()
    assert not dh[labels == -100].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, dict(softcap=3.0, label_smoothing=0.1)], ids=str)
def test_never_less_accurate_than_twice_eager(options, dtype):
    h, w, b, labels = make(dtype, (3, 40))

    def of(loss):
        return lambda h, w, b: loss(h, w, labels, bias=b, **options)

    assert_as_accurate(of(linear_cross_entropy), of(definition), [h, w, b], torch.tensor(1.0))


@pytest.mark.parametrize("nested", [True, False])
def test_a_4bit_layer(nested):
    bnb = pytest.importorskip("bitsandbytes.functional")
    h, _, _, labels = make(torch.float32)
    weight = bnb.quantize_4bit(
        torch.randn(V, D), quant_type="nf4", compress_statistics=nested, blocksize=64
    )
    from fastprompt.ops import dequantize_4bit

    found = [
        (y, *torch.autograd.grad(y, h))
        for y in (
            linear_cross_entropy(h, weight, labels),
            definition(h, dequantize_4bit(weight), labels),
        )
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("n", range(1, 8))
def test_chunks_of_three_take_any_number_of_rows(n):
    h, w, _, labels = make(rows=(n,), ignored=0)
    found = [
        (y, *torch.autograd.grad(y, h))
        for y in (loss(h, w, labels) for loss in (linear_cross_entropy, definition))
    ]
    torch.testing.assert_close(*found)


def test_rows_that_cannot_be_left_out_count_for_nothing():
    """Under CUDA graph capture all rows are computed, those without a label as of label -1."""
    h, w, _, labels = make()
    h, labels = h.detach().flatten(0, 1).requires_grad_(), labels.flatten()
    found = [
        (y, *torch.autograd.grad(y, h))
        for y in (
            own._Chunks.apply(h, labels.clamp(min=-1), w, None, 1.0, None, 0.1),
            definition(h, w, labels, label_smoothing=0.1, reduction="sum"),
        )
    ]
    torch.testing.assert_close(*found)


def test_a_second_backward_gives_the_same():
    h, w, _, labels = make()
    y = 3 * linear_cross_entropy(h, w, labels)
    first = torch.autograd.grad(y, h, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(y, h))


def test_no_label_counts():
    h, w, _, labels = make()
    labels.fill_(-100)
    mean, total = (linear_cross_entropy(h, w, labels, reduction=r) for r in ("mean", "sum"))
    assert mean.isnan() and total == 0
    for y in (mean, total):
        assert not torch.autograd.grad(y, h)[0].any()
    # as torch has it
    assert definition(h, w, labels).isnan() and definition(h, w, labels, reduction="sum") == 0


def test_other_labels_to_ignore_strided_rows_and_an_empty_batch():
    h, w, _, labels = make(ignored=0)
    labels[labels == 7] = 8
    labels[0, :4] = 7
    wide = torch.stack([h, h], 1).detach()[:, 0].requires_grad_()
    for x in (h, wide):
        got = linear_cross_entropy(x, w, labels, ignore_index=7)
        torch.testing.assert_close(got, definition(x, w, labels, ignore_index=7))
    assert linear_cross_entropy(h[:0], w, labels[:0], reduction="sum") == 0


def test_autocast():
    h, w, _, labels = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = linear_cross_entropy(h, w, labels), definition(h, w, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    a, b = (torch.autograd.grad(y, h)[0] for y in (got, want))
    assert a.dtype == b.dtype and (a - b).norm() < 1e-2 * b.norm()


class Widths(TorchDispatchMode):
    """The most rows of any result that is as wide as there are labels, but for the weight's."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.rows, self.ops = weight.data_ptr(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor) and t.ndim > 1 and t.shape[-1] == V:
                if t.data_ptr() == self.weight:
                    continue
                self.rows, self.ops = max(self.rows, t.numel() // V), self.ops + 1
        return result


def test_logits_are_never_whole_and_rows_without_a_label_cost_nothing():
    h, w, _, labels = make(ignored=0.8)
    n = int((labels != -100).sum())
    kept = []
    with (
        Widths(w) as seen,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = linear_cross_entropy(h, w, labels)
        y.backward()
    assert 0 < n < 8 and seen.ops and seen.rows <= 3
    # which rows, and their gradients
    assert sorted((t.shape for t in kept if t.ndim), key=len) == [(n,), (n, D)]


def test_without_a_gradient_none_is_computed(monkeypatch):
    h, w, _, labels = make()
    seen = []
    loss = own._loss
    monkeypatch.setattr(own, "_loss", lambda *a: seen.append(a[-1]) or loss(*a))
    linear_cross_entropy(h.detach(), w, labels)
    with torch.no_grad():
        linear_cross_entropy(h, w, labels)
    assert not any(seen)


def test_by_liger(monkeypatch):
    """A stand-in that takes what liger-kernel 0.8 takes."""
    calls = []

    def liger(
        input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
        label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False,
    ):  # fmt: skip
        calls.append(len(input))
        assert target.min() >= 0 and input.shape[0] == target.shape[0]
        return definition(
            input, weight, target, bias, softcap=softcap, ignore_index=ignore_index,
            label_smoothing=label_smoothing, reduction=reduction,
        )  # fmt: skip

    h, w, b, labels = make(torch.float32)
    monkeypatch.setattr(own, "_liger", lambda: liger)
    options = dict(bias=b, softcap=3.0, label_smoothing=0.1)
    found = [
        (y, *torch.autograd.grad(y, h))
        for y in (
            linear_cross_entropy(h, w, labels, backend="liger", **options),
            linear_cross_entropy(h, w, labels, **options),  # on the CPU its own
        )
    ]
    torch.testing.assert_close(*found)
    assert calls == [int((labels != -100).sum())]
    for wrong in (dict(scale=2.0), dict()):
        x, weight = (h, w) if wrong else (h.double(), w.double())
        with pytest.raises(ValueError, match='"liger" wants'):
            linear_cross_entropy(x, weight, labels, backend="liger", **wrong)


def test_refusals():
    h, w, b, labels = make()
    for args, options, message in [
        ((h.long(), w, labels), {}, "hidden: want"),
        ((h, w[:, :5], labels), {}, r"weight: want \[V, 16\], got \[50, 5\]"),
        ((h, w.clone().requires_grad_(), labels), {}, "weight must be frozen"),
        ((h, w.to("meta"), labels), {}, "weight: want it on cpu, got meta"),
        ((h, w, labels[:1]), {}, r"labels: want \[2, 11\] torch.int64; got \[1, 11\]"),
        ((h, w, labels.int()), {}, "got .* torch.int32"),
        ((h, w, labels.to("meta")), {}, "labels: want them on cpu"),
        ((h, w, labels), dict(bias=b[:4]), r"bias: want it frozen, \[50\]; got \[4\]"),
        ((h, w, labels), dict(reduction="none"), "reduction: want"),
        ((h, w, labels), dict(label_smoothing=2), "label_smoothing: want 0 to 1"),
        ((h, w, labels), dict(softcap=0.0), "softcap: want it above 0"),
        ((h, w, labels), dict(backend="triton"), "backend: want one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*args, **options)
    for label in (V, -1):
        labels[0, 0] = label
        with pytest.raises(IndexError, match=r"labels: want 0 to 49 or -100"):
            linear_cross_entropy(h, w, labels)
