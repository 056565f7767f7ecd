"""The one call of ``F.scaled_dot_product_attention`` inside an attention module's own forward.

Attention of timm and open_clip differs in what is around that call (fused projections, norms of
queries and keys, rotation, gates), from class to class and from release to release, and none of it
is written again here: the module's own forward runs, and this call alone is another function's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastprompt import multihead

_MULTIHEAD = (nn.MultiheadAttention, multihead.MultiheadAttention)


class _Instead(TorchFunctionMode):
    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.function(*args, **(kwargs or {}))


def run(attention: nn.Module, function: Callable[..., Tensor], *args, **kwargs) -> Any:
    """The attention's own forward, with ``function`` in place of that call.

    torch's own ``nn.MultiheadAttention`` runs as `multihead.attend` has it.

    Raises:
        ValueError: it does not make that call, or makes it twice.
    """
    calls = []

    def counted(*inputs, **options) -> Tensor:
        calls.append(function)
        return function(*inputs, **options)

    with _Instead(counted):
        torchs = type(attention) is nn.MultiheadAttention
        forward = multihead.attend if torchs else type(attention).forward
        out = forward(attention, *args, **kwargs)
    if len(calls) != 1:
        raise ValueError(
            f"{type(attention).__name__}: want an attention that calls "
            f"F.scaled_dot_product_attention once, got {len(calls)} calls"
        )
    return out


@contextmanager
def asked_for(attention: nn.Module) -> Iterator[None]:
    """Inside, timm's ``fused_attn`` is on: whether an attention makes that call at all."""
    before = getattr(attention, "fused_attn", True)
    if not before:
        attention.fused_attn = True
    try:
        yield
    finally:
        if not before:
            attention.fused_attn = before


def keys_values(attention: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [S, Hkv, P, d] that the attention makes of normed rows [S, P, D].

    Without rotation and bias of places, which its forward has to be given.
    """
    kept = []

    def keep(query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        kept[:] = key, value
        return query  # of the output's shape; what becomes of it is not used

    own = next((p for p in attention.parameters() if p.is_floating_point()), rows)
    rows = rows.to(own.dtype)
    if isinstance(attention, _MULTIHEAD):
        rows = rows if attention.batch_first else rows.transpose(0, 1)
        run(attention, keep, rows, rows, rows, need_weights=False)
    else:
        run(attention, keep, rows)
    return kept[0], kept[1]
