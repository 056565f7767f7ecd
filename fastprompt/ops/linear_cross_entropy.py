"""Cross entropy of a frozen linear layer's logits, which are never whole in memory.

    z_i  = c tanh(s (W h_i + b) / c)                    rows i with a label; c, s as Gemma has them
    l_i  = log Σ_j exp z_ij - (1-ε) z_i,y_i - ε mean_j z_ij
    dh_i = (dz_i · s (1 - (z_i/c)²)) W,   dz_ij = p_ij - (1-ε) [j = y_i] - ε/V

The layer is frozen, so that h alone gets a gradient, and what that is but for the loss's own factor
is known as soon as the row's logits are: it is computed chunk by chunk in the forward and is all
that is kept. Rows without a label cost nothing. On CUDA liger-kernel's fused op does the chunks
where it is installed and serves the case. Label smoothing: arXiv 1512.00567.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.ops.checks import check_number
from fastprompt.ops.nf4_linear import decoded
from fastprompt.ops.packed import FLOATS, unpack

CHUNK = 2**24  # logits at once: 64 MB of float32
BACKENDS = ("auto", "chunks", "liger")


class _Rows(torch.autograd.Function):
    """h[at], none of them twice: so that backward writes rows, and adds nothing."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        ctx.count = len(h)
        return h.index_select(0, at)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (at,) = ctx.saved_tensors
        return dy.new_zeros(ctx.count, dy.shape[1]).index_copy_(0, at, dy), None


