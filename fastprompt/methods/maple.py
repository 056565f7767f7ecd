"""MaPLe, multi-modal prompt learning (Khattak et al., arXiv 2210.03117)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastprompt.families import TEXT, VISION, Anatomy, Block, Tower
from fastprompt.methods.base import Method, Prompted
from fastprompt.methods.pool import whole
from fastprompt.prompts import BlockPrompt, Prompt
from fastprompt.shards import is_shard

_STD = 0.02


@dataclass(frozen=True)
class MaPLe(Method):
    """Learned prompts in the first blocks of CLIP's text tower, and in those of its vision tower
    prompts made from them, by a learned linear map for each block. The rest is frozen.

        P_vision = map(P_text)

    Up to block ``depth`` the paper writes both prompts anew before each block, which is what side
    keys compute. Where this differs: a text's start token sees the prompts too (in the paper they
    stand behind it), the first prompts carry no position embedding, and behind block ``depth`` no
    prompt is seen (the paper's last ones go on as tokens). A new text prompt is normal, of standard
    deviation 0.02 (the paper's first begins as "a photo of a").

    Served: CLIP, SigLIP and SigLIP 2 of transformers with both towers.

    Args:
        num_tokens: prompt rows per block, the same in both towers.
        depth: how many blocks of each tower have prompts, the first ones (the paper's J).
    """

    num_tokens: int = 2
    depth: int = 9

    def lengths(self) -> dict[str, int]:
        return {VISION: self.num_tokens, TEXT: self.num_tokens}

    def trains(self) -> tuple[str, ...]:
        return ()

    def blocks(self, tower: Tower) -> list[Block]:
        return tower.blocks[: self.depth]

    def prompt(self, kind: str, layer: int, like: Tensor) -> BlockPrompt:
        if kind == VISION:
            return MappedPrompt()
        rows = like.new_empty(self.num_tokens, *like.shape)
        return Prompt(nn.init.normal_(rows, std=_STD))

    def connect(self, towers: list[Prompted]) -> list[tuple[Tower, nn.Module]]:
        found = {tower.kind: (self.blocks(tower), prompts) for tower, prompts in towers}
        _, sources = found[TEXT]
        for block, prompt, source in zip(*found[VISION], sources, strict=True):
            prompt.couple(source, self.row(block))
        return []

    def describe(self, kind: str, layer: int) -> str:
        of_text = " made from the text's" if kind == VISION else ""
        return f"{self.num_tokens} prompt rows{of_text} as side keys"

    def check(self, anatomy: Anatomy) -> None:
        kinds = sorted(tower.kind for tower in anatomy.towers)
        if anatomy.host is not None or kinds != [TEXT, VISION]:
            raise ValueError(
                f"MaPLe: want a CLIP with a text and a vision tower, got {anatomy.family} with "
                f"{', '.join(kinds)}" + " and a projector between" * (anatomy.host is not None)
            )
        whole("MaPLe.num_tokens", self.num_tokens, 1)
        blocks = min(len(tower.blocks) for tower in anatomy.towers)
        whole("MaPLe.depth", self.depth, 1, blocks)
        super().check(anatomy)


class MappedPrompt(BlockPrompt):
    """Rows that a linear ``map`` of its own makes from another block's prompt."""

    def couple(self, source: Prompt, like: Tensor) -> None:
        """Make the map to rows as ``like``, an empty one [D]. ``source`` stays its own block's
        child, and is none of this module's."""
        shape = source.tokens.shape[1], len(like)
        self.map = nn.Linear(*shape, dtype=like.dtype, device=like.device)
        self.__dict__["source"] = source

    @property
    def length(self) -> int:
        return self.source.length

    def learned(self) -> Tensor:
        if is_shard(self.source.tokens):  # gathered for its own block's forward alone
            raise ValueError("MaPLe: want whole parameters of the text tower, got FSDP's shards")
        return self.map(self.source.learned().to(self.map.weight.device))

    def tensors(self) -> list[Tensor]:
        return [*self.parameters(), *self.source.parameters()]
