"""A block's products with its frozen weights, dense or 4-bit, several at once where they share x.

On a GPU the 4-bit weights of one call are to be decoded side by side into one buffer and multiplied
as one; whoever does that does it in these two functions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import linear4bit
from fastprompt.ops.nf4_linear import nf4_linear, nf4_linear_backward


def is_adopted(part: nn.Module) -> bool:
    """Whether the part is a Linear4bit with our product behind it."""
    return isinstance(vars(part).get("forward"), linear4bit.Product)


def project(x: Tensor, parts: Sequence[nn.Module], autocast: bool) -> list[Tensor]:
    """[..., in] -> x Wᵀ + b [..., out] of each part, in the dtype of x.

    ``autocast``: a 4-bit product is computed in the dtype of x, not in the module's own.
    """
    return [_product(x, part, autocast) for part in parts]


def project_backward(grads: Sequence[Tensor], parts: Sequence[nn.Module], autocast: bool) -> Tensor:
    """dx [..., in]: the sum of dy W over the parts, each dy [..., out]."""
    (first, *grads), (part, *parts) = grads, parts
    dx = _gradient(first, part, autocast)
    for dy, part in zip(grads, parts, strict=True):
        if is_adopted(part):
            dx += _gradient(dy, part, autocast)
        else:  # added by the product itself
            dx.flatten(0, -2).addmm_(dy.flatten(0, -2), part.weight.to(dy.dtype))
    return dx


def _product(x: Tensor, part: nn.Module, autocast: bool) -> Tensor:
    if is_adopted(part):
        weight, dtype = linear4bit.opened(part, x)
        dtype = x.dtype if autocast else dtype
        return nf4_linear(x, weight, part.bias, dtype=dtype).to(x.dtype)
    bias = None if part.bias is None else part.bias.to(x.dtype)
    return F.linear(x, part.weight.to(x.dtype), bias)


def _gradient(dy: Tensor, part: nn.Module, autocast: bool) -> Tensor:
    if is_adopted(part):
        weight, dtype = linear4bit.opened(part, dy)
        dtype = dy.dtype if autocast else dtype
        return nf4_linear_backward(dy.to(dtype), weight).to(dy.dtype)
    return torch.matmul(dy, part.weight.to(dy.dtype))
