"""How much attention prompts get: of every head and token, of one image, as a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastprompt import recorder
from fastprompt.attention import with_sinks
from fastprompt.families import VISION
from fastprompt.ops import reference
from fastprompt.patching import patch_of


@torch.no_grad()
def attention_to_prompts(model: nn.Module, **inputs) -> dict[str, Tensor]:
    """The share of each token's attention that goes to the block's prompt (M2PT's Figure 3).

    Args:
        model: a patched model.
        inputs: keyword arguments of its forward, which is run once.

    Returns:
        Block name -> [B, Hq, N] float32 in 0 .. 1, in the order in which the blocks ran.
        `attention_mass` says what it would be if attention were spread evenly.

    Raises:
        ValueError: the model is not patched.
    """
    return _look(model, inputs, lambda weights, P, _: weights[..., :P].sum(-1))


class Mass(NamedTuple):
    """Attention to a block's prompt, the mean over its heads and tokens.

    Attributes:
        share: of all attention, 0 .. 1.
        even: what the share would be if each token attended evenly to all that it may see:
            P/(P+N) where it sees N tokens.
    """

    share: float
    even: float

    @property
    def ratio(self) -> float:
        """1: prompts get what any other key gets."""
        return self.share / self.even if self.even else math.nan


@torch.no_grad()
def attention_mass(model: nn.Module, **inputs) -> dict[str, Mass]:
    """How much attention each block's prompt gets, as one number against its even share.

    Call it before and after training to see what prompts came to be used.

    Args:
        model: a patched model.
        inputs: keyword arguments of its forward, which is run once. A 2-D ``attention_mask`` as
            long as a block's tokens leaves padding out of the mean.

    Returns:
        Block name -> `Mass`, in the order in which the blocks ran.

    Raises:
        ValueError: the model is not patched.
    """
    real = inputs.get("attention_mask")

    def masses(weights: Tensor, P: int, even: Callable[[], Tensor]) -> Mass:
        shares = (w[..., :P].sum(-1).mean(1) for w in (weights, even()))  # [B, N]
        fits = real is not None and real.shape == (weights.shape[0], weights.shape[2])
        chosen = real.bool() if fits else torch.ones((), dtype=torch.bool)
        return Mass(*(s[chosen.expand_as(s)].mean().item() for s in shares))

    return _look(model, inputs, masses)


@torch.no_grad()
def patches_to_prompts(
    model: nn.Module, *, grid: tuple[int, int] | None = None, **inputs
) -> dict[str, Tensor]:
    """How much attention each patch of an image pays to each row of its block's prompt.

    Args:
        model: a patched model with a vision tower.
        grid: patches of an image, (high, wide); by default the largest square that its tokens
            hold, the tokens before which are taken for class and register tokens.
        inputs: keyword arguments of its forward, which is run once.

    Returns:
        Vision block name -> [B, P, high, wide] float32, the mean over heads.

    Raises:
        ValueError: the model is not patched, has no prompted vision tower, or its tokens make no
            such grid.
    """
    towers = [t for t in patch_of(model).anatomy.towers if t.kind == VISION]
    seen = {block.name for tower in towers for block in (*tower.blocks, *tower.unread)}

    def maps(weights: Tensor, P: int, _: object) -> Tensor:
        high, wide = grid or (math.isqrt(weights.shape[2]),) * 2
        before = weights.shape[2] - high * wide
        if before < 0 or (grid is None and before > 16):
            raise ValueError(
                f"grid: want (high, wide) of patches; {weights.shape[2]} tokens are not "
                + (f"{high} x {wide} and more" if grid else "a square and class tokens")
            )
        rows = weights[:, :, before:, :P].mean(1)  # [B, patches, P]
        return rows.transpose(1, 2).unflatten(-1, (high, wide))

    found = _look(model, inputs, maps, seen)
    if not found:
        raise ValueError("patches_to_prompts: want a model with visual prompts, got none")
    return found


def _look(
    model: nn.Module,
    inputs: dict,
    see: Callable[[Tensor, int, Callable[[], Tensor]], object],
    names: set[str] | None = None,
) -> dict:
    """Block name -> ``see`` of its weights [B, Hq, N, P+M], P, and the even weights, of a forward
    of the blocks ``names`` (all, if None)."""
    patch = patch_of(model)
    if any(map(patch.method.as_tokens, patch.anatomy.towers)):
        raise ValueError(f"want prompts that are keys of their block, got tokens of {patch.method}")
    found: dict = {}

    def listen(name: str, given: tuple[Tensor, ...], options: dict) -> None:
        if names is not None and name not in names:
            return
        wide, options = tuple(t.float() for t in given), dict(options)
        sinks = options.pop("sinks", None)
        ends, _ = (options.pop(f"cu_seqlens_{x}", None) for x in "qk")
        if ends is not None and "prompt_index" in options:
            raise ValueError(f"{name}: want one prompt set for all packed images, got several")
        if ends is not None:  # each place sees its own image
            image = torch.bucketize(
                torch.arange(given[0].shape[2], device=ends.device), ends, right=True
            )
            options["attn_mask"] = (image[:, None] == image)[None, None]
        if sinks is None:
            _, weights = reference.prompt_attention_with_weights(*wide, **options)
        else:
            wide, sunk = with_sinks(wide, sinks, options)
            weights = reference.prompt_attention_with_weights(*wide, **sunk)[1][..., 1:]
        P = given[3].shape[-2]
        found[name] = see(weights, P, lambda: _even(given, options))

    with recorder.listening(listen):
        model(**inputs)
    return found


def _even(given: tuple[Tensor, ...], options: dict) -> Tensor:
    """Weights of one who attends evenly to all that may be seen."""
    options = dict(options, prompt_bias=None)
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        options["attn_mask"] = mask > torch.finfo(mask.dtype).min / 2
    query, *rest = (t.float() for t in given)
    return reference.prompt_attention_with_weights(torch.zeros_like(query), *rest, **options)[1]
