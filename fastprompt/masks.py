"""fastprompt's mask function, as transformers' AttentionMaskInterface calls it."""

from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs,
) -> Tensor | None:
    """The mask for `attention.attention_forward`, as small as the pattern allows.

    Returns:
        Where the pattern is causal, with or without a sliding window (aligned at the last key), or
        full: the padding mask [B, M] bool, or None without padding; `attention_forward` knows the
        window. Else [B, 1, N, M] bool.
    """
    causal = mask_function is causal_mask_function or _is_sliding_window(mask_function)
    # a static cache is longer than what it holds, so its last key is not the last query's
    at_the_end = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if mask_function is bidirectional_mask_function or (causal and at_the_end):
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        return None if padding is None else padding[:, kv_offset : kv_offset + kv_length]
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
        kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        local_size=local_size, allow_is_causal_skip=False, **kwargs,
    )  # fmt: skip


def _is_sliding_window(mask_function) -> bool:
    """Whether this is ``sliding_window_causal_mask_function(…)`` and nothing more (no packing)."""
    cells = getattr(mask_function, "__closure__", None) or ()
    parts = [cell.cell_contents for cell in cells]
    if len(parts) != 1 or not isinstance(parts[0], tuple) or len(parts[0]) != 2:
        return False
    window, causal = parts[0]
    of = getattr(window, "__qualname__", "")
    return causal is causal_mask_function and of.startswith("sliding_window_overlay.")
