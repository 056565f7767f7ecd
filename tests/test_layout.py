"""How tensors are cut up: into rows for the kernels, into pieces for the CPU's caches."""

import pytest
import torch

from fastprompt import ops
from fastprompt.ops import layout, reference
from fastprompt.ops.layout import pieces, rows_of


def test_axes_that_adjoin_become_one():
    x = torch.empty(2, 3, 4, 5)
    assert rows_of(x) == ((1, 1, 24), ((0, 0, 5),))
    assert rows_of(x.transpose(0, 1)).count == 24
    assert rows_of(x[:, :, 1:]) == ((1, 6, 3), ((0, 20, 5),))
    assert rows_of(x, x.transpose(1, 2).contiguous().transpose(1, 2)) == (
        (2, 3, 4), ((60, 20, 5), (60, 5, 15))
    )  # fmt: skip
    assert rows_of(x[:, :1, :1]) == ((1, 1, 2), ((0, 0, 60),))
    assert rows_of(x[0, 0, 0]) == ((1, 1, 1), ((0, 0, 0),))
    assert rows_of(torch.empty(1, 5).expand(3, 5)) == ((1, 1, 3), ((0, 0, 0),))


@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 3), (2, 3, 2, 40), (50,), (1, 1, 100), (0, 3)])
@pytest.mark.parametrize("size", [1, 8, 30, 10**6])
def test_every_row_is_in_one_piece(shape, size, monkeypatch):
    monkeypatch.setattr(layout, "PIECE", size)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x, each = torch.zeros(shape), torch.zeros(*shape[:-1], 1)
    for part, nothing, one in pieces(x, None, each):
        assert nothing is None and part.shape[:-1] == one.shape[:-1]
        assert part.numel() <= max(size, shape[-1])
        part += 1
        one += 1
    assert (x == 1).all() and (each == 1).all()


def joined(*results):
    return torch.cat([t.flatten() for t in results])


@pytest.mark.parametrize("size", [1, 50])
@pytest.mark.parametrize(
    "run",
    [
        lambda where, x, r, w: joined(*where.rms_norm(x, w, 1e-6, residual=r)),
        lambda where, x, r, w: joined(*where.layer_norm(x, w, w, 1e-6, residual=r)),
        lambda where, x, r, w: where.swiglu(x, r),
        lambda where, x, r, w: where.swiglu(x, r, activation="gelu_tanh"),
        lambda where, x, r, w: joined(*where.rope(x, r, *w.expand(2, 1, 5, 8).cos())),
    ],
    ids=["rms_norm", "layer_norm", "swiglu", "geglu", "rope"],
)
def test_pieces_give_the_same(run, size, monkeypatch):
    monkeypatch.setattr(layout, "PIECE", size)
    x, r = (torch.randn(3, 4, 5, 8, requires_grad=True) for _ in range(2))
    w = torch.randn(8)
    got, want = (run(where, x, r, w) for where in (ops, reference))
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(y, (x, r), grad) for y in (got, want)))


@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_rows_further_apart_than_32_bits_count(backend):
    """Gigabytes of addresses, of which two rows are touched."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    far = torch.empty_strided(
        (2, 1, 2, 8), (2**31 + 8, 8, 16, 1), dtype=torch.float16, device=device
    )
    near = torch.randn(2, 1, 2, 8, device=device).half()
    far.copy_(near)
    w, angle = torch.randn(8, device=device), torch.rand(2, 2, 8, device=device)
    for run in (
        lambda x: ops.rms_norm(x, w, 1e-6, backend=backend),
        lambda x: ops.swiglu(x, x, backend=backend),
        lambda x: ops.rope(x, x, angle, angle, backend=backend)[1],
    ):
        torch.testing.assert_close(run(far), run(near), rtol=0, atol=0)
