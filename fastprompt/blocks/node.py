"""A frozen block as one autograd node: what each memory policy keeps, and the order of backward.

    "speed"      x, q, k, v, out, log-sum-exp, middle, gate, up        no product is recomputed
    "balanced"   the same without gate and up                          they are recomputed
    "low"        x                                                     all is, but down_proj
    "offload"    x, in the host's memory (`offload`)

(q and k before the norms of their heads, where they have any; no x where no gradient goes to it.)
Everything goes through ``save_for_backward``, so that hooks on saved tensors, a second backward and
the check for writes in place work as everywhere. No weight is saved: each is read from its module
when it is used.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastprompt.blocks import compute
from fastprompt.blocks.compute import Math, Side
from fastprompt.blocks.fp8 import check_device
from fastprompt.blocks.offload import Host
from fastprompt.blocks.parts import Parts
from fastprompt.ops.layout import distinct
from fastprompt.ops.options import Options

# of the attention's options, those that a block has
_TENSORS = ("key_mask", "attn_mask", "prompt_index", "prompt_len")


class Plan(NamedTuple):
    """What a call of the node is told beside its tensors."""

    parts: Parts
    policy: str
    math: Math
    options: Options  # without tensors
    caches: bool  # whether k and v are returned for a KV cache
    host: Host
    index: int  # the block's place in its tower


class _FrozenBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, prompt_k, prompt_v, cos, sin, *rest):
        *tensors, plan = rest
        parts, math = plan.parts, plan.math
        beside = (prompt_k, prompt_v, cos, sin, *tensors)
        side = _side(plan, *beside)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = raw = compute.projections(parts, x, math)
            q, k = compute.turned(parts, q, k, side)
            out, lse = compute.attention(q, k, v, side)
            middle, gate, up = compute.mlp_inputs(parts, x, out, math)
            y = compute.after_mlp(parts, middle, gate, up, math, kept=plan.policy == "speed")

        ctx.plan, ctx.sent = plan, None
        keeps_x = ctx.needs_input_grad[0] or plan.policy in ("low", "offload")
        kept = [x if keeps_x else None]
        if plan.policy == "offload" and x.device.type == "cuda":  # on the CPU it is there already
            ctx.sent = plan.host.send(x, plan.index)
            kept = [ctx.sent.pinned]
        if plan.policy in ("speed", "balanced"):
            kept += raw if parts.q_norm or parts.k_norm else (q, k, v)
            kept += (out, lse, middle)
        if plan.policy == "speed":
            kept += (gate, up)
        ctx.save_for_backward(*beside, *kept)
        return (y, k.transpose(1, 2), v.transpose(1, 2)) if plan.caches else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dk_cached=None, dv_cached=None):
        plan = ctx.plan
        parts, math = plan.parts, plan.math
        saved = ctx.saved_tensors  # asked for once: checkpointing allows no more
        beside, (x, *kept) = saved[:8], saved[8:]
        side = _side(plan, *beside)
        to_x, prompts = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.sent is not None:
                x = ctx.sent.fetch(x)
            if not kept:
                raw_q, raw_k, v = compute.projections(parts, x, math)
            else:
                raw_q, raw_k, v = kept[:3]
            q, k = raw_q, raw_k
            if not kept or parts.q_norm or parts.k_norm:
                q, k = compute.turned(parts, raw_q, raw_k, side)
            if not kept:
                out, lse = compute.attention(q, k, v, side)
                middle, gate, up = compute.mlp_inputs(parts, x, out, math)
            else:
                out, lse, middle, *both = kept[3:]
                gate, up = both or compute.mlp_inputs_again(parts, middle, math)

            speed = len(kept) > 6
            dmiddle = compute.mlp_backward(parts, dy, middle, gate, up, math, kept=speed)
            del gate, up
            *grads, dprompt_k, dprompt_v = compute.attention_backward(
                parts, dmiddle, q, k, v, out, lse, side, math, to_x, prompts
            )
            dx = None
            if to_x:
                if plan.caches:
                    grads[1] = grads[1] + dk_cached.transpose(1, 2)
                    grads[2] = grads[2] + dv_cached.transpose(1, 2)
                dx = compute.projections_backward(
                    parts, grads, dmiddle, x, raw_q, raw_k, side, math
                ).to(x.dtype)
        if not prompts:
            dprompt_k = dprompt_v = None
        return dx, dprompt_k, dprompt_v, *[None] * 7


def _side(plan: Plan, prompt_k, prompt_v, cos, sin, *tensors) -> Side:
    o = plan.options._replace(**dict(zip(_TENSORS, tensors, strict=True)))
    return Side(prompt_k, prompt_v, cos, sin, o)


def frozen_block(
    parts: Parts,
    x: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    options: Options,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    policy: str = "speed",
    dtype: torch.dtype | None = None,
    caches: bool = False,
    host: Host | None = None,
    index: int = 0,
    fp8: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """A pre-norm transformer block with frozen weights; gradients go to x and the prompt alone.

    Args:
        parts: the block. Its weights must be frozen.
        x: [B, N, D] float, the residual stream.
        prompt_k, prompt_v: [Hkv, P, d] in the dtype computed in, or sets of them with
            ``options.prompt_index`` and ``prompt_len``; as `ops.prompt_attention` takes them.
        options: of the attention; ``scale`` and all masks.
        cos, sin: [B or 1, N, r], half-split rotation of q and k.
        policy: "speed", "balanced", "low" or "offload": what is kept for backward.
        dtype: what to compute in; by default autocast's, or what the block's first norm returns.
        caches: return the block's keys and values [B, Hkv, N, d] as well, as a KV cache takes
            them. Gradients go through them too.
        host, index: under "offload", where all blocks of one tower send their inputs, and this
            block's place among them: the next one's is fetched ahead in backward.
        fp8: where the block computes in bfloat16, run those of its products in fp8 that can
            (`blocks.fp8.why_not`).

    Returns:
        [B, N, D] in the dtype of x, or the wider one of it and ``dtype``.

    Raises:
        ValueError: what `ops.prompt_attention` and `ops.nf4_linear` refuse, or ``fp8`` on a card
            that has none.
    """
    dtype = dtype or parts.dtype(x)
    fp8 = fp8 and dtype == torch.bfloat16
    if fp8 and not torch.compiler.is_compiling():
        check_device(x.device)
    math = Math(dtype, torch.is_autocast_enabled(x.device.type), fp8)
    tensors = [getattr(options, name) for name in _TENSORS]
    options = options._replace(**dict.fromkeys(_TENSORS))
    plan = Plan(parts, policy, math, options, caches, host or Host(), index)
    return _FrozenBlock.apply(*distinct(x, prompt_k, prompt_v, cos, sin, *tensors), plan)
