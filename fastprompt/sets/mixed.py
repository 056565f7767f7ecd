"""What the blocks of a tower are told while others than their own prompts are in use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.prompts import BlockPrompt

if TYPE_CHECKING:
    from fastprompt.attention import SideKeys


class _Stack(NamedTuple):
    alone: list[Tensor | None]  # keys and values of each set, as they were stacked
    k: Tensor
    v: Tensor
    lengths: Tensor | None  # [S], where they differ


@dataclass(eq=False)
class Mixed:
    """Prompt sets for one forward of a tower, and which of them each row has.

    Attributes:
        sets: block name -> prompt of each set; a block that is not in it has none.
        index: [B], the set of each row of the tower's batch; of a packed tower [N], of each place.
            None: all have the first.
        stacks: block name -> the sets' keys and values side by side, kept from forward to forward.
    """

    sets: list[dict[str, BlockPrompt]]
    index: Tensor | None = None
    stacks: dict[str, _Stack] = field(default_factory=dict)

    def has(self, block: str) -> bool:
        """Whether any set has a prompt there."""
        return any(block in each for each in self.sets)

    def side_keys(self, side: SideKeys, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict]:
        """As `SideKeys.for_batch`, of a block that `has` a prompt."""
        name = side.block.name
        alone = [
            replace(side, prompt=each[name]).keys_values(dtype) if name in each else None
            for each in self.sets
        ]
        if self.index is None:
            return *alone[0], {}
        alone = [x for kv in alone for x in (kv or (None, None))]
        kept = self.stacks.get(name)
        if kept is None or any(a is not b for a, b in zip(kept.alone, alone, strict=True)):
            kept = self.stacks[name] = _stack(alone)
        options = dict(prompt_index=self.index.to(kept.k.device))
        if kept.lengths is not None:
            options["prompt_len"] = kept.lengths
        return kept.k, kept.v, options


def _stack(alone: list[Tensor | None]) -> _Stack:
    """[S, Hkv, P, d] each, of keys and values [Hkv, P or less, d] in turn; None: of no rows."""
    some = [x for x in alone if x is not None]
    sizes = [0 if x is None else x.shape[1] for x in alone[::2]]
    lengths = None
    # tensors made under inference_mode could not be used in a later graph
    with torch.inference_mode(False), torch.set_grad_enabled(any(x.requires_grad for x in some)):
        filled = [some[i % 2][:, :0] if x is None else x for i, x in enumerate(alone)]
        k, v = (
            torch.stack([F.pad(x, (0, 0, 0, max(sizes) - x.shape[1])) for x in filled[i::2]])
            for i in range(2)
        )
        if len({*sizes}) > 1:
            lengths = torch.tensor(sizes, device=k.device)
    return _Stack(alone, k, v, lengths)
