"""Which prompts each row of a batch has: what the towers are told while `Patch.using` lasts.

A text's row has one set, and so do the images in it. Which images these are is counted: each row's
share of the vision tower's batch is its share of the image tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastprompt import attention
from fastprompt.families import VISION, Anatomy, Tower
from fastprompt.placement import device_of
from fastprompt.prompts import BlockPrompt
from fastprompt.sets.mixed import Mixed
from fastprompt.tapping import HostMethod

# hosts whose images, or tiles of images, all become the same number of tokens
_EVEN = ("llava", "llava_linear", "paligemma", "gemma3", "internvl", "idefics3", "smolvlm")
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "hidden_states")


@dataclass(eq=False)
class Rows:
    """Tells each tower of a model, before its forward, which prompts its rows have.

    Attributes:
        sets: block name -> prompt, of each set.
        which: of each row of the batch its set; None: all have the first.
        images: how many rows of the vision tower's batch each row has; None: counted.
        tokens: the image tokens of each row, in the forward or ``generate`` under way.
        generating: whether it is ``generate``, which repeats rows (beams, several answers).
    """

    model: nn.Module
    anatomy: Anatomy
    sets: list[dict[str, BlockPrompt]]
    which: list[int] | None = None
    images: Sequence[int] | None = None
    tokens: list[int] | None = None
    generating: bool = False
    _stacks: dict[str, dict] = field(default_factory=dict)  # of each tower
    _last: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)  # its last index

    def put_on(self, stack: ExitStack) -> None:
        """Until the stack is left."""
        handles = []
        if self.which is not None:
            if hasattr(self.model, "generate"):
                stack.callback(Generate(self.model, self).put_on().undo)
            if self.anatomy.host is not None:
                host = self.anatomy.host
                handles.append(host.register_forward_pre_hook(self.count, with_kwargs=True))
                handles.append(host.register_forward_hook(self.forget, always_call=True))
        for tower in self.anatomy.towers:
            tell = Tell(self, tower)
            # before the hooks that ask which rows have prompts
            handles.append(
                tower.model.register_forward_pre_hook(tell, with_kwargs=True, prepend=True)
            )
            handles.append(tower.model.register_forward_hook(tell.nothing, always_call=True))
        for handle in handles:
            stack.callback(handle.remove)

    def mixed(self, tower: Tower, batch: int) -> Mixed:
        """What the blocks of a tower are told of a batch of so many rows (packed: places)."""
        stacks = self._stacks.setdefault(tower.name, {})
        if self.which is None:
            return Mixed(self.sets, None, stacks)
        index = self._index(tower, batch)
        if tower.name not in self._last or self._last[tower.name][0] != index:
            device = device_of(tower.blocks[0].like)
            self._last[tower.name] = index, torch.tensor(index, device=device)
        return Mixed(self.sets, self._last[tower.name][1], stacks)

    def _index(self, tower: Tower, batch: int) -> list[int]:
        if tower.kind == VISION and self.anatomy.host is not None:
            counts = self._images(tower, batch)
        else:
            counts = self._repeats(batch, tower.name or "the batch")
        return [s for s, count in zip(self.which, counts, strict=True) for _ in range(count)]

    def _repeats(self, batch: int, where: str) -> list[int]:
        """How many rows of a batch each of ours has: one, or as `generate` repeats them."""
        rows = len(self.which)
        if batch != rows and not (self.generating and batch % rows == 0):
            raise ValueError(f"using: want a name for each row, {batch} of {where}; got {rows}")
        return [batch // rows] * rows

    # ---- images ----

    def _images(self, tower: Tower, batch: int) -> list[int]:
        """How many rows (packed: places) of the vision tower's batch each row has."""
        tokens = self.tokens
        if self.images is not None:
            total = sum(self.images)
            fits = batch == total or (self.generating and total and batch % total == 0)
            if tower.packed or not fits:
                what = "no images=, they are counted" if tower.packed else f"a sum of {batch}"
                raise ValueError(f"images: want {what}, got {list(self.images)}")
            return [n * batch // max(1, total) for n in self.images]
        if not tokens or not (tower.packed or self.anatomy.family in _EVEN):
            raise ValueError(
                f"using: of this call of {tower.name} ({self.anatomy.family}) it cannot be known "
                "whose its images are: give images=, how many images (or tiles of them) are in "
                "each row"
            )
        shares = [n * batch / max(1, sum(tokens)) for n in tokens]
        if not all(share.is_integer() for share in shares) or sum(shares) != batch:
            raise ValueError(
                f"using: want {batch} images of as many tokens each, got rows of {tokens}"
            )
        shares = iter(shares)
        return [
            sum(int(next(shares)) for _ in range(n)) for n in self._repeats(len(tokens), "text")
        ]

    def count(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of a vision-language model."""
        given = _named(type(module).forward, args, kwargs)
        if given.get("pixel_values") is not None:
            self.tokens = self.image_tokens(given.get("input_ids"))

    def forget(self, *_) -> None:
        """Its forward hook."""
        self.tokens = None

    def image_tokens(self, ids: Any) -> list[int] | None:
        """Of each row of ids [B, N]; None: not known."""
        if self.anatomy.host is None or not isinstance(ids, Tensor):
            return None
        config = self.anatomy.host.config
        token = getattr(config, "image_token_id", None)
        token = config.image_token_index if token is None else token
        return (ids == token).sum(1).tolist()


@dataclass(eq=False)
class Tell:
    """Forward pre-hook of a tower; `nothing` is its forward hook."""

    rows: Rows
    tower: Tower

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = _named(type(module).forward, args, kwargs)
        batch = next((len(x) for name in _INPUTS if (x := given.get(name)) is not None), 0)
        mixed = self.rows.mixed(self.tower, batch)
        self._leave(mixed)
        return args, kwargs | {attention.CHOICE: mixed}

    def nothing(self, *_) -> None:
        self._leave(None)

    def _leave(self, mixed: Mixed | None) -> None:
        """For blocks that get no keywords."""
        for block in (*self.tower.blocks, *self.tower.unread):
            side = vars(block.attention).get(attention.ATTRIBUTE)
            if side is not None:  # a tower without prompts
                side.mixed = mixed


@dataclass(eq=False)
class Generate(HostMethod):
    """Stands in for ``generate``, which may run the vision tower before the model's forward."""

    rows: Rows
    name: ClassVar[str] = "generate"

    def __call__(self, *args, **kwargs) -> Any:
        rows, given = self.rows, _named(type(self.host).generate, args, kwargs)
        ids = given.get("inputs", given.get("input_ids"))
        if ids is not None:
            rows._repeats(len(ids), "generate")
        rows.tokens, rows.generating = rows.image_tokens(ids), True
        try:
            return self.own(*args, **kwargs)
        finally:
            rows.tokens, rows.generating = None, False


def _named(function: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a method's call by name."""
    names = list(inspect.signature(function).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs
