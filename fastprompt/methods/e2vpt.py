"""E²VPT, effective and efficient visual prompt tuning (Han et al., arXiv 2307.13770)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastprompt.families import VISION, Anatomy, Block
from fastprompt.methods import lengths
from fastprompt.methods.base import DeepMethod
from fastprompt.methods.lengths import Lengths
from fastprompt.methods.vpt import VPT
from fastprompt.prompts import BlockPrompt, Project, Prompt, free_keys_values


@dataclass(frozen=True)
class E2VPT(DeepMethod):
    """Input prompts before every block, as VPT-deep's, and in its attention learned keys and values
    beside those that the block makes (the paper's P_K and P_V).

    Each head has keys and values of its own, behind all projections and norms. The paper's pruning
    (scoring the trained rows of input prompts and their segments on the task, leaving out the
    least, and training again from the start without them) is not part of this.

    Args:
        num_tokens: input prompt rows per block.
        kv_tokens: learned keys and values per block.
        train_head: train the model's ``classifier``, if it has one.
        layers, init, dropout (of input prompts), and lengths by block (of input prompts): see
            `DeepMethod`. `prefill` fills the input prompts alone.
    """

    num_tokens: Lengths = 10
    kv_tokens: int = 5
    train_head: bool = True

    def asked(self) -> dict[str, Lengths]:
        return {VISION: self.num_tokens}

    def lengths(self) -> dict[str, int]:
        return {kind: length + self.kv_tokens for kind, length in super().lengths().items()}

    def length(self, kind: str, layer: int) -> int:
        return super().length(kind, layer) + self.kv_tokens

    def trains(self) -> tuple[str, ...]:
        return ("head",) if self.train_head else ()

    def row(self, block: Block) -> Tensor:
        """[D, 2, H, d], of one number: the sizes of a row and of a key and a value."""
        row = super().row(block)
        return row.new_empty(1).expand(len(row), 2, *block.kv_heads)

    def prompt(self, kind: str, layer: int, like: Tensor) -> BlockPrompt | None:
        P, D = lengths.at(self.num_tokens, layer), len(like)
        rows = self.init_(like.new_empty(P, D)) if P else like.new_empty(0, D)
        free = like.new_empty(self.kv_tokens, *like.shape[1:])
        if self.kv_tokens:
            self.init_(free.flatten(2).flatten(0, 1))  # a view
        return InputAndKeyValues(rows, free, self.dropout)

    xavier_ = VPT.xavier_

    def describe(self, kind: str, layer: int) -> str:
        rows = lengths.at(self.num_tokens, layer)
        dropped = f", dropout {self.dropout}" if self.dropout else ""
        return f"{rows} prompt rows{dropped} and {self.kv_tokens} keys and values as side keys"

    def check(self, anatomy: Anatomy) -> None:
        lengths.check(self.kv_tokens, "kv_tokens")
        if not isinstance(self.kv_tokens, int) or not self.kv_tokens:
            raise ValueError(
                f"kv_tokens: want one number of 1 or more, got {self.kv_tokens!r}; VPT has none"
            )
        super().check(anatomy)


class InputAndKeyValues(Prompt):
    """``tokens`` [P, D], rows of hidden states, and ``free`` [Q, 2, H, d], keys and values."""

    def __init__(self, tokens: Tensor, free: Tensor, dropout: float = 0.0):
        super().__init__(tokens, dropout)
        self.free = nn.Parameter(free)

    @property
    def length(self) -> int:
        return len(self.tokens) + len(self.free)

    def keys_values(self, project: Project) -> tuple[Tensor, Tensor]:
        free = free_keys_values(self.free)
        if not len(self.tokens):
            return free
        made = super().keys_values(project)
        k, v = (torch.cat([b, a.to(b.dtype)], dim=1) for a, b in zip(made, free, strict=True))
        return k, v

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, free={list(self.free.shape)}"
