"""`select_prompts` on the CPU by csrc/select."""

import torch
from torch import Tensor

from fastprompt import native, native_select

_MOST = 1 << 28  # bytes of candidates at once


def serves(query: Tensor, keys: Tensor, prompts: Tensor, k: int) -> bool:
    """Whether csrc takes this call."""
    floats = query.dtype in native.DTYPES and prompts.dtype in native.DTYPES
    parts = 2 * torch.get_num_threads()
    return (
        floats
        and (keys.dtype in native.DTYPES or keys.dtype == torch.int8)
        and len(keys) < 2**31
        and len(query) * parts * 2 * (k + 64) * 8 <= _MOST
        and native.available()
    )


def forward(
    query: Tensor, keys: Tensor, prompts: Tensor, k: int, rest: bool,
    key_scale: Tensor | None, total: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(tokens [B, k + rest, ...], indices [B, k] int64, scores [B, k] float32)."""
    entries = prompts[:, None] if prompts.ndim == 2 else prompts
    key_scale, total = (None if x is None else x.contiguous() for x in (key_scale, total))
    tokens, indices, scores = native_select.select(query, keys, entries, k, rest, key_scale, total)
    return tokens.view(*tokens.shape[:2], *prompts.shape[1:]), indices, scores
