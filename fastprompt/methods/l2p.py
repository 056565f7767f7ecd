"""L2P, learning to prompt for continual learning (Wang et al., arXiv 2112.08654)."""

from dataclasses import dataclass

from torch import Tensor

from fastprompt.families import VISION, Anatomy
from fastprompt.methods.pool import (
    PoolMethod,
    as_tuple,
    nearest,
    new_entries,
    new_keys,
    pulled,
    weight,
    whole,
)
from fastprompt.pools import Pool, PoolKeys
from fastprompt.prompts import Prompt


@dataclass(frozen=True)
class L2P(PoolMethod):
    """A pool of prompts with keys; each image gets the ``top_n`` whose keys its query is nearest.

        query = CLS of the frozen model without prompts
        loss  = the model's + pull · mean over images of sum over chosen keys of 1 - cosine  (eq. 5)

    The paper writes the chosen rows into the sequence once, before the first block, lets them pass
    all blocks as tokens, and classifies the mean of their outputs. Here they are **side keys** of
    the blocks that ``layers`` names: the first block sees exactly what it would see, later blocks
    see what it wrote into the image's own tokens, and the model's head reads what it always read
    (CLS). With more blocks, each has rows of its own under the same keys and the same choice.

    Args:
        pool_size: entries of the pool (the paper's M).
        length: rows of an entry (L_p).
        top_n: entries for each image (N).
        pull: weight of the pull term (lambda).
        layers: blocks, from 0, that have a pool.
        batchwise: all images of a batch get the entries that most of them chose, as the released
            code has it. **It leaks**: what an image gets then depends on its neighbours, and a test
            batch of one task tells every image of it which task that is.
        train_head: train the model's ``classifier``, if it has one.
    """

    pool_size: int = 10
    length: int = 5
    top_n: int = 5
    pull: float = 0.5
    layers: tuple[int, ...] = (0,)
    batchwise: bool = False
    train_head: bool = True

    def __post_init__(self) -> None:
        as_tuple(self, "layers")

    def lengths(self) -> dict[str, int]:
        return {VISION: self.top_n * self.length}

    def used_layers(self) -> dict[str, tuple[int, ...]]:
        return {"layers": self.layers}

    def check(self, anatomy: Anatomy) -> None:
        whole("pool_size", self.pool_size, 1)
        whole("length", self.length, 1)
        whole("top_n", self.top_n, 1, self.pool_size)
        weight("pull", self.pull)
        super().check(anatomy)

    def prompt(self, kind: str, layer: int, like: Tensor) -> Prompt | None:
        if layer not in self.layers:
            return None
        return Prompt(new_entries(self, self.pool_size, self.length, like))

    def describe(self, kind: str, layer: int) -> str:
        return f"{self.top_n} of {self.pool_size} prompts of {self.length} rows as side keys"

    def shared_keys(self, like: Tensor) -> PoolKeys:
        return new_keys(self.pool_size, like)

    def choose(self, query: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        indices, cosines = nearest(query, pool.keys, self.top_n, self.batchwise)
        return indices, self.pull * pulled(cosines)
