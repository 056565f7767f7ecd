"""A block's forward and backward on tensors, without autograd. What is kept between is `node`'s.

With frozen weights nothing but the way back to the input is wanted, so that no product's input is
needed, only what stands behind something that is not linear: the norms' inputs x and middle, the
attention's q, k, v, out and log-sum-exp, the activation's gate and up.

    db = scale2 · dy                    da = db W_down              dgate, dup = act'(da; gate, up)
    dm = dgate W_gate + dup W_up        dmiddle = dy + norm2'(dm; middle)
    dout = (scale1 · dmiddle) W_o       dq, dk, dv, dprompt_k, dprompt_v = attention'(dout; …)
    dn = q_norm'(rope'(dq)) W_q + k_norm'(rope'(dk)) W_k + dv W_v
    dx = dmiddle + norm1'(dn; x)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastprompt.blocks import fp8
from fastprompt.blocks.elementwise import (
    activate,
    activate_backward,
    add,
    add_and_normalize,
    normalize,
    normalize_backward,
)
from fastprompt.blocks.parts import Parts, Vector
from fastprompt.blocks.products import project, project_backward
from fastprompt.ops.options import Options
from fastprompt.ops.prompt_attention import attend, attend_backward
from fastprompt.ops.quantize_rows import E4M3, Quantized
from fastprompt.ops.rope import backward as rope_backward
from fastprompt.ops.rope import forward as rope


class Side(NamedTuple):
    """What comes to a block beside its tokens."""

    prompt_k: Tensor  # [Hkv, P, d], or sets of them
    prompt_v: Tensor
    cos: Tensor | None  # [B or 1, N, r]
    sin: Tensor | None
    options: Options  # of the attention


class Math(NamedTuple):
    """What a block computes in: a dtype, and whether autocast asked for it.

    ``fp8``: those of its products that can run in fp8.
    """

    dtype: torch.dtype
    autocast: bool
    fp8: bool = False

    def taken_by(self, parts: Sequence[nn.Module]) -> torch.dtype:
        """What the products with these weights, which share their input, take."""
        return E4M3 if self.fp8 and not fp8.why_not(parts) else self.dtype


# ---- forward ----


def projections(parts: Parts, x: Tensor, math: Math) -> list[Tensor]:
    """q, k and v [B, N, H, d] as the products give them."""
    n = normalize(x, parts.norm1, math.taken_by(parts.qkv))
    heads = (-1, parts.head_dim)
    return [y.unflatten(-1, heads) for y in _project(n, parts.qkv, math)]


def turned(parts: Parts, q: Tensor, k: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    """q and k [B, N, H, d] through the norms of their heads and rotated.

    Where neither has a norm, in the memory of q and k, which nobody then reads as they were.
    """
    if parts.q_norm is not None:
        q = normalize(q, parts.q_norm, q.dtype)
    if parts.k_norm is not None:
        k = normalize(k, parts.k_norm, k.dtype)
    if side.cos is None:
        return q, k
    heads_first = q.transpose(1, 2), k.transpose(1, 2)
    ours = (parts.q_norm is None) == (parts.k_norm is None)
    turned = rope(*heads_first, side.cos, side.sin, out=heads_first if ours else None)
    return turned[0].transpose(1, 2), turned[1].transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    """(out [B, N, H, d], log-sum-exp) of q, k, v [B, N, H, d]."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = attend(*heads_first, side.prompt_k, side.prompt_v, side.options)
    return out.transpose(1, 2), lse


