"""`prompt_attention` on the CPU by csrc/attention: one pass over prompts and tokens, both ways."""

import torch
from torch import Tensor

from fastprompt import native
from fastprompt.ops.layout import rows_like
from fastprompt.ops.options import Options

DTYPES = (torch.float32, torch.bfloat16)
_LONGEST = 1 << 22  # keys times channels: what a thread copies is four such tables at most


def serves(q: Tensor, k: Tensor, prompt_k: Tensor, o: Options, backward: bool = False) -> bool:
    """Whether csrc takes this call; whatever it does not take is the vendor's.

    A forward and a backward may be different ones': what passes between them is the same.
    """
    if q.dtype not in DTYPES or not native.available():
        return False
    if (o.prompt_bias, o.cu_seqlens_q) != (None, None) or not _reads(o.attn_mask, o.softcap):
        return False
    if q.shape[2] == 1 and not backward:
        return o.attn_mask is None  # its keys are read where they lie
    keys = k.shape[2] + prompt_k.shape[-2]
    # a pair of a sample and a key head is one thread's work, and copied by it
    return keys * q.shape[3] <= _LONGEST and k.shape[0] * k.shape[1] >= torch.get_num_threads()


def _reads(mask: Tensor | None, softcap: float | None) -> bool:
    if mask is None or mask.dtype == torch.bool:
        return True
    # a slope of the cap is told from a score, which a number added to it would hide
    return mask.dtype in native.MASKS and not softcap


def forward(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, o: Options
) -> tuple[Tensor, Tensor]:
    """([B, Hq, N, d] laid out as [B, N, Hq, d], lse [B, Hq, N] float32, natural logarithm)."""
    B, H, N, _ = q.shape
    out, lse = rows_like(q), q.new_empty(B, H, N, dtype=torch.float32)
    native.attention(q, k, v, prompt_k, prompt_v, out, lse, **_options(o))
    return out, lse


def backward(
    dout, out, lse, q, k, v, prompt_k, prompt_v, o: Options, tokens: bool, prompts: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dprompt_k, dprompt_v); empty tensors for what is not asked."""
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    rows = tuple(rows_like(x) for x in (q, k, v)) if tokens else None
    shares, parts = None, None
    if prompts:
        parts, count = native.attention_parts(*k.shape[:2], 8 * prompt_k.numel())
        shares = torch.zeros(count, 2, *prompt_k.shape)
    native.attention(
        q, k, v, prompt_k, prompt_v, out, lse,
        dout=dout, token_grads=rows, prompt_grads=shares, parts=parts, **_options(o),
    )  # fmt: skip
    own = [shares[:, i].sum(0).to(q.dtype) if prompts else q.new_empty(0) for i in (0, 1)]
    return *(rows or [q.new_empty(0) for _ in range(3)]), *own


def _options(o: Options) -> dict:
    given = dict(key_mask=o.key_mask, prompt_index=o.prompt_index, prompt_len=o.prompt_len)
    for name, t in given.items():
        if t is not None:
            given[name] = t.contiguous() if t.dtype == torch.bool else t.long().contiguous()
    given["attn_mask"] = o.attn_mask
    return dict(causal=o.causal, scale=o.scale, window=o.window, softcap=o.softcap, **given)
