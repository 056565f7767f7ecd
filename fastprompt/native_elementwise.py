"""What csrc/ has of a frozen block's elementwise work: norms, activations, rotation.

The same calls as `ops.norms_triton`, `ops.activations_triton` and `ops.rope_triton`, each one pass
over memory on torch.get_num_threads() threads, whose number the results do not depend on. A result
may lie where an input does. ``variant`` is one of `native.variants()`, by default the best.
"""

import math

import torch
from torch import Tensor, nn

from fastprompt import native
from fastprompt.ops.layout import merged

DTYPES = (torch.float32, torch.bfloat16)
KINDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "gelu_quick": 3}  # csrc/elementwise.h: Kind


def serves(*tensors: Tensor | None, alike: bool = False) -> bool:
    """Whether csrc takes these: float32 or bfloat16 rows on the CPU; ``alike``: of one dtype.

    Of tensors with memory of their own, which a fake one, say, has not.
    """
    given = [t for t in tensors if t is not None]
    if alike and any(t.dtype != given[0].dtype for t in given):
        return False
    return all(map(_is_rows, given)) and native.available()


def _is_rows(t: Tensor) -> bool:
    dense = t.stride(-1) == 1 or t.shape[-1] <= 1
    return dense and t.is_cpu and t.dtype in DTYPES and type(t) in (Tensor, nn.Parameter)


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    y: Tensor,
    total: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    variant: str | None = None,
) -> None:
    """Writes y, total = x + residual (if given), mean (if given: a layer norm) and rstd.

    x, residual and total are of one dtype; y, total, mean and rstd (float32, [..., 1]) contiguous;
    weight and bias [D] of any dtype.
    """
    module, variant = _module(variant)
    _check(x.shape, x.dtype, x=x, residual=residual, total=total)
    _check(x.shape, y=y)
    _check((*x.shape[:-1], 1), torch.float32, mean=mean, rstd=rstd)
    _check_contiguous(y=y, total=total, mean=mean, rstd=rstd)
    weight, bias = _wide("weight", weight, x), _wide("bias", bias, x)
    sizes, strides = _rows(x, residual)
    module.norm_forward(
        _addresses(x, residual, weight, bias, y, total, mean, rstd),
        sizes,
        strides,
        x.shape[-1],
        eps,
        offset,
        cast_first,
        [native.DTYPES[x.dtype], native.DTYPES[y.dtype]],
        torch.get_num_threads(),
        variant,
    )


def norm_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    dh: Tensor | None,
    eps: float,
    offset: float,
    centers: bool,
    dx: Tensor,
    variant: str | None = None,
) -> None:
    """Writes dx (contiguous), with dh (of dx's dtype) added if given.

    centers: of a layer norm. mean and rstd as `norm_forward` wrote them; without rstd they are made
    again, with eps.
    """
    module, variant = _module(variant)
    _check(h.shape, h=h, dy=dy)
    _check(h.shape, dx.dtype, dx=dx, dh=dh)
    _check((*h.shape[:-1], 1), torch.float32, mean=mean, rstd=rstd)
    if rstd is not None and centers and mean is None:
        raise ValueError("mean: want it beside rstd in a layer norm, got None")
    _check_contiguous(dx=dx)
    weight = _wide("weight", weight, h)
    mean, rstd = (t if t is None else t.contiguous() for t in (mean, rstd))
    sizes, strides = _rows(dy, h, dh)
    module.norm_backward(
        _addresses(dy, h, dh, weight, mean, rstd, dx),
        sizes,
        strides,
        h.shape[-1],
        eps,
        offset,
        centers,
        [native.DTYPES[t.dtype] for t in (dy, h, dx)],
        torch.get_num_threads(),
        variant,
    )


def activate(
    gate: Tensor, up: Tensor | None, kind: str, y: Tensor, variant: str | None = None
) -> None:
    """Writes y = activation(gate), times up if given; all of one dtype."""
    _activate(variant, kind, dy=None, gate=gate, up=up, y=y, dup=None)


