"""Visual prompt tuning, VPT-deep and VPT-shallow (Jia et al., arXiv 2203.12119)."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from fastprompt import token_mode
from fastprompt.families import VISION, Anatomy, Block, Tower
from fastprompt.methods.base import DeepMethod
from fastprompt.methods.lengths import Lengths


@dataclass(frozen=True)
class VPT(DeepMethod):
    """New prompt rows before every block of a vision encoder; the head trains too.

    Args:
        num_tokens: prompt rows per block.
        deep: False is VPT-shallow: one prompt before the first block, whose rows go through all
            blocks as tokens of the image, behind its position embeddings (and CLIP's first norm).
            They are taken out of all hidden states that the model returns, before pooling;
            attentions have them, first.
        train_head: train the model's ``classifier``, if it has one.
        layers, init, dropout, and lengths by block: see `DeepMethod`. VPT-shallow has one length,
            and no choice of layers.
    """

    num_tokens: Lengths = 10
    deep: bool = True
    train_head: bool = True

    def asked(self) -> dict[str, Lengths]:
        return {VISION: self.num_tokens}

    def trains(self) -> tuple[str, ...]:
        return ("head",) if self.train_head else ()

    def as_tokens(self, tower: Tower) -> bool:
        return tower.kind == VISION and not self.deep

    def blocks(self, tower: Tower) -> list[Block]:
        return super().blocks(tower) if self.deep else tower.blocks[:1]

    def xavier_(self, tokens: Tensor) -> Tensor:
        """Uniform within sqrt(6 / (3·16·16 + D)): Xavier over a 16-pixel RGB patch and D."""
        bound = math.sqrt(6 / (3 * 16 * 16 + tokens.shape[1]))
        return nn.init.uniform_(tokens, -bound, bound)

    def describe(self, kind: str, layer: int) -> str:
        what = super().describe(kind, layer)
        return what if self.deep else what.replace("side keys", "tokens, through all blocks")

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if self.deep:
            return
        if not isinstance(self.num_tokens, int) or self.layers != "all":
            raise ValueError(
                "VPT(deep=False): want one length, and no choice of layers; got num_tokens="
                f"{self.num_tokens!r}, layers={self.layers!r}"
            )
        why = token_mode.why_not(anatomy.tower(VISION)) if self.num_tokens else None
        if why is not None:
            raise ValueError(f"VPT(deep=False): want another vision encoder; {why}")
