"""Tiny models with a prompt pool, for `test_pools.py` and `test_pools_patch.py`."""

import copy

import tiny
import torch

import fastprompt
from fastprompt.methods import L2P, CODAPrompt, DualPrompt

DUAL = DualPrompt(3, 1, 2, 3, g_layers=(0,), e_layers=(2, 1))
METHODS = {
    "l2p": L2P(6, 2, 3, layers=(0, 2)),  # the pool is projected once, each sample gathers
    "l2p of one": L2P(4, 2, 1, layers=(1,)),  # entries are sets as they are
    "l2p of many": L2P(40, 2, 2),  # fewer rows are chosen than the pool has
    "dual": DUAL,
    "coda": CODAPrompt(6, 2, layers=(0, 1), tasks=3, task=1),
}
B = 4


def patched(name, method, dtype=torch.float64, **more):
    """A patched model whose trained values are no initial ones, and the model as it was."""
    model = tiny.build(name, dtype, **more)
    before = copy.deepcopy(model)
    patch = fastprompt.patch(model, method)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in patch.trainable.values():
            p.copy_(torch.randn_like(p))
    return model, patch, before


def images(name, dtype=torch.float64, batch=B):
    return tiny.inputs(name, dtype, batch=batch)


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