class _Chunks(torch.autograd.Function):
    """The sum over the rows of h [n, D]; labels < 0 count for nothing."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, labels: Tensor, weight, bias, scale, softcap, smoothing):
        wide = torch.promote_types(h.dtype, torch.float32)
        total = h.new_zeros((), dtype=wide)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        with _dense(weight, h.dtype) as W:
            step = rows_at_once(len(W))
            for first in range(0, len(h), step):
                rows = slice(first, first + step)
                z = F.linear(h[rows], W, bias).to(wide)
                loss, dz = _loss(z, labels[rows], scale, softcap, smoothing, dh is not None)
                total += loss
                if dz is not None:
                    torch.mm(dz.to(h.dtype), W, out=dh[rows])
        if dh is not None:
            ctx.save_for_backward(dh)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (dh,) = ctx.saved_tensors
        return (dh * dloss).to(dh.dtype), *[None] * 6


def _loss(
    z: Tensor, labels: Tensor, scale: float, softcap: float | None, smoothing: float, back: bool
) -> tuple[Tensor, Tensor | None]:
    """(sum of the rows' losses, its gradient to W h + b); z [n, V] is written over."""
    if scale != 1:
        z *= scale
    if softcap is not None:
        z = z.div_(softcap).tanh_()
        slope = 1 - z.square() if back else None
        z *= softcap
    counted = (labels >= 0)[:, None]
    target = labels.clamp(min=0)[:, None]
    top = z.amax(-1, keepdim=True)
    own = z.gather(1, target) - top
    mean = z.mean(-1, keepdim=True) - top if smoothing else 0.0
    p = z.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    each = total.log() - (1 - smoothing) * own - smoothing * mean
    loss = torch.where(counted, each, 0.0).sum()
    if not back:
        return loss, None
    p /= total
    p.scatter_add_(1, target, torch.full_like(own, smoothing - 1))
    if smoothing:
        p -= smoothing / p.shape[1]
    if softcap is not None:
        p *= slope
    return loss, p.mul_(scale).masked_fill_(~counted, 0.0)


@contextlib.contextmanager
def _dense(weight: Tensor | tuple[Tensor, Any], dtype: torch.dtype) -> Iterator[Tensor]:
    """The layer's weight [V, D] in ``dtype``; a 4-bit one in scratch memory."""
    if _is_4bit(weight):
        with decoded(unpack(weight), dtype=dtype) as dense:
            yield dense
    else:
        yield weight.to(dtype)


def _is_4bit(weight: Tensor | tuple[Tensor, Any]) -> bool:
    return isinstance(weight, tuple) or getattr(weight, "quant_state", None) is not None


def rows_at_once(vocabulary: int) -> int:
    """Of how many rows `linear_cross_entropy` has logits at the same time."""
    return max(1, CHUNK // max(1, vocabulary))


# ---- liger-kernel ----


@functools.cache
def _liger() -> Callable[..., Tensor] | None:
    """liger-kernel's op; None where it is not installed."""
    if find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def _by_liger(h: Tensor, weight: Any, scale: float, backend: str) -> bool:
    """Whether liger-kernel's op serves this: no 4-bit weights, no scale, no float64."""
    if backend == "chunks" or _liger() is None or _is_4bit(weight):
        return False
    return scale == 1 and h.dtype != torch.float64 and (h.is_cuda or backend == "liger")


# ---- public ----


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | tuple[Tensor, Any],
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """``F.cross_entropy(hidden @ weight.T + bias, labels)``, without the logits; dh alone.

    Args:
        hidden: [..., D] float32, float16, bfloat16 or float64. Products are in its dtype (under
            autocast in that one), all else in float32 (of float64, float64).
        weight: [V, D], frozen: any float dtype, or 4-bit as `ops.nf4_linear` takes it.
        labels: [...] int64 below V, of hidden's leading axes, already shifted: what each row is to
            foretell. Rows with ``ignore_index`` are left out, but under CUDA graph capture, where
            all are computed (and labels not checked).
        bias: [V], frozen.
        reduction: "mean" over the rows that count (NaN where none does), or "sum".
        scale, softcap: logits are ``softcap · tanh(scale · z / softcap)``; None: not capped.
        label_smoothing: the share of the label that is spread over all V, from 0 to 1.
        backend: "chunks", "liger" (liger-kernel's fused op) or "auto": liger on CUDA where it is
            installed and serves the case, else chunks.

    Returns:
        A scalar in float32 (of float64, float64).

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, a weight or bias that
            trains, or liger-kernel asked for where it does not serve.
        IndexError: a label that is neither of the V nor ``ignore_index``.
    """
    check_number("scale", scale)
    rows, columns = _check(hidden, weight, labels, bias, reduction, label_smoothing, softcap)
    if backend not in BACKENDS:
        raise ValueError(f"backend: want one of {', '.join(BACKENDS)}; got {backend!r}")
    by_liger = _by_liger(hidden, weight, scale, backend)
    if backend == "liger" and not by_liger:
        raise ValueError(
            'backend: "liger" wants liger-kernel installed, a dense weight, scale 1 and no float64'
        )
    h, labels = hidden.reshape(-1, columns), labels.reshape(-1)
    counts = labels != ignore_index
    # which rows count is asked of the device, which must not be asked under capture
    if h.is_cuda and torch.cuda.is_current_stream_capturing():
        labels, count = labels.masked_fill(~counts, -1), counts.sum()
    else:
        at = counts.nonzero().squeeze(1)
        h, labels, count = _Rows.apply(h, at), labels[at], len(at)
        least, most = torch.stack(labels.aminmax()).tolist() if count else (0, -1)
        if least < 0 or most >= rows:
            raise IndexError(f"labels: want 0 to {rows - 1} or {ignore_index}, got {least}, {most}")
    kind = h.device.type
    if torch.is_autocast_enabled(kind):
        h = h.to(torch.get_autocast_dtype(kind))
    bias = None if bias is None else bias.to(h.dtype)
    with torch.autocast(kind, enabled=False):
        if by_liger and len(h):
            options = dict(label_smoothing=label_smoothing, softcap=softcap, reduction="sum")
            total = _liger()(h, weight.to(h.dtype), labels, bias=bias, ignore_index=-1, **options)
        else:
            total = _Chunks.apply(h, labels, weight, bias, float(scale), softcap, label_smoothing)
        return total if reduction == "sum" else total / count


def _check(hidden, weight, labels, bias, reduction, smoothing, softcap) -> tuple[int, int]:
    """Rows and columns of the weight."""
    weights = () if isinstance(weight, tuple) else (("weight", weight),)
    for name, x in (("hidden", hidden), *weights, ("labels", labels), ("bias", bias)):
        if not isinstance(x, Tensor) and (name, x) != ("bias", None):
            raise ValueError(f"{name}: want a tensor, got {type(x).__name__}")
    if hidden.dtype not in FLOATS or hidden.ndim == 0:
        raise ValueError(f"hidden: want [..., D] of one of {[*FLOATS]}, got {hidden.dtype}")
    if _is_4bit(weight):
        w = unpack(weight)
        size, device = (w.rows, w.columns), w.packed.device
    else:
        size, device = tuple(weight.shape), weight.device
        if weight.requires_grad or not weight.is_floating_point():
            raise ValueError("weight must be frozen and floating: no gradient is returned for it")
    if len(size) != 2 or size[1] != hidden.shape[-1]:
        raise ValueError(f"weight: want [V, {hidden.shape[-1]}], got {list(size)}")
    if device != hidden.device:
        raise ValueError(f"weight: want it on {hidden.device}, got {device}")
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        want = f"{list(hidden.shape[:-1])} torch.int64"
        raise ValueError(f"labels: want {want}; got {list(labels.shape)} {labels.dtype}")
    if labels.device != hidden.device:
        raise ValueError(f"labels: want them on {hidden.device}, got {labels.device}")
    if bias is not None and (bias.shape != size[:1] or bias.requires_grad):
        raise ValueError(f"bias: want it frozen, [{size[0]}]; got {list(bias.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: want 'mean' or 'sum', got {reduction!r}")
    check_number("label_smoothing", smoothing)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing: want 0 to 1, got {smoothing}")
    if softcap is not None:
        check_number("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap: want it above 0, got {softcap}")
    return size
