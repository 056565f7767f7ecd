"""A few numbers by which one frozen model is told from another."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from fastprompt import placement, shards

_SAMPLES = 64


def base_sample(
    model: nn.Module, *, trained: bool = False, without: Collection[str] = ()
) -> list[float]:
    """A few numbers of the frozen model that tell one base model from another.

    From embeddings, norms and biases, which no 4-bit loader touches, so that a dense and a 4-bit
    copy of one model agree to the rounding of their dtypes.

    Args:
        trained: also from what trains, which is the base model's only before it has. Then methods
            that train different parts give the same numbers.
        without: names of parameters that are not the base model's.
    """
    names = (
        "embed_tokens.weight",
        "patch_embedding.weight",
        "patch_embeddings.projection.weight",
        "token_embedding.weight",
    )
    away = placement.offloaded_values(model)
    own = [(n, p) for n, p in model.named_parameters() if n not in without]
    frozen = [(n, p) for n, p in own if trained or not p.requires_grad]
    frozen = [(n, p) for n, p in frozen if p.is_floating_point() and (not p.is_meta or n in away)]

    def values(name: str, p: Tensor) -> Tensor:
        return (away[name]() if p.is_meta else shards.whole(p)).flatten()

    tables = [(n, p) for n, p in frozen if n.endswith(names)]
    vectors = [(n, p) for n, p in frozen if p.ndim == 1]
    each = max(1, _SAMPLES // max(1, len(tables)))
    steps = [values(n, p)[:: max(1, p.numel() // each)][:each] for n, p in tables]
    steps += [values(n, p)[:1] for n, p in vectors[:: max(1, len(vectors) // _SAMPLES)]]
    return [float(f"{x:.4g}") for part in steps for x in part.float().tolist()]


def same_base(want: list[float], got: list[float]) -> bool:
    """Whether both are of one model; a float16 and a bfloat16 copy differ by less than this."""
    both = torch.tensor(want), torch.tensor(got)
    return both[0].shape == both[1].shape and torch.allclose(*both, rtol=5e-3, atol=1e-6)
