"""``nn.MultiheadAttention`` written with linear layers and one call of SDPA.

torch's own takes its projections' weights as numbers: 4-bit ones it cannot read, and in evaluation
it runs them in native code that prompts cannot enter.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadAttention(nn.Module):
    """``nn.MultiheadAttention`` whose projections are modules of their own, called as such.

    Args:
        old: whose sizes it has. It wants queries, keys and values of one width.
        in_proj: D -> 3 D, queries, keys and values side by side; ``out_proj``: D -> D.
    """

    def __init__(self, old: nn.MultiheadAttention, in_proj: nn.Module, out_proj: nn.Module):
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = old.embed_dim, old.num_heads, old.head_dim
        self.dropout, self.batch_first = old.dropout, old.batch_first
        self.in_proj, self.out_proj = in_proj, out_proj
        self.train(old.training)

    def forward(self, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """As `attend`."""
        return attend(self, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


def attend(
    module: nn.MultiheadAttention | MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What ``nn.MultiheadAttention.forward`` computes, of the same arguments.

    Args:
        query: [B, N, D], key, value: [B, M, D], or [N, B, D] and [M, B, D] without batch_first, or
            [N, D] and [M, D].
        key_padding_mask: [B, M] or [M]; attn_mask: [N, M] or [B H, N, M]. Added to scores, or bool:
            True is not seen.
        need_weights: return them too, [B, N, M], or [B, H, N, M] without ``average_attn_weights``.
            They are then computed without SDPA, so that no prompts can be among the keys.

    Raises:
        ValueError: a hint of causality without its mask, or other axes.
    """
    if is_causal and attn_mask is None:
        raise ValueError("MultiheadAttention: want attn_mask beside is_causal, got none")
    if query.ndim not in (2, 3):
        raise ValueError(f"MultiheadAttention: want inputs of 2 or 3 axes, got {list(query.shape)}")
    q, k, v = _in_proj(module, query)
    if key is not query:
        _, k, v = _in_proj(module, key)
    if value is not key:
        _, _, v = _in_proj(module, value)
    axes = (0, 1) if module.batch_first else (1, 0)
    if query.ndim == 2:
        q, k, v = (x.unsqueeze(axes[0]) for x in (q, k, v))
    q, k, v = (
        x.unflatten(-1, (module.num_heads, -1)).permute(*axes, 2, 3).transpose(1, 2)
        for x in (q, k, v)
    )
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.unflatten(0, (-1, module.num_heads))
    mask = _added(attn_mask, q)
    if key_padding_mask is not None:
        padding = _added(key_padding_mask[..., None, None, :], q)
        mask = padding if mask is None else mask + padding
    dropout, weights = module.dropout if module.training else 0.0, None
    if need_weights:  # which SDPA keeps to itself
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout)
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    out = module.out_proj(out.transpose(1, 2).permute(*axes, 2, 3).flatten(-2))
    if query.ndim == 2:
        out = out.squeeze(axes[0])
        weights = None if weights is None else weights.squeeze(0)
    return out, weights


def _in_proj(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    if isinstance(module, MultiheadAttention):
        return module.in_proj(x).chunk(3, dim=-1)
    return F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)


def _added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask whose True is not seen, as numbers to be added."""
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)
