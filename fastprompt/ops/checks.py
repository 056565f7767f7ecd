"""What the ops of frozen blocks refuse alike, and which of their implementations runs."""

import math
import os

import torch
from torch import Tensor

from fastprompt import native_elementwise

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("auto", "triton", "plain", "reference")
AND_NATIVE = ("auto", "triton", "native", "plain", "reference")  # of the ops that csrc has too
MOST_CHANNELS = 16384  # of a row that a norm's program holds: 16 a thread of 1024, of each tensor


def by_triton(x: Tensor, backend: str) -> bool:
    """Whether Triton runs on ``x``; else torch's own operations do (float64, empty tensors)."""
    if backend == "auto" and torch.compiler.is_compiling():
        return False  # a forward that is traced through: the compiler fuses torch's operations
    if backend not in ("auto", "triton") or x.dtype == torch.float64 or x.numel() == 0:
        return False
    return backend == "triton" or x.device.type == "cuda"


def by_native(backend: str, *tensors: Tensor | None, alike: bool = False) -> bool:
    """Whether csrc runs on these (of one dtype: ``alike``); else torch's own operations do."""
    if backend == "auto" and torch.compiler.is_compiling():
        return False
    return backend in ("auto", "native") and native_elementwise.serves(*tensors, alike=alike)


def by_reference(x: Tensor, backend: str) -> bool:
    """Whether the definition itself runs; "plain" alone has formulas of its own for float64."""
    return backend == "reference" or (x.dtype == torch.float64 and backend != "plain")


def check_backend(backend: str, device: torch.device, backends: tuple = BACKENDS) -> None:
    if backend not in backends:
        raise ValueError(f"backend: want one of {', '.join(backends)}; got {backend!r}")
    if backend == "native" and device.type != "cpu":
        raise ValueError(f'backend: want tensors on the CPU for "native", got them on {device}')
    # the interpreter is looked for only where it is asked for
    if backend == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'backend: want CUDA tensors for "triton", got them on {device.type} (on the CPU it '
            "runs in Triton's interpreter alone: TRITON_INTERPRET=1 before triton is imported)"
        )


def check_floats(**tensors: Tensor) -> None:
    """Each floating with a contiguous last axis, all of the first's dtype and device."""
    first, like = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: want a tensor of one of {[*FLOATS]}, got {got}")
        if x.dtype != like.dtype or x.device != like.device:
            want = f"{like.dtype} on {like.device}, as {first}"
            raise ValueError(f"{name}: want {want}; got {x.dtype} on {x.device}")
        if x.numel() and x.ndim and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name}: want a contiguous last axis, got strides {x.stride()}")


def check_number(name: str, x: float, least: float = -math.inf) -> None:
    # comparisons alone: what is traced by torch.compile may be no number yet
    if not isinstance(x, (int, float)) or not -math.inf < x < math.inf or x < least:
        want = "a finite number" if least == -math.inf else f"a finite number of at least {least}"
        raise ValueError(f"{name}: want {want}, got {x!r}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: want a tensor {list(shape)}, got {type(x).__name__}")
    if x.shape != shape:
        raise ValueError(f"{name}: want {list(shape)}, got {list(x.shape)}")


def check_frozen(name: str, x: Tensor, shape: tuple[int, ...], device) -> None:
    """A parameter that gets no gradient: of the shape, on the device, contiguous, any float."""
    check_floats(**{name: x})
    check_shape(name, x, shape)
    if x.requires_grad:
        raise ValueError(f"{name} must be frozen: this op returns no gradient for it")
    if x.device != device:
        raise ValueError(f"{name}: want it on {device}, got {x.device}")


def check_out(name: str, out: Tensor, like: Tensor, dtypes: tuple = ()) -> None:
    """Memory to be written: as ``like``, with nothing between its rows; in its dtype, or one of
    ``dtypes``."""
    check_shape(name, out, like.shape)
    dtypes = dtypes or (like.dtype,)
    if out.dtype not in dtypes or out.device != like.device or not out.is_contiguous():
        want = " or ".join(map(str, dtypes))
        raise ValueError(
            f"{name}: want contiguous {want} on {like.device}, "
            f"got {out.dtype} on {out.device} with strides {out.stride()}"
        )
