"""A 4-bit weight of bitsandbytes opened up: what ops that read it take, and what they refuse."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("nf4", "fp4")


class Packed(NamedTuple):
    """A 4-bit weight opened up: what the ops take, in their order."""

    packed: Tensor  # [bytes] uint8, two values a byte, the high nibble first
    code: Tensor  # [16] float32
    absmax: Tensor  # [blocks] float32, or uint8 when nested
    code2: Tensor | None  # [256] float32; this and the next two are None when plain
    absmax2: Tensor | None  # [blocks2] float32
    offset: Tensor | None  # [] float32
    blocksize: int
    blocksize2: int
    rows: int
    columns: int
    kind: str

    @property
    def nested(self) -> tuple[Tensor, Tensor, Tensor, int] | None:
        """The scales' own scales, as `native` takes them."""
        if self.code2 is None:
            return None
        return self.code2, self.absmax2, self.offset, self.blocksize2


def _bytes_of(packed: Tensor) -> Tensor:
    # Params4bit intercepts every tensor method in Python: some 20 us a call without this
    with torch._C.DisableTorchFunctionSubclass():
        if packed.requires_grad:
            raise ValueError("weight must be frozen: this op returns no gradient for it")
        flat = packed.detach().view(-1)
        return flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)


def unpack(weight: Tensor | tuple[Tensor, Any]) -> Packed:
    """Open a bitsandbytes weight: a Params4bit, or (packed tensor, QuantState); an opened one is
    returned as it is.

    Raises:
        ValueError: it is not quantised, trains, is neither NF4 nor FP4, is not [out, in], was
            repacked by bitsandbytes for a kernel of its own, or its scales or code are too few, of
            another dtype or on another device.
    """
    if isinstance(weight, Packed):
        return weight
    if isinstance(weight, tuple):
        packed, state = weight
    else:
        packed, state = weight, getattr(weight, "quant_state", None)
    if state is None:
        raise ValueError(f"weight: want a quantised 4-bit weight, got {type(packed)} without state")
    if state.quant_type not in KINDS:
        raise ValueError(f"weight: want quant_type in {KINDS}, got {state.quant_type!r}")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "weight: want bitsandbytes' ordinary storage, got the one it repacks to on its first "
            "forward without gradients on this CPU, which loses precision: load the model again"
        )
    shape = state.shape
    if shape is None or len(shape) != 2:
        raise ValueError(f"weight: want shape [out, in], got {shape}")
    data = _bytes_of(packed)
    if data.numel() != (shape[0] * shape[1] + 1) // 2:
        raise ValueError(f"weight: want {tuple(shape)} in 4 bits, got {data.numel()} bytes")
    scales = torch.uint8 if state.nested else torch.float32
    if state.absmax.dtype != scales:
        raise ValueError(f"weight: want absmax in {scales}, got {state.absmax.dtype}")
    second = (None, None, None, 1)
    if state.nested:
        inner = state.state2
        second = (inner.code, inner.absmax, state.offset, inner.blocksize)
    *tensors, blocksize2 = second
    opened = Packed(
        data, state.code, state.absmax, *tensors,
        state.blocksize, blocksize2, shape[0], shape[1], state.quant_type,
    )  # fmt: skip
    _check_scales(opened)
    return opened


def _check_scales(w: Packed) -> None:
    """That a kernel which trusts its sizes reads nothing past an end."""
    if w.blocksize < 1 or w.blocksize2 < 1:
        got = f"{w.blocksize} and {w.blocksize2}"
        raise ValueError(f"weight: want a blocksize of at least 1, got {got}")
    blocks = -(w.rows * w.columns // -w.blocksize)
    counts = [("absmax", w.absmax, blocks), ("code", w.code, 16)]
    if w.code2 is not None:
        blocks2 = -(blocks // -w.blocksize2)
        counts += [
            ("code2", w.code2, 256),
            ("absmax2", w.absmax2, blocks2),
            ("offset", w.offset, 1),
        ]
    for name, t, count in counts:
        if t.numel() < count:
            raise ValueError(f"weight: want {count} values of {name}, got {t.numel()}")
        if not t.is_contiguous():
            raise ValueError(f"weight: want {name} contiguous, got strides {t.stride()}")
        if name != "absmax" and t.dtype != torch.float32:
            raise ValueError(f"weight: want {name} in torch.float32, got {t.dtype}")
        if t.device != w.packed.device:
            raise ValueError(f"weight: want {name} on {w.packed.device}, got {t.device}")


def in_triton(w: Packed) -> bool:
    """Whether the Triton kernel decodes blocks of this size."""
    return not w.blocksize & (w.blocksize - 1) and 32 <= w.blocksize <= 4096


def block_scales(w: Packed) -> Tensor:
    """[blocks] float32: what each block's values are multiplied by."""
    if w.code2 is None:
        return w.absmax
    scale2 = w.absmax2.repeat_interleave(w.blocksize2)[: w.absmax.numel()]
    return w.code2[w.absmax.int()] * scale2 + w.offset


def decode_by_torch(w: Packed, dtype: torch.dtype) -> Tensor:
    n = w.rows * w.columns
    absmax = block_scales(w)
    pairs = torch.stack([w.code.repeat_interleave(16), w.code.repeat(16)], 1)  # of every byte
    values = pairs.index_select(0, w.packed[: (n + 1) // 2].int()).flatten()[:n]
    full = n // w.blocksize
    values[: full * w.blocksize].view(full, w.blocksize).mul_(absmax[:full, None])
    if full * w.blocksize < n:
        values[full * w.blocksize :].mul_(absmax[full])
    return values.view(w.rows, w.columns).to(dtype)
