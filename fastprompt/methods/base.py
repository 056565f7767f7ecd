"""What a method asks of a model: how long each tower's prompts are, and what trains beside them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastprompt.families import TEXT, VISION, Anatomy, Block, Tower
from fastprompt.prompts import Prompt

if TYPE_CHECKING:
    from fastprompt.pools import Pool


@dataclass(frozen=True)
class Method:
    """Base of all methods: frozen, of plain values, so that a checkpoint's card can hold it."""

    def lengths(self) -> dict[str, int]:
        """Prompt rows per block for each kind of tower, "vision" and "text"."""
        raise NotImplementedError

    def trains(self) -> tuple[str, ...]:
        """Parts that train beside the prompts: of "projector", "lm_head", "head"."""
        raise NotImplementedError

    def shown(self) -> str:
        """What a vision-language model's projector sees of the visual prompts: `tapping.SHOWN`."""
        return "drop"

    def blocks(self, tower: Tower) -> list[Block]:
        """The blocks of a tower that get a prompt, in order; `prompt` may still say none."""
        return tower.blocks

    def prompt(self, kind: str, layer: int, like: Tensor) -> Prompt | None:
        """A new prompt for block ``layer``, from 0, of such a tower; None: none there.

        ``like`` is [D], of the prompt's width, dtype and device.
        """
        return Prompt(self.init_(like.new_empty(self.lengths()[kind], len(like))))

    def describe(self, kind: str, layer: int) -> str:
        """What that block then has, for the report."""
        return f"{self.lengths()[kind]} prompt rows as side keys"

    def pool(self, tower: Tower) -> Pool | None:
        """What chooses prompts for each sample of the tower; None: all samples have the same."""
        return None

    def init_(self, tokens: Tensor) -> Tensor:
        """Fill new prompt rows [P, D] in place: Xavier-uniform over (1, P, D), as M2PT has it."""
        P, D = tokens.shape
        bound = math.sqrt(6 / (P * D + D))
        return nn.init.uniform_(tokens, -bound, bound)

    def check(self, anatomy: Anatomy) -> None:
        """Raise a ValueError if the method asks for what the model does not have."""
        for kind, length in self.lengths().items():
            if not isinstance(length, int) or isinstance(length, bool) or length < 0:
                raise ValueError(f"{kind} prompt: want a length of 0 or more, got {length!r}")
            if length and anatomy.tower(kind) is None:
                has = ", ".join(tower.kind for tower in anatomy.towers)
                raise ValueError(f"{self!r}: want a {kind} tower; {anatomy.family} has {has}")

    def card(self) -> dict:
        return {"name": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class DeepPrompts(Method):
    """Prompts before every block of each tower named, and nothing else but a task head.

    The deep form of P-tuning v2 (arXiv 2110.07602) with prompts as rows of hidden states.

    Args:
        vision, text: prompt rows per block of that tower; 0 leaves it alone.
        train_head: train a classification head (``classifier``, ``score``) if the model has one.
    """

    vision: int = 0
    text: int = 0
    train_head: bool = True

    def lengths(self) -> dict[str, int]:
        return {VISION: self.vision, TEXT: self.text}

    def trains(self) -> tuple[str, ...]:
        return ("head",) if self.train_head else ()
