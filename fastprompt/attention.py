"""fastprompt's attention and mask functions, as transformers' AttentionInterface calls them.

Each attention module of a patched tower carries a `SideKeys`: a plain object, so that it adds no
module cycle to ``state_dict`` and goes with the model through deepcopy and pickle. It turns the
block's prompt into keys and values by *calling* the block's own norm and projections, so that 4-bit
weights, LoRA and offload hooks keep working there.
"""

import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastprompt import recorder
from fastprompt.families import Block, Tower
from fastprompt.ops import prompt_attention, reference
from fastprompt.prompts import Prompt
from fastprompt.rotation import rotate

NAME = "fastprompt"
# transformers hands rows of several images over whole where the name says flash, else one by one
PACKED = "fastprompt_flash"
ATTRIBUTE = "_fastprompt"
CHOICE = "fastprompt_choice"  # the keyword under which a pool's choice comes down to its blocks


@dataclass(eq=False)
class SideKeys:
    """What an attention module of a patched tower knows of its block."""

    block: Block
    prompt: Prompt | None  # None: an attention without a prompt
    previous: str  # the attention implementation that the tower had
    backend: str = "auto"
    # it had "eager" for lack of another that transformers has for it
    by_need: bool = field(default=False, kw_only=True)

    def for_batch(
        self, dtype: torch.dtype, choice: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [Hkv, P, d], or sets of them with each sample's ``prompt_index``.

        ``choice`` is what a pool chose for this batch, for the pools' own side keys.
        """
        return *self.keys_values(dtype), None

    def keys_values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[Hkv, P, d] each. Computed once per forward; kept while nothing changes in evaluation."""
        block = self.block
        tracked = torch.is_grad_enabled() and any(
            p.requires_grad for m in (self.prompt, *block_modules(block)) for p in m.parameters()
        )
        if tracked or self.prompt.training or not self._may_cache():
            return self.compute(dtype)
        key = self._key(dtype)
        kept = self.prompt.cached(key)
        if kept is None:
            # a tensor made under inference_mode could not be used in a later graph
            with torch.inference_mode(False), torch.no_grad():
                kept = self.compute(dtype)
            self.prompt.keep(key, kept)
        return kept

    def compute(self, dtype: torch.dtype, first: int | None = None) -> tuple[Tensor, Tensor]:
        """[Hkv, P, d] each, of the prompt at positions from ``first`` on; -P unless given."""
        # a batch axis of one: what modules and hooks of a block are used to
        k, v = (x[0] for x in self.project(self.prompt.tokens.flatten(0, -2)[None]))
        if self.block.rotary is not None:
            k = rotate(k, self.block.rotary, first)
        return k.to(dtype), v.to(dtype)

    def project(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[S, P, D], rows of hidden states -> keys and values [S, Hkv, P, d], not rotated."""
        block = self.block
        rows = rows.to(block.like.weight.dtype)
        if block.norm is not None:
            rows = block.norm(rows)
        if block.fused:  # queries, keys and values side by side
            k, v = block.k_proj(rows)[..., -2 * block.kv_width :].chunk(2, dim=-1)
        else:
            k, v = block.k_proj(rows), block.v_proj(rows)
        if block.k_norm_whole:
            k = block.k_norm(k)
        k, v = (x.unflatten(-1, (-1, block.head_dim)) for x in (k, v))
        if block.k_norm is not None and not block.k_norm_whole:
            k = block.k_norm(k)
        return k.transpose(1, 2), v.transpose(1, 2)

    def _tensors(self) -> list[Tensor]:
        rotary = [] if self.block.rotary is None else [self.block.rotary.inv_freq]
        modules = (self.prompt, *block_modules(self.block))
        return [p for module in modules for p in module.parameters()] + rotary

    def _may_cache(self) -> bool:
        tokens = self.prompt.tokens
        if type(tokens) is not nn.Parameter or torch.compiler.is_compiling():
            return False  # FSDP2 hands out DTensors
        if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        return not any(t.is_inference() for t in self._tensors())  # they count no versions

    def _key(self, dtype: torch.dtype) -> tuple:
        """All that the kept keys and values depend on."""
        tensors = self._tensors()
        device = self.prompt.tokens.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        adapters = tuple(
            str(
                [
                    getattr(m, name, None)
                    for name in ("active_adapters", "merged", "disable_adapters")
                ]
            )
            for m in block_modules(self.block)
        )
        versions = tuple((id(t), t.data_ptr(), t._version) for t in tensors)
        return dtype, str(self.prompt.tokens.device), autocast, adapters, versions


def name_for(tower: Tower) -> str:
    """The attention implementation that a patched tower's config names."""
    return PACKED if tower.packed else NAME


def block_modules(block: Block) -> list[nn.Module]:
    """The modules that a prompt passes through."""
    return [m for m in (block.norm, block.k_proj, block.v_proj, block.k_norm) if m is not None]


# ---- the attention function ----


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the prompt of the module's block, if it has one, and its tokens.

    Args:
        query: [B, Hq, N, d]; key, value: [B, Hkv, M, d], the cache already applied.
        attention_mask: what `attention_mask` below returned, or the caller's own 4-D mask.

    Returns:
        [B, N, Hq, d], and the probabilities [B, Hq, N, P+M], prompts first, where the model had
        "eager" attention before it was patched (else None).
    """
    side: SideKeys = module.__dict__[ATTRIBUTE]
    choice = kwargs.pop(CHOICE, None)
    if kwargs.get("output_attentions") and side.previous != "eager":
        raise ValueError(
            "output_attentions: want a model that was loaded with attn_implementation='eager' "
            f"before patching (this one had {side.previous!r})"
        )
    window = kwargs.get("sliding_window")
    masks = as_options(module, attention_mask, is_causal, window, query.shape[0], query.shape[2])
    if side.block.packed:
        masks |= {f"cu_seqlens_{x}": kwargs.get(f"cu_seq_lens_{x}") for x in "qk"}
    bias = kwargs.pop("position_bias", None)
    if bias is not None:  # T5's, over prompts first
        rows = bias.shape[-1] - key.shape[2]
        bias = bias.detach()  # frozen; reentrant checkpointing says that it wants a gradient
        bias, of_prompts = bias[..., rows:], bias[..., :rows]
        masks["attn_mask"] = _with_mask(bias, masks.get("attn_mask"))
    if side.prompt is None and side.previous in ("eager", "sdpa") and not side.block.packed:
        rest = dict(kwargs, dropout=dropout, scaling=scaling, is_causal=is_causal)
        return _without_prompt(side.previous, module, query, key, value, masks, rest)

    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (t.to(dtype) for t in (query, key, value))
    if side.prompt is None:
        *prompts, index = *key.new_empty(2, key.shape[1], 0, key.shape[3]).unbind(0), None
    else:
        *prompts, index = side.for_batch(dtype, choice)
    inputs = (query, key, value, *prompts)
    options = dict(masks, scale=scaling)
    if side.previous != "sdpa":  # which in transformers 5.17 left Gemma 2's out
        options["softcap"] = kwargs.get("softcap")
    if bias is not None:
        options["prompt_bias"] = of_prompts[..., rows - prompts[0].shape[-2] :]
    if index is not None:
        options["prompt_index"] = index
    sinks = kwargs.get("s_aux")
    if sinks is None:
        recorder.record(side.block.name, inputs, options)
    else:
        recorder.record(side.block.name, inputs, dict(options, sinks=sinks))
        inputs, options["prompt_bias"] = with_sinks(inputs, sinks)
    # no other way drops what eager attention drops beside soft-capping and sinks
    by_eager = not side.by_need or dropout or kwargs.get("output_attentions")
    if side.previous == "eager" and by_eager and not side.block.packed:
        out, weights = reference.prompt_attention_with_weights(*inputs, dropout=dropout, **options)
        if sinks is not None:  # transformers' weights have no column for them
            P = prompts[0].shape[-2]
            weights = torch.cat([weights[..., :P], weights[..., P + 1 :]], dim=-1)
        return out.transpose(1, 2), weights
    if dropout:
        return _with_dropout(*inputs, dropout, options).transpose(1, 2), None
    return prompt_attention(*inputs, backend=side.backend, **options).transpose(1, 2), None


def _with_mask(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def with_sinks(inputs: tuple[Tensor, ...], sinks: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """gpt-oss's: a score [Hq] in each row's softmax that has no value.

    That is what one more prompt is whose key and value are 0 and whose bias is that score.
    """
    query, key, value, *prompts = inputs
    prompts = [F.pad(x, (0, 0, 0, 1)) for x in prompts]
    bias = query.new_zeros(1, query.shape[1], 1, prompts[0].shape[-2])
    bias[..., -1] = sinks[:, None]
    return (query, key, value, *prompts), bias.expand(-1, -1, query.shape[2], -1)


def as_options(
    module: nn.Module,
    mask: Tensor | None,
    is_causal: bool | None,
    window: int | None,
    batch: int,
    queries: int,
) -> dict:
    """The mask that an attention module is given, as `prompt_attention` takes it."""
    if is_causal is None:
        # a decoder can be told by its config to look both ways
        is_causal = getattr(module, "is_causal", True) and getattr(module.config, "is_causal", True)
    if mask is None or mask.ndim == 2:  # then `attention_mask` left the window to us
        causal, seen = bool(is_causal) and queries > 1, None if mask is None else mask.bool()
        return dict(causal=causal, key_mask=seen, window=window)
    if queries == 1 and mask.dtype == torch.bool and mask.shape[1] == 1:
        seen = mask[:, 0, 0].expand(batch, -1)
        return dict(causal=False, key_mask=seen)  # decoding with a static cache
    return dict(causal=False, attn_mask=mask)  # a 4-D mask already holds causality


def _without_prompt(previous, module, query, key, value, masks, rest):
    """Send a block that has no prompt on to the implementation it had."""
    shape = (query.shape[2], key.shape[2], query)
    mask = None
    if previous == "eager":
        # the lowest number, as transformers writes it: a row of -inf would give NaN
        mask = reference.additive_mask(*shape, **masks).clamp(min=torch.finfo(query.dtype).min)
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[previous]
        if any(masks.get(name) is not None for name in ("key_mask", "attn_mask", "window")):
            mask = reference.additive_mask(*shape, **masks)
    return function(module, query, key, value, mask, **rest)


def _with_dropout(query, key, value, prompt_k, prompt_v, dropout, options) -> Tensor:
    """Concatenated: a softmax in two parts cannot drop what SDPA drops from the whole row."""
    B, P = query.shape[0], prompt_k.shape[-2]
    scale, index = options.pop("scale"), options.pop("prompt_index", None)
    if index is not None:
        prompt_k, prompt_v = prompt_k[index], prompt_v[index]
    if options.pop("softcap", None) is not None:
        raise ValueError("attention dropout: want none beside soft-capping (SDPA has no such pair)")
    bias = options.pop("prompt_bias", None)
    mask = reference.additive_mask(query.shape[2], key.shape[2], query, **options)
    if bias is None:
        mask = F.pad(mask, (P, 0))
    else:
        lead = torch.broadcast_shapes(mask.shape[:-1], bias.shape[:-1])
        mask = torch.cat([x.expand(*lead, -1) for x in (bias, mask)], dim=-1)
    key, value = (
        torch.cat([prompt.expand(B, -1, -1, -1), x], dim=2)
        for prompt, x in ((prompt_k, key), (prompt_v, value))
    )
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p=dropout, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


# ---- the mask function ----


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs,
) -> Tensor | None:
    """The mask for `attention_forward`, as small as the pattern allows.

    Returns:
        Where the pattern is causal, with or without a sliding window (aligned at the last key), or
        full: the padding mask [B, M] bool, or None without padding; `attention_forward` knows the
        window. Else [B, 1, N, M] bool.
    """
    causal = mask_function is causal_mask_function or _is_sliding_window(mask_function)
    # a static cache is longer than what it holds, so its last key is not the last query's
    at_the_end = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if mask_function is bidirectional_mask_function or (causal and at_the_end):
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        return None if padding is None else padding[:, kv_offset : kv_offset + kv_length]
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
        kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        local_size=local_size, allow_is_causal_skip=False, **kwargs,
    )  # fmt: skip


def _is_sliding_window(mask_function) -> bool:
    """Whether this is ``sliding_window_causal_mask_function(…)`` and nothing more (no packing)."""
    cells = getattr(mask_function, "__closure__", None) or ()
    parts = [cell.cell_contents for cell in cells]
    if len(parts) != 1 or not isinstance(parts[0], tuple) or len(parts[0]) != 2:
        return False
    window, causal = parts[0]
    of = getattr(window, "__qualname__", "")
    return causal is causal_mask_function and of.startswith("sliding_window_overlay.")


def register() -> None:
    """Make "fastprompt" known to transformers; twice does no harm."""
    for name in (NAME, PACKED):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, attention_mask)
        assert name in ALL_MASK_ATTENTION_FUNCTIONS
