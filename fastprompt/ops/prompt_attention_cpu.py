"""`prompt_attention` on the CPU: the vendor's attention on tokens and on prompts, merged.

Each part comes with its log-sum-exp, so that with w = sigmoid(lse_tokens - lse_prompts)

    out = w · out_tokens + (1 - w) · out_prompts,    lse = logaddexp(lse_tokens, lse_prompts)

and no key or value is ever copied. Backward, the vendor's own kernel is given the *merged* output
and log-sum-exp, from which it recomputes each part's probabilities, and so gives its exact share.
"""

import torch
from torch import Tensor

from fastprompt.ops import reference

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(q, k, v, prompt_k, prompt_v, causal, scale, key_mask, attn_mask, prompt_bias):
    """([B, Hq, N, d] laid out as [B, N, Hq, d], lse [B, Hq, N] float32, natural logarithm)."""
    B, H, N, d = q.shape
    tokens = _tokens_part(q, k, v, causal, scale, key_mask, attn_mask)
    prompts = _prompts_part(q, prompt_k, prompt_v, scale, prompt_bias)
    if tokens and prompts:
        (out_t, lse_t), (out_p, lse_p) = tokens, prompts
        w = torch.sigmoid(lse_t - lse_p)[..., None]
        out = (w * out_t + (1 - w) * out_p).to(q.dtype)
        lse = torch.logaddexp(lse_t, lse_p)
    elif tokens or prompts:
        out, lse = tokens or prompts
    else:  # no key at all, or nothing that asks
        out, lse = q.new_zeros(B, N, H, d), torch.full((B, H, N), -torch.inf)
        out = out.transpose(1, 2)
    # the vendor's strides follow its inputs': say ours once more (no copy where they agree)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


def backward(
    dout, out, lse,
    q, k, v, prompt_k, prompt_v, causal, scale, key_mask, attn_mask, prompt_bias,
    tokens, prompts,
):  # fmt: skip
    """(dq, dk, dv, dprompt_k, dprompt_v); empty tensors for what is not asked."""
    dtype = q.dtype
    # the vendor's backward is 1.5 to 15 times slower in bfloat16 than in float32 (torch 2.14)
    dout, out, q, k, v, prompt_k, prompt_v = (
        t.float() for t in (dout, out, q, k, v, prompt_k, prompt_v)
    )
    # a row that saw nothing has lse -inf; +inf makes every probability of it zero, not NaN
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    dq = dk = dv = dpk = dpv = None
    if tokens and q.numel() and k.numel():
        mask, top_left = _vendor_mask(q, k, causal, key_mask, attn_mask)
        dq, dk, dv = _attend_backward(
            dout, q, k, v, out, lse, 0.0, top_left, attn_mask=mask, scale=scale
        )
    if q.numel() and prompt_k.numel():
        mask = None if prompt_bias is None else prompt_bias.float()
        shared = [t.expand(q.shape[0], -1, -1, -1) for t in (prompt_k, prompt_v)]
        dq_p, dpk, dpv = _attend_backward(
            dout, q, *shared, out, lse, 0.0, False, attn_mask=mask, scale=scale
        )
        dq = dq_p if dq is None else dq.add_(dq_p)
        dpk, dpv = dpk.sum(0), dpv.sum(0)

    def given(grad, x, wanted):
        if not wanted:
            return x.new_empty(0, dtype=dtype)
        return (torch.zeros_like(x) if grad is None else grad).to(dtype)

    rows = (given(g, x, tokens) for g, x in ((dq, q), (dk, k), (dv, v)))
    rows = (g.transpose(1, 2).contiguous().transpose(1, 2) if tokens else g for g in rows)
    own = (given(g, x, prompts) for g, x in ((dpk, prompt_k), (dpv, prompt_v)))
    return *rows, *(g.contiguous() for g in own)


def _tokens_part(q, k, v, causal, scale, key_mask, attn_mask):
    if not (q.numel() and k.numel()):  # the vendor divides by the number of blocks
        return None
    mask, top_left = _vendor_mask(q, k, causal, key_mask, attn_mask)
    out, lse = _attend(q, k, v, 0.0, top_left, attn_mask=mask, scale=scale)
    hidden = _sees_nothing(q, k, mask, top_left, key_mask)
    # there the vendor gives out = 0, which is right, and lse = 0, which is not
    return out, lse if hidden is None else lse.masked_fill(hidden, -torch.inf)


def _prompts_part(q, prompt_k, prompt_v, scale, prompt_bias):
    if not (q.numel() and prompt_k.numel()):
        return None
    shared = [t.expand(q.shape[0], -1, -1, -1) for t in (prompt_k, prompt_v)]
    mask = None if prompt_bias is None else prompt_bias.to(q.dtype)
    out, lse = _attend(q, *shared, 0.0, False, attn_mask=mask, scale=scale)
    if mask is not None:
        lse = lse.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
    return out, lse


def _vendor_mask(q, k, causal, key_mask, attn_mask) -> tuple[Tensor | None, bool]:
    """The vendor's additive mask and its causal flag, which is aligned at the *first* key."""
    N, M = q.shape[2], k.shape[2]
    causal = causal and N > 1  # one query, aligned at the last key, sees everything
    top_left = causal and N == M
    if attn_mask is None and key_mask is None and causal == top_left:
        return None, top_left
    if attn_mask is None and causal == top_left:
        mask = torch.zeros(key_mask.shape, dtype=q.dtype).masked_fill_(~key_mask, -torch.inf)
        return mask[:, None, None, :], top_left
    options = dict(causal=causal, key_mask=key_mask, attn_mask=attn_mask)
    return reference.additive_mask(N, M, q, **options), False


def _sees_nothing(q, k, mask, top_left, key_mask) -> Tensor | None:
    """Rows [B or 1, H or 1, N] to which every token is hidden."""
    if mask is None:
        return None
    if top_left:  # only key_mask beside causality: nothing seen before the first unmasked key
        return (key_mask.cumsum(-1) == 0)[:, None, :]
    return (mask == -torch.inf).all(-1)
