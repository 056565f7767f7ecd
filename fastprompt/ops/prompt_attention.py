"""Attention whose first keys are learned prompts, without writing the concatenation.

    out = softmax(scale · q [prompt_k ; k]ᵀ + mask) [prompt_v ; v]        prompts are never masked

The prompts have no batch axis: one set of keys and values serves every sample. With the
log-sum-exp L of a whole row over prompts and tokens, the two parts part again exactly:

    p_j  = exp(scale · q·k_j + mask_j - L)          j over prompts, then over tokens
    D    = sum over channels of dout * out
    ds_j = p_j (dout·v_j - D)
    dq   = scale · sum_j ds_j k_j,    dk_j = scale · sum_n ds_nj q_n,    dv_j = sum_n p_nj dout_n

and for prompts the last two sums run over the batch as well. Where the tokens need no gradient
(the first prompted layer of a frozen model), only the prompts' two sums are computed.
"""

import torch
from torch import Tensor

from fastprompt.ops import prompt_attention_cpu as cpu
from fastprompt.ops import reference

BACKENDS = ("auto", "triton", "cpu", "reference")

# ---- op: schema, fake, dispatch ----

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor prompt_k, Tensor prompt_v, bool causal, float scale, "
    "Tensor? key_mask, Tensor? attn_mask, Tensor? prompt_bias, str backend"
)
torch.library.define("fastprompt::prompt_attention", f"({_INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    "fastprompt::prompt_attention_backward",
    f"(Tensor dout, Tensor out, Tensor lse, {_INPUTS}, bool tokens, bool prompts)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("fastprompt::prompt_attention")
def _outputs(q, k, v, prompt_k, prompt_v, *options):
    """[B, Hq, N, d] whose memory is [B, N, Hq, d], so that the caller's reshape is free; lse."""
    B, H, N, d = q.shape
    return q.new_empty(B, N, H, d).transpose(1, 2), q.new_empty(B, H, N, dtype=torch.float32)


@torch.library.register_fake("fastprompt::prompt_attention_backward")
def _gradients(dout, out, lse, q, k, v, prompt_k, prompt_v, *options):
    """Each token gradient in [B, tokens, heads, d] memory; an empty tensor where none is asked."""
    *_, tokens, prompts = options

    def like(x, wanted):
        if not wanted:
            return x.new_empty(0)
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)

    own = [t.new_empty(t.shape if prompts else 0) for t in (prompt_k, prompt_v)]
    return (*(like(t, tokens) for t in (q, k, v)), *own)


def _triton():
    # imported on first use: triton exists on Linux alone, and the CPU path does not need it
    from fastprompt.ops import prompt_attention_triton

    return prompt_attention_triton


@torch.library.impl("fastprompt::prompt_attention", "CUDA")
def _forward_cuda(*inputs):
    return _triton().forward(*inputs[:-1])


@torch.library.impl("fastprompt::prompt_attention_backward", "CUDA")
def _backward_cuda(dout, out, lse, *rest):
    *inputs, _, tokens, prompts = rest
    return _triton().backward(dout, out, lse, *inputs, tokens, prompts)


@torch.library.impl("fastprompt::prompt_attention", "CPU")
def _forward_cpu(*inputs):
    *inputs, backend = inputs
    return (_triton() if backend == "triton" else cpu).forward(*inputs)


@torch.library.impl("fastprompt::prompt_attention_backward", "CPU")
def _backward_cpu(dout, out, lse, *rest):
    *inputs, backend, tokens, prompts = rest
    module = _triton() if backend == "triton" else cpu
    return module.backward(dout, out, lse, *inputs, tokens, prompts)


# ---- autograd ----


class _PromptAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, prompt_k, prompt_v, causal, scale, *masks_and_backend):
        inputs = (q, k, v, prompt_k, prompt_v)
        out, lse = torch.ops.fastprompt.prompt_attention(*inputs, causal, scale, *masks_and_backend)
        *masks, ctx.backend = masks_and_backend
        ctx.causal, ctx.scale = causal, scale
        ctx.save_for_backward(*inputs, out, lse, *masks)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        *inputs, out, lse, key_mask, attn_mask, prompt_bias = ctx.saved_tensors
        masks = (key_mask, attn_mask, prompt_bias)
        tokens, prompts = any(ctx.needs_input_grad[:3]), any(ctx.needs_input_grad[3:5])
        grads = torch.ops.fastprompt.prompt_attention_backward(
            dout, out, lse, *inputs, ctx.causal, ctx.scale, *masks, ctx.backend, tokens, prompts
        )
        wanted = zip(grads, ctx.needs_input_grad[:5], strict=True)
        return (*(grad if wants else None for grad, wants in wanted), *[None] * 6)


