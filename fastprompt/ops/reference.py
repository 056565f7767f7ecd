"""What every op means, in plain PyTorch: tests trust it, float64 runs it, kernels race it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    prompt_index: Tensor | None = None,
    **options,
) -> Tensor:
    """``softmax(scale · q [prompt_k ; k]ᵀ + bias) [prompt_v ; v]``; see `ops.prompt_attention`."""
    prompts = (prompt_k, prompt_v)
    if cu_seqlens_q is None:
        rows = (q, k, v, *prompts)
        return prompt_attention_with_weights(*rows, prompt_index=prompt_index, **options)[0]
    # packed sequences: each alone, with its own prompts
    ends, outs = (cu_seqlens_q.tolist(), cu_seqlens_k.tolist()), []
    for i in range(len(ends[0]) - 1):
        of_q, of_k = (slice(end[i], end[i + 1]) for end in ends)
        rows = (q[:, :, of_q], k[:, :, of_k], v[:, :, of_k], *prompts)
        chosen = None if prompt_index is None else prompt_index[i : i + 1]
        outs.append(prompt_attention_with_weights(*rows, prompt_index=chosen, **options)[0])
    return torch.cat(outs, dim=2)


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
    window: int | None = None,
    softcap: float | None = None,
    prompt_index: Tensor | None = None,
    prompt_len: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, N, d] and probabilities [B, Hq, N, P+M], prompts first, after any dropout."""
    B, Hq, N, d = q.shape
    M, P = k.shape[2], prompt_k.shape[-2]
    groups = Hq // k.shape[1]
    if prompt_index is not None:
        prompt_k, prompt_v = prompt_k[prompt_index], prompt_v[prompt_index]  # [B, Hkv, P, d]
    if prompt_len is not None:
        absent = torch.arange(P, device=q.device) >= prompt_len[prompt_index][:, None]  # [B, P]
        # whatever lies there is not read: 0 times NaN would be NaN
        gone = absent[:, None, :, None]
        prompt_k, prompt_v = prompt_k.masked_fill(gone, 0.0), prompt_v.masked_fill(gone, 0.0)
    keys = torch.cat([prompt_k.expand(B, -1, -1, -1), k], dim=2).repeat_interleave(groups, dim=1)
    values = torch.cat([prompt_v.expand(B, -1, -1, -1), v], dim=2).repeat_interleave(groups, dim=1)

    scores = q @ keys.transpose(-1, -2) * (d**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    masks = dict(causal=causal, key_mask=key_mask, attn_mask=attn_mask, window=window)
    tokens = additive_mask(N, M, scores, **masks)
    prompts = scores.new_zeros(1, 1, N, P) if prompt_bias is None else _bias(prompt_bias, scores)
    if prompt_len is not None:
        prompts = prompts.masked_fill(absent[:, None, None, :], -torch.inf)
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
    window: int | None = None,
    ahead: int | None = None,
) -> Tensor:
    """What is added to the scores of the tokens, [B or 1, H or 1, N, M], in ``like``'s dtype.

    Query n stands at key n + ahead; M - N unless given, so that the last query stands at the last
    key. Causal hides the keys after that place, ``window`` those that far or further from it.
    """
    bias = like.new_zeros(1, 1, N, M)
    if causal or window is not None:
        n, j = (torch.arange(size, device=like.device) for size in (N, M))
        back = n[:, None] + (M - N if ahead is None else ahead) - j  # how far behind its query
        hidden = torch.zeros_like(back, dtype=torch.bool)
        if causal:
            hidden |= back < 0
        if window is not None:
            hidden |= back.abs() >= window
        bias = bias.masked_fill(hidden, -torch.inf)
    if key_mask is not None:
        bias = bias.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = bias.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        bias = bias + _bias(attn_mask, like)
    return bias


def _bias(mask: Tensor, like: Tensor) -> Tensor:
    """An additive mask in ``like``'s dtype; whoever writes the lowest number means hidden."""
    lowest = mask <= torch.finfo(mask.dtype).min
    return mask.to(like.dtype).masked_fill(lowest, -torch.inf)