def activate_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    kind: str,
    dgate: Tensor,
    dup: Tensor | None,
    variant: str | None = None,
) -> None:
    """Writes dgate, and dup if there is an up; all of one dtype."""
    if (up is None) != (dup is None):
        raise ValueError("up and dup: want both or none of them")
    _activate(variant, kind, dy=dy, gate=gate, up=up, dgate=dgate, dup=dup)


def _activate(variant, kind, gate, **others):
    module, variant = _module(variant)
    _check(gate.shape, gate.dtype, gate=gate, **others)
    dy, *rest = others.values()
    tensors, columns = (dy, gate, *rest), gate.shape[-1]
    if all(t is None or t.is_contiguous() for t in tensors):
        sizes, strides, columns = [], [[]] * len(tensors), gate.numel()  # one long row
    else:
        sizes, strides = _rows(*tensors)
    module.activate(
        _addresses(*tensors),
        sizes,
        strides,
        columns,
        KINDS[kind],
        native.DTYPES[gate.dtype],
        torch.get_num_threads(),
        variant,
    )


def turn(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    back: bool,
    q_out: Tensor,
    k_out: Tensor,
    variant: str | None = None,
) -> None:
    """Writes q [B, Hq, N, d] and k [B, Hkv, N, d] turned, or turned back; angles [B or 1, N, r]."""
    module, variant = _module(variant)
    (B, Hq, N, d), Hkv, r = q.shape, k.shape[1], cos.shape[-1]
    _check(q.shape, q.dtype, q=q, q_out=q_out)
    _check((B, Hkv, N, d), q.dtype, k=k, k_out=k_out)
    cos, sin = (_angles(t, cos.dtype == sin.dtype) for t in (cos, sin))
    _check((1 if len(cos) == 1 else B, N, r), cos=cos, sin=sin)
    if r % 2 or r > d:
        raise ValueError(f"cos: want [{B} or 1, {N}, r], r even and at most {d}; got {r}")
    of_angles = [[t.stride(0) if len(t) > 1 else 0, t.stride(1)] for t in (cos, sin)]
    module.rotate(
        _addresses(q, k, q_out, k_out, cos, sin),
        [*(t.stride()[:3] for t in (q, k, q_out, k_out)), *of_angles],
        [B, Hq, Hkv, N, d, r],
        [native.DTYPES[q.dtype], native.DTYPES[cos.dtype]],
        back,
        torch.get_num_threads(),
        variant,
    )


def _module(variant):
    module, _ = native._module(variant)
    return module, variant or native.isa()


def _check(shape: tuple[int, ...], dtype: torch.dtype | None = None, **tensors) -> None:
    for name, t in tensors.items():
        if t is None or (t.shape == shape and t.dtype == (dtype or t.dtype) and _is_rows(t)):
            continue
        want = f"{list(shape)} {dtype or 'float32 or bfloat16'} rows on the CPU"
        got = f"{list(t.shape)} {t.dtype} on {t.device} with strides {t.stride()}"
        raise ValueError(f"{name}: want {want}, got {got}")


def _check_contiguous(**tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name}: want it contiguous, got strides {t.stride()}")


def _wide(name: str, parameter: Tensor | None, x: Tensor) -> Tensor | None:
    if parameter is None:
        return None
    parameter = parameter.float().contiguous()
    _check(x.shape[-1:], **{name: parameter})
    return parameter


def _angles(t: Tensor, alike: bool) -> Tensor:
    t = t if alike and t.dtype in DTYPES else t.float()
    return t if t.stride(-1) == 1 else t.contiguous()


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _rows(*tensors: Tensor | None) -> tuple[list[int], list[list[int]]]:
    """The leading axes that all share, merged as far as they go, and each tensor's strides."""
    given = [t for t in tensors if t is not None]
    if all(t.is_contiguous() for t in given):
        *lead, columns = given[0].shape
        return [math.prod(lead)], [[columns]] * len(tensors)
    sizes, strides = merged(*given)
    own = iter(strides)
    return sizes, [[0] * len(sizes) if t is None else next(own) for t in tensors]
