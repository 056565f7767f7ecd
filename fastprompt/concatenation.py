"""The literal form of deep prompts, as the code of VPT and M2PT has it: rows written, then cut off.

Tests compare side keys with it and benchmarks race it; nothing else uses it. It has no KV cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastprompt.families import Tower, anatomy
from fastprompt.methods import Method
from fastprompt.prompts import Prompt


@dataclass(eq=False)
class WriteRows:
    """Stands in for ``layer.forward``: [P + N] tokens go through the block, the last N come out."""

    layer: nn.Module
    prompt: Prompt

    def __call__(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        B, P = hidden_states.shape[0], self.prompt.tokens.shape[0]
        rows = self.prompt.tokens.to(hidden_states.dtype).expand(B, -1, -1)
        if args:
            args = (_with_prompt_rows(args[0], P), *args[1:])
        elif "attention_mask" in kwargs:
            kwargs["attention_mask"] = _with_prompt_rows(kwargs["attention_mask"], P)
        hidden_states = torch.cat([rows, hidden_states], dim=1)
        return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)[:, P:]


@dataclass(eq=False)
class WritePositions:
    """Stands in for ``rotary.forward``: prompts take positions 0 .. P-1, tokens move on by P."""

    rotary: nn.Module
    P: int

    def __call__(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.arange(self.P, device=position_ids.device).expand(len(position_ids), -1)
        positions = torch.cat([first, position_ids + self.P], dim=1)
        return type(self.rotary).forward(self.rotary, x, positions)


@dataclass(eq=False)
class WithoutRows:
    """Stands in for ``layer.forward`` of a block without a prompt beside blocks with one."""

    layer: nn.Module
    P: int

    def __call__(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if kwargs.get("position_embeddings") is not None:
            cos, sin = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = cos[:, self.P :], sin[:, self.P :]
        return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)


def concatenate(model: nn.Module, method: Method) -> dict[str, Prompt]:
    """Give an unpatched model literal prompts, in place and for good; all but them is frozen.

    Returns:
        Module name -> prompt, as `Patch.prompts` names them.
    """
    model.requires_grad_(False)
    prompts = {}
    for tower in anatomy(model).towers:
        length = method.lengths().get(tower.kind, 0)
        if length:
            prompts |= _tower(tower, length, method)
    return prompts


def _tower(tower: Tower, length: int, method: Method) -> dict[str, Prompt]:
    prompts = {}
    chosen = method.blocks(tower)
    for block in tower.blocks:
        if block not in chosen:
            block.layer.forward = WithoutRows(block.layer, length)
            continue
        weight = block.norm.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        tokens = torch.empty(length, block.width, dtype=dtype, device=weight.device)
        prompt = block.layer.fastprompt = Prompt(method.init_(tokens))
        block.layer.forward = WriteRows(block.layer, prompt)
        prompts[f"{block.name}.fastprompt"] = prompt
    if tower.rotary is not None:
        tower.rotary.forward = WritePositions(tower.rotary, length)
    return prompts


def _with_prompt_rows(mask: Tensor | None, P: int) -> Tensor | None:
    """A 4-D mask with P more keys, seen by all, and P more queries, whose output is cut off."""
    if mask is None:
        return None  # causal or full over P + N tokens is what is wanted
    seen = True if mask.dtype == torch.bool else 0.0
    return nn.functional.pad(mask, (P, 0, P, 0), value=seen)
