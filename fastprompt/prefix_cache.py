"""Trained prompts as an ordinary prefix cache, for engines that know nothing of fastprompt."""

import warnings

import torch
from torch import nn
from transformers import DynamicCache

from fastprompt import attention
from fastprompt.families.base import TEXT, Tower
from fastprompt.patching import Patch, patch_of

_LENGTH_BOUND = ("dynamic", "longrope")  # rotations that change with the length they have seen


@torch.no_grad()
def prefix_cache(
    model: nn.Module, batch: int = 1, *, dtype: torch.dtype | None = None, positions: bool = False
) -> DynamicCache:
    """The language model's prompts as keys and values of P tokens that were already read.

    The unpatched model goes on from there and gives the patched one's logits::

        cache = fastprompt.prefix_cache(model, batch=len(input_ids))
        base(input_ids, past_key_values=cache, attention_mask=mask)

    with a mask [batch, P + N] whose first P columns are ones. ``generate`` leaves out as many ids
    as a cache holds, so it wants any P ids before the text's own. A cache is written to by who uses
    it: make one for each call, or copy it.

    What does not carry over: prompts of a vision tower, and what else was trained (a projector, a
    head), which are left behind with a warning.

    Args:
        model: patched, with prompts of one length in every block of its language model.
        batch: rows of the cache.
        dtype: of keys and values; by default the embeddings'.
        positions: promise to give ``position_ids`` that count from the first token, as a model
            with learned positions needs it (its prompts carry none). Models with rotary positions
            count on from the prompts by themselves and need nothing.

    Returns:
        One layer a block, each [batch, Hkv, P, d], keys rotated as positions 0 .. P-1.

    Raises:
        ValueError: no language model with such prompts, sliding windows (they would hide the
            prompts, which are never hidden), positions that no prefix can stand before, or a pool
            (its prompts differ by sample).
    """
    patch = patch_of(model)
    tower = _checked(patch, positions)
    left = [t.kind + " prompts" for t in patch.anatomy.towers if t is not tower and t.blocks]
    left += [name for name in patch.trainable if "fastprompt" not in name.split(".")]
    if left:
        warnings.warn(
            f"prefix_cache holds the language model's prompts alone, not {left}", stacklevel=2
        )
    cache = DynamicCache()
    dtype = dtype or tower.embeddings.weight.dtype
    for layer, block in enumerate(tower.blocks):
        side: attention.SideKeys = vars(block.attention)[attention.ATTRIBUTE]
        keys_values = (x.expand(batch, -1, -1, -1) for x in side.compute(dtype, first=0))
        cache.update(*(x.contiguous() for x in keys_values), layer)
    return cache


def _checked(patch: Patch, positions: bool) -> Tower:
    tower = patch.anatomy.tower(TEXT)
    prompts = [getattr(block.layer, "fastprompt", None) for block in tower.blocks] if tower else []
    if patch.pool is not None:
        raise ValueError(f"prefix_cache: want the same prompts for all samples, got {patch.method}")
    if not prompts or None in prompts or len({len(p.tokens) for p in prompts}) != 1:
        raise ValueError(
            "prefix_cache: want prompts of one length in every block of a language model, got "
            f"lengths {[None if p is None else len(p.tokens) for p in prompts]}"
        )
    config = tower.model.config
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        window is not None and getattr(config, "use_sliding_window", True)
    ):
        raise ValueError(
            f"prefix_cache: want full attention in every layer, got a sliding window of {window}: "
            "it would hide the prompts from later tokens"
        )
    kind = getattr(tower.rotary, "rope_type", "default")
    if kind in _LENGTH_BOUND:
        raise ValueError(f"prefix_cache: want rotation that no length changes, got {kind!r}")
    if tower.rotary is None and not positions:
        raise ValueError(
            f"prefix_cache: {tower.family} has learned positions, and tokens behind a prefix would "
            "get those of later ones: pass positions=True and give position_ids from 0 on"
        )
    return tower
