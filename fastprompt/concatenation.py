"""The literal form of deep prompts, as the code of VPT and M2PT has it: rows written, then cut off.

Tests compare side keys with it and benchmarks race it; nothing else uses it. It has no KV cache.
"""

import inspect
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastprompt.families import Block, Tower, anatomy
from fastprompt.methods import Method
from fastprompt.prompts import Prompt

# modules of a layer that return a bias [1, H, N, N] between places of an image
_BIAS = "relative_position_bias"


@dataclass(eq=False)
class WriteRows:
    """Stands in for ``module.forward``: [P + N] tokens go through it, the last N come out.

    Attributes:
        module: a block, or its attention where windows are cut before it.
        norm: what prompts go through first, where ``module`` is given normed rows.
        rotated: whether tokens are rotated by places that prompts do not have.
    """

    module: nn.Module
    prompt: Prompt
    norm: nn.Module | None = None
    rotated: bool = False

    def __call__(self, hidden_states: Tensor, *args, **kwargs) -> Tensor | tuple:
        forward, P = type(self.module).forward, self.prompt.tokens.shape[0]
        names = list(inspect.signature(forward).parameters)[2:]
        given = kwargs | dict(zip(names, args, strict=False))
        if given.get("attention_mask") is not None:
            given["attention_mask"] = _with_rows(given["attention_mask"], P)
        rows = self.prompt.tokens.to(hidden_states.dtype)
        rows = rows if self.norm is None else self.norm(rows)
        if self.rotated:
            cos, sin = given["position_embeddings"]
            given["position_embeddings"] = _unrotated(cos, 1.0, P), _unrotated(sin, 0.0, P)
        rows = rows.expand(hidden_states.shape[0], -1, -1)
        out = forward(self.module, torch.cat([rows, hidden_states], dim=1), **given)
        return (out[0][:, P:], *out[1:]) if isinstance(out, tuple) else out[:, P:]


@dataclass(eq=False)
class WritePackedRows:
    """`WriteRows` for images that follow one another in [N, D]: rows before each one's tokens."""

    module: nn.Module
    prompt: Prompt

    def __call__(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs,
    ) -> Tensor:
        P, ends = self.prompt.tokens.shape[0], cu_seqlens.tolist()
        rows = self.prompt.tokens.to(hidden_states.dtype)
        cos, sin = (
            _insert(x, ends, x.new_full((P, x.shape[-1]), fill))
            for x, fill in zip(position_embeddings, (1.0, 0.0), strict=True)
        )
        out = type(self.module).forward(
            self.module,
            _insert(hidden_states, ends, rows),
            cu_seqlens=cu_seqlens + P * torch.arange(len(ends), device=cu_seqlens.device),
            position_embeddings=(cos, sin),
            **kwargs,
        )
        sizes = cu_seqlens.diff().tolist()
        return torch.cat([part[P:] for part in out.split([P + size for size in sizes])])


@dataclass(eq=False)
class WritePositions:
    """Stands in for ``rotary.forward``: prompts take positions 0 .. P-1, tokens move on by P."""

    rotary: nn.Module
    P: int

    def __call__(self, x: Tensor, position_ids: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        first = torch.arange(self.P, device=position_ids.device)
        first = first.expand(*position_ids.shape[:-1], -1)
        positions = torch.cat([first, position_ids + self.P], dim=-1)
        return type(self.rotary).forward(self.rotary, x, positions, *args, **kwargs)


@dataclass(eq=False)
class PadBias:
    """Stands in for the forward of a module that makes a bias: prompts' is 0."""

    module: nn.Module
    P: int

    def __call__(self, *args, **kwargs) -> Tensor:
        return _with_rows(type(self.module).forward(self.module, *args, **kwargs), self.P)


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
        weight = block.like.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        tokens = torch.empty(length, block.width, dtype=dtype, device=weight.device)
        prompt = block.layer.fastprompt = Prompt(method.init_(tokens))
        _write(tower, block, prompt)
        prompts[f"{block.name}.fastprompt"] = prompt
    if tower.rotary is not None:
        tower.rotary.forward = WritePositions(tower.rotary, length)
    return prompts


def _write(tower: Tower, block: Block, prompt: Prompt) -> None:
    layer, attention = block.layer, block.attention
    for owner in (layer, attention):
        bias = getattr(owner, _BIAS, None)
        if bias is not None:
            bias.forward = PadBias(bias, prompt.tokens.shape[0])
    if tower.packed:
        layer.forward = WritePackedRows(layer, prompt)
    elif tower.family == "swin":
        attention.forward = WriteRows(attention, prompt, norm=block.norm)
    else:
        rotated = "position_embeddings" in inspect.signature(type(layer).forward).parameters
        rotated = rotated and tower.rotary is None
        layer.forward = WriteRows(layer, prompt, rotated=rotated)


def _with_rows(mask: Tensor, P: int) -> Tensor:
    """A mask of N x M places with P more keys, seen by all, and P more queries, cut off later."""
    seen = True if mask.dtype == torch.bool else 0.0
    return nn.functional.pad(mask, (P, 0, P, 0), value=seen)


def _unrotated(x: Tensor, value: float, P: int) -> Tensor:
    """A rotation [..., N, d] with P rows before it that rotate nothing."""
    return nn.functional.pad(x, (0, 0, P, 0), value=value)


def _insert(x: Tensor, ends: list[int], rows: Tensor) -> Tensor:
    """``rows`` before each of the parts of ``x`` that ``ends`` bound."""
    parts = (x[start:end] for start, end in pairwise(ends))
    return torch.cat([row for part in parts for row in (rows, part)])