def select_prompts(
    query: Tensor,
    keys: Tensor,
    prompts: Tensor,
    k: int,
    *,
    rest: str | None = "mean",
    key_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [B, k or k+1, ...], indices [B, k], scores [B, k]); see `ops.select_prompts`."""
    B, C = len(query), len(keys)
    scores = cosines(query, keys if key_scale is None else keys * key_scale[:, None])
    indices = scores.detach().sort(descending=True, stable=True).indices[:, :k]
    tokens = prompts[indices]
    if rest is not None and k < C:
        others = torch.ones(B, C, dtype=torch.bool, device=query.device).scatter(1, indices, False)
        wide = torch.promote_types(prompts.dtype, torch.float32)
        mean = others.to(wide) @ prompts.flatten(1).to(wide) / (C - k)
        mean = mean.to(prompts.dtype).view(B, 1, *prompts.shape[1:])
        tokens = torch.cat([tokens, mean], dim=1)
    return tokens, indices, scores.gather(1, indices)


def cosines(query: Tensor, keys: Tensor) -> Tensor:
    """Cosine of every query row to every key row, [B, C], in float32 or wider.

    0 with a zero row, -inf with one whose squared length is not finite.
    """
    (query, _, fine_query), (keys, _, fine_keys) = unit_rows(query), unit_rows(keys)
    wide = torch.promote_types(query.dtype, keys.dtype)
    scores = query.to(wide) @ keys.to(wide).mT
    return scores.masked_fill(~(fine_query & fine_keys.mT), -torch.inf)


def cosine_logits(cls: Tensor, tokens: Tensor, scale: float | Tensor) -> Tensor:
    """``scale`` times the cosine of each row to each of its tokens; see `ops.cosine_logits`."""
    (cls, _, fine_cls), (tokens, _, fine_tokens) = unit_rows(cls), unit_rows(tokens)
    wide = torch.promote_types(cls.dtype, tokens.dtype)
    logits = (
        (tokens.to(wide) @ cls.to(wide)[..., None]).squeeze(-1)
        if tokens.ndim == 3
        else (cls.to(wide) @ tokens.to(wide).mT)
    )
    return scale * logits.masked_fill(~(fine_cls & fine_tokens.squeeze(-1)), torch.nan)


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows at length 1, what they were multiplied by, and whether their squared length is finite.

    In float32 or wider; the last two are [..., 1]. Rows of length 0 or not finite come out as 0,
    multiplied by 0.
    """
    x = x.to(
        torch.promote_types(x.dtype if x.is_floating_point() else torch.float32, torch.float32)
    )
    square = x.square().sum(-1, keepdim=True)
    fine = square.isfinite()
    has_length = fine & (square > 0)
    factor = torch.where(has_length, square, 1.0).rsqrt().masked_fill(~has_length, 0.0)
    return x.masked_fill(~has_length, 0.0) * factor, factor, fine


# ---- the parts of a frozen block ----


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    cast_first: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``x / rms(x) · (offset + weight)``, of ``x + residual`` if given; see `ops.rms_norm`."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset == 0 if cast_first is None else cast_first:
        unit = unit.to(h.dtype)
        factor = weight + offset if offset else weight
    else:
        factor = offset + weight.to(wide.dtype)
    y = (unit * factor).to(h.dtype)
    return y if residual is None else (y, h)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rows of mean 0 and variance 1, times weight, plus bias; see `ops.layer_norm`."""
    h = x if residual is None else x + residual
    wide = torch.promote_types(h.dtype, torch.float32)
    weight, bias = (p if p is None else p.to(wide) for p in (weight, bias))
    y = F.layer_norm(h.to(wide), h.shape[-1:], weight, bias, eps).to(h.dtype)
    return y if residual is None else (y, h)


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """``activation(gate) · up``; see `ops.swiglu`."""
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """``x · Φ(x)``, or one of its two approximations; see `ops.gelu`."""
    return (
        x * torch.sigmoid(1.702 * x)
        if approximate == "quick"
        else F.gelu(x, approximate=approximate)
    )


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Each pair of channels (i, i + r/2) of the first r turned; see `ops.rope`."""
    cos, sin = cos[:, None], sin[:, None]  # the same for all heads
    turned = []
    for x in (q, k):
        first, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        low, high = first.chunk(2, dim=-1)
        first = first * cos + torch.cat([-high, low], dim=-1) * sin
        turned.append(torch.cat([first.to(x.dtype), rest], dim=-1))
    return turned[0], turned[1]


def dequantize_4bit(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    nested: tuple[Tensor, Tensor, Tensor, int] | None = None,
) -> Tensor:
    """Value i is ``code[nibble i] · absmax[i // blocksize]``; see `ops.dequantize_4bit`."""
    if nested is not None:
        code2, absmax2, offset, blocksize2 = nested
        scale2 = absmax2.repeat_interleave(blocksize2)[: absmax.numel()]
        absmax = code2[absmax.long()] * scale2 + offset
    nibbles = torch.stack([packed >> 4, packed & 15], dim=-1).flatten().long()
    n = math.prod(shape)
    values = code[nibbles[:n]] * absmax.repeat_interleave(blocksize)[:n]
    return values.to(dtype).view(shape)
