"""Attention by plain matrix products, added to attention that is there already.

For keys that no vendor's kernel takes as they are: prompts, which the whole batch shares (so that
its rows are one tall matrix), and soft-capped scores. With L the log-sum-exp so far and l that of
the new keys, in place,

    L' = logaddexp(L, l),    out' = exp(L - L') out + exp(s - L') v

Scores are never whole in memory: CHUNK of them at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 1024  # that one product adds up
CHUNK = 2**20  # scores at once: 4 MB, which a core's cache still helps with


def attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    scale: float, softcap: float | None, bias: Tensor | None,
) -> None:  # fmt: skip
    """Adds the keys' share to ``out`` [H, n, d] and ``lse`` [H, n] float32, in place.

    q [H, n, d]; k, v [H, J, d]; bias [H or 1, n, J], added to the scores.
    """
    for h, n in _pieces(q, k):
        s, _ = _scores(q[h, n], k[h], scale, softcap, _part(bias, h, n))
        top = s.amax(-1, keepdim=True)
        # everything relative to the highest score: the sum would be lost in a logarithm far from 0
        most = torch.maximum(top, lse[h, n, None]).clamp_(min=torch.finfo(s.dtype).min)
        p, before = s.sub_(most).exp_(), (lse[h, n, None] - most).exp_()
        whole = before + p.sum(-1, keepdim=True)
        seen = whole.masked_fill(whole == 0, 1.0)  # or nothing was: the result stays 0
        out[h, n] *= before / seen
        out[h, n].baddbmm_(p.div_(seen).to(q.dtype), v[h])
        total = (most + whole.log()).squeeze(-1)
        lse[h, n] = total


def gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dq: Tensor | None,
    scale: float, softcap: float | None, bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dk, dv) [H, J, d] float32; adds the keys' share to ``dq`` [H, n, d] in place, if given.

    lse of the whole row, +inf where it saw nothing; delta = sum over channels of dout · out.
    """
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    for h, n in _pieces(q, k):
        s, slope = _scores(q[h, n], k[h], scale, softcap, _part(bias, h, n))
        p = s.sub_(lse[h, n, None]).exp_()
        ds = torch.bmm(dout[h, n], v[h].mT).to(p.dtype).sub_(delta[h, n, None]).mul_(p)
        if slope is not None:
            ds *= slope
        p, ds = p.to(q.dtype), ds.to(q.dtype)
        dv[h] += _over_rows(p, dout[h, n])
        dk[h].add_(_over_rows(ds, q[h, n]), alpha=scale)
        if dq is not None:
            dq[h, n].baddbmm_(ds, k[h], alpha=scale)
    return dk, dv


def _over_rows(x: Tensor, y: Tensor) -> Tensor:
    """x [H, n, J], y [H, n, d] -> xᵀ y [H, J, d], the sums of ROWS rows each added up apart: of one
    product, some libraries (MKL on AMD's processors) add up all in a row."""
    whole = x.shape[1] // ROWS * ROWS
    if x.shape[1] <= ROWS:
        return torch.bmm(x.mT, y)
    parts = [t[:, :whole].unflatten(1, (-1, ROWS)) for t in (x, y)]
    total = torch.matmul(parts[0].mT, parts[1]).sum(1, dtype=torch.float32)
    return total + torch.bmm(x[:, whole:].mT, y[:, whole:])


def _scores(q, k, scale, softcap, bias) -> tuple[Tensor, Tensor | None]:
    """Scores [H, n, J] float32, and the slope of soft-capping."""
    # in float32 always: backward's probabilities come from these scores' log-sum-exp
    s = torch.baddbmm(
        torch.empty(1, 1, 1, device=q.device), q.float(), k.float().mT, beta=0, alpha=scale
    )
    slope = None
    if softcap is not None:
        s = s.div_(softcap).tanh_()
        slope = 1 - s.square()
        s *= softcap
    if bias is not None:
        s += bias
    return s, slope


def _pieces(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Heads and rows of at most CHUNK scores."""
    (H, n), J = q.shape[:2], k.shape[1]
    if n * J == 0:
        return
    rows = max(1, min(n, CHUNK // J))
    heads = max(1, CHUNK // (n * J)) if rows == n else 1
    for h in range(0, H, heads):
        for r in range(0, n, rows):
            yield slice(h, h + heads), slice(r, r + rows)


def _part(bias, h, n):
    return None if bias is None else bias[h if bias.shape[0] > 1 else slice(None), n]
