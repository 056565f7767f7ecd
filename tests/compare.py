"""The one rule of accuracy: never more than twice as far from the truth as eager PyTorch is."""

import torch
from torch.linalg import vector_norm as norm

from benchmarks.check import FLOOR


def run(fn, tensors, grad_out, dtype=None):
    """Output and input gradients of `fn`, its inputs first cast to `dtype`."""
    args = [t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) for t in tensors]
    out = fn(*args)
    out.backward(grad_out.to(out.dtype))
    return {"out": out, **{f"grad[{i}]": a.grad for i, a in enumerate(args) if a.requires_grad}}


def assert_as_accurate(ours, eager, tensors, grad_out):
    truth = run(eager, tensors, grad_out, torch.float64)
    got, base = run(ours, tensors, grad_out), run(eager, tensors, grad_out)
    for name, want in truth.items():
        assert got[name].dtype == base[name].dtype and got[name].shape == want.shape, name
        err, eager_err = (norm(r[name].double() - want) for r in (got, base))
        limit = 2 * eager_err + FLOOR[base[name].dtype] * norm(want)
        assert err <= limit, f"{name}: off by {err:.2e}, limit {limit:.2e}, eager {eager_err:.2e}"