def mlp_inputs(
    parts: Parts, x: Tensor, out: Tensor, math: Math
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(middle [B, N, D], the residual stream between attention and MLP; gate, up [B, N, F])."""
    (branch,) = _project(out.flatten(2), (parts.o_proj,), math)
    dtype = math.taken_by(parts.first)
    m, middle = add_and_normalize(x, _scaled(branch, parts.scale1), parts.norm2, dtype)
    return middle, *_gate_and_up(parts, m, math)


def mlp_inputs_again(parts: Parts, middle: Tensor, math: Math) -> tuple[Tensor, Tensor | None]:
    """(gate, up [B, N, F]) of a middle that was kept."""
    return _gate_and_up(parts, normalize(middle, parts.norm2, math.taken_by(parts.first)), math)


def after_mlp(
    parts: Parts, middle: Tensor, gate: Tensor, up: Tensor | None, math: Math, kept: bool
) -> Tensor:
    """The block's output [B, N, D]. ``kept``: gate and up are read later, so not written to."""
    dtype = math.taken_by((parts.down,))
    a = activate(parts.activation, gate, up, dtype, into=None if kept else gate)
    (branch,) = _project(a, (parts.down,), math)
    return add(middle, _scaled(branch, parts.scale2))


def _gate_and_up(parts: Parts, m: Tensor | Quantized, math: Math) -> tuple[Tensor, Tensor | None]:
    gate, *up = _project(m, parts.first, math)
    return gate, (up[0] if up else None)


def _project(x: Tensor | Quantized, parts: Sequence[nn.Module], math: Math) -> list[Tensor]:
    if math.taken_by(parts) == E4M3:
        return fp8.project(x, parts)
    return project(x, parts, math.autocast)


def _scaled(branch: Tensor, scale: Vector | None) -> Tensor:
    return branch if scale is None else branch * scale.value


# ---- backward ----


def mlp_backward(
    parts: Parts,
    dy: Tensor,
    middle: Tensor,
    gate: Tensor,
    up: Tensor | None,
    math: Math,
    kept: bool,
) -> Tensor:
    """dmiddle [B, N, D]. ``kept``: gate and up may be read again (a second backward)."""
    da = _project_backward((_of_branch(dy, parts.scale2, math),), (parts.down,), math)
    if math.taken_by(parts.first) == E4M3:
        dm = fp8.activation_and_project_backward(parts.activation, da, gate, up, parts.first)
    else:
        into = None if kept else (gate, up)
        grads = activate_backward(parts.activation, da, gate, up, into=into)
        dm = project_backward(grads, parts.first, math.autocast)
    return normalize_backward(dm, middle, parts.norm2, residual=dy, into=dm)


def attention_backward(
    parts: Parts,
    dmiddle: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    side: Side,
    math: Math,
    tokens: bool,
    prompts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv [B, N, H, d], dprompt_k, dprompt_v), empty for what is not asked."""
    dbranch = _of_branch(dmiddle, parts.scale1, math)
    dout = _project_backward((dbranch,), (parts.o_proj,), math)
    dout = dout.unflatten(-1, (-1, parts.head_dim))
    heads_first = (t.transpose(1, 2) for t in (dout, out))
    inputs = (t.transpose(1, 2) for t in (q, k, v))
    prompt = (side.prompt_k, side.prompt_v)
    *grads, dprompt_k, dprompt_v = attend_backward(
        *heads_first, lse, *inputs, *prompt, side.options, tokens, prompts
    )
    dq, dk, dv = (g.transpose(1, 2) if tokens else g for g in grads)
    return dq, dk, dv, dprompt_k, dprompt_v


def projections_backward(
    parts: Parts,
    grads: tuple[Tensor, Tensor, Tensor],
    dmiddle: Tensor,
    x: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    side: Side,
    math: Math,
) -> Tensor:
    """dx [B, N, D]; q and k, as `projections` gave them, are read where their heads have norms."""
    dq, dk, dv = grads
    if side.cos is not None:
        heads_first = dq.transpose(1, 2), dk.transpose(1, 2)  # attention's own, so written over
        rope_backward(*heads_first, side.cos, side.sin, out=heads_first)
    if parts.q_norm is not None:
        dq = normalize_backward(dq, q, parts.q_norm, None)
    if parts.k_norm is not None:
        dk = normalize_backward(dk, k, parts.k_norm, None)
    flat = [g.flatten(2) for g in (dq, dk, dv)]
    dn = _project_backward(flat, parts.qkv, math)
    return normalize_backward(dn, x, parts.norm1, residual=dmiddle, into=dn)


def _project_backward(grads: Sequence[Tensor], parts: Sequence[nn.Module], math: Math) -> Tensor:
    if math.taken_by(parts) == E4M3:
        return fp8.project_backward(grads, parts)
    return project_backward(grads, parts, math.autocast)


def _of_branch(dy: Tensor, scale: Vector | None, math: Math) -> Tensor:
    """The gradient of what was added to the residual, before its scale."""
    return (dy if scale is None else dy * scale.value).to(math.dtype)
