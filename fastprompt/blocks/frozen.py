"""What stands in a layer's place: at each call the block runs as one node, or as it always did.

The layer stays where it is, with its modules, hooks and weights; this object is its ``forward``,
in the instance's ``__dict__`` alone. A plain object that holds its layer: it follows the layer
through deepcopy and pickle, and is no child of it.

Gradient checkpointing asks for what the policy "low" does, so under it a block is recomputed by its
own node and never by the checkpoint as well:

* where transformers checkpoints in the class's ``forward`` (newer than 5.17) the node goes past it;
* where it checkpoints in ``__call__`` (5.17) the node runs inside the checkpoint. Non-reentrant,
  what the node saves is hidden from the checkpoint, which then has nothing to recompute.
  Reentrant, a call with gradients is the recomputation already, and keeps all ("speed").
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from fastprompt import placement, recorder
from fastprompt.attention import ATTRIBUTE, CHOICE, SideKeys, as_options
from fastprompt.blocks import checks
from fastprompt.blocks.memory import Memory
from fastprompt.blocks.node import frozen_block
from fastprompt.blocks.parts import Parts
from fastprompt.families import TEXT, Tower
from fastprompt.ops.options import Options
from fastprompt.prompts import CHILD

if TYPE_CHECKING:
    from fastprompt.loss import FusedLoss

_CHECKPOINTS_CALLS = "__call__" in vars(GradientCheckpointingLayer)


@dataclass(eq=False)
class Frozen:
    """Stands in for ``layer.forward``.

    Attributes:
        memory: says what is kept for backward; one for all blocks of a tower.
        reason: why the last training call ran the layer's own forward; None: it ran as one node.
        ran: whether there was such a call.
        compute: "fp8" asks for products in fp8; ``dtype``: what the last call computed in.
    """

    layer: nn.Module
    parts: Parts
    side: SideKeys
    memory: Memory
    inside: list[checks.Inside]
    index: int  # among the tower's
    compute: str
    names: list[str] = field(default_factory=list)  # of forward's positional arguments, the first
    reason: str | None = None  # one apart
    ran: bool = False
    dtype: torch.dtype | None = None

    @classmethod
    def put_on(
        cls, layer: nn.Module, parts: Parts, side: SideKeys, memory: Memory, compute: str
    ) -> str | None:
        """Take the place of ``layer.forward``. Returns why not, if the block is none of ours."""
        found = checks.inside(layer, ignored=getattr(layer, CHILD, None))
        why = checks.unknown(parts, found)
        if side.previous == "eager":
            why = "eager attention, which returns its weights"
        if why is None:
            names = list(inspect.signature(type(layer).forward).parameters)[2:]
            index = len(memory.blocks)
            own = cls(layer, parts, side, memory, found, index, compute, names)
            placement.put_in(layer, own)
            memory.blocks.append(parts)
        return why

    @classmethod
    def of(cls, layer: nn.Module) -> Frozen | None:
        """What `put_on` put there."""
        found = placement.stands_in(layer)
        return found if isinstance(found, cls) else None

    def undo(self) -> None:
        placement.take_out(self.layer, self)

    def __call__(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        given = kwargs | dict(zip(self.names, args, strict=False))
        # without gradients nothing is kept anyway (evaluation, generation); but what a checkpoint
        # recomputes with gradients must be what it ran without them
        if torch.is_grad_enabled() or self._inside_reentrant():
            reason = self._why_not(hidden_states, given)
            if not torch.compiler.is_compiling():
                self.reason, self.ran = reason, True
            if reason is None:
                return self._run(hidden_states, given)
        return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)

    def why_not(self) -> str | None:
        """What keeps the block from running as one node, as far as is known now."""
        return checks.obstacle(self.parts, self.inside) or self.reason

    def _why_not(self, x: Tensor, given: dict[str, Any]) -> str | None:
        if type(x) not in (Tensor, nn.Parameter) or x.ndim != 3:
            return f"hidden states {type(x).__name__} with {x.ndim} axes"
        if given.get("output_attentions"):
            return "output_attentions"
        if recorder.listened_to():
            return "someone looks at its attention (fastprompt.viz)"
        mask = given.get("attention_mask")
        if mask is not None and not isinstance(mask, Tensor):
            return f"a mask that is a {type(mask).__name__}"
        if self.parts.rotary and given.get("position_embeddings") is None:
            return "no position_embeddings were given"
        cache = self._cache(given)
        if cache is not None and not _is_fresh(cache, self.parts.attention.layer_idx):
            return f"a KV cache ({type(cache).__name__}) that is not a new dynamic one"
        return checks.obstacle(self.parts, self.inside)

    def _run(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        parts, side, attention = self.parts, self.side, self.parts.attention
        dtype = parts.dtype(x)
        if not torch.compiler.is_compiling():
            self.dtype = dtype
        policy, context = self._policy(x, dtype)
        is_causal = given.get("is_causal") if parts.hands_on else None
        masks = as_options(
            attention, given.get("attention_mask"), is_causal, parts.window, *x.shape[:2]
        )
        cos, sin = given["position_embeddings"] if parts.rotary else (None, None)
        cache = self._cache(given)
        with context():
            sides = side.sides(dtype, given.get(CHOICE))
            if sides is None:
                heads = parts.k_proj.out_features // parts.head_dim
                none = x.new_empty(heads, 0, parts.head_dim, dtype=dtype)
                sides = none, none, {}
            prompt_k, prompt_v, choosing = sides
            options = Options(
                scale=parts.scale, backend=side.backend, **{"causal": False} | masks | choosing
            )
            out = frozen_block(
                parts, x, prompt_k, prompt_v, options, cos=cos, sin=sin, policy=policy,
                dtype=dtype, caches=cache is not None, host=self.memory.host, index=self.index,
                fp8=self.compute == "fp8",
            )  # fmt: skip
        if cache is None:
            return out
        y, k, v = out
        cache.update(k, v, attention.layer_idx)
        return y

    def _cache(self, given: dict[str, Any]) -> Any:
        """The KV cache to write to; a checkpointed layer drops it, as transformers' own does."""
        return None if self.checkpointed else given.get("past_key_values")

    @property
    def checkpointed(self) -> bool:
        """Whether transformers' gradient checkpointing is on."""
        return getattr(self.layer, "gradient_checkpointing", False) and self.layer.training

    def _policy(self, x: Tensor, dtype: torch.dtype) -> tuple[str, Callable]:
        """What to keep, and the context to run in."""
        if not self.checkpointed:
            return self.memory.policy(x, dtype), contextlib.nullcontext
        low = "offload" if self.memory.asked == "offload" else "low"
        if self._inside_reentrant():
            return "speed", contextlib.nullcontext
        return low, _out_of_the_checkpoint if _CHECKPOINTS_CALLS else contextlib.nullcontext

    def _inside_reentrant(self) -> bool:
        """Whether this call comes from a reentrant checkpoint of transformers'."""
        if not _CHECKPOINTS_CALLS or not self.checkpointed:
            return False
        options = getattr(self.layer._gradient_checkpointing_func, "keywords", {})
        return options.get("use_reentrant") is not False


