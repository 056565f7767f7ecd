"""Prompts that start from real hidden states: of a text and of images, at each block.

Every block normalises its rows, so random ones soak up attention at full strength. Rows taken from
the model's own hidden states make a patched model begin as the base model with a text before the
text and patches before the patches. Prefix tuning's keys and values begin as a text's own, which no
norm sees again: under full attention the model is then the base model with that text in front
(learned positions want `PrefixTuning.position_offset` for it).
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from fastprompt import attention
from fastprompt.attention import SideKeys
from fastprompt.families import TEXT, VISION, Block, Tower
from fastprompt.methods.base import DeepMethod
from fastprompt.patching import Patch
from fastprompt.prompts import CHILD, KeyValues
from fastprompt.tapping import rows_before_patches
from fastprompt.without import taken_out

SCALE = 0.1  # root mean square of a row: blocks are all but blind to it, learning rates are not
_ONE_BY_ONE = (
    "prefill: want a vision tower with a row of patches for each image; got {}, which has one row "
    "of them all"
)


@torch.no_grad()
def prefill(
    patch: Patch, input_ids: Tensor | None = None, pixel_values: Tensor | None = None
) -> None:
    """Fill a patch's prompts with what its model, without prompts, makes of a text and of images.

    Each row is one token's hidden state before the block, scaled to a root mean square of 0.1; of
    `PrefixTuning`, one token's keys and values as they are.

    Args:
        input_ids: [T] or [1, T], T at least the length of textual prompts, whose rows are the first
            tokens' states: ``tokenizer(text, return_tensors="pt").input_ids``. Wanted if there are
            textual prompts.
        pixel_values: [B, 3, H, W], as the model takes them. Row i is of image i mod B, and of
            another patch than the row before. Wanted if there are visual prompts.

    Raises:
        ValueError: what is wanted is not there, too short or of another shape, or a vision tower
            that takes images otherwise (Qwen-VL's, Pixtral); nothing has changed then.
    """
    if patch.baked:
        raise ValueError("prefill: want prompts that can train, got a baked patch")
    if not isinstance(patch.method, DeepMethod) or patch.method.folded() != patch.method:
        raise ValueError(
            "prefill: want prompts that are rows of a block (or its keys and values themselves), "
            f"got {patch.method}"
        )
    if any(tower.outside for tower in patch.anatomy.towers):
        raise ValueError(f"prefill: want a model of transformers, got {patch.anatomy.family}")
    given = {TEXT: input_ids, VISION: pixel_values}
    towers = [t for t in patch.anatomy.towers if any(_prompted(t))]
    starts: dict[nn.Module, Tensor] = {}
    for tower in towers:
        P, inputs = patch.method.lengths()[tower.kind], given[tower.kind]
        if tower.packed:
            raise ValueError(_ONE_BY_ONE.format(tower.family))
        if inputs is None or (tower.kind == TEXT and inputs.numel() < P):
            want = f"a text of {P} tokens or more" if tower.kind == TEXT else "images"
            got = "none" if inputs is None else f"{inputs.numel()}"
            raise ValueError(f"prefill: want {want} for the {tower.kind} prompts, got {got}")
        if tower.kind == VISION and inputs.ndim != 4:
            raise ValueError(f"prefill: want images [B, 3, H, W], got {list(inputs.shape)}")
        prompted = _prompted(tower)
        found = hidden_states(patch, tower, prompted, inputs)
        if tower.kind == VISION and any(len(states) != len(inputs) for states in found):
            raise ValueError(_ONE_BY_ONE.format(tower.family))
        for block, states in zip(prompted, found, strict=True):
            prompt = getattr(block.layer, CHILD)
            if isinstance(prompt, KeyValues):
                side = vars(block.attention)[attention.ATTRIBUTE]
                starts[prompt] = keys_values_of(side, states[:1, :P])[-len(prompt.tokens) :]
            else:
                before = 0 if tower.kind == TEXT else rows_before_patches(tower.model)
                starts[prompt] = _rows(states[:, before:], len(prompt.tokens), tower.kind)
    for prompt, start in starts.items():
        prompt.tokens.copy_(start)
    patch.refresh()


def _prompted(tower: Tower) -> list[Block]:
    return [b for b in (*tower.blocks, *tower.unread) if hasattr(b.layer, CHILD)]


def hidden_states(patch: Patch, tower: Tower, blocks: list[Block], inputs: Tensor) -> list[Tensor]:
    """The hidden states [B, N, D] before each of the blocks, in a pass without prompts.

    ``inputs``: images [B, 3, H, W]; of a language model token ids [N], or embeddings [N, D].
    """
    found: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        found[layer] = args[0] if args else kwargs["hidden_states"]

    device, training = patch.model.device, tower.model.training
    if tower.kind == TEXT:
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        shape = (1, *inputs.shape[-2:]) if inputs.is_floating_point() else (1, -1)
        options = {name: inputs.reshape(shape).to(device)}
    else:
        options = dict(pixel_values=inputs.to(device, patch.model.dtype))
    with ExitStack() as stack:
        stack.enter_context(taken_out(patch, [*tower.blocks, *tower.unread]))
        for block in blocks:
            # before the hook of visual_prompts="context", which puts rows in front
            handle = block.layer.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        stack.callback(tower.model.train, training)
        tower.model.eval()
        tower.model(**options)
    return [found[block.layer] for block in blocks]


def keys_values_of(side: SideKeys, states: Tensor) -> Tensor:
    """[N, 2, Hkv, d] of hidden states [1, N, D]: what the block makes of them, not rotated."""
    k, v = (x[0].transpose(0, 1) for x in side.project(states))
    return torch.stack([k, v], dim=1)


def _rows(states: Tensor, P: int, kind: str) -> Tensor:
    """[P, D] float32 of hidden states [B, N, D]."""
    B, N, _ = states.shape
    i = torch.arange(P, device=states.device)
    rows = states[0, :P] if kind == TEXT else states[i % B, i % N]
    return scaled(rows.float())


def scaled(rows: Tensor) -> Tensor:
    """Rows at a root mean square of 0.1 each."""
    return SCALE * rows / rows.square().mean(-1, keepdim=True).sqrt()
