"""Prompts that start from real hidden states: of a text and of images, at each block.

Every block normalises its rows, so random ones soak up attention at full strength. Rows taken from
the model's own hidden states make a patched model begin as the base model with a text before the
text and patches before the patches.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt import attention
from fastprompt.families import TEXT, VISION, Tower
from fastprompt.methods.base import DeepMethod
from fastprompt.patching import Patch
from fastprompt.prompts import CHILD

SCALE = 0.1  # root mean square of a row: blocks are all but blind to it, learning rates are not


@torch.no_grad()
def prefill(
    patch: Patch, input_ids: Tensor | None = None, pixel_values: Tensor | None = None
) -> None:
    """Fill a patch's prompts with what its model, without prompts, makes of a text and of images.

    Each row is one token's hidden state before the block, scaled to a root mean square of 0.1.

    Args:
        input_ids: [T] or [1, T], T at least the length of textual prompts, whose rows are the first
            tokens' states. Wanted if there are textual prompts.
        pixel_values: [B, 3, H, W], as the model takes them. Row i is of image i mod B, and of
            another patch than the row before. Wanted if there are visual prompts.

    Raises:
        ValueError: what is wanted is not there, or too short; nothing has changed then.
    """
    if not isinstance(patch.method, DeepMethod):
        raise ValueError(f"prefill: want prompts that are rows of a block, got {patch.method}")
    given = {TEXT: input_ids, VISION: pixel_values}
    towers = [t for t in patch.anatomy.towers if any(_prompted(t))]
    rows: dict[nn.Module, Tensor] = {}
    for tower in towers:
        P, inputs = patch.method.lengths()[tower.kind], given[tower.kind]
        if inputs is None or (tower.kind == TEXT and inputs.numel() < P):
            want = f"a text of {P} tokens or more" if tower.kind == TEXT else "images"
            got = "none" if inputs is None else f"{inputs.numel()}"
            raise ValueError(f"prefill: want {want} for the {tower.kind} prompts, got {got}")
        for layer, states in _states(patch, tower, inputs).items():
            rows[layer] = _rows(states, P, tower.kind)
    for layer, start in rows.items():
        getattr(layer, CHILD).tokens.copy_(start)
    patch.refresh()


def _prompted(tower: Tower) -> list[nn.Module]:
    layers = (block.layer for block in (*tower.blocks, *tower.unread))
    return [layer for layer in layers if hasattr(layer, CHILD)]


def _states(patch: Patch, tower: Tower, inputs: Tensor) -> dict[nn.Module, Tensor]:
    """Prompted layer -> the hidden states [B, N, D] before it, in a pass without prompts."""
    found: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        found[layer] = args[0] if args else kwargs["hidden_states"]

    device, training = patch.model.device, tower.model.training
    if tower.kind == TEXT:
        options = dict(input_ids=inputs.reshape(1, -1).to(device))
    else:
        options = dict(pixel_values=inputs.to(device, patch.model.dtype))
    with ExitStack() as stack:
        stack.enter_context(_without_prompts(tower))
        for layer in _prompted(tower):
            # before the hook of visual_prompts="context", which puts rows in front
            handle = layer.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        stack.callback(tower.model.train, training)
        tower.model.eval()
        tower.model(**options)
    return found


@contextmanager
def _without_prompts(tower: Tower) -> Any:
    sides = [vars(b.attention)[attention.ATTRIBUTE] for b in (*tower.blocks, *tower.unread)]
    prompts = [side.prompt for side in sides]
    try:
        for side in sides:
            side.prompt = None
        yield
    finally:
        for side, prompt in zip(sides, prompts, strict=True):
            side.prompt = prompt


def _rows(states: Tensor, P: int, kind: str) -> Tensor:
    """[P, D] float32 of hidden states [B, N, D]."""
    B, N, _ = states.shape
    i = torch.arange(P, device=states.device)
    rows = states[0, :P] if kind == TEXT else states[i % B, 1 + i % (N - 1)]
    rows = rows.float()
    return SCALE * rows / rows.square().mean(-1, keepdim=True).sqrt()
