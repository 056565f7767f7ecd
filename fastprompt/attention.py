"""fastprompt's attention function, as transformers' AttentionInterface calls it.

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
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastprompt import recorder, sdpa
from fastprompt.families import Block, Tower
from fastprompt.families.base import THROUGH
from fastprompt.masks import attention_mask
from fastprompt.ops import prompt_attention, reference
from fastprompt.prompts import BlockPrompt
from fastprompt.rotation import rotate
from fastprompt.sets.mixed import Mixed

NAME = "fastprompt"
# transformers hands rows of several images over whole where the name says flash, else one by one
PACKED = "fastprompt_flash"
ATTRIBUTE = "_fastprompt"
# the keyword under which a pool's choice, or `Mixed` sets, come down to the blocks
CHOICE = "fastprompt_choice"


@dataclass(eq=False)
class SideKeys:
    """What an attention module of a patched tower knows of its block."""

    block: Block
    prompt: BlockPrompt | None  # None: an attention without a prompt
    previous: str  # the attention implementation that the tower had
    backend: str = "auto"
    # it had "eager" for lack of another that transformers has for it
    by_need: bool = field(default=False, kw_only=True)
    # of the tower's forward under way, where no keywords come down to the block
    mixed: Mixed | None = field(default=None, kw_only=True)

    def sides(
        self, dtype: torch.dtype, choice: Tensor | Mixed | None
    ) -> tuple[Tensor, Tensor, dict] | None:
        """What attention sees beside the tokens, as `for_batch` says; None: no prompt at all.

        ``choice`` is what came down with the batch: a pool's, or prompt sets in use.
        """
        mixed = choice if isinstance(choice, Mixed) else self.mixed
        if mixed is None:
            return None if self.prompt is None else self.for_batch(dtype, choice)
        layer = self.block.layer
        recomputed = getattr(layer, "gradient_checkpointing", False) and layer.training
        if mixed is not choice and recomputed:
            raise ValueError(
                f"{self.block.name}: want no gradient checkpointing in patch.using: this "
                "architecture would not tell a recomputed block of its sets"
            )
        return mixed.side_keys(self, dtype) if mixed.has(self.block.name) else None

    def for_batch(self, dtype: torch.dtype, choice: Tensor | None) -> tuple[Tensor, Tensor, dict]:
        """Keys and values [Hkv, P, d], or sets of them with the options that choose among them.

        These are `prompt_attention`'s ``prompt_index`` and ``prompt_len``. ``choice`` is what a
        pool chose for this batch, for the pools' own side keys.
        """
        return *self.keys_values(dtype), {}

    def keys_values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[Hkv, P, d] each. Computed once per forward; kept while nothing changes in evaluation."""
        tracked = torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters())
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
        k, v = self.prompt.keys_values(self.project)
        if self.block.rotary is not None:
            k = rotate(k, self.block.rotary, first)
        return k.to(dtype), v.to(dtype)

    def project(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[S, P, D], rows of hidden states -> keys and values [S, Hkv, P, d], not rotated."""
        block = self.block
        norm, k_proj, v_proj, k_norm = (block.by_now(part) for part in THROUGH)
        rows = rows.to(block.like.weight.dtype)
        if norm is not None:
            rows = norm(rows)
        if k_proj is None:  # outside transformers, the attention itself knows
            return sdpa.keys_values(block.attention, rows)
        if block.fused:  # queries, keys and values side by side
            k, v = k_proj(rows)[..., -2 * block.kv_width :].chunk(2, dim=-1)
        else:
            k, v = k_proj(rows), v_proj(rows)
        if block.k_norm_whole:
            k = k_norm(k)
        k, v = (x.unflatten(-1, (-1, block.head_dim)) for x in (k, v))
        if k_norm is not None and not block.k_norm_whole:
            k = k_norm(k)
        return k.transpose(1, 2), v.transpose(1, 2)

    def _parameters(self) -> list[Tensor]:
        own = [p for module in block_modules(self.block) for p in module.parameters()]
        return self.prompt.tensors() + own

    def _tensors(self) -> list[Tensor]:
        rotary = [] if self.block.rotary is None else [self.block.rotary.inv_freq]
        return self._parameters() + rotary

    def _may_cache(self) -> bool:
        learned, block = self.prompt.tensors(), block_modules(self.block)
        if torch.compiler.is_compiling() or any(type(t) is not nn.Parameter for t in learned):
            return False
        # FSDP2 gathers a weight anew into the same tensor, whose version it keeps
        if any(hasattr(m, "_is_fsdp_managed_module") for m in (self.prompt, *block)):
            return False
        if learned[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        return not any(t.is_inference() for t in self._tensors())  # they count no versions

    def _key(self, dtype: torch.dtype) -> tuple:
        """All that the kept keys and values depend on."""
        tensors = self._tensors()
        device = tensors[0].device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        adapters = tuple(
            str(
                [
                    getattr(m, name, None)
                    for name in ("active_adapters", "merged", "disable_adapters", "scaling")
                ]
            )
            for m in block_modules(self.block)
        )
        versions = tuple((id(t), t.data_ptr(), t._version) for t in tensors)
        return dtype, str(device), autocast, adapters, versions


def name_for(tower: Tower) -> str:
    """The attention implementation that a patched tower's config names."""
    return PACKED if tower.packed else NAME


def block_modules(block: Block) -> list[nn.Module]:
    """The modules that a prompt passes through."""
    through = [block.by_now(part) for part in THROUGH]
    if block.k_proj is None:
        through = [block.norm, *block.attention.modules()]
    return [m for m in through if m is not None]


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
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    crosses = module is not side.block.attention  # which has no prompts of its own
    sides = None if crosses else side.sides(dtype, choice)
    if sides is None and side.previous in ("eager", "sdpa") and not side.block.packed:
        rest = dict(kwargs, dropout=dropout, scaling=scaling, is_causal=is_causal)
        return _without_prompt(side.previous, module, query, key, value, masks, rest)

    query, key, value = (t.to(dtype) for t in (query, key, value))
    if sides is None:
        sides = *key.new_empty(2, key.shape[1], 0, key.shape[3]).unbind(0), {}
    *prompts, choosing = sides
    inputs = (query, key, value, *prompts)
    options = dict(masks, scale=scaling, **_for_rows(side.block, choosing, query, masks))
    if side.previous != "sdpa":  # which in transformers 5.17 left Gemma 2's out
        options["softcap"] = kwargs.get("softcap")
    if bias is not None:
        options["prompt_bias"] = _bias_of(of_prompts, prompts[0].shape[-2], options)
    sinks = kwargs.get("s_aux")
    if sinks is None:
        recorder.record(side.block.name, inputs, options)
    else:
        recorder.record(side.block.name, inputs, dict(options, sinks=sinks))
        inputs, options = with_sinks(inputs, sinks, options)
    # no other way drops what eager attention drops beside soft-capping and sinks
    by_eager = not side.by_need or dropout or kwargs.get("output_attentions")
    if side.previous == "eager" and by_eager and not side.block.packed:
        out, weights = reference.prompt_attention_with_weights(*inputs, dropout=dropout, **options)
        if sinks is not None:  # transformers' weights have no column for them
            weights = weights[..., 1:]
        return out.transpose(1, 2), weights
    if dropout:
        return _with_dropout(*inputs, dropout, options).transpose(1, 2), None
    return prompt_attention(*inputs, backend=side.backend, **options).transpose(1, 2), None


def _with_mask(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _for_rows(block: Block, choosing: dict, query: Tensor, masks: dict) -> dict:
    """The options that choose prompts, of each sequence that the attention sees."""
    index, B = choosing.get("prompt_index"), query.shape[0]
    if index is None:
        return choosing
    if block.packed:  # by place: a sequence has the set of its first
        index = index[masks["cu_seqlens_q"][:-1]]
    elif len(index) != B:  # windows of one image
        if B % max(1, len(index)):
            raise ValueError(
                f"{block.name}: want a batch of {len(index)} rows, each with its prompts, or of "
                f"as many windows of each; got {B}"
            )
        index = index.repeat_interleave(B // len(index))
    return choosing | dict(prompt_index=index)


def _bias_of(bias: Tensor, P: int, options: dict) -> Tensor:
    """[1 or B, H, N, P] of a bias [1, H, N, rows] of places -rows .. -1: prompts end at -1."""
    rows, lengths = bias.shape[-1], options.get("prompt_len")
    if lengths is None:
        return bias[..., rows - P :]
    places = torch.arange(P, device=bias.device) + rows - lengths[:, None]  # [S, P]
    bias = bias[0][..., places.clamp(max=rows - 1)]  # [H, N, S, P]; what is past a set is not seen
    return bias.permute(2, 0, 1, 3)[options["prompt_index"]]


def with_sinks(
    inputs: tuple[Tensor, ...], sinks: Tensor, options: dict
) -> tuple[tuple[Tensor, ...], dict]:
    """gpt-oss's: a score [Hq] in each row's softmax that has no value.

    That is what one more prompt is, the first, whose key and value are 0 and whose bias is that
    score.
    """
    query, key, value, *prompts = inputs
    prompts = [F.pad(x, (0, 0, 1, 0)) for x in prompts]
    bias = query.new_zeros(1, query.shape[1], 1, prompts[0].shape[-2])
    bias[..., 0] = sinks[:, None]
    options = dict(options, prompt_bias=bias.expand(-1, -1, query.shape[2], -1))
    if "prompt_len" in options:
        options["prompt_len"] = options["prompt_len"] + 1
    return (query, key, value, *prompts), options


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
    lengths = options.pop("prompt_len", None)
    if index is not None:
        prompt_k, prompt_v = prompt_k[index], prompt_v[index]
    if options.pop("softcap", None) is not None:
        raise ValueError("attention dropout: want none beside soft-capping (SDPA has no such pair)")
    bias = options.pop("prompt_bias", None)
    mask = reference.additive_mask(query.shape[2], key.shape[2], query, **options)
    if bias is None:
        bias = mask.new_zeros(1, 1, 1, P)
    if lengths is not None:
        absent = torch.arange(P, device=mask.device) >= lengths[index][:, None]
        bias = bias.masked_fill(absent[:, None, None, :], -torch.inf)
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


def register() -> None:
    """Make "fastprompt" known to transformers; twice does no harm."""
    for name in (NAME, PACKED):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, attention_mask)
        assert name in ALL_MASK_ATTENTION_FUNCTIONS
