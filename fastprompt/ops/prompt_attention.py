"""Attention whose first keys are learned prompts, without writing the concatenation.

    out = softmax(scale · q [prompt_k ; k]ᵀ + mask) [prompt_v ; v]        prompts are never masked

One set of prompts serves every sample, or each sample has its own of several. With the
log-sum-exp L of a whole row over prompts and tokens, the two parts part again exactly:

    p_j  = exp(scale · q·k_j + mask_j - L)          j over prompts, then over tokens
    D    = sum over channels of dout * out
    ds_j = p_j (dout·v_j - D)
    dq   = scale · sum_j ds_j k_j,    dk_j = scale · sum_n ds_nj q_n,    dv_j = sum_n p_nj dout_n

and for prompts the last two sums run over the samples that see them as well. Soft-capped scores
c·tanh(scale · q·k / c) multiply ds by 1 - tanh². Where the tokens need no gradient (the first
prompted layer of a frozen model), only the prompts' two sums are computed.

Backends, each with a ``forward`` and a ``backward`` of the same arguments:
`prompt_attention_triton` (CUDA), `prompt_attention_native` (csrc, on the CPU) and
`prompt_attention_merge` (whatever `vendors` has).
"""

from functools import partial
from numbers import Integral

import torch
from torch import Tensor

from fastprompt import native
from fastprompt.ops import prompt_attention_merge as merge
from fastprompt.ops import prompt_attention_native as compiled
from fastprompt.ops import reference, vendors
from fastprompt.ops.layout import distinct, in_our_layout, rows_like
from fastprompt.ops.options import (
    SCHEMA,
    TENSORS,
    Options,
    as_number,
    check,
    check_ranks,
    check_values,
)

# ---- op: schema, fake, dispatch ----

