"""What a method asks of a model: how long each tower's prompts are, and what trains beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastprompt.families import TEXT, VISION, Anatomy, Block, Tower
from fastprompt.methods import lengths
from fastprompt.methods.lengths import Lengths
from fastprompt.prompts import BlockPrompt, Prompt, row_like

if TYPE_CHECKING:
    from fastprompt.pools import Pool

Prompted = tuple[Tower, list[BlockPrompt]]  # a tower and its prompts, in the order of its blocks


@dataclass(frozen=True)
class Method:
    """Base of all methods: frozen, of plain values, so that a checkpoint's card can hold it."""

    def lengths(self) -> dict[str, int]:
        """Prompt rows per block for each kind of tower, "vision" and "text"; the most of any."""
        raise NotImplementedError

    def length(self, kind: str, layer: int) -> int:
        """Prompt rows of block ``layer``, from 0, of those that `blocks` gives."""
        return self.lengths()[kind]

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
        """[D]: an empty row of that block's prompt, on its device; free keys have other axes."""
        return row_like(block.like)

    def as_tokens(self, tower: Tower) -> bool:
        """Whether its prompt goes through all blocks, from the first on, as tokens."""
        return False

    def prompt(self, kind: str, layer: int, like: Tensor) -> BlockPrompt | None:
        """A new prompt for a block of such a tower; None: none there.

        ``layer`` is the block's place in `blocks`, from 0, and not in the tower, where some blocks
        have no prompt. ``like`` is `row`'s, of the prompt's width, dtype and device.
        """
        return Prompt(self.init_(like.new_empty(self.length(kind, layer), *like.shape)))

    def position_of_first(self, tower: Tower) -> int:
        """Where its tokens' learned positions begin; rotary ones have no beginning."""
        return 0

    def connect(self, towers: list[Prompted]) -> list[tuple[Tower, nn.Module]]:
        """Tell new prompts of what they share; gives modules to be put beside a tower's blocks."""
        return []

    def folded(self) -> Method:
        """The method that computes the same from prompts `BlockPrompt.folded`."""
        return self

    def describe(self, kind: str, layer: int) -> str:
        """What that block then has, for the report."""
        return f"{self.length(kind, layer)} prompt rows as side keys"

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
            lengths.check(length, f"{kind} prompt")
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


def new_prompts(
    method: Method, towers: list[Tower]
) -> tuple[dict[str, BlockPrompt], list[tuple[Tower, nn.Module]]]:
    """All prompts of a method, by block, and what is to stand beside a tower's blocks."""
    made: dict[str, BlockPrompt] = {}
    found: list[Prompted] = []
    for tower in towers:
        blocks = enumerate(method.blocks(tower))
        new = {b.name: method.prompt(tower.kind, i, method.row(b)) for i, b in blocks}
        new = {name: prompt for name, prompt in new.items() if prompt is not None}
        found.append((tower, [*new.values()]))
        made |= new
    return made, method.connect(found)


LAYERS = ("all", "first", "odd", "bottom", "top")
INITS = ("xavier", "normal")
_STD = 0.02  # what transformers initialises weights with


