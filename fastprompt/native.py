"""What touches the compiled part (csrc/): 4-bit weights and attention. Selection is in
`native_select`, norms, activations and rotation in `native_elementwise`, CUDA kernels in
`native_cuda`; nothing else does.

The package works without it: `available()` says whether it is there, `why_missing()` why not. In
the environment FASTPROMPT_NATIVE=0 leaves it out, and FASTPROMPT_ISA names the best instruction set
that may be used: "portable" runs everywhere.
"""

import functools
import importlib
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fastprompt.files import is_cut_short

ABI = 10  # csrc/module.cpp has the same; a module left from another version is not called
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/decode.h: Dtype
OFF = "FASTPROMPT_NATIVE=0"  # in the environment
MASKS = {torch.float32: 0, torch.bfloat16: 1, torch.bool: 2}  # csrc/attention.h: Mask::Kind


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("FASTPROMPT_NATIVE") == "0":
        return None, OFF
    try:
        _check_file()
        module = importlib.import_module("fastprompt._native")
        why = None if module.ABI == ABI else f"built from another version: {module.__file__}"
    # not built, not readable, or for another Python or platform
    except (ImportError, AttributeError, OSError) as error:
        why = str(error)
    if why is None:
        return module, None
    why = f"fastprompt's native part is not usable ({why})"
    warnings.warn(f"{why}; torch serves the CPU, more slowly", stacklevel=3)
    return None, why


def _check_file() -> None:
    """ImportError for a file that was not written to its end, which would end the process."""
    spec = None if "fastprompt._native" in sys.modules else find_spec("fastprompt._native")
    if spec is not None and is_cut_short(Path(spec.origin)):
        raise ImportError(f"cut short: {spec.origin}")


def compiled() -> tuple[ModuleType | None, str | None]:
    """The compiled part, or None and why it is not there."""
    return _load()


def available() -> bool:
    """Whether the compiled part is there. The first answer of no is also a warning."""
    return _load()[0] is not None


def why_missing() -> str | None:
    """Why the compiled part is not there; None when it is."""
    return _load()[1]


@functools.cache
def _numbers(kind: str) -> dict[str, int]:
    """What FASTPROMPT_ISA leaves of the module's "variants" or "multipliers", and their numbers."""
    module = _load()[0]
    if module is None:
        return {}
    names = getattr(module, kind)()
    asked = os.environ.get("FASTPROMPT_ISA")
    if asked and asked not in module.variants():
        raise ValueError(f"FASTPROMPT_ISA: want one of {module.variants()} here, got {asked!r}")
    first = names.index(asked) if asked else 0
    return {name: number for number, name in enumerate(names) if number >= first}


def variants() -> tuple[str, ...]:
    """Instruction sets that this machine runs, the best first; empty without the native part."""
    return tuple(_numbers("variants"))


TILES = ("amx", "avx512_bf16")  # of bfloat16 alone


def multipliers() -> tuple[str, ...]:
    """What `product_4bit` runs on here, the best first: those of `TILES`, and `variants()`."""
    return tuple(_numbers("multipliers"))


def isa() -> str:
    """The instruction set in use: "avx512", "avx2", "neon" or "portable"; "torch" without any."""
    return variants()[0] if available() else "torch"


def _check(name: str, t: Tensor, dtype: torch.dtype, numel: int) -> int:
    if t.dtype is not dtype or t.numel() < numel or not t.is_contiguous() or not t.is_cpu:
        raise ValueError(
            f"{name}: want contiguous {dtype} on the CPU with at least {numel} elements, "
            f"got {t.dtype} {tuple(t.shape)} on {t.device} with strides {t.stride()}"
        )
    return t.data_ptr()


Nested = tuple[Tensor, Tensor, Tensor, int]  # code2, absmax2, offset, blocksize2


