"""Product with a frozen 4-bit weight, as bitsandbytes stores it (NF4 or FP4, plain or nested).

    y  = x Wᵀ + b        W[i] = code[nibble i] * scale of its block, rounded once to x's dtype
    dx = dy W            W decoded again from the same storage; b and W are frozen

W is decoded into a scratch buffer that all weights of a thread share, so that neither a second
copy of the weights nor anything for backward is ever kept. On the CPU csrc/ decodes (or torch,
without it), on CUDA bitsandbytes; the product is torch's own. A single token without gradients
(generation) is multiplied in csrc/ straight from the 4 bits.
"""

import threading
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt import native

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


# ---- decoding ----

_scratch = threading.local()


def _shared_buffer(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """This thread's scratch as [rows, columns]: valid until its next call with this dtype."""
    n = rows * columns
    buffer = vars(_scratch).get(dtype)
    if buffer is None or buffer.numel() < n:
        buffer = vars(_scratch)[dtype] = torch.empty(n, dtype=dtype)
    return buffer[:n].view(rows, columns)


def free_scratch() -> None:
    """Give back this thread's scratch (for each dtype it is as large as the largest weight met)."""
    vars(_scratch).clear()


def decode_by_torch(w: Packed, dtype: torch.dtype) -> Tensor:
    n = w.rows * w.columns
    absmax = w.absmax
    if w.code2 is not None:
        scale2 = w.absmax2.repeat_interleave(w.blocksize2)[: absmax.numel()]
        absmax = w.code2[absmax.int()] * scale2 + w.offset
    pairs = torch.stack([w.code.repeat_interleave(16), w.code.repeat(16)], 1)  # of every byte
    values = pairs.index_select(0, w.packed[: (n + 1) // 2].int()).flatten()[:n]
    full = n // w.blocksize
    values[: full * w.blocksize].view(full, w.blocksize).mul_(absmax[:full, None])
    if full * w.blocksize < n:
        values[full * w.blocksize :].mul_(absmax[full])
    return values.view(w.rows, w.columns).to(dtype)


def _decode_by_bitsandbytes(w: Packed, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    absmax = w.absmax
    if w.code2 is not None:
        absmax = dequantize_blockwise(
            absmax, absmax=w.absmax2, code=w.code2, blocksize=w.blocksize2
        ).add_(w.offset)
    return torch.ops.bitsandbytes.dequantize_4bit(
        w.packed[:, None], absmax, w.blocksize, w.kind, (w.rows, w.columns), dtype
    )


def _decode(w: Packed, dtype: torch.dtype) -> Tensor:
    """[rows, columns] `dtype`, to be used at once: on the CPU it is the shared buffer."""
    if dtype == torch.float64:
        return _decode(w, torch.float32).double()
    if w.packed.device.type != "cpu":
        return _decode_by_bitsandbytes(w, dtype)
    if not native.available():
        return decode_by_torch(w, dtype)
    out = _shared_buffer(w.rows, w.columns, dtype)
    return native.decode_4bit(out, w.packed, w.code, w.absmax, w.blocksize, w.nested)


def _generates(x: Tensor, w: Packed) -> bool:
    """Whether `x` is a single token without gradients that csrc/ multiplies without decoding."""
    return (
        x.numel() == w.columns > 0
        and x.is_cpu
        and x.dtype in native.DTYPES
        and not x.requires_grad
        and w.blocksize % 32 == 0
        and w.columns % w.blocksize == 0
        and native.available()
    )


# ---- ops: schema, fake, implementation ----

_WEIGHT = (
    "Tensor packed, Tensor code, Tensor absmax, Tensor? code2, Tensor? absmax2, Tensor? offset, "
    "int blocksize, int blocksize2, int rows, int columns, str kind"
)
_KERNELS = "CompositeExplicitAutograd"  # one function for every device

torch.library.define("fastprompt::nf4_linear", f"(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor")
torch.library.define("fastprompt::nf4_linear_backward", f"(Tensor dy, {_WEIGHT}) -> Tensor")


@torch.library.register_fake("fastprompt::nf4_linear")
def _fake_forward(x, bias, *weight):
    return x.new_empty(*x.shape[:-1], Packed(*weight).rows)


@torch.library.register_fake("fastprompt::nf4_linear_backward")
def _fake_backward(dy, *weight):
    return dy.new_empty(*dy.shape[:-1], Packed(*weight).columns)


def _forward(x, bias, *weight):
    w = Packed(*weight)
    if not _generates(x, w):
        return F.linear(x, _decode(w, x.dtype), bias)
    token = x.reshape(-1).contiguous().float()
    y = native.matvec_4bit(token, w.rows, w.packed, w.code, w.absmax, w.blocksize, w.nested)
    y = y if bias is None else y.add_(bias)
    return y.to(x.dtype).view(*x.shape[:-1], w.rows)


def _backward(dy, *weight):
    return torch.matmul(dy, _decode(Packed(*weight), dy.dtype))


torch.library.impl("fastprompt::nf4_linear", _KERNELS, _forward)
torch.library.impl("fastprompt::nf4_linear_backward", _KERNELS, _backward)


# ---- autograd ----


def _save(ctx, inputs, output):
    _, _, *weight = inputs
    ctx.save_for_backward(*weight[:6])
    ctx.sizes = weight[6:]


def _traced_backward(ctx, dy):
    weight = (*ctx.saved_tensors, *ctx.sizes)
    dx = torch.ops.fastprompt.nf4_linear_backward(dy, *weight)
    return dx, None, *[None] * len(weight)


torch.library.register_autograd("fastprompt::nf4_linear", _traced_backward, setup_context=_save)


class _NF4Linear(torch.autograd.Function):
    """The same for eager tensors: cheaper than the dispatcher, and the weight is held by plain
    reference, so that hooks on saved tensors (checkpointing, offload) do not copy it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Packed) -> Tensor:
        ctx.weight = weight
        return _forward(x, bias, *weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _backward(dy, *ctx.weight), None, None


# ---- public ----


def _bytes_of(packed: Tensor) -> Tensor:
    # Params4bit intercepts every tensor method in Python: some 20 us a call without this
    with torch._C.DisableTorchFunctionSubclass():
        if packed.requires_grad:
            raise ValueError("weight must be frozen: this op returns no gradient for it")
        flat = packed.detach().view(-1)
        return flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)


def unpack(weight: Tensor | tuple[Tensor, Any]) -> Packed:
    """Open a bitsandbytes weight: a Params4bit, or (packed tensor, QuantState).

    Raises:
        ValueError: it is not quantised, trains, is neither NF4 nor FP4, is not [out, in], or was
            repacked by bitsandbytes for a kernel of its own.
    """
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
    return Packed(
        data, state.code, state.absmax, *tensors,
        state.blocksize, blocksize2, shape[0], shape[1], state.quant_type,
    )  # fmt: skip


def nf4_linear(
    x: Tensor,
    weight: Tensor | tuple[Tensor, Any],
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``x Wᵀ + bias`` with a frozen 4-bit weight; the gradient goes to x alone.

    Args:
        x: [..., in] float32, bfloat16, float16 or float64, any strides.
        weight: a bitsandbytes Params4bit [out, in], or (its packed tensor, its QuantState): NF4 or
            FP4, plain or nested absmax, any blocksize. Its state is read anew at every call.
        bias: [out], frozen.
        dtype: what to compute in; by default autocast's dtype, else that of x.

    Returns:
        [..., out] in the dtype computed in.

    Raises:
        ValueError: a size, dtype or device that does not fit, a weight or bias that trains, or a
            weight that `unpack` refuses.
    """
    w = unpack(weight)
    if x.device != w.packed.device:
        raise ValueError(f"x: want the weight's device {w.packed.device}, got {x.device}")
    if dtype is None:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if dtype not in FLOATS or not x.is_floating_point():
        raise ValueError(f"x: want one of {FLOATS}, got {x.dtype}, to be computed in {dtype}")
    if x.ndim == 0 or x.shape[-1] != w.columns:
        raise ValueError(f"x: want [..., {w.columns}], got {tuple(x.shape)}")
    if bias is not None:
        if bias.requires_grad:
            raise ValueError("bias must be frozen: this op returns no gradient for it")
        if bias.shape != (w.rows,):
            raise ValueError(f"bias: want [{w.rows}], got {tuple(bias.shape)}")
        bias = bias.to(dtype)
    x = x.to(dtype)
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return torch.ops.fastprompt.nf4_linear(x, bias, *w)
    if x.requires_grad and torch.is_grad_enabled():
        return _NF4Linear.apply(x, bias, w)
    return _forward(x, bias, *w)


def nf4_linear_backward(dy: Tensor, weight: Tensor | tuple[Tensor, Any]) -> Tensor:
    """dx [..., in] of `nf4_linear`, ``dy W`` in the dtype of dy [..., out]; no autograd of its own.

    Raises:
        ValueError: a weight that `unpack` refuses.
    """
    w = unpack(weight)
    if torch.compiler.is_compiling():
        return torch.ops.fastprompt.nf4_linear_backward(dy, *w)
    return _backward(dy, *w)