@dataclass(frozen=True, kw_only=True)
class DeepMethod(Method):
    """Base of methods with prompts in each block, or in some of them.

    A length is a number; or a list of them, one for each block that ``layers`` names; or a dict of
    them by layer, from 0, whose blocks alone then have a prompt.

    Args:
        layers: which blocks of each tower have a prompt. "all"; "first" alone; "odd": every second,
            the first among them; "bottom", "top": the half next to the input (the larger one, of an
            odd number), the other; or indices from 0 as text: "0,3,7". Of a vision-language model's
            vision tower those blocks count whose output is read.
        init: of new prompt rows. "xavier": uniform, as the method has it; "normal": of standard
            deviation 0.02. `prefill` starts from a real text and real images.
        dropout: in training, the probability with which numbers of a prompt's rows are zeroed, as
            VPT has it, before the block's norm. One mask a forward for the whole batch, whose
            samples share a prompt's keys and values; VPT draws one for each sample.
    """

    layers: str = "all"
    # how rows began and were trained is no part of what they are: a checkpoint fits either way
    init: str = field(default="xavier", compare=False)
    dropout: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, lengths.plain(value))

    def asked(self) -> dict[str, Lengths]:
        """Lengths by kind of tower, as they were given."""
        raise NotImplementedError

    def lengths(self) -> dict[str, int]:
        return {kind: max(lengths.each(given), default=0) for kind, given in self.asked().items()}

    def length(self, kind: str, layer: int) -> int:
        return lengths.at(self.asked()[kind], layer)

    def blocks(self, tower: Tower) -> list[Block]:
        given = self.asked().get(tower.kind)
        by_layer = isinstance(given, dict)
        chosen = given if by_layer else chosen_layers(self.layers, len(tower.blocks))
        return [tower.blocks[i] for i in chosen]

    def prompt(self, kind: str, layer: int, like: Tensor) -> BlockPrompt | None:
        P = self.length(kind, layer)
        return self.prompt_of(like.new_empty(P, *like.shape)) if P else None

    def prompt_of(self, rows: Tensor) -> BlockPrompt:
        """A new prompt with these rows, whose numbers are still to be set."""
        return Prompt(self.init_(rows), self.dropout)

    def init_(self, tokens: Tensor) -> Tensor:
        return nn.init.normal_(tokens, std=_STD) if self.init == "normal" else self.xavier_(tokens)

    def xavier_(self, tokens: Tensor) -> Tensor:
        """Fill new prompt rows [P, D] in place, as the method's paper has it."""
        return super().init_(tokens)

    def describe(self, kind: str, layer: int) -> str:
        dropped = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.length(kind, layer)} prompt rows{dropped} as side keys"

    def check(self, anatomy: Anatomy) -> None:
        for kind, given in self.asked().items():
            lengths.check(given, f"{kind} prompt")
        super().check(anatomy)
        if self.init not in INITS:
            raise ValueError(f"init: want one of {', '.join(INITS)}; got {self.init!r}")
        p = self.dropout
        if not isinstance(p, (int, float)) or isinstance(p, bool) or not 0 <= p < 1:
            raise ValueError(f"dropout: want a probability from 0 to below 1, got {p!r}")
        for tower in anatomy.towers:
            if self.lengths().get(tower.kind):
                self._check_layers(tower.kind, len(tower.blocks))

    def _check_layers(self, kind: str, count: int) -> None:
        chosen = chosen_layers(self.layers, count, f"{kind} ")
        if not chosen and count:
            raise ValueError(f"layers={self.layers!r}: none of {count} {kind} block")
        given = self.asked()[kind]
        lengths.check_layers(given, self.layers, len(chosen), count, f"{kind} prompt")


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


def check_projector(method: Method, anatomy: Anatomy) -> None:
    """Raise a ValueError if its projector is to train and there is none."""
    if "projector" in method.trains() and "projector" not in anatomy.parts:
        raise ValueError(
            f"{type(method).__name__}: want a vision-language model, whose projector trains; got "
            f"{anatomy.family}"
        )


@dataclass(frozen=True)
class DeepPrompts(DeepMethod):
    """Prompts before every block of each tower named, and nothing else but a task head.

    The deep form of P-tuning v2 (arXiv 2110.07602) with prompts as rows of hidden states.

    Args:
        vision, text: prompt rows per block of that tower; 0 leaves it alone.
        train_head: train a classification head (``classifier``, ``score``) if the model has one.
        train_projector: train a vision-language model's projector.
        layers, init, dropout, and lengths by block: see `DeepMethod`.
    """

    vision: Lengths = 0
    text: Lengths = 0
    train_head: bool = True
    train_projector: bool = False

    def asked(self) -> dict[str, Lengths]:
        return {VISION: self.vision, TEXT: self.text}

    def trains(self) -> tuple[str, ...]:
        return ("head",) * self.train_head + ("projector",) * self.train_projector

    def check(self, anatomy: Anatomy) -> None:
        check_projector(self, anatomy)
        super().check(anatomy)
