"""What every op means, in plain PyTorch: tests trust it, float64 runs it, kernels race it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, **options
) -> Tensor:
    """``softmax(scale · q [prompt_k ; k]ᵀ + bias) [prompt_v ; v]``; see `ops.prompt_attention`."""
    return prompt_attention_with_weights(q, k, v, prompt_k, prompt_v, **options)[0]


def prompt_attention_with_weights(
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
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, N, d] and probabilities [B, Hq, N, P+M], prompts first, after any dropout."""
    B, Hq, N, d = q.shape
    M, P = k.shape[2], prompt_k.shape[1]
    groups = Hq // k.shape[1]
    keys = torch.cat([prompt_k.expand(B, -1, -1, -1), k], dim=2).repeat_interleave(groups, dim=1)
    values = torch.cat([prompt_v.expand(B, -1, -1, -1), v], dim=2).repeat_interleave(groups, dim=1)

    scores = q @ keys.transpose(-1, -2) * (d**-0.5 if scale is None else scale)
    tokens = additive_mask(N, M, scores, causal=causal, key_mask=key_mask, attn_mask=attn_mask)
    prompts = scores.new_zeros(1, 1, N, P) if prompt_bias is None else prompt_bias.to(scores.dtype)
    lead = torch.broadcast_shapes(tokens.shape[:2], prompts.shape[:2])
    bias = torch.cat([prompts.expand(*lead, N, P), tokens.expand(*lead, N, M)], dim=-1)

    # a row that sees no key at all (possible only without prompts) gives zeros, never NaN
    sees_nothing = (bias == -torch.inf).all(-1, keepdim=True)
    scores = scores + bias.masked_fill(sees_nothing, 0.0)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=wide).masked_fill(sees_nothing, 0.0).to(q.dtype)
    weights = F.dropout(weights, dropout)
    return weights @ values, weights


def additive_mask(
    N: int,
    M: int,
    like: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """What is added to the scores of the tokens, [B or 1, H or 1, N, M], in ``like``'s dtype.

    Causal is aligned at the last key: query n sees keys 0 .. n + M - N.
    """
    bias = like.new_zeros(1, 1, N, M)
    if causal:
        hidden = torch.ones(N, M, dtype=torch.bool, device=like.device).triu(M - N + 1)
        bias = bias.masked_fill(hidden, -torch.inf)
    if key_mask is not None:
        bias = bias.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = bias.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        bias = bias + attn_mask.to(like.dtype)
    return bias