class FrozenTowers(NamedTuple):
    """What `freeze` did."""

    blocks: list[Frozen]
    memories: dict[str, Memory]  # by the tower's name
    unfused: dict[str, str]  # block name -> why it never runs as one node


def freeze(
    model: nn.Module,
    towers: list[Tower],
    memory: str,
    loss: FusedLoss | None = None,
    compute: str = "auto",
) -> FrozenTowers:
    """Let each block of the towers, whose attention modules have their `SideKeys`, run as one
    node, where it can. ``memory``: of `memory.CHOICES`; ``loss``: the model's, if it is fused;
    ``compute``: of `fp8.CHOICES`."""
    done = FrozenTowers([], {}, {})
    for i, tower in enumerate(towers):
        # towers run one after another: each leaves as much to those after it as it takes
        share = 0.8 / (len(towers) - i)
        behind = _logits(model, tower)
        own = Memory(memory, share=share, behind=behind, loss=loss if behind else None)
        done.memories[tower.name] = own
        for block in tower.blocks:
            why = block.undescribed
            if block.parts is not None:
                side = vars(block.attention)[ATTRIBUTE]
                why = Frozen.put_on(block.layer, block.parts, side, own, compute)
            if why:
                done.unfused[block.name] = why
            else:
                done.blocks.append(Frozen.of(block.layer))
    return done


def _logits(model: nn.Module, tower: Tower) -> int:
    """Bytes for each token of a language model's logits at their peak, as transformers has them:
    in half precision, in float32, their logarithms, and the gradients of the first two."""
    made = tower.kind == TEXT and not tower.outside
    head = model.get_output_embeddings() if made else None
    return 16 * head.out_features if isinstance(head, nn.Linear) else 0


def _is_fresh(cache: Any, layer: int) -> bool:
    return type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length(layer) == 0


def _out_of_the_checkpoint() -> contextlib.AbstractContextManager:
    """Only the innermost hooks on saved tensors act: these, which leave them as they are."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
