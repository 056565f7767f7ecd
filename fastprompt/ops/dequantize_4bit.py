"""A frozen 4-bit weight, as bitsandbytes stores it, back to a dense one, into memory given.

    W[i] = code[nibble i] · scale[i // blocksize]                      in float32, rounded once
    scale[j] = absmax[j],  or nested  code2[absmax[j]] · absmax2[j // blocksize2] + offset

Bit for bit what `bitsandbytes.functional.dequantize_4bit` gives. Written into a view of one buffer,
so that weights which share an input (q, k and v; gate and up) lie side by side for one product. On
CUDA a Triton kernel decodes nested scales too, in the same launch; on the CPU csrc/ does (torch,
without it). NF4: arXiv 2305.14314.
"""

from typing import Any

import torch
from torch import Tensor

from fastprompt import native
from fastprompt.ops import reference
from fastprompt.ops.checks import FLOATS, by_triton, check_backend
from fastprompt.ops.packed import Packed, decode_by_torch, in_triton, unpack

# ---- without checks: what a frozen block calls ----


def forward(w: Packed, out: Tensor, *, backend: str = "auto") -> Tensor:
    """Decodes ``w``, which `packed.unpack` opened, into contiguous ``out`` [rows, columns]."""
    nested = w.nested
    if out.dtype == torch.float64:
        single = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        return out.copy_(forward(w, single, backend=backend))
    if by_triton(out, backend):
        from fastprompt.ops import dequantize_4bit_triton as triton

        triton.decode(w, out)
        return out
    if backend == "reference":
        shape, scales = tuple(out.shape), (w.absmax, w.blocksize)
        return out.copy_(
            reference.dequantize_4bit(w.packed, w.code, *scales, shape, out.dtype, nested)
        )
    if out.is_cpu and native.available():
        return native.decode_4bit(out, w.packed, w.code, w.absmax, w.blocksize, nested)
    return out.copy_(decode_by_torch(w, out.dtype))


# ---- op: schema, fake, implementation ----

_WEIGHT = (
    "Tensor packed, Tensor code, Tensor absmax, Tensor? code2, Tensor? absmax2, Tensor? offset, "
    "int blocksize, int blocksize2, int rows, int columns, str kind"
)
torch.library.define(
    "fastprompt::dequantize_4bit", f"({_WEIGHT}, ScalarType dtype, str backend) -> Tensor"
)
torch.library.define(
    "fastprompt::dequantize_4bit_into", f"(Tensor(a!) out, {_WEIGHT}, str backend) -> ()"
)


@torch.library.register_fake("fastprompt::dequantize_4bit")
def _result(*arguments):
    *weight, dtype, _ = arguments
    w = Packed(*weight)
    return w.packed.new_empty(w.rows, w.columns, dtype=dtype)


@torch.library.register_fake("fastprompt::dequantize_4bit_into")
def _nothing(*arguments):
    return None


def _new(*arguments):
    *weight, _, backend = arguments
    return forward(Packed(*weight), _result(*arguments), backend=backend)


def _into(out, *arguments):
    *weight, backend = arguments
    forward(Packed(*weight), out, backend=backend)


for _key in ("CPU", "CUDA"):
    torch.library.impl("fastprompt::dequantize_4bit", _key, _new)
    torch.library.impl("fastprompt::dequantize_4bit_into", _key, _into)


# ---- public ----


def dequantize_4bit(
    weight: Tensor | tuple[Tensor, Any],
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A frozen 4-bit weight as a dense one, without a gradient.

    Args:
        weight: a bitsandbytes Params4bit [out, in], or (its packed tensor, its QuantState): NF4 or
            FP4, plain or nested absmax; its state is read anew at every call.
        dtype: float32, bfloat16, float16 or float64; by default that of ``out``, else the one that
            the weight had before it was quantised.
        out: contiguous [out, in], such as some rows of a larger buffer; a new one by default.
        backend: "triton" (CUDA; on the CPU its interpreter), for blocks of a power of two, 32 up to
            4096; "plain" (csrc/, or torch without it) or "reference", for any blocks. "auto" is
            Triton on CUDA, else plain.

    Returns:
        ``out``: bit for bit what `bitsandbytes.functional.dequantize_4bit` gives.

    Raises:
        ValueError: a weight that `unpack` refuses, or blocks, a shape, dtype or device that do not
            fit.
    """
    w = unpack(weight)
    check_backend(backend, w.packed.device)
    size = (w.rows, w.columns)
    if dtype is None:
        dtype = out.dtype if out is not None else _dense_dtype(weight)
    if dtype not in FLOATS:
        raise ValueError(f"dtype: want one of {[*FLOATS]}, got {dtype}")
    if by_triton(w.packed, backend) and not in_triton(w):
        raise ValueError(
            f"weight: want a blocksize of a power of two, 32 to 4096; got {w.blocksize}"
        )
    if out is None:
        return torch.ops.fastprompt.dequantize_4bit(*w, dtype, backend)
    if out.shape != size or out.dtype != dtype or out.device != w.packed.device:
        want = f"{list(size)} {dtype} on {w.packed.device}"
        raise ValueError(f"out: want {want}; got {list(out.shape)} {out.dtype} on {out.device}")
    if not out.is_contiguous() or out.requires_grad:
        wrong = f"strides {out.stride()}, requires_grad {out.requires_grad}"
        raise ValueError(f"out: want it contiguous and without a gradient, got {wrong}")
    torch.ops.fastprompt.dequantize_4bit_into(out, *w, backend)
    return out


def _dense_dtype(weight: Tensor | tuple[Tensor, Any]) -> torch.dtype:
    state = weight[1] if isinstance(weight, tuple) else weight.quant_state
    return state.dtype
