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
from fastprompt.methods.base import new_prompts
from fastprompt.prompts import CHILD, Prompt

# modules of a layer that return a bias [1, H, N, N] between places of an image
_BIAS = "relative_position_bias"
# a layer's arguments of places by places
_MASKS = ("attention_mask", "attn_mask", "shared_rel_pos_bias")


@dataclass(eq=False)
class WriteRows:
    """Stands in for ``module.forward``: [P + N] tokens go through it, the last N come out.

    Attributes:
        module: a block, or its attention where windows are cut before it.
        norm: what prompts go through first, where ``module`` is given normed rows.
        rotated: whether tokens are rotated by places that prompts do not have.
        skip: rows by which another block's prompt is longer: positions that this one's has not.
        axis: of tokens among those of hidden states.
    """

    module: nn.Module
    prompt: Prompt
    norm: nn.Module | None = None
    rotated: bool = False
    skip: int = 0
    axis: int = 1

    def __call__(self, hidden_states: Tensor, *args, **kwargs) -> Tensor | tuple:
        forward, P = type(self.module).forward, self.prompt.tokens.shape[0]
        names = list(inspect.signature(forward).parameters)[2:]
        given = kwargs | dict(zip(names, args, strict=False))
        for name in _MASKS:
            if given.get(name) is not None:
                given[name] = _with_rows(given[name], P)
        rows = self.prompt.rows().to(hidden_states.dtype)
        rows = rows if self.norm is None else self.norm(rows)
        if self.rotated:
            cos, sin = given["position_embeddings"]
            given["position_embeddings"] = _unrotated(cos, 1.0, P), _unrotated(sin, 0.0, P)
        elif self.skip and given.get("position_embeddings") is not None:
            cos, sin = given["position_embeddings"]
            given["position_embeddings"] = cos[:, self.skip :], sin[:, self.skip :]
        rows = rows.expand(hidden_states.shape[1 - self.axis], -1, -1).movedim(1, self.axis)
        out = forward(self.module, torch.cat([rows, hidden_states], dim=self.axis), **given)
        if isinstance(out, tuple):
            return out[0][:, P:], *out[1:]
        return out.narrow(self.axis, P, out.shape[self.axis] - P)


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
    """Stands in for the method of a module that makes a bias: prompts' is 0."""

    module: nn.Module
    P: int
    method: str = "forward"

    def __call__(self, *args, **kwargs) -> Tensor:
        made = getattr(type(self.module), self.method)(self.module, *args, **kwargs)
        return _with_rows(made, self.P)


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
    lengths = method.lengths()
    towers = [tower for tower in anatomy(model).towers if lengths.get(tower.kind)]
    prompts, _ = new_prompts(method, towers)
    if any(map(method.as_tokens, towers)) or {type(p) for p in prompts.values()} - {Prompt}:
        raise ValueError(f"concatenate: want prompts that are rows of each block, got {method}")
    model.requires_grad_(False)
    for tower in towers:
        _tower(tower, lengths[tower.kind], prompts)
    return {f"{name}.{CHILD}": prompt for name, prompt in prompts.items()}


def _tower(tower: Tower, length: int, prompts: dict[str, Prompt]) -> None:
    for block in tower.blocks:
        prompt = prompts.get(block.name)
        if prompt is None:
            block.layer.forward = WithoutRows(block.layer, 0 if tower.rotary is None else length)
            continue
        block.layer.add_module(CHILD, prompt)
        _write(tower, block, prompt, length - prompt.length)
    if tower.rotary is not None:
        tower.rotary.forward = WritePositions(tower.rotary, length)


def _write(tower: Tower, block: Block, prompt: Prompt, skip: int) -> None:
    layer, attention, P = block.layer, block.attention, prompt.tokens.shape[0]
    for owner in (layer, attention):
        bias = getattr(owner, _BIAS, None)
        if bias is not None:
            bias.forward = PadBias(bias, P)
    if hasattr(attention, "_get_rel_pos_bias"):  # timm's BEiT
        attention._get_rel_pos_bias = PadBias(attention, P, "_get_rel_pos_bias")
    if hasattr(attention, "num_prefix_tokens"):  # timm's EVA: those that are not rotated
        attention.num_prefix_tokens += P
    if tower.packed:
        layer.forward = WritePackedRows(layer, prompt)
    elif tower.family == "swin":
        attention.forward = WriteRows(attention, prompt, norm=block.norm)
    else:
        rotated = "position_embeddings" in inspect.signature(type(layer).forward).parameters
        rotated = rotated and tower.rotary is None
        axis = int(getattr(attention, "batch_first", True))  # of open_clip's
        layer.forward = WriteRows(layer, prompt, rotated=rotated, skip=skip, axis=axis)


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
