"""CODA-Prompt, decomposed attention-based prompting (Smith et al., arXiv 2211.13218)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastprompt.families import VISION, Anatomy
from fastprompt.methods.pool import PoolMethod, as_tuple, weight, whole
from fastprompt.pools import Components, Pool
from fastprompt.pools.parts import orthogonality


@dataclass(frozen=True)
class CODAPrompt(PoolMethod):
    """Each image's prompt is a weighted sum of all components of a block's pool.

        prompt = sum over m of cosine(query * A_m, K_m) P_m
        loss   = the model's + ortho · sum over blocks, over P, K and A, of mean (X Xᵀ - 1)²

    with X the components as rows of a matrix. A prompt row passes the block's norm, so a sum's
    direction reaches the keys and values and its length does not (the released code's prefixes are
    not normed). With several ``tasks`` the components are shared out: task t trains its own
    pool_size / tasks, uses those of earlier tasks as they are, and does not see later ones.
    `Patch.set_task` goes on to the next (with a new optimizer: momentum or weight decay would move
    the frozen ones).

    Args:
        pool_size: components of each block (the paper's M).
        length: rows of the prompt.
        ortho: weight of the orthogonality penalty (lambda).
        layers: blocks, from 0, that have a pool.
        tasks: how many tasks share the components.
        task: the task that is trained, from 0.
        train_head: train the model's ``classifier``, if it has one.
    """

    pool_size: int = 100
    length: int = 8
    ortho: float = 0.1
    layers: tuple[int, ...] = (0, 1, 2, 3, 4)
    tasks: int = 1
    task: int = 0
    train_head: bool = True

    def __post_init__(self) -> None:
        as_tuple(self, "layers")

    def lengths(self) -> dict[str, int]:
        return {VISION: self.length}

    def used_layers(self) -> dict[str, tuple[int, ...]]:
        return {"layers": self.layers}

    def check(self, anatomy: Anatomy) -> None:
        self.check_task()
        whole("pool_size", self.pool_size, 1)
        whole("length", self.length, 1)
        weight("ortho", self.ortho)
        if self.pool_size % self.tasks:
            raise ValueError(
                f"pool_size: want a multiple of {self.tasks} tasks, got {self.pool_size}"
            )
        super().check(anatomy)

    def span(self) -> tuple[int, int]:
        """Components that stay as they are, and those that take part."""
        each = self.pool_size // self.tasks
        return self.task * each, (self.task + 1) * each

    def prompt(self, kind: str, layer: int, like: Tensor) -> Components | None:
        if layer not in self.layers:
            return None
        M, L, D = self.pool_size, self.length, len(like)
        # components at right angles to each other, as far as there is room
        P, K, A = (nn.init.orthogonal_(like.new_empty(M, size)) for size in (L * D, D, D))
        return Components(P.view(M, L, D), K, A)

    def describe(self, kind: str, layer: int) -> str:
        return f"{self.length} prompt rows, each summed of {self.pool_size}, as side keys"

    def shared_keys(self, like: Tensor) -> None:
        return None  # each block has its own

    def choose(self, query: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        loss = query.new_zeros((), dtype=torch.promote_types(query.dtype, torch.float32))
        if self.ortho and torch.is_grad_enabled():
            parts = [x.flatten(1) for p in pool.prompts for x in p.parts(*self.span())]
            loss = self.ortho * sum(orthogonality(x) for x in parts)
        return query, loss
