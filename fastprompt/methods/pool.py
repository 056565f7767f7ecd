"""What the methods with a prompt pool share: options, their checks, how entries are chosen."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.families import VISION, Anatomy, Tower
from fastprompt.methods.base import Method
from fastprompt.ops import reference, select_prompts
from fastprompt.pools import Pool, PoolKeys
from fastprompt.pools.pool import FAMILIES


@dataclass(frozen=True)
class PoolMethod(Method):
    """Base of L2P, DualPrompt and CODA-Prompt: prompts of a vision model that depend on the image.

    In the released code a prefix is keys and values of its own, made by no projection and given as
    one half each. Here, as everywhere in this library, a prompt is rows of hidden states that pass
    the block's own norm and its key and value projections, so each row is one key and one value.
    """

    def trains(self) -> tuple[str, ...]:
        return ("head",) if self.train_head else ()

    def used_layers(self) -> dict[str, tuple[int, ...]]:
        """Option -> the blocks, from 0, that it names."""
        raise NotImplementedError

    def choose(self, query: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        """[B, D] -> what the blocks get (see `pools.side_keys`), and the method's own loss."""
        raise NotImplementedError

    def shared_keys(self, like: Tensor) -> PoolKeys | None:
        """New keys for all blocks together; ``like``: [D]."""
        raise NotImplementedError

    def pool(self, tower: Tower) -> Pool:
        return Pool(tower, self)

    def at_task(self, task: int) -> PoolMethod:
        """The same method when its ``task``-th task is trained.

        Raises:
            ValueError: a method without tasks, or a task that it does not have.
        """
        if not hasattr(self, "task"):
            raise ValueError(f"set_task: want a method with tasks, got {type(self).__name__}")
        new = dataclasses.replace(self, task=task)
        new.check_task()
        return new

    def check_task(self) -> None:
        whole("tasks", self.tasks, 1)
        whole("task", self.task, 0, self.tasks - 1)

    def check(self, anatomy: Anatomy) -> None:
        kind = type(self).__name__
        if anatomy.host is not None:
            raise ValueError(f"{kind}: want a vision model, got {anatomy.family}")
        super().check(anatomy)
        family = anatomy.tower(VISION).family
        if family not in FAMILIES:
            raise ValueError(f"{kind}: want one of {', '.join(FAMILIES)}; got {family}")
        depth = len(anatomy.tower(VISION).blocks)
        for name, layers in self.used_layers().items():
            if not isinstance(layers, tuple) or len({*layers}) != len(layers):
                raise ValueError(f"{name}: want different blocks, as (0, 1), got {layers!r}")
            for layer in layers:
                whole(f"{kind}.{name}", layer, 0, depth - 1)
        if not any(self.used_layers().values()):
            raise ValueError(f"{kind}: want a block to prompt, got none")


def whole(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raises ValueError unless ``value`` is a whole number from ``low`` to ``high``."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):
        upper = "or more" if high is None else f".. {high}"
        raise ValueError(f"{name}: want a whole number {low} {upper}, got {value!r}")


def weight(name: str, value: object) -> None:
    """Raises ValueError unless ``value`` can weigh a loss."""
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: want a number 0 or more, got {value!r}")


def as_tuple(method: Method, *names: str) -> None:
    """Lists (a checkpoint's card knows no tuples) of a frozen method become tuples."""
    for name in names:
        value = getattr(method, name)
        object.__setattr__(method, name, tuple(value) if isinstance(value, list) else value)


def new_keys(entries: int, like: Tensor) -> PoolKeys:
    """Rows of length about 1, where a cosine's gradient is neither lost nor wild."""
    bound = math.sqrt(3 / len(like))
    return PoolKeys(nn.init.uniform_(like.new_empty(entries, len(like)), -bound, bound))


def new_entries(method: Method, entries: int, length: int, like: Tensor) -> Tensor:
    """[M, L, D]: each entry as the method fills a prompt [L, D]."""
    tokens = like.new_empty(entries, length, len(like))
    for entry in tokens:
        method.init_(entry)
    return tokens


def nearest(query: Tensor, keys: Tensor, k: int, batchwise: bool) -> tuple[Tensor, Tensor]:
    """The ``k`` keys of highest cosine.

    Returns:
        indices [B, k], or [1, k] for the whole batch where it votes (the keys that most samples
        have among their k; ties: the lower index first), and each sample's cosines [B, k] to them.
    """
    # the op gathers as well: one column is the least it takes
    _, indices, cosines = select_prompts(query, keys, keys.detach()[:, :1], k, rest=None)
    if not batchwise:
        return indices, cosines
    votes = F.one_hot(indices, len(keys)).sum((0, 1))
    indices = votes.sort(descending=True, stable=True).indices[:k]
    return indices[None], reference.cosines(query, keys[indices])


def pulled(cosines: Tensor) -> Tensor:
    """[B, k] -> the mean over samples of what their chosen keys lack to a cosine of 1."""
    return (1 - cosines).sum() / max(1, len(cosines))


def batch_of_one(index: int, like: Tensor) -> Tensor:
    """The choice [1, 1] of one entry for the whole batch."""
    return torch.full((1, 1), index, device=like.device)