# ---- public ----


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    prompt_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of ``q`` over ``[prompt_k ; k]`` and ``[prompt_v ; v]``.

    Exactly what row-writing deep prompts (VPT-deep, arXiv 2203.12119; M2PT, arXiv 2409.15657)
    compute for the tokens, when ``prompt_k`` and ``prompt_v`` are the block's projections of its
    prompt. float32, float16 and bfloat16 run kernels; float64 runs the reference.

    Args:
        q: [B, Hq, N, d]. Any strides with a contiguous last axis, here and below.
        k, v: [B, Hkv, M, d]; Hkv divides Hq (grouped and multi-query attention).
        prompt_k, prompt_v: [Hkv, P, d], shared by the batch. P may be 0.
        causal: query n sees tokens 0 .. n + M - N (aligned at the last key; wants M >= N) and
            every prompt.
        scale: multiplies q·k; 1/sqrt(d) unless given.
        key_mask: [B, M] bool, True where a token may be seen (padding is False).
        attn_mask: [B or 1, Hq or 1, N, M], bool (True: may be seen) or float, added to the scores.
        prompt_bias: [B or 1, Hq or 1, N, P] float, added to the prompts' scores.
        backend: "auto" is Triton on CUDA, vendor attention and a merge on the CPU; "triton" on
            the CPU wants its interpreter; "reference" is plain PyTorch everywhere.

    Returns:
        [B, Hq, N, d] in ``q.dtype``, laid out as [B, N, Hq, d]. A row that may see no token gets
        the prompts' answer, or zeros where P is 0; never NaN.

    Raises:
        ValueError: a shape, stride, dtype, device or mask that the op does not serve.
    """
    _check(q, k, v, prompt_k, prompt_v, causal, key_mask, attn_mask, prompt_bias, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.dtype == torch.float64 or backend == "reference":
        masks = dict(key_mask=key_mask, attn_mask=attn_mask, prompt_bias=prompt_bias)
        options = dict(causal=causal, scale=scale, **masks)
        return reference.prompt_attention(q, k, v, prompt_k, prompt_v, **options)
    masks = (key_mask, attn_mask, prompt_bias)
    return _PromptAttention.apply(q, k, v, prompt_k, prompt_v, causal, scale, *masks, backend)


def _check(q, k, v, prompt_k, prompt_v, causal, key_mask, attn_mask, prompt_bias, backend):
    if backend not in BACKENDS:
        raise ValueError(f"backend: want one of {', '.join(BACKENDS)}; got {backend!r}")
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"want q [B, Hq, N, d] and k [B, Hkv, M, d]; got {_shape(q)} and {_shape(k)}"
        )
    (B, Hq, N, d), (Hkv, M) = q.shape, k.shape[1:3]
    if d % 8 or not 0 < d <= 256:
        raise ValueError(f"d: want a multiple of 8 up to 256, got {d}")
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"want Hkv to divide Hq; got Hkv {Hkv} and Hq {Hq}")
    _want("k", k, (B, Hkv, M, d))
    _want("v", v, (B, Hkv, M, d))
    P = prompt_k.shape[1] if prompt_k.ndim == 3 else 0
    _want("prompt_k", prompt_k, (Hkv, P, d))
    _want("prompt_v", prompt_v, (Hkv, P, d))
    if causal and M < N:
        raise ValueError(f"causal: want at least as many keys as queries; got M {M} and N {N}")

    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if q.dtype not in dtypes:
        raise ValueError(f"q: want float32, float16, bfloat16 or float64; got {q.dtype}")
    for name, x in dict(k=k, v=v, prompt_k=prompt_k, prompt_v=prompt_v).items():
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: want {q.dtype} on {q.device}; got {x.dtype} on {x.device}")
    for name, x in dict(q=q, k=k, v=v, prompt_k=prompt_k, prompt_v=prompt_v).items():
        if x.stride(-1) != 1 and x.numel() > 0:
            raise ValueError(f"{name}: want a contiguous last axis; got strides {x.stride()}")
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"want tensors on cpu or cuda; got {q.device}")

    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise ValueError(f"key_mask: want bool, got {key_mask.dtype}")
        _want("key_mask", key_mask, (B, M), q.device)
    _want_mask("attn_mask", attn_mask, (B, Hq, N, M), q.device, or_bool=True)
    _want_mask("prompt_bias", prompt_bias, (B, Hq, N, P), q.device, or_bool=False)


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _want(name, x, shape, device=None):
    if x.shape != torch.Size(shape):
        raise ValueError(f"{name}: want {list(shape)}, got {_shape(x)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: want it on {device}, got {x.device}")


def _want_mask(name, mask, full, device, or_bool):
    if mask is None:
        return
    B, H, N, M = full
    if mask.ndim != 4 or mask.shape[0] not in (1, B) or mask.shape[1] not in (1, H):
        raise ValueError(f"{name}: want [{B} or 1, {H} or 1, {N}, {M}], got {_shape(mask)}")
    _want(name, mask, (*mask.shape[:2], N, M), device)
    if not (mask.is_floating_point() or (or_bool and mask.dtype == torch.bool)):
        kinds = "bool or floating point" if or_bool else "floating point"
        raise ValueError(f"{name}: want {kinds}, got {mask.dtype}")
    if mask.requires_grad:
        raise ValueError(f"{name}: want it frozen (this op gives no gradient for it)")
