"""What learned rows look like, without running a model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.patching import Patch
from fastprompt.prompts import CHILD


def similarity(patch: Patch) -> dict[str, Tensor]:
    """How alike a tower's prompts are from block to block.

    Returns:
        Tower kind -> [L, L] float32 of its L prompted blocks: the mean over the rows of two blocks
        of the cosine of each row with the nearest row of the other, both ways. 1 on the diagonal.
        Towers whose prompts differ in width from block to block are left out.
    """
    found = {}
    for tower in patch.anatomy.towers:
        rows = [
            F.normalize(getattr(block.layer, CHILD).learned().detach().flatten(1).float(), dim=-1)
            for block in (*tower.blocks, *tower.unread)
            if hasattr(block.layer, CHILD)
        ]
        if rows and len({r.shape[-1] for r in rows}) == 1:
            each = [torch.stack([_alike(a, b) for b in rows]) for a in rows]
            found[tower.kind] = torch.stack(each)
    return found


def _alike(a: Tensor, b: Tensor) -> Tensor:
    cosines = a @ b.T
    return (cosines.amax(0).mean() + cosines.amax(1).mean()) / 2


def effective_rank(rows: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy & Vetterli, 2007): how many directions
    [P, D] rows really take, 1 .. min(P, D); 0 of rows that are all zero."""
    values = torch.linalg.svdvals(rows.detach().flatten(1).double())
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()