def _weight(
    numel: int, packed: Tensor, code: Tensor, absmax: Tensor, blocksize: int, nested: Nested | None
) -> tuple[int, ...]:
    """A checked weight as the addresses and sizes that the module takes."""
    if blocksize < 1 or (nested and nested[3] < 1):
        raise ValueError(f"blocksize: want at least 1, got {blocksize}, nested {nested}")
    blocks = -(numel // -blocksize)
    scales, second, blocksize2 = torch.float32, (0, 0, 0), 1
    if nested:
        code2, absmax2, offset, blocksize2 = nested
        scales = torch.uint8
        second = (
            _check("code2", code2, torch.float32, 256),
            _check("absmax2", absmax2, torch.float32, -(blocks // -blocksize2)),
            _check("offset", offset, torch.float32, 1),
        )
    return (
        _check("packed", packed, torch.uint8, (numel + 1) // 2),
        _check("code", code, torch.float32, 16),
        _check("absmax", absmax, scales, blocks),
        *second,
        blocksize,
        blocksize2,
    )


def _module(variant: str | None, kind: str = "variants") -> tuple[ModuleType, int]:
    module, why = _load()
    if module is None:
        raise RuntimeError(why)
    numbers = _numbers(kind)
    if variant is None:
        variant = next(iter(numbers))
    elif variant not in numbers:
        raise ValueError(f"{kind[:-1]}: want one of {(*numbers,)}, got {variant!r}")
    return module, numbers[variant]


def decode_4bit(
    out: Tensor,
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    blocksize: int,
    nested: Nested | None = None,
    variant: str | None = None,
) -> Tensor:
    """Decode bitsandbytes' 4-bit storage into `out`, on torch.get_num_threads() threads.

    Bit for bit what `bitsandbytes.functional.dequantize_4bit` gives where rows have whole blocks
    (elsewhere its CPU kernel is wrong): products in float32, one rounding (to nearest even) to the
    dtype of `out`.

    Args:
        out: contiguous float32, bfloat16 or float16 of any shape; every element is written.
        packed: uint8, two values a byte, the high nibble first; `out.numel()` values.
        code: [16] float32, the values that the nibbles stand for (NF4, FP4 or others).
        absmax: [blocks] float32 scales, or uint8 when `nested`.
        blocksize: values that share a scale.
        nested: (code2 [256], absmax2 [blocks2], offset [], blocksize2), all float32: the scale of
            block b is then ``code2[absmax[b]] * absmax2[b // blocksize2] + offset``.
        variant: one of `variants()`; the best of them by default.

    Returns:
        `out`.

    Raises:
        ValueError: a dtype, size, stride or device other than these, or an unknown variant.
        RuntimeError: the native part is missing.
    """
    module, index = _module(variant)
    dtype = DTYPES.get(out.dtype)
    if dtype is None:
        raise ValueError(f"out: want one of {[*DTYPES]}, got {out.dtype}")
    n = out.numel()
    weight = _weight(n, packed, code, absmax, blocksize, nested)
    address = _check("out", out, out.dtype, n)
    module.decode(*weight, n, address, dtype, torch.get_num_threads(), index)
    return out


def multiplies_4bit(rows: int, columns: int, blocksize: int) -> bool:
    """Whether `product_4bit` serves a weight of these sizes."""
    power = blocksize >= 32 and not blocksize & (blocksize - 1)
    return power and rows > 0 and columns > 0 and columns % blocksize == 0


def product_4bit(
    x: Tensor,
    rows: int,
    columns: int,
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    blocksize: int,
    nested: Nested | None = None,
    *,
    bias: Tensor | None = None,
    backward: bool = False,
    multiplier: str | None = None,
) -> Tensor:
    """``x Wᵀ + bias``, or backward ``x W``, for some tokens, with no decoded weight in between.

    On torch.get_num_threads() threads, whose number changes no bit.

    Args:
        x: [tokens, columns], backward [tokens, rows]: float32, bfloat16 or float16, any strides
            with a contiguous last axis.
        rows, columns: of the weight; columns a multiple of blocksize, that one a power of two of
            at least 32.
        packed, code, absmax, blocksize, nested: as in `decode_4bit`.
        bias: [rows] contiguous, in the dtype of x; not backward.
        multiplier: of `multipliers()`; by default the first that takes the dtype.

    Returns:
        [tokens, rows], backward [tokens, columns], in the dtype of x: sums in float32, rounded
        once, of weights that were not rounded (by `TILES`: to bfloat16). Raises as `decode_4bit`.
    """
    module, index = _module(multiplier, "multipliers")
    if not multiplies_4bit(rows, columns, blocksize):
        want, got = "a power of two from 32 on", f"[{rows}, {columns}] in blocks of {blocksize}"
        raise ValueError(f"weight: want rows of whole blocks of {want}, got {got}")
    width, out_width = (rows, columns) if backward else (columns, rows)
    if x.dim() != 2 or x.shape[1] != width or x.dtype not in DTYPES or not x.is_cpu:
        want, got = (
            f"[tokens, {width}] in one of {[*DTYPES]} on the CPU",
            f"{list(x.shape)} {x.dtype}",
        )
        raise ValueError(f"x: want {want}, got {got} on {x.device}")
    if x.stride(1) != 1 and width > 1 and len(x):
        raise ValueError(f"x: want a contiguous last axis, got strides {x.stride()}")
    if x.dtype != torch.bfloat16:
        if multiplier in TILES:
            raise ValueError(f"x: want torch.bfloat16 for {multiplier}, got {x.dtype}")
        numbers = _numbers("multipliers")
        index = next(i for name, i in numbers.items() if i >= index and name not in TILES)
    if backward and bias is not None:
        raise ValueError("bias: want none backward")
    weight = _weight(rows * columns, packed, code, absmax, blocksize, nested)
    out = x.new_empty(len(x), out_width)
    module.product(
        *weight,
        x.data_ptr(),
        x.stride(0),
        0 if bias is None else _check("bias", bias, x.dtype, rows),
        out.data_ptr(),
        rows,
        columns,
        len(x),
        DTYPES[x.dtype],
        backward,
        torch.get_num_threads(),
        index,
    )
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    prompt_index: Tensor | None = None,
    prompt_len: Tensor | None = None,
    dout: Tensor | None = None,
    token_grads: tuple[Tensor, Tensor, Tensor] | None = None,
    prompt_grads: Tensor | None = None,
    parts: int | None = None,
    variant: str | None = None,
) -> None:
    """Attention over prompts and tokens, or, with ``dout``, its gradients, into tensors given.

    On torch.get_num_threads() threads, in float32 inside; same threads, same bits.

    Args:
        q [B, H, N, d], k, v [B, Hkv, M, d], prompt_k, prompt_v [Hkv, P, d] or sets
            [S, Hkv, P, d], out, dout as q: float32 or bfloat16, any strides with a contiguous last
            axis. ``out`` is written, or read.
        lse: [B, H, N] contiguous float32, written, or read; -inf where a query saw nothing.
        causal, scale, window, softcap, key_mask: as in `ops.prompt_attention`; key_mask [B, M]
            contiguous.
        attn_mask: [B or 1, H or 1, N, M] of any strides: bool, or float32 or bfloat16 where there
            is no softcap.
        prompt_index, prompt_len: [B] and [S] contiguous int64, 0 .. S - 1 and 0 .. P: the set of
            each sample and the rows of each set. Not looked at here: see `options.check_values`.
        token_grads: (dq, dk, dv), written; None where tokens want none.
        prompt_grads: [shares, 2, S, Hkv, P, d] contiguous float32 zeros, to which gradients are
            added, to be summed over shares; None where prompts want none.
        parts: how many pieces the work is cut into; with prompt_grads, it and ``shares`` come from
            `attention_parts`.
        variant: one of `variants()`; the best of them by default.

    Raises:
        ValueError: an unknown variant, or a dtype, stride or device other than these.
        RuntimeError: the native part is missing.
    """
    module, index = _module(variant)
    (B, H, N, d), (Hkv, M), P = q.shape, k.shape[1:3], prompt_k.shape[-2]
    sets = len(prompt_k) if prompt_k.dim() == 4 else 1
    inputs = (q, k, v, prompt_k, prompt_v, out, dout)
    grads = token_grads or (None, None, None)
    rows, keys, own = (B, H, N, d), (B, Hkv, M, d), (Hkv, P, d)
    own = (sets, *own) if prompt_k.dim() == 4 else own
    shapes = (rows, keys, keys, own, own, rows, rows, rows, keys, keys)
    for t, shape in zip((*inputs, *grads), shapes, strict=True):
        if t is not None and t.shape != shape:
            raise ValueError(f"want {list(shape)}, got {list(t.shape)}")
    for t in (*inputs, *grads):
        if t is not None and (
            t.dtype != q.dtype or not t.is_cpu or (t.numel() and t.stride(-1) != 1)
        ):
            raise ValueError(f"want {q.dtype} rows on the CPU, got {t.dtype} on {t.device}")
    if q.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"q: want float32 or bfloat16, got {q.dtype}")
    shares = 1 if prompt_grads is None else len(prompt_grads)
    small = {
        "lse": (lse, torch.float32, B * H * N),
        "prompt_grads": (prompt_grads, torch.float32, shares * 2 * sets * Hkv * P * d),
        "key_mask": (key_mask, torch.bool, B * M),
        "prompt_index": (prompt_index, torch.int64, B),
        "prompt_len": (prompt_len, torch.int64, sets),
    }
    parts = parts or attention_parts(B, Hkv)[0]
    if prompt_grads is not None and not (
        shares == parts or (shares == 1 and Hkv % parts == 0)  # else parts would write past it
    ):
        raise ValueError(f"prompt_grads: want {parts} shares for {parts} parts, got {shares}")
    module.attention(
        [_rows(t) for t in inputs],
        [_rows(t) for t in grads],
        [0 if t is None else _check(name, t, *want) for name, (t, *want) in small.items()],
        _mask(attn_mask, (B, H, N, M), softcap),
        [B, H, Hkv, N, M, P, d, sets, shares],
        window or 0,
        scale,
        softcap or 0.0,
        DTYPES[q.dtype],
        causal,
        dout is not None,
        token_grads is not None,
        parts,
        torch.get_num_threads(),
        index,
    )


def attention_parts(B: int, Hkv: int, share_bytes: int = 0) -> tuple[int, int]:
    """(parts, shares): pieces of the work on the pairs of a sample and a key head, two a thread.

    Parts that meet in a head have sums of their own, a share each. Where parts are whole heads no
    two meet, and one share does for all: also where a share for each would take over 128 MB.
    """
    parts = max(1, min(B * Hkv, 2 * torch.get_num_threads()))
    if Hkv % parts and parts * share_bytes <= 1 << 27:
        return parts, parts
    return max(n for n in range(1, parts + 1) if Hkv % n == 0), 1


def _mask(t: Tensor | None, shape: tuple[int, ...], softcap: float | None) -> tuple[int, ...]:
    if t is None:
        return (0,) * 6
    kind = MASKS.get(t.dtype)
    if kind is None or not t.is_cpu or (softcap and t.dtype != torch.bool):
        raise ValueError(f"attn_mask: want one of {[*MASKS]}, on the CPU, and bool with softcap")
    return t.data_ptr(), *t.expand(shape).stride(), kind


def _rows(t: Tensor | None) -> tuple[int, int, int, int]:
    if t is None:
        return (0, 0, 0, 0)
    strides = (0, *t.stride()[:-1])[-3:]  # one set of prompts has no sample
    return (t.data_ptr(), *strides)
