"""What `prompt_attention` takes beside its five tensors, and what it refuses."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprompt.ops import vendors
from fastprompt.ops.checks import check_backend

BACKENDS = ("auto", "triton", "native", "vendor", "xformers", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# in the order of `Options`, as torch.library writes them
SCHEMA = (
    "bool causal, float scale, Tensor? key_mask, Tensor? attn_mask, Tensor? prompt_bias, "
    "SymInt? window, float? softcap, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? prompt_index, Tensor? prompt_len, str backend"
)


class Options(NamedTuple):
    """See `ops.prompt_attention` for each."""

    causal: bool
    scale: float
    key_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    prompt_bias: Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    prompt_index: Tensor | None = None
    prompt_len: Tensor | None = None
    backend: str = "auto"

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    def of(self, samples: slice) -> "Options":
        """Those of some samples of the batch; packed sequences are one sample."""
        if self.packed:
            return self
        own = {}
        for name in ("key_mask", "attn_mask", "prompt_bias", "prompt_index"):
            x = getattr(self, name)
            if x is not None and (name in ("key_mask", "prompt_index") or len(x) > 1):
                own[name] = x[samples]
        return self._replace(**own)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) for name in TENSORS)


TENSORS = (
    "key_mask", "attn_mask", "prompt_bias",
    "cu_seqlens_q", "cu_seqlens_k", "prompt_index", "prompt_len",
)  # fmt: skip


_MOST = 1e38  # kernels compute in float32


def check_ranks(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> None:
    """Raises ValueError for what is no tensor, or has no head dimension to be read off it."""
    named = dict(q=q, k=k, v=v, prompt_k=prompt_k, prompt_v=prompt_v)
    _want_tensors(named)
    for name, x in named.items():
        if x.is_nested or x.ndim == 0:
            raise ValueError(f"{name}: want rows of d numbers, got a nested tensor or a number")
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"want q [B, Hq, N, d] and k [B, Hkv, M, d]; got {_shape(q)} and {_shape(k)}"
        )
    d = q.shape[-1]
    if d % 8 or not 0 < d <= 256:
        raise ValueError(f"d: want a multiple of 8 up to 256, got {d}")


def as_number(name: str, x: Any) -> float:
    """A plain number out of what a caller gives; gradients would be lost on the way."""
    if isinstance(x, Tensor) and x.requires_grad:
        raise ValueError(f"{name}: want it frozen (this op gives no gradient for it)")
    if isinstance(x, (bool, str)) or (isinstance(x, Tensor) and x.numel() != 1):
        raise ValueError(f"{name}: want a number, got {type(x).__name__}")
    try:
        return float(x)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{name}: want a number, got {type(x).__name__}: {error}") from error


def _check_numbers(o):
    if not isinstance(o.causal, (bool, torch.SymBool)):
        raise ValueError(f"causal: want True or False, got {o.causal!r}")
    if not -_MOST <= o.scale <= _MOST:
        raise ValueError(f"scale: want a finite number, got {o.scale}")
    if o.softcap is not None and not 0 < o.softcap <= _MOST:
        raise ValueError(f"softcap: want a finite number above 0, got {o.softcap}")
    whole = isinstance(o.window, (int, torch.SymInt)) and not isinstance(o.window, bool)
    if o.window is not None and not (whole and o.window >= 1):
        raise ValueError(f"window: want an integer of at least 1, got {o.window!r}")


def check(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, o: Options) -> None:
    """Raises ValueError for whatever the op does not serve, saying what was wanted and came."""
    check_backend(o.backend, q.device, BACKENDS)
    if o.backend == "xformers" and not vendors.has_xformers():
        raise ValueError('backend: want xformers installed for "xformers" (pip install xformers)')
    _check_numbers(o)
    (B, Hq, N, d), (Hkv, M) = q.shape, k.shape[1:3]
    if Hkv == 0 or Hq == 0 or Hq % Hkv:
        raise ValueError(f"want Hkv to divide Hq, both above 0; got Hkv {Hkv} and Hq {Hq}")
    _want("k", k, (B, Hkv, M, d))
    _want("v", v, (B, Hkv, M, d))
    _check_tensors(q, dict(k=k, v=v, prompt_k=prompt_k, prompt_v=prompt_v))
    _check_packed(q, o)
    if o.causal and M < N and not o.packed:
        raise ValueError(f"causal: want at least as many keys as queries; got M {M} and N {N}")
    _check_prompts(prompt_k, prompt_v, (B, Hkv, d), o)
    P = prompt_k.shape[-2]

    if o.key_mask is not None:
        _want_tensors(dict(key_mask=o.key_mask))
        if o.key_mask.dtype != torch.bool:
            raise ValueError(f"key_mask: want bool, got {o.key_mask.dtype}")
        _want("key_mask", o.key_mask, (B, M), q.device)
    _want_mask("attn_mask", o.attn_mask, (B, Hq, N, M), q.device, or_bool=True)
    _want_mask("prompt_bias", o.prompt_bias, (B, Hq, N, P), q.device, or_bool=False)


def _want_tensors(named):
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: want a tensor, got {type(x).__name__}")


def _check_tensors(q, others):
    if q.dtype not in DTYPES:
        raise ValueError(f"q: want float32, float16, bfloat16 or float64; got {q.dtype}")
    for name, x in others.items():
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: want {q.dtype} on {q.device}; got {x.dtype} on {x.device}")
    for name, x in dict(q=q, **others).items():
        if x.stride(-1) != 1 and x.numel() > 0:
            raise ValueError(f"{name}: want a contiguous last axis; got strides {x.stride()}")
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"want tensors on cpu or cuda; got {q.device}")


def _check_packed(q, o):
    if (o.cu_seqlens_q is None) != (o.cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k: want both or none of them")
    if not o.packed:
        return
    _want_tensors(dict(cu_seqlens_q=o.cu_seqlens_q, cu_seqlens_k=o.cu_seqlens_k))
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens_q: want packed rows, a batch of 1; got {q.shape[0]}")
    for name in ("key_mask", "attn_mask", "prompt_bias"):
        if getattr(o, name) is not None:
            raise ValueError(f"{name}: want none beside cu_seqlens_q (pack what is to be seen)")
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        ends = getattr(o, name)
        _want_whole(name, ends, (o.cu_seqlens_q.numel(),), q.device)
        if ends.numel() < 2:
            raise ValueError(f"{name}: want at least one sequence, [0, length]; got {_shape(ends)}")


def _check_prompts(prompt_k, prompt_v, sizes, o):
    B, Hkv, d = sizes
    if o.prompt_index is None:
        if o.prompt_len is not None:
            raise ValueError("prompt_len: want prompt_index beside it, which picks the set")
        if prompt_k.ndim == 4:
            raise ValueError("prompt_k: want prompt_index beside several sets, or [Hkv, P, d]")
        if prompt_k.ndim != 3:
            raise ValueError(f"prompt_k: want [{Hkv}, P, {d}], got {_shape(prompt_k)}")
        P = prompt_k.shape[1]
        _want("prompt_k", prompt_k, (Hkv, P, d))
        _want("prompt_v", prompt_v, (Hkv, P, d))
        return
    samples = o.cu_seqlens_q.numel() - 1 if o.packed else B
    _want_whole("prompt_index", o.prompt_index, (samples,), prompt_k.device)
    if prompt_k.ndim != 4:
        raise ValueError(
            f"prompt_k: want sets [S, {Hkv}, P, {d}] for prompt_index, got {_shape(prompt_k)}"
        )
    S, P = prompt_k.shape[0], prompt_k.shape[2]
    if S == 0 and samples:
        raise ValueError(
            f"prompt_k: want at least one set for prompt_index, got {_shape(prompt_k)}"
        )
    _want("prompt_k", prompt_k, (S, Hkv, P, d))
    _want("prompt_v", prompt_v, (S, Hkv, P, d))
    if o.prompt_len is not None:
        _want_whole("prompt_len", o.prompt_len, (S,), prompt_k.device)


def check_values(q: Tensor, k: Tensor, prompt_k: Tensor, o: Options) -> None:
    """Raises ValueError for indices out of range. On the CPU alone: a GPU would be waited for."""
    if q.device.type != "cpu":
        return
    if o.packed:
        for name, rows in (("cu_seqlens_q", q.shape[2]), ("cu_seqlens_k", k.shape[2])):
            values = getattr(o, name).tolist()
            if values[0] != 0 or values[-1] != rows or values != sorted(values):
                raise ValueError(f"{name}: want 0 .. {rows} in rising order, got {values[:9]}")
        if o.causal and (o.cu_seqlens_q.diff() > o.cu_seqlens_k.diff()).any():
            raise ValueError("causal: want as many keys as queries in every sequence")
    if o.prompt_index is not None:
        _within("prompt_index", o.prompt_index, 0, len(prompt_k) - 1)
    if o.prompt_len is not None:
        _within("prompt_len", o.prompt_len, 0, prompt_k.shape[2])


def _within(name, x, low, high):
    if x.numel() and not low <= int(x.min()) <= int(x.max()) <= high:
        raise ValueError(f"{name}: want {low} .. {high}, got {int(x.min())} .. {int(x.max())}")


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _want(name, x, shape, device=None):
    if x.shape != torch.Size(shape):
        raise ValueError(f"{name}: want {list(shape)}, got {_shape(x)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: want it on {device}, got {x.device}")


def _want_whole(name, x, shape, device):
    _want_tensors({name: x})
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: want int32 or int64, got {x.dtype}")
    _want(name, x, shape, device)


def _want_mask(name, mask, full, device, or_bool):
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name}: want a tensor, got {type(mask).__name__}")
    B, H, N, M = full
    if mask.ndim != 4 or mask.shape[0] not in (1, B) or mask.shape[1] not in (1, H):
        raise ValueError(f"{name}: want [{B} or 1, {H} or 1, {N}, {M}], got {_shape(mask)}")
    _want(name, mask, (*mask.shape[:2], N, M), device)
    if not (mask.dtype in DTYPES or (or_bool and mask.dtype == torch.bool)):
        kinds = "bool or floating point" if or_bool else "floating point"
        raise ValueError(f"{name}: want {kinds}, got {mask.dtype}")
    if mask.requires_grad:
        raise ValueError(f"{name}: want it frozen (this op gives no gradient for it)")
