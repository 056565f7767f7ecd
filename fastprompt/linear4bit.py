"""Our product behind bitsandbytes' Linear4bit, one instance at a time: for inputs on the CPU, and
for few tokens on a GPU where csrc/cuda serves it.

bitsandbytes is slow on the CPU and, on CPUs with AVX512-BF16, wrong: its first forward in eval mode
without gradients repacks the weight for a kernel of its own, after which gradients are silently
wrong and the scales have lost precision for good.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt import placement
from fastprompt.ops import nf4_linear_cuda
from fastprompt.ops.nf4_linear import nf4_linear
from fastprompt.ops.packed import Packed, unpack

# Tokens on a GPU that leave bitsandbytes. One does not: bitsandbytes took 28 us where a first draft
# of our kernel took 30 (DESIGN.md, section 7: H100; 16 tokens: 72 and 33). Between: not measured.
FEW = range(2, nf4_linear_cuda.FORWARD[-1].most + 1)


class Product:
    """Stands where a Linear4bit's forward did. A plain object that holds its module: unlike a
    bound method it follows the module through deepcopy and pickle, and is no child of it."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.compute = (module.compute_dtype, module.compute_type_is_set)

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module
        found = opened(module, x) if x.device.type == "cpu" else _few(module, x)
        if found is None:
            return type(module).forward(module, x)
        weight, dtype = found
        bias, inside = module.bias, x.to(dtype)
        if bias is None or not bias.requires_grad:
            y = nf4_linear(inside, weight, bias)
        else:
            y = nf4_linear(inside, weight)
            y = y + bias.to(y.dtype)
        return y.to(x.dtype)

    def undo(self) -> None:
        placement.take_out(self.module, self)
        self.module.compute_dtype, self.module.compute_type_is_set = self.compute


def _few(module: nn.Module, x: Tensor) -> tuple[Packed, torch.dtype] | None:
    """What `nf4_linear` takes where csrc/cuda multiplies; None where bitsandbytes does, as ever."""
    if torch.compiler.is_compiling():
        return None
    tokens, kind = x.shape[:-1].numel(), x.device.type
    if tokens not in FEW or nf4_linear_cuda.why_not(x.device):  # sooner known than by opening
        return None
    weight, dtype = opened(module, x)
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != dtype:
        return None  # which of the two it is in, bitsandbytes decides by the number of tokens
    try:
        weight = unpack(weight)
    except ValueError:  # bitsandbytes takes it, or says what is wrong
        return None
    return (weight, dtype) if nf4_linear_cuda.serves_forward(tokens, dtype, weight) else None


def opened(module: nn.Module, x: Tensor) -> tuple[tuple[Tensor, Any], torch.dtype]:
    """What `ops.nf4_linear` takes of a Linear4bit: (packed weight, its state), and the dtype that
    bitsandbytes computes in where autocast says no other."""
    if not module.compute_type_is_set:  # bitsandbytes infers it from the first input
        module.set_compute_type(x)
        module.compute_type_is_set = True
    return (module.weight, state_of(module)), module.compute_dtype or x.dtype


def state_of(module: nn.Module) -> Any:
    """The QuantState of a Linear4bit; None before it is quantised."""
    # under FSDP2 the weight is a plain Parameter and the module alone has the state
    return getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)


def adopt(model: nn.Module) -> dict[str, nn.Module]:
    """Put our product behind every Linear4bit of `model`, for inputs on the CPU and few on a GPU.

    The modules, weights, hooks and state dict stay as they are, and other inputs go to
    bitsandbytes. A module whose forward someone else has replaced is left alone.

    Returns:
        The adopted modules by name, for `release`.

    Raises:
        ValueError: bitsandbytes has repacked a weight in a way that cannot be undone exactly;
            nothing has been changed then.
    """
    if "bitsandbytes" not in sys.modules:  # then no module can be of its classes
        return {}
    from bitsandbytes.nn import Linear4bit

    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
        and type(module).forward is Linear4bit.forward
        and placement.stands_in(module) is None
    }
    repacked = {n: m for n, m in found.items() if hasattr(state_of(m), "original_dtype")}
    lost = [n for n, m in repacked.items() if not _exact(state_of(m))]
    if lost:
        raise ValueError(
            f"{len(lost)} 4-bit weights (the first is {lost[0]!r}) were repacked by bitsandbytes "
            "in a forward without gradients on this CPU, which rounded their scales: load the "
            "model again and patch it before its first forward"
        )
    for module in repacked.values():
        _unrepack(module)
    for module in found.values():
        placement.put_in(module, Product(module))
    return found


def check(modules: dict[str, nn.Module]) -> None:
    """Refuse frozen modules that `adopt` returned whose weights cannot be read.

    Raises:
        ValueError: naming the module, and what is wrong with its weight (see `unpack`).
    """
    for name, module in modules.items():
        try:
            unpack((module.weight, state_of(module)))
        except ValueError as wrong:
            raise ValueError(f"{name}: {wrong}") from wrong


def release(modules: dict[str, nn.Module] | Iterable[nn.Module]) -> None:
    """Give the modules that `adopt` returned their own forward back."""
    for module in modules.values() if isinstance(modules, dict) else modules:
        product = placement.stands_in(module)
        if isinstance(product, Product):
            product.undo()


def _exact(state: Any) -> bool:
    """Whether repacking lost nothing. It rounds the scales to bfloat16, which scales of a bfloat16
    weight are already, and drops nested scales."""
    return state.original_dtype == torch.bfloat16 and not state.original_nested


def _unrepack(module: nn.Module) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    weight, state = module.weight, state_of(module)
    absmax = state.absmax.T if state.absmax.ndim == 2 else state.absmax  # the inverse forgets this
    absmax = absmax.reshape(-1).float()
    if getattr(state, "packing_format_for_cpu", False):
        weight.data, _ = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = absmax
    for name in ("original_dtype", "original_nested", "original_qshape", "original_storage_type"):
        vars(state).pop(name, None)
