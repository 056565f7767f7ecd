"""Trained prompts as an ordinary prefix cache, for engines that know nothing of fastprompt."""

import warnings

import torch
from torch import nn
from transformers import DynamicCache

from fastprompt import attention
from fastprompt.families.base import TEXT, Tower
from fastprompt.patching import Patch, patch_of
from fastprompt.prompts import CHILD, without_dropout

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
        positions: promise to give ``position_ids`` that count from the first token (from
            `PrefixTuning.position_offset`), as a model with learned positions needs it (its prompts
            carry none). Models with rotary positions, and prefixes whose offset is their length,
            count on from the prompts by themselves and need nothing.

    Returns:
        One layer a block, each [batch, Hkv, P, d], keys rotated as positions 0 .. P-1.

    Raises:
        ValueError: no language model with such prompts, sliding windows (they would hide the
            prompts, which are never hidden), positions that no prefix can stand before, an encoder,
            T5 (its prompts have a bias, too), or a pool (its prompts differ by sample).
    """
    patch = patch_of(model)
    tower = _checked(patch, positions)
    others = [t for t in patch.anatomy.towers if t is not tower]
    left = [f"{t.kind} prompts" for t in others if any(hasattr(b.layer, CHILD) for b in t.blocks)]
    left += [name for name in patch.trainable if CHILD not in name.split(".")]
    if left:
        warnings.warn(
            f"prefix_cache holds the language model's prompts alone, not {left}", stacklevel=2
        )
    cache = DynamicCache()
    dtype = dtype or tower.embeddings.weight.dtype
    for layer, block in enumerate(tower.blocks):
        side: attention.SideKeys = vars(block.attention)[attention.ATTRIBUTE]
        with without_dropout(side.prompt):
            keys_values = side.compute(dtype, first=0)
        cache.update(*(x.expand(batch, -1, -1, -1).contiguous() for x in keys_values), layer)
    return cache


def _checked(patch: Patch, positions: bool) -> Tower:
    tower = patch.anatomy.tower(TEXT)
    if tower is not None and tower.outside:
        raise ValueError(f"prefix_cache: want a model of transformers, got {tower.family}")
    prompts = [getattr(block.layer, CHILD, None) for block in tower.blocks] if tower else []
    if patch.pool is not None:
        raise ValueError(f"prefix_cache: want the same prompts for all samples, got {patch.method}")
    if not prompts or None in prompts or len({p.length for p in prompts}) != 1:
        raise ValueError(
            "prefix_cache: want prompts of one length in every block of a language model, got "
            f"lengths {[None if p is None else p.length for p in prompts]}"
        )
    decodes = tower.rotary is not None or tower.blocks[0].attention.is_causal
    if tower.bias is not None or not decodes:
        raise ValueError(
            "prefix_cache: want a decoder whose keys a cache holds whole, got "
            f"{tower.family}, " + ("an encoder" if tower.bias is None else "with a bias of places")
        )
    window = sliding_window(tower)
    if window is not None:
        raise ValueError(
            f"prefix_cache: want full attention in every layer, got a sliding window of {window}: "
            "it would hide the prompts from later tokens"
        )
    check_rotation("prefix_cache", tower)
    first = patch.method.position_of_first(tower)
    if tower.rotary is None and not positions and first != prompts[0].length:
        raise ValueError(
            f"prefix_cache: {tower.family} has learned positions, and tokens behind a prefix would "
            f"get those of later ones: pass positions=True and give position_ids from {first} on"
        )
    return tower


def check_rotation(what: str, tower: Tower) -> None:
    """Raises ValueError if keys rotated at 0 .. P-1 are not what other code makes of them."""
    kind = getattr(tower.rotary, "rope_type", "default")
    if kind in _LENGTH_BOUND:
        raise ValueError(f"{what}: want rotation that no length changes, got {kind!r}")


def sliding_window(tower: Tower) -> int | None:
    """The window of a language model, if any of its layers has one."""
    config = tower.model.config
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return window if slides or getattr(config, "use_sliding_window", True) else None
