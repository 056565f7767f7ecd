"""The parameters that a pool has beside its entries, and what they alone compute."""

import torch
from torch import Tensor, nn

from fastprompt.prompts import Prompt


class PoolKeys(nn.Module):
    """``keys`` [M, D]: what a query is compared with; one row for each entry of a pool.

    A child of the tower (``vit.fastprompt``), since all its blocks share what is chosen.
    """

    def __init__(self, keys: Tensor):
        super().__init__()
        self.keys = nn.Parameter(keys)

    def extra_repr(self) -> str:
        return f"keys={list(self.keys.shape)}"


class Components(Prompt):
    """A block's pool of CODA-Prompt (arXiv 2211.13218): M prompts that are summed with weights.

    ``tokens`` P [M, L, D], ``keys`` K [M, D] and ``attention`` A [M, D], float32 or float64.
    """

    def __init__(self, tokens: Tensor, keys: Tensor, attention: Tensor):
        super().__init__(tokens)
        self.keys, self.attention = nn.Parameter(keys), nn.Parameter(attention)

    def parts(self, old: int, used: int) -> tuple[Tensor, Tensor, Tensor]:
        """P, K and A of the first ``used`` components; the first ``old`` get no gradient."""
        return tuple(_grown(x, old, used) for x in (self.tokens, self.keys, self.attention))

    def rows(self, query: Tensor, old: int, used: int) -> Tensor:
        """[B, D] -> [B, L, D]: sum over m of cosine(query * A_m, K_m) P_m.

        Written out, so that no [B, M, D] is:

            cosine(q * A_m, K_m) = q · (A_m * K_m) / (|q * A_m| |K_m|),    |q * A_m|² = q² · A_m²
        """
        P, K, A = self.parts(old, used)
        # a weight in bfloat16 would be off by a half per cent
        with torch.autocast(query.device.type, enabled=False):
            query = query.to(K.dtype)
            squares = query.square() @ A.square().mT * K.square().sum(1)
            weights = query @ (A * K).mT * squares.clamp(min=torch.finfo(K.dtype).tiny).rsqrt()
            return (weights @ P.flatten(1)).unflatten(1, P.shape[1:])


def orthogonality(x: Tensor) -> Tensor:
    """[M, D] -> how far x xᵀ is from the identity: the mean of the squared differences."""
    return (x @ x.mT - torch.eye(len(x), dtype=x.dtype, device=x.device)).square().mean()


def _grown(x: Tensor, old: int, used: int) -> Tensor:
    if old == 0:
        return x[:used]
    return torch.cat([x[:old].detach(), x[old:used]])
