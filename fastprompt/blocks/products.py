"""A block's products with its frozen weights, dense or 4-bit, several at once where they share x.

On a GPU the 4-bit weights of one call (q, k, v; gate, up) are decoded under one another into
scratch memory that all blocks share, and multiplied as one weight; backward joins the gradients
likewise. One after the other go few tokens, which are multiplied straight from the 4 bits
(`nf4_linear_cuda`), and those on the CPU, where a product takes longer than what is before it.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import linear4bit
from fastprompt.ops.nf4_linear import decoded, nf4_linear, nf4_linear_backward
from fastprompt.ops.nf4_linear_cuda import serves_backward, serves_forward
from fastprompt.ops.packed import Packed, unpack


def is_adopted(part: nn.Module) -> bool:
    """Whether the part is a Linear4bit with our product behind it."""
    own = part.__dict__  # asked of every module in every step
    return isinstance(own.get("_old_forward", own.get("forward")), linear4bit.Product)


def project(x: Tensor, parts: Sequence[nn.Module], autocast: bool) -> list[Tensor]:
    """[..., in] -> x Wᵀ + b [..., out] of each part, in the dtype of x.

    ``autocast``: a 4-bit product is computed in the dtype of x, not in the module's own.
    The results may be views of one tensor, side by side along the last axis.
    """
    together = _together(x, parts, autocast, serves_forward)
    if together is None:
        return [_product(x, part, autocast) for part in parts]
    weights, dtype = together
    with decoded(*weights, dtype=dtype) as dense:
        y = F.linear(x.to(dtype), dense, biases(parts, dense)).to(x.dtype)
    return list(y.split([w.rows for w in weights], dim=-1))


def project_backward(grads: Sequence[Tensor], parts: Sequence[nn.Module], autocast: bool) -> Tensor:
    """dx [..., in], memory of its own: the sum of dy W over the parts, each dy [..., out]."""
    together = _together(grads[0], parts, autocast, serves_backward)
    if together is not None:
        weights, dtype = together
        dy = joined(grads).to(dtype)
        with decoded(*weights, dtype=dtype) as dense:
            return torch.matmul(dy, dense).to(grads[0].dtype)
    (first, *grads), (part, *parts) = grads, parts
    dx = _gradient(first, part, autocast)
    for dy, part in zip(grads, parts, strict=True):
        if is_adopted(part):
            dx += _gradient(dy, part, autocast)
        else:  # added by the product itself
            dx.flatten(0, -2).addmm_(dy.flatten(0, -2), part.weight.to(dy.dtype))
    return dx


def side_by_side(x: Tensor) -> bool:
    """Whether 4-bit weights that share ``x`` are multiplied as one."""
    # the compiler is given one op for each product, which it need not look into
    return x.is_cuda and not torch.compiler.is_compiling()


def joined(grads: Sequence[Tensor]) -> Tensor:
    """[..., sum of widths]: the tensors side by side; no copy where they lie so already."""
    first, *rest = grads
    if not rest:
        return first
    if torch.compiler.is_compiling():  # which plans its memory itself
        return torch.cat(grads, dim=-1)
    end = first.storage_offset() + first.shape[-1]
    for g in rest:
        if (
            g.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or g.shape[:-1] != first.shape[:-1]
            or g.stride() != first.stride()
            or g.storage_offset() != end
        ):
            return torch.cat(grads, dim=-1)
        end += g.shape[-1]
    width = end - first.storage_offset()
    # rows that are no further apart than one tensor's width are not beside one another
    if first.stride(-1) != 1 or first.ndim < 2 or first.stride(-2) < width:
        return torch.cat(grads, dim=-1)
    return first.as_strided((*first.shape[:-1], width), first.stride())


def _together(
    x: Tensor, parts: Sequence[nn.Module], autocast: bool, served: Callable[..., bool]
) -> tuple[list[Packed], torch.dtype] | None:
    """The weights and what to compute in, where the parts can be multiplied as one and are not each
    ``served`` by a kernel that decodes nothing."""
    if len(parts) < 2 or not side_by_side(x) or not all(map(is_adopted, parts)):
        return None
    opened = [linear4bit.opened(part, x) for part in parts]
    dtypes = {x.dtype if autocast else dtype for _, dtype in opened}
    weights = [unpack(weight) for weight, _ in opened]
    if len(dtypes) > 1 or any(w.packed.device != x.device for w in weights):
        return None
    (dtype,) = dtypes
    if all(served(x.shape[:-1].numel(), dtype, w) for w in weights):
        return None
    return weights, dtype


def biases(parts: Sequence[nn.Module], like: Tensor) -> Tensor | None:
    """[sum of out], with zeros where a part has none; None if none has."""
    if all(part.bias is None for part in parts):
        return None
    found = (
        like.new_zeros(part.out_features) if part.bias is None else part.bias.to(like.dtype)
        for part in parts
    )
    return torch.cat([*found])


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
