"""Which classes each image of a training batch sees: its own, some others, the mean of the rest."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt import ops


@torch.no_grad()
def kept_classes(query: Tensor | None, keys: Tensor, labels: Tensor, k: int, others: str) -> Tensor:
    """[B, k] int64, each row with its label and k - 1 other classes, none twice.

    Args:
        query: [B, D], the encoder's features; keys: [C, D]. Read for "score" alone.
        others: "score": those of highest cosine, the label in the last one's place if it is not
            among them; "random": drawn from torch's generator.
    """
    C = len(keys)
    if others == "random":
        drawn = torch.rand(len(labels), C, device=keys.device).scatter_(1, labels[:, None], 2.0)
        return drawn.topk(k).indices
    nothing = keys.new_empty(C, 0)  # no prompt is gathered: rows are to keep their graph
    _, indices, _ = ops.select_prompts(query, keys, nothing, k, rest=None)
    absent = ~(indices == labels[:, None]).any(1)
    indices[:, -1] = torch.where(absent, labels, indices[:, -1])
    return indices


def kept_rows(rows: Tensor, indices: Tensor) -> Tensor:
    """[B, k+1, L, D]: of ``rows`` [C, L, D] those kept, and the mean of all others as last.

    Gradients reach every row, in the same order at each run.
    """
    C, k = len(rows), indices.shape[1]
    kept = F.embedding(indices, rows.flatten(1)).unflatten(2, rows.shape[1:])
    # in float64, as the op does it: what is left of a sum must be right
    rest = (rows.sum(0, dtype=torch.float64) - kept.sum(1, dtype=torch.float64)) / (C - k)
    return torch.cat([kept, rest[:, None].to(rows.dtype)], dim=1)