_INPUTS = f"Tensor q, Tensor k, Tensor v, Tensor prompt_k, Tensor prompt_v, {SCHEMA}"
torch.library.define("fastprompt::prompt_attention", f"({_INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    "fastprompt::prompt_attention_backward",
    f"(Tensor dout, Tensor out, Tensor lse, {_INPUTS}, bool tokens, bool prompts)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("fastprompt::prompt_attention")
def _outputs(q, k, v, prompt_k, prompt_v, *options):
    """[B, Hq, N, d] whose memory is [B, N, Hq, d], so that the caller's reshape is free; lse."""
    B, H, N, _ = q.shape
    return rows_like(q), q.new_empty(B, H, N, dtype=torch.float32)


@torch.library.register_fake("fastprompt::prompt_attention_backward")
def _gradients(dout, out, lse, q, k, v, prompt_k, prompt_v, *options):
    """Each token gradient in [B, tokens, heads, d] memory; an empty tensor where none is asked."""
    *_, tokens, prompts = options

    own = [t.new_empty(t.shape if prompts else 0) for t in (prompt_k, prompt_v)]
    return (*(rows_like(t) if tokens else t.new_empty(0) for t in (q, k, v)), *own)


def chosen_backend(q: Tensor, backend: str = "auto") -> str:
    """Which implementation "auto" stands for on the device and dtype of ``q``.

    A single call that "native" does not take is the vendor's.
    """
    if q.dtype == torch.float64:
        return "reference"
    if backend != "auto":
        return backend
    if q.device.type != "cuda":
        return "native" if native.available() and q.dtype in compiled.DTYPES else "vendor"
    if torch.cuda.get_device_capability(q.device) >= (8, 0):
        return "triton"
    return "xformers" if vendors.has_xformers() else "vendor"


def _implementation(q: Tensor, k: Tensor, prompt_k: Tensor, o: Options, backward: bool = False):
    """Forward or backward of the backend that this very call takes."""
    backend = chosen_backend(q, o.backend)
    if backend == "triton":
        # imported on first use: triton exists on Linux alone
        from fastprompt.ops import prompt_attention_triton as triton

        return triton.backward if backward else triton.forward
    if backend == "native" and compiled.serves(q, k, prompt_k, o, backward):
        return compiled.backward if backward else compiled.forward
    vendor = vendors.named(backend, q.device)
    return partial(merge.backward if backward else merge.forward, vendor)


def _forward(*inputs):
    *tensors, o = *inputs[:5], Options(*inputs[5:])
    check_values(tensors[0], tensors[1], tensors[3], o)
    return _implementation(tensors[0], tensors[1], tensors[3], o)(*tensors, o)


def _backward(dout, out, lse, *rest):
    tensors, o, wanted = rest[:5], Options(*rest[5:-2]), rest[-2:]
    run = _implementation(tensors[0], tensors[1], tensors[3], o, backward=True)
    return run(dout, out, lse, *tensors, o, *wanted)


for _key in ("CPU", "CUDA"):
    torch.library.impl("fastprompt::prompt_attention", _key, _forward)
    torch.library.impl("fastprompt::prompt_attention_backward", _key, _backward)


# ---- autograd ----


class _PromptAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, prompt_k, prompt_v, *options):
        inputs = (q, k, v, prompt_k, prompt_v)
        out, lse = torch.ops.fastprompt.prompt_attention(*inputs, *options)
        o = Options(*options)
        ctx.rest = tuple(o._replace(**dict.fromkeys(TENSORS)))
        ctx.save_for_backward(*inputs, out, lse, *o.tensors)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        saved = ctx.saved_tensors  # asked for once: checkpointing allows no more
        *inputs, out, lse = saved[:7]
        o = Options(*ctx.rest)._replace(**dict(zip(TENSORS, saved[7:], strict=True)))
        tokens, prompts = any(ctx.needs_input_grad[:3]), any(ctx.needs_input_grad[3:5])
        grads = torch.ops.fastprompt.prompt_attention_backward(
            dout, out, lse, *inputs, *o, tokens, prompts
        )
        wanted = zip(grads, ctx.needs_input_grad[:5], strict=True)
        return (*(grad if wants else None for grad, wants in wanted), *[None] * len(o))


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
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    prompt_index: Tensor | None = None,
    prompt_len: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of ``q`` over ``[prompt_k ; k]`` and ``[prompt_v ; v]``.

    Exactly what row-writing deep prompts (VPT-deep, arXiv 2203.12119; M2PT, arXiv 2409.15657)
    compute for the tokens, when ``prompt_k`` and ``prompt_v`` are the block's projections of its
    prompt. float32, float16 and bfloat16 run kernels; float64 runs the reference.

    Args:
        q: [B, Hq, N, d]. Any strides with a contiguous last axis, here and below.
        k, v: [B, Hkv, M, d]; Hkv divides Hq (grouped and multi-query attention).
        prompt_k, prompt_v: [Hkv, P, d], shared by the batch, or with ``prompt_index`` S sets
            [S, Hkv, P, d]. P may be 0.
        causal: query n sees tokens 0 .. n + M - N (aligned at the last key; wants M >= N) and
            every prompt.
        scale: multiplies q·k; 1/sqrt(d) unless given.
        key_mask: [B, M] bool, True where a token may be seen (padding is False).
        attn_mask: [B or 1, Hq or 1, N, M], bool (True: may be seen) or float, added to the scores.
        prompt_bias: [B or 1, Hq or 1, N, P] float, added to the prompts' scores.
        window: query n sees tokens less than this far from n + M - N (itself is 0 far), and every
            prompt. Mistral's and Gemma's ``sliding_window``.
        softcap: c of the scores c·tanh(scale · q·k / c), for tokens and prompts (Gemma 2).
        cu_seqlens_q, cu_seqlens_k: [sequences + 1] int32 or int64, from 0 to N and to M: where
            packed sequences begin and end. B is then 1, a query sees its own sequence alone, and
            causal and window are aligned at the last key of each. Checked on the CPU alone (a
            check would wait for a GPU), as the next two are.
        prompt_index: [B] (packed: [sequences]) int32 or int64, the set of each sample.
        prompt_len: [S] int32 or int64: the first so many rows of a set exist.
        backend: "triton" (CUDA; on the CPU it wants its interpreter); "native", csrc's kernel on
            the CPU, for float32 and bfloat16 without prompt_bias or packing, where B·Hkv is not
            below the threads and (P + M)·d not above 2²² (of one query a head always, but for its
            backward); a mask may be bool, or float32 or bfloat16 without a softcap and for more
            than one query; every other call is sent on to "vendor";
            "vendor", torch's own attention on the tokens and the prompts merged in (on CUDA,
            packing and sets make it wait for the device); "xformers", the same with that package;
            "reference", plain PyTorch. "auto" is Triton on CUDA from sm_80 on (an attn_mask is
            read by its kernels as well), and native on the CPU.

    Returns:
        [B, Hq, N, d] in ``q.dtype``, laid out as [B, N, Hq, d]. A row that may see no token gets
        the prompts' answer, or zeros where it sees no prompt either; never NaN. Gradients go
        through autograd alone (no torch.func transforms, no second derivatives but in float64).

    Raises:
        ValueError: a shape, stride, dtype, device or mask that the op does not serve.
    """
    check_ranks(q, k, v, prompt_k, prompt_v)
    scale = q.shape[-1] ** -0.5 if scale is None else as_number("scale", scale)
    softcap = None if softcap is None else as_number("softcap", softcap)
    window = int(window) if isinstance(window, Integral) and type(window) is not bool else window
    o = Options(
        causal, scale, key_mask, attn_mask, prompt_bias, window, softcap,
        cu_seqlens_q, cu_seqlens_k, prompt_index, prompt_len, backend,
    )  # fmt: skip
    o = _checked(q, k, v, prompt_k, prompt_v, o)
    if _by_reference(q, o):
        return _reference(q, k, v, prompt_k, prompt_v, o)
    return _PromptAttention.apply(*distinct(q, k, v, prompt_k, prompt_v, *o))


# ---- without autograd, for nodes that hold more than attention ----


def attend(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, o: Options
) -> tuple[Tensor, Tensor]:
    """`prompt_attention` and its log-sum-exp [B, Hq, N] float32, which `attend_backward` wants.

    The reference (float64) leaves no log-sum-exp: [0] then.
    """
    o = _checked(q, k, v, prompt_k, prompt_v, o)
    if _by_reference(q, o):
        return _reference(q, k, v, prompt_k, prompt_v, o), q.new_empty(0)
    return torch.ops.fastprompt.prompt_attention(q, k, v, prompt_k, prompt_v, *o)


def attend_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    o: Options,
    tokens: bool = True,
    prompts: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dprompt_k, dprompt_v) of `attend`; empty tensors for what is not asked."""
    inputs = (q, k, v, prompt_k, prompt_v)
    if not _by_reference(q, o):
        o = _effective(q, k, o)
        return torch.ops.fastprompt.prompt_attention_backward(
            dout, out, lse, *inputs, *o, tokens, prompts
        )
    asked = (tokens, tokens, tokens, prompts, prompts)
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_(own) for x, own in zip(inputs, asked, strict=True)]
        wanted = [x for x in inputs if x.requires_grad]
        again = _reference(*inputs, _effective(q, k, o))
    given = iter(torch.autograd.grad(again, wanted, dout) if wanted else ())
    return tuple(next(given) if own else q.new_empty(0) for own in asked)


def _checked(q, k, v, prompt_k, prompt_v, o: Options) -> Options:
    check(q, k, v, prompt_k, prompt_v, o)
    return _effective(q, k, o)


def _effective(q: Tensor, k: Tensor, o: Options) -> Options:
    if o.window is not None and o.window >= max(q.shape[2], k.shape[2]):
        return o._replace(window=None)  # it hides nothing
    return o


def _by_reference(q: Tensor, o: Options) -> bool:
    return q.dtype == torch.float64 or o.backend == "reference"


def _reference(q, k, v, prompt_k, prompt_v, o: Options) -> Tensor:
    check_values(q, k, prompt_k, o)
    options = o._asdict()
    del options["backend"]
    return in_our_layout(reference.prompt_attention(q, k, v, prompt_k, prompt_v, **options))
