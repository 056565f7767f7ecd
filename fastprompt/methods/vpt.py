"""Visual prompt tuning, VPT-deep (Jia et al., arXiv 2203.12119)."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from fastprompt.families import VISION, Anatomy
from fastprompt.methods.base import DeepMethod


@dataclass(frozen=True)
class VPT(DeepMethod):
    """New prompt rows before every block of a vision encoder; the head trains too.

    Args:
        num_tokens: prompt rows per block.
        deep: True. VPT-shallow reads the outputs of its prompts and is not served yet.
        train_head: train the model's ``classifier``, if it has one.
        layers, init: see `DeepMethod`.
    """

    num_tokens: int = 10
    deep: bool = True
    train_head: bool = True

    def lengths(self) -> dict[str, int]:
        return {VISION: self.num_tokens}

    def trains(self) -> tuple[str, ...]:
        return ("head",) if self.train_head else ()

    def xavier_(self, tokens: Tensor) -> Tensor:
        """Uniform within sqrt(6 / (3·16·16 + D)): Xavier over a 16-pixel RGB patch and D."""
        bound = math.sqrt(6 / (3 * 16 * 16 + tokens.shape[1]))
        return nn.init.uniform_(tokens, -bound, bound)

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if not self.deep:
            raise ValueError("VPT: want deep=True, got False (VPT-shallow is not served yet)")
