"""Side keys that differ from sample to sample: chosen entries of a pool, or sums of all.

`ops.prompt_attention` takes them as sets with a ``prompt_index``; nothing is concatenated to the
tokens' keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastprompt.attention import SideKeys

if TYPE_CHECKING:
    from fastprompt.pools.pool import Pool


@dataclass(eq=False)
class PoolSideKeys(SideKeys):
    """The side keys of a block that has a pool."""

    pool: Pool | None = None

    def chosen(self, choice: Tensor | None) -> Tensor:
        """What the pool chose for the forward (or recomputation) that this call belongs to."""
        # transformers 5.17's DINOv2 hands its blocks no keywords
        choice = self.pool.choice if choice is None else choice
        if choice is None:
            raise ValueError(
                f"{self.block.name}: want a call from its tower's forward, which chooses the "
                "prompts; got one without a choice (gradient checkpointing of DINOv2 wants a "
                "transformers newer than 5.17)"
            )
        return choice


@dataclass(eq=False)
class ChosenKeys(PoolSideKeys):
    """Entries of a pool ``tokens`` [M, L, D], as a choice [S, k] says.

    S is the batch, or 1: the whole batch has the same. A sample's k·L rows are its entries, one
    after another.
    """

    def for_batch(self, dtype: torch.dtype, choice: Tensor | None) -> tuple[Tensor, Tensor, dict]:
        choice, tokens = self.chosen(choice), self.prompt.tokens
        M, L, _ = tokens.shape
        S, k = choice.shape
        if S == 1 or S * k < M:  # fewer rows than the whole pool has
            sets = [x.to(dtype) for x in self.project(tokens[choice].flatten(1, 2))]
            return (*(x[0] for x in sets), {}) if S == 1 else (*sets, _counted(sets[0]))
        # each entry once for the whole batch, and in evaluation once for all
        entries = [x.transpose(0, 1).unflatten(0, (M, L)) for x in self.keys_values(dtype)]
        if k == 1:
            return *(x.transpose(1, 2) for x in entries), dict(prompt_index=choice[:, 0])
        # not index_select: its gradient adds up in another order every run on CUDA
        sets = [x[choice].flatten(1, 2).transpose(1, 2) for x in entries]
        return *sets, _counted(sets[0])


@dataclass(eq=False)
class SummedKeys(PoolSideKeys):
    """Each sample's own sum of all entries (`Components`); the choice is the query [B, D]."""

    def for_batch(self, dtype: torch.dtype, choice: Tensor | None) -> tuple[Tensor, Tensor, dict]:
        rows = self.prompt.rows(self.chosen(choice), *self.pool.method.span())
        sets = [x.to(dtype) for x in self.project(rows)]
        return *sets, _counted(sets[0])


def _counted(sets: Tensor) -> dict[str, Tensor]:
    return dict(prompt_index=torch.arange(len(sets), device=sets.device))
