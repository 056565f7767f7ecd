"""Cosine top-K by plain torch, some keys at a time: wherever no kernel of ours serves the call."""

import torch
from torch import Tensor

from fastprompt.ops import reference

CHUNK = 2**22  # scores at once: 16 MB


def top_k(query: Tensor, keys: Tensor, k: int, key_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(indices [B, k] int64, scores [B, k] float32), the highest first, ties by lower index."""
    (query, _, fine), C = reference.unit_rows(query), len(keys)
    step = max(k, CHUNK // max(1, len(query)))
    best = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    for first in range(0, C, step):
        some = keys[first : first + step]
        if key_scale is not None:
            some = some * key_scale[first : first + step, None]
        scores = reference.cosines(query, some.to(query.dtype)).masked_fill_(~fine, -torch.inf)
        order = torch.arange(first, first + len(some), device=query.device)
        best = torch.cat([best, _ranked(scores, order)], 1).topk(min(k, C), sorted=True).values
    return _LAST - (best & _LAST), _score(best >> 32)


_LAST = 2**32 - 1


def _ranked(scores: Tensor, index: Tensor) -> Tensor:
    """int64 that order as (score, lower index first) do: score above, complemented index below."""
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0: -0.0 and 0.0 are a tie
    return (_ordered(bits) << 32) | (_LAST - index)


def _ordered(bits: Tensor) -> Tensor:
    """A float32's bits as an integer of the same order; its own inverse."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _score(ordered: Tensor) -> Tensor:
    return _ordered(ordered).int().view(torch.float32)


def gather(prompts: Tensor, indices: Tensor, rest: bool, total: Tensor | None) -> Tensor:
    """[B, k, ...] prompts, and with ``rest`` the mean of all others as last row."""
    tokens = prompts[indices]
    if not rest:
        return tokens
    if total is None:
        total = sum_of(prompts)
    # in float64: what is left of a sum after most of it was taken away must still be right
    mean = total - tokens.sum(1, dtype=torch.float64)
    mean /= len(prompts) - indices.shape[1]
    return torch.cat([tokens, mean.to(prompts.dtype)[:, None]], 1)


def sum_of(prompts: Tensor) -> Tensor:
    """Sum of all prompts [C, ...] over C, in float64."""
    return prompts.detach().sum(0, dtype=torch.float64)
