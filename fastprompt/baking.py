"""Prompts' keys and values computed once and for all, for inference."""

from __future__ import annotations

import torch
from torch import nn

from fastprompt import attention
from fastprompt.families.base import join
from fastprompt.patching import Patch, patch_of
from fastprompt.prompts import CHILD, KeyValues, without_dropout


@torch.no_grad()
def bake(model: nn.Module) -> Patch:
    """Replace each block's prompt by the keys and values that the block makes of it.

    The model's outputs stay. No norm or projection of a prompt is computed any more, also where
    keys and values are not cached (compiled, captured in a CUDA graph, exported). No prompt trains
    then; a projector or head does, but nothing of the patch can be saved any more: save before.
    `Patch.undo` still gives the model back as it was before patching.

    Args:
        model: patched, with prompts as side keys.

    Returns:
        Its `Patch`; ``trainable`` holds no prompt any more.

    Raises:
        ValueError: the model is not patched, chooses prompts for each sample (a pool), has prompts
            as tokens, prompts that its projector sees ("raw", "context"), or several sets of
            them. Nothing has changed.
    """
    done = patch_of(model)
    towers = done.anatomy.towers
    blocks = [b for t in towers for b in (*t.blocks, *t.unread) if hasattr(b.layer, CHILD)]
    tokens = any(done.method.as_tokens(tower) for tower in towers)
    if done.pool is not None or tokens or done.method.shown() != "drop" or not blocks:
        raise ValueError(f"bake: want prompts as side keys, of every sample, got {done.method}")
    if done.several:
        raise ValueError(f"bake: want one prompt set, got {', '.join(done.sets)}: drop the others")
    made = {}
    for block in blocks:
        prompt = getattr(block.layer, CHILD)
        side = vars(block.attention)[attention.ATTRIBUTE]
        with without_dropout(prompt):
            k, v = prompt.keys_values(side.project)
        made[block] = torch.stack([k, v]).permute(2, 0, 1, 3).contiguous()  # [P, 2, Hkv, d]
    for block, tokens in made.items():
        baked = KeyValues(tokens).requires_grad_(False).eval()
        block.layer._modules[CHILD] = baked
        vars(block.attention)[attention.ATTRIBUTE].prompt = baked
    for tower in towers:  # what its prompts were made from
        tower.model._modules.pop(CHILD, None)
        done.replaced.pop(join(tower.name, CHILD), None)
    gone = tuple(f"{join(each.name, CHILD)}." for each in (*made, *towers))
    done._names[:] = [name for name in done._names if not name.startswith(gone)]
    done.baked, done._sets = True, None
    return done
