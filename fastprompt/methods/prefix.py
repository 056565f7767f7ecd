"""Prefix tuning (Li and Liang, arXiv 2101.00190), in every layer as P-tuning v2 (2110.07602)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastprompt.families import TEXT, Anatomy, Block, Tower
from fastprompt.methods.base import DeepMethod, Method, Prompted, check_projector
from fastprompt.methods.lengths import Lengths
from fastprompt.methods.pool import whole
from fastprompt.prompts import BlockPrompt, KeyValues


@dataclass(frozen=True)
class PrefixTuning(DeepMethod):
    """The keys and values of each block's prefix are learned as they are, behind its projections
    and the norms of its heads.

    A prefix ``tokens`` [P, 2, Hkv, d] holds keys before rotation, then values. Keys are rotated as
    positions -P .. -1, which computes what PEFT's ``PrefixTuningConfig`` does: its keys are these
    rotated as positions 0 .. P-1. (Under learned positions PEFT's tokens count from P, ours from
    0.) In T5 the encoder and the decoder's self-attention each have a prefix, whose bias is that of
    keys at -P .. -1.

    How a prefix begins decides how well it trains (section 7.4 of Li and Liang):
    ``fastprompt.prefill(patch, input_ids)`` takes the keys and values of a real text. The model
    then begins as the frozen one with that text in front, where attention is full (and learned
    positions begin behind it).

    Args:
        num_tokens: of the prefix.
        init: "normal": standard normal, as PEFT's; "xavier": uniform over (P, 2·Hkv·d), smaller.
        mlp: width of a reparametrisation, as Li and Liang train theirs (section 4.3); 0: none. Then
            one embedding [P, D] for all blocks goes through a layer D -> ``mlp``, tanh, and a layer
            of each block's own -> 2·Hkv·d. `fastprompt.save` folds it away: a checkpoint holds keys
            and values alone. Trainer's checkpoints keep it, to go on from.
        position_offset: added to learned positions (GPT-2's, OPT's): P for prefixes that were
            trained by code which lets the tokens count on from the prefix, as PEFT does.
        train_projector: train a vision-language model's projector, too.
        layers, dropout, and lengths by block: see `DeepMethod`.
    """

    num_tokens: Lengths = 10
    init: str = field(default="normal", compare=False, kw_only=True)
    mlp: int = field(default=0, kw_only=True)
    position_offset: int = field(default=0, kw_only=True)
    train_projector: bool = field(default=False, kw_only=True)

    def asked(self) -> dict[str, Lengths]:
        return {TEXT: self.num_tokens}

    def trains(self) -> tuple[str, ...]:
        return ("projector",) * self.train_projector

    def row(self, block: Block) -> Tensor:
        return super().row(block).new_empty(2, *block.kv_heads)

    def prompt_of(self, rows: Tensor) -> BlockPrompt:
        if self.mlp:
            return FromEmbedding(self.mlp, rows, self.dropout)
        return KeyValues(self.init_(rows), self.dropout)

    def init_(self, tokens: Tensor) -> Tensor:
        if self.init == "normal":
            return nn.init.normal_(tokens)
        self.xavier_(tokens.flatten(1))  # a view
        return tokens

    def connect(self, towers: list[Prompted]) -> list[tuple[Tower, nn.Module]]:
        if not self.mlp:
            return []
        made = []
        for tower, prompts in towers:
            like = Method.row(self, tower.blocks[0])
            longest = max(prompt.length for prompt in prompts)
            shared = PrefixEmbedding(like.new_empty(longest, *like.shape), self.mlp)
            for prompt in prompts:
                prompt.of(shared)
            made.append((tower, shared))
        return made

    def position_of_first(self, tower: Tower) -> int:
        return self.position_offset

    def folded(self) -> PrefixTuning:
        return replace(self, mlp=0)

    def describe(self, kind: str, layer: int) -> str:
        of_mlp = " made by an MLP" if self.mlp else ""
        dropped = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.length(kind, layer)} free keys and values{of_mlp}{dropped}"

    def check(self, anatomy: Anatomy) -> None:
        if not isinstance(self.mlp, int) or isinstance(self.mlp, bool) or self.mlp < 0:
            raise ValueError(f"PrefixTuning.mlp: want a width of 0 or more, got {self.mlp!r}")
        check_projector(self, anatomy)
        whole("PrefixTuning.position_offset", self.position_offset, 0)
        tower = anatomy.tower(TEXT)
        if self.position_offset and (tower is None or tower.counts is None):
            raise ValueError(
                "PrefixTuning.position_offset: want 0, or more under learned positions, as GPT-2's "
                f"or OPT's; got {self.position_offset} for {anatomy.family}"
            )
        super().check(anatomy)


class PrefixEmbedding(nn.Module):
    """What all prefixes of a tower are made from: ``tokens`` [P, D], standard normal, and a layer.

    A child of the tower (``model.fastprompt``).
    """

    def __init__(self, tokens: Tensor, width: int):
        super().__init__()
        self.tokens = nn.Parameter(nn.init.normal_(tokens))
        self.hidden = nn.Linear(tokens.shape[1], width, dtype=tokens.dtype, device=tokens.device)

    def forward(self) -> Tensor:
        """[P, width]"""
        return torch.tanh(self.hidden(self.tokens))

    def folded(self) -> dict[str, Tensor]:
        """Nothing: the prefixes hold what it makes."""
        return {}


class FromEmbedding(KeyValues):
    """Keys and values made from a tower's `PrefixEmbedding` by a layer ``out`` of the block's own.

    Args:
        width: what the embedding gives.
        rows: [P, 2, Hkv, d], for its shape, dtype and device.
    """

    def __init__(self, width: int, rows: Tensor, dropout: float = 0.0):
        BlockPrompt.__init__(self, dropout)
        self.shape = rows.shape
        self.out = nn.Linear(width, rows[0].numel(), dtype=rows.dtype, device=rows.device)

    def of(self, shared: PrefixEmbedding) -> None:
        """Not as a child, which it is of its tower."""
        self.__dict__["shared"] = shared

    @property
    def length(self) -> int:
        return self.shape[0]

    def learned(self) -> Tensor:
        # the last ones, which stand where the longest prefix's last ones do
        made = self.shared()[-self.length :].to(self.out.weight.device)
        return self.out(made).unflatten(-1, self.shape[1:])

    def tensors(self) -> list[Tensor]:
        return [*self.parameters(), *self.shared.parameters()]

    def folded(self) -> dict[str, Tensor]:
        return {"tokens": self.learned()}

    def extra_repr(self) -> str:
        return f"tokens={list(self.shape)}"
