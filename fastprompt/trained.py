"""Parts of the model that train beside the prompts: float32 copies in the original's place."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import placement
from fastprompt.ops import dequantize_4bit


class TrainedLinear(nn.Linear):
    """A float32 linear layer inside a model of lower precision.

    The weight is float32 because updates of the usual size vanish in bfloat16; the product runs in
    the input's dtype, so that the model around it sees what it saw before.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def trained_copy(part: nn.Module) -> nn.Module:
    """A trainable copy of ``part``: low-precision and 4-bit linear layers become `TrainedLinear`.

    The original is left as it is, so that putting it back undoes any training.
    """
    dense = {id(m): _dense(m) for m in part.modules() if _is_low(m)}
    # through deepcopy's memo, so that the rest of the part (hooks, containers) comes along
    part = copy.deepcopy(part, dense | {id(x): x for x in placement.shared(part)})
    for p in part.parameters():
        p.requires_grad_(True)
    return part


def _is_low(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    return module.weight.dtype not in (torch.float32, torch.float64)


def _dense(linear: nn.Linear) -> TrainedLinear:
    copied = TrainedLinear(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        device=linear.weight.device,
    )
    with torch.no_grad():
        copied.weight.copy_(dense_weight(linear))
        if linear.bias is not None:
            copied.bias.copy_(linear.bias)
    return copied.train(linear.training)


def dense_weight(linear: nn.Linear) -> Tensor:
    """The weight [out, in] as numbers, decoded if it is 4-bit."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return linear.weight.detach()
    # not bitsandbytes': on the CPU it is wrong where in_features is no multiple of the block size
    return dequantize_4bit((linear.weight, state))
