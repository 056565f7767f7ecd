"""A block's products in fp8, on request (``compute="fp8"``): which can, and those that do.

A call's weights (q, k, v; gate, up) go through one product together, on the CPU too, so that rows
are quantised there as on a GPU. All else in the block stays as it is.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from fastprompt import linear4bit
from fastprompt.blocks.parts import Parts
from fastprompt.blocks.products import biases, is_adopted, joined
from fastprompt.ops import fp8_linear as ops
from fastprompt.ops.packed import Packed, unpack
from fastprompt.ops.quantize_rows import E4M3, Quantized, activation_backward
from fastprompt.ops.quantize_rows import forward as quantize_rows

CHOICES = ("auto", "fp8")  # what a block's products are computed in
# a gradient's row spans less than e4m3's range, and e5m2 rounds twice as coarsely: see
# benchmarks/fp8_error.py
GRADIENT = E4M3


@cache
def check_device(device: torch.device) -> None:
    """Refuse a device where fp8 products neither run nor are emulated.

    Raises:
        ValueError: naming the device and what it lacks.
    """
    if device.type == "cpu":
        return
    if device.type != "cuda" or torch.version.hip:
        got = "an AMD card" if device.type == "cuda" else device
        raise ValueError(f"compute='fp8': want an NVIDIA card or the CPU, got {got}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        name, got = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        raise ValueError(
            f"compute='fp8': want CUDA capability 8.9 or newer, got {got} ({name} has no fp8)"
        )


def why_not(parts: Sequence[nn.Module]) -> str | None:
    """What keeps products that share their input from running in fp8, in a block that computes in
    bfloat16: one of them is enough."""
    for part in parts:
        if not is_adopted(part):
            return "dense weights, fp8 wants 4-bit ones"
        state = linear4bit.state_of(part)
        if why := ops.why_not(*state.shape, state.blocksize):
            return why
    return None


def check_some(blocks: Iterable[Parts], others: Iterable[str]) -> None:
    """Refuse a model of which not one product is to run in fp8.

    Raises:
        ValueError: with each product's reason, and ``others``: why blocks are none of ours.
    """
    reasons = [why_not(group) for block in blocks for group in block.groups]
    if all(reasons):
        why = [*dict.fromkeys([*reasons, *others])] or ["no tower has prompts"]
        raise ValueError(f"compute='fp8': want frozen 4-bit blocks, got none: {'; '.join(why)}")


def project(x: Tensor | Quantized, parts: Sequence[nn.Module]) -> list[Tensor]:
    """[..., in] -> x Wᵀ + b [..., out] of each part, bfloat16, views of one tensor."""
    if not isinstance(x, Quantized):
        x = quantize_rows(x)
    weights, scales = _weights(parts)
    y = ops.fp8_linear(x, weights, scales, biases(parts, scales.new_empty(0, dtype=ops.OUT)))
    return [*y.split([w.rows for w in weights], dim=-1)]


def project_backward(grads: Sequence[Tensor], parts: Sequence[nn.Module]) -> Tensor:
    """dx [..., in] bfloat16: the sum of dy W over the parts, each dy [..., out]."""
    weights, scales = _weights(parts)
    dy = joined(grads)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()  # a sum's gradient has no rows in memory
    dy = quantize_rows(dy, scales, dtype=GRADIENT)
    return ops.fp8_linear_backward(dy, weights, scales)


def activation_and_project_backward(
    kind: str, da: Tensor, gate: Tensor, up: Tensor | None, parts: Sequence[nn.Module]
) -> Tensor:
    """dm [..., in] bfloat16 of a = act(gate) · up, where gate and up are the parts' results.

    Their gradients exist in fp8 alone. ``kind``: of `quantize_rows.ACTIVATIONS`.
    """
    weights, scales = _weights(parts)
    dy = activation_backward(kind, da, gate, up, scales, dtype=GRADIENT)
    return ops.fp8_linear_backward(dy, weights, scales)


def _weights(parts: Sequence[nn.Module]) -> tuple[list[Packed], Tensor]:
    """The weights and their `row_scales`."""
    weights = [unpack((part.weight, linear4bit.state_of(part))) for part in parts]
    return weights, ops.row_scales(weights)
