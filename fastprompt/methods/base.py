"""What a method asks of a model: how long each tower's prompts are, and what trains beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastprompt.attention import SideKeys
from fastprompt.families import TEXT, VISION, Anatomy, Block, Tower
from fastprompt.prompts import Prompt, row_like

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

    def row(self, block: Block) -> Tensor:
        """[W]: an empty row of that block's prompt, on its device; W is D but for free keys."""
        return row_like(block.like.weight)

    def side_keys(self) -> type[SideKeys]:
        """What turns a block's prompt into keys and values."""
        return SideKeys

    def prompt(self, kind: str, layer: int, like: Tensor) -> Prompt | None:
        """A new prompt for block ``layer``, from 0, of such a tower; None: none there.

        ``like`` is `row`'s, of the prompt's width, dtype and device.
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

    def adapt(self, model: nn.Module, anatomy: Anatomy) -> Adapted | None:
        """Put in what is neither a prompt nor a part, such as an adapter; None: nothing.

        All of the model is frozen by then.
        """
        return None

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


class Adapted:
    """What `Method.adapt` put into a model, and the way back.

    Args:
        names: of the parameters that train.
        replaced: module name -> what stands there now, for the report.
    """

    def __init__(self, names: Sequence[str], replaced: dict[str, str]):
        self.names, self.replaced = names, replaced

    def undo(self) -> None:
        raise NotImplementedError


LAYERS = ("all", "first", "odd", "bottom", "top")
INITS = ("xavier", "normal")
_STD = 0.02  # what transformers initialises weights with


@dataclass(frozen=True, kw_only=True)
class DeepMethod(Method):
    """Base of methods with prompts in each block, or in some of them.

    Args:
        layers: which blocks of each tower have a prompt. "all"; "first" alone; "odd": every second,
            the first among them; "bottom", "top": the half next to the input (the larger one, of an
            odd number), the other; or indices from 0 as text: "0,3,7". Of a vision-language model's
            vision tower those blocks count whose output is read.
        init: of new prompt rows. "xavier": uniform, as the method has it; "normal": of standard
            deviation 0.02. `prefill` starts from a real text and real images.
    """

    layers: str = "all"
    # how rows began is no part of what they are: a checkpoint fits either way
    init: str = field(default="xavier", compare=False)

    def blocks(self, tower: Tower) -> list[Block]:
        return [tower.blocks[i] for i in chosen_layers(self.layers, len(tower.blocks))]

    def init_(self, tokens: Tensor) -> Tensor:
        return nn.init.normal_(tokens, std=_STD) if self.init == "normal" else self.xavier_(tokens)

    def xavier_(self, tokens: Tensor) -> Tensor:
        """Fill new prompt rows [P, D] in place, as the method's paper has it."""
        return super().init_(tokens)

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if self.init not in INITS:
            raise ValueError(f"init: want one of {', '.join(INITS)}; got {self.init!r}")
        for kind, length in self.lengths().items():
            count = len(anatomy.tower(kind).blocks) if length else 0
            if length and not chosen_layers(self.layers, count, f"{kind} ") and count:
                raise ValueError(f"layers={self.layers!r}: none of {count} {kind} block")


def chosen_layers(layers: str, count: int, kind: str = "") -> list[int]:
    """Indices of ``count`` blocks that ``layers`` names (see `DeepMethod`), ascending.

    Raises:
        ValueError: no choice of ours, or an index of no block.
    """
    half = (count + 1) // 2
    named = dict(
        all=range(count), first=range(min(1, count)), odd=range(0, count, 2),
        bottom=range(half), top=range(half, count),
    )  # fmt: skip
    parts = [part.strip() for part in str(layers).split(",")]
    if parts[0] in named and len(parts) == 1:
        return list(named[parts[0]])
    if not isinstance(layers, str) or not all(part.isdecimal() for part in parts):
        raise ValueError(f"layers: want one of {', '.join(LAYERS)}, or 0,3,7; got {layers!r}")
    chosen = sorted({int(part) for part in parts})
    if chosen[-1] >= count:
        raise ValueError(f"layers: want indices below {count}, the {kind}blocks; got {layers!r}")
    return chosen


@dataclass(frozen=True)
class DeepPrompts(DeepMethod):
    """Prompts before every block of each tower named, and nothing else but a task head.

    The deep form of P-tuning v2 (arXiv 2110.07602) with prompts as rows of hidden states.

    Args:
        vision, text: prompt rows per block of that tower; 0 leaves it alone.
        train_head: train a classification head (``classifier``, ``score``) if the model has one.
        layers, init: see `DeepMethod`.
    """

    vision: int = 0
    text: int = 0
    train_head: bool = True

    def lengths(self) -> dict[str, int]:
        return {VISION: self.vision, TEXT: self.text}

    def trains(self) -> tuple[str, ...]:
        return ("head",) if self.train_head else ()
