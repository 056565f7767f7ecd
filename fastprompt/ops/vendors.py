"""The attention kernels of others, by one interface: with log-sum-exp, and a backward apart.

    attend(q, k, v, mask, causal, scale) -> out, lse
    gradients(dout, q, k, v, out, lse, mask, causal, scale) -> dq, dk, dv

``mask`` is additive and broadcasts to [B, H, N, M], or None; ``causal`` is aligned at the first key
and comes with N = M and no mask, or one by key. ``lse`` [B, H, N] is float32. A row that sees
nothing may be answered by anything: the caller knows it.
"""

from importlib.util import find_spec
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Vendor(Protocol):
    backward_in_float32: bool

    def attend(self, q, k, v, mask, causal, scale) -> tuple[Tensor, Tensor]: ...

    def gradients(
        self, dout, q, k, v, out, lse, mask, causal, scale
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class OnCpu:
    """torch's flash attention for the CPU; takes any mask, and grouped queries as they are."""

    # in bfloat16 its backward is 1.5 to 15 times slower (torch 2.14)
    backward_in_float32 = True

    def attend(self, q, k, v, mask, causal, scale):
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )

    def gradients(self, dout, q, k, v, out, lse, mask, causal, scale):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )


class _Ungrouped:
    """What takes as many key heads as query heads alone: they are repeated, gradients summed."""

    backward_in_float32 = False

    def attend(self, q, k, v, mask, causal, scale):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return self._attend(q, k, v, mask, causal, scale)

    def gradients(self, dout, q, k, v, out, lse, mask, causal, scale):
        heads = k.shape[1]
        k, v = (x.repeat_interleave(q.shape[1] // heads, dim=1) for x in (k, v))
        dq, *grads = self._gradients(dout, q, k, v, out, lse, mask, causal, scale)
        return dq, *(g.unflatten(1, (heads, -1)).sum(2) for g in grads)


class _Flash:
    """FlashAttention 2 in PyTorch: float16 and bfloat16, no mask."""

    def attend(self, q, k, v, mask, causal, scale):
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return out, lse

    def gradients(self, dout, q, k, v, out, lse, mask, causal, scale):
        sizes, seed = (None, None, q.shape[2], k.shape[2]), _unused_seed(q)
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, *sizes, 0.0, causal, seed, seed, scale=scale
        )


class _Cudnn:
    """cuDNN's attention in PyTorch: float16 and bfloat16, no mask here."""

    def attend(self, q, k, v, mask, causal, scale):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )
        return out, lse.reshape(q.shape[:3])

    def gradients(self, dout, q, k, v, out, lse, mask, causal, scale):
        sizes, seed = (None, None, q.shape[2], k.shape[2]), _unused_seed(q)
        return aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse[..., None], seed, seed, None, *sizes, 0.0, causal, scale=scale
        )


class _Efficient:
    """The memory-efficient kernel in PyTorch: every dtype, additive masks."""

    def attend(self, q, k, v, mask, causal, scale):
        bias = _aligned(mask, q, k)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, True, 0.0, causal, scale=scale
        )
        return out, lse[..., : q.shape[2]]  # it comes in whole blocks of 32 rows

    def gradients(self, dout, q, k, v, out, lse, mask, causal, scale):
        seed = _unused_seed(q)
        lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
        bias, wanted = _aligned(mask, q, k), [True, True, True, False]
        *grads, _ = aten._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, bias, out, lse, seed, seed, 0.0, wanted, causal, scale=scale
        )
        return grads


class OnCuda(_Ungrouped):
    """What PyTorch brings for CUDA: cuDNN's or FlashAttention's kernel, under a mask a third."""

    def _attend(self, q, k, v, mask, causal, scale):
        return _kernel(q, mask).attend(q, k, v, mask, causal, scale)

    def _gradients(self, dout, q, k, v, out, lse, mask, causal, scale):
        return _kernel(q, mask).gradients(dout, q, k, v, out, lse, mask, causal, scale)


def _kernel(q: Tensor, mask: Tensor | None):
    capability = torch.cuda.get_device_capability(q.device)
    if mask is not None or q.dtype == torch.float32 or capability < (8, 0):
        return _Efficient()
    return _Cudnn() if capability >= (9, 0) and q.shape[-1] <= 128 else _Flash()


class Xformers(_Ungrouped):
    """`memory_efficient_attention` of xformers, for cards that Triton no longer serves."""

    def _attend(self, q, k, v, mask, causal, scale):
        from xformers.ops import fmha

        out, lse = fmha.memory_efficient_attention_forward_requires_grad(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_bias=_xformers_bias(mask, causal, q, k),
            scale=scale,
        )  # fmt: skip
        return out.transpose(1, 2), lse[..., : q.shape[2]]

    def _gradients(self, dout, q, k, v, out, lse, mask, causal, scale):
        from xformers.ops import fmha

        dout, q_, k_, v_, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
        grads = fmha.memory_efficient_attention_backward(
            dout, out, lse, q_, k_, v_, attn_bias=_xformers_bias(mask, causal, q, k), scale=scale
        )
        return tuple(g.transpose(1, 2) for g in grads)


def named(name: str, device: torch.device) -> Vendor:
    """ "vendor" (PyTorch's own for the device) or "xformers"."""
    if name == "xformers":
        return Xformers()
    return OnCpu() if device.type == "cpu" else OnCuda()


def has_xformers() -> bool:
    return find_spec("xformers") is not None


def _unused_seed(q: Tensor) -> Tensor:
    """What an operator's schema asks for, and nothing reads without dropout."""
    return torch.zeros((), dtype=torch.int64, device=q.device)


def _aligned(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as [B, H, N, M], rows a multiple of 16 elements apart, as the kernels load them."""
    if mask is None:
        return None
    shape = (*q.shape[:3], k.shape[2])
    rows = F.pad(mask, (0, -k.shape[2] % 16)) if k.shape[2] % 16 else mask
    rows = rows.expand(*mask.shape[:2], q.shape[2], -1)[..., : k.shape[2]]
    return rows.expand(shape)


def _xformers_bias(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor):
    from xformers.ops import fmha

    if causal and mask is None:
        return fmha.attn_bias.LowerTriangularMask()
    if causal:
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        mask = mask.masked_fill(later, -torch.inf)
    return _aligned(mask, q, k)
