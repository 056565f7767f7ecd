"""DualPrompt, complementary prompting for continual learning (Wang et al., arXiv 2204.04799)."""

from dataclasses import dataclass

from torch import Tensor

from fastprompt.families import VISION, Anatomy
from fastprompt.methods.pool import (
    PoolMethod,
    as_tuple,
    batch_of_one,
    nearest,
    new_entries,
    new_keys,
    pulled,
    weight,
    whole,
)
from fastprompt.ops import reference
from fastprompt.pools import Pool, PoolKeys
from fastprompt.prompts import Prompt


@dataclass(frozen=True)
class DualPrompt(PoolMethod):
    """General prompts in the first blocks, and in later ones an expert prompt for each task.

    In training (``model.train()``) the current task's expert is used, and its key is pulled towards
    the queries:

        loss = the model's + pull · mean over images of 1 - cosine(query, key of the task)

    In evaluation each image gets the expert whose key is nearest, among the tasks trained so far
    (0 .. ``task``). Experts of a task have rows of their own in each block, under one key.
    `Patch.set_task` goes on to the next task; the others get no gradient then (an optimizer's
    momentum or weight decay would move them all the same: take a new one for each task).

    Args:
        tasks: how many experts there are.
        task: the task that is trained, from 0.
        g_length, e_length: rows of a general and of an expert prompt.
        pull: weight of the matching loss (lambda).
        g_layers, e_layers: blocks, from 0, of general and of expert prompts; none is in both.
        batchwise: in evaluation the whole batch gets the expert that most of its images chose, as
            the released code has it. **It leaks** the task between test images.
        train_head: train the model's ``classifier``, if it has one.
    """

    tasks: int = 10
    task: int = 0
    g_length: int = 5
    e_length: int = 20
    pull: float = 1.0
    g_layers: tuple[int, ...] = (0, 1)
    e_layers: tuple[int, ...] = (2, 3, 4)
    batchwise: bool = False
    train_head: bool = True

    def __post_init__(self) -> None:
        as_tuple(self, "g_layers", "e_layers")

    def lengths(self) -> dict[str, int]:
        return {VISION: self.e_length}

    def used_layers(self) -> dict[str, tuple[int, ...]]:
        return {"g_layers": self.g_layers, "e_layers": self.e_layers}

    def check(self, anatomy: Anatomy) -> None:
        self.check_task()
        whole("g_length", self.g_length, 1)
        whole("e_length", self.e_length, 1)
        weight("pull", self.pull)
        super().check(anatomy)
        both = sorted({*self.g_layers} & {*self.e_layers})
        if both or not self.e_layers:
            raise ValueError(
                "DualPrompt: want blocks with an expert prompt, and none with a general one too; "
                f"got e_layers {self.e_layers} and g_layers {self.g_layers}"
            )

    def prompt(self, kind: str, layer: int, like: Tensor) -> Prompt | None:
        if layer in self.g_layers:
            return Prompt(self.init_(like.new_empty(self.g_length, len(like))))
        if layer in self.e_layers:
            return Prompt(new_entries(self, self.tasks, self.e_length, like))
        return None

    def describe(self, kind: str, layer: int) -> str:
        if layer in self.g_layers:
            return f"{self.g_length} prompt rows as side keys"
        return f"1 of {self.tasks} prompts of {self.e_length} rows as side keys"

    def shared_keys(self, like: Tensor) -> PoolKeys:
        return new_keys(self.tasks, like)

    def choose(self, query: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        if pool.tower.model.training:
            indices = batch_of_one(self.task, query)
            cosines = reference.cosines(query, pool.keys[self.task : self.task + 1])
        else:
            trained = pool.keys[: self.task + 1]
            indices, cosines = nearest(query, trained, 1, self.batchwise)
        return indices, self.pull * pulled(cosines)
