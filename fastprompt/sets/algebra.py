"""Prompt sets made from others: their mean, what is between two, one after another.

patch.add("both", concatenate(patch.sets["a"], patch.sets["b"]))
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastprompt.methods.base import DeepMethod
from fastprompt.sets.sets import PromptSet


def average(*sets: PromptSet, weights: Sequence[float] | None = None) -> PromptSet:
    """The weighted sum of sets of the same lengths, number by number.

    Args:
        weights: one for each set; all 1/n unless given.

    Raises:
        ValueError: no set, sets of other methods or lengths, with projectors of their own, or
            another number of weights.
    """
    _check(sets)
    weights = [1 / len(sets)] * len(sets) if weights is None else list(weights)
    if len(weights) != len(sets):
        raise ValueError(f"weights: want {len(sets)}, one a set; got {weights}")
    if any(each.method != sets[0].method for each in sets):
        raise ValueError(f"want sets of one method, got {[each.method for each in sets]}")
    return _made(sets, lambda values: sum(w * x for w, x in zip(weights, values, strict=True)))


def interpolate(a: PromptSet, b: PromptSet, t: float) -> PromptSet:
    """(1 - t)·a + t·b; 0 gives a, 1 gives b."""
    return average(a, b, weights=(1 - t, t))


def concatenate(*sets: PromptSet) -> PromptSet:
    """All rows of the sets, the first set's first: attention then sees them all.

    Where text is rotated the last set stands where it stood alone, right before the text, and the
    others before it, as rows that are written one set after another do.

    Raises:
        ValueError: no set, sets in other blocks, with projectors of their own, or prompts that are
            not rows.
    """
    _check(sets)
    method = sets[0].method
    for each in sets[1:]:
        method = _joined(method, each.method)
    made = _made(sets, torch.cat)
    made.method = method
    return made


def _check(sets: Sequence[PromptSet]) -> None:
    if not sets:
        raise ValueError("want one set or more, got none")
    if any(each.parts is not None for each in sets):
        raise ValueError("want sets that share the patch's projector or head, got one with its own")
    keys = [{*each.tensors()} for each in sets]
    if any(each != keys[0] for each in keys):
        odd = sorted(set.union(*keys) - set.intersection(*keys))
        raise ValueError(f"want prompts in the same blocks, got {odd[0]} in some sets alone")


@torch.no_grad()
def _made(sets: Sequence[PromptSet], of: Callable[[list[Tensor]], Tensor]) -> PromptSet:
    """A copy of the first set whose parameters are ``of`` those of all sets."""
    made = PromptSet(sets[0].method, copy.deepcopy(sets[0].prompts))
    given = [each.tensors() for each in sets]
    for name, p in made.tensors().items():
        p.data = of([tensors[name].to(p.device) for tensors in given])
    return made


def _joined(a: DeepMethod, b: DeepMethod) -> DeepMethod:
    """The method with as many rows as both have.

    What can be given by position are its lengths, and switches; what is by name alone is to be the
    same in both.
    """
    options: dict[str, Any] = {}
    for field in dataclasses.fields(a) if type(a) is type(b) and isinstance(a, DeepMethod) else ():
        ours, theirs = getattr(a, field.name), getattr(b, field.name)
        if not field.kw_only and _is_length(ours) and _is_length(theirs):
            options[field.name] = _sum(ours, theirs)
        elif field.compare and ours != theirs:
            break
    else:
        if options:
            return dataclasses.replace(a, **options)
    raise ValueError(f"concatenate: want prompts that are rows, of one method; got {a} and {b}")


def _is_length(value: Any) -> bool:
    return isinstance(value, (int, tuple, dict)) and not isinstance(value, bool)


def _sum(a: Any, b: Any) -> Any:
    if isinstance(a, dict) or isinstance(b, dict):
        blocks = {i for x in (a, b) if not isinstance(x, int) for i in _blocks(x)}
        return {i: _at(a, i) + _at(b, i) for i in sorted(blocks)}
    if isinstance(a, tuple) or isinstance(b, tuple):
        count = len(a) if isinstance(a, tuple) else len(b)
        each = (x if isinstance(x, tuple) else (x,) * count for x in (a, b))
        return tuple(map(sum, zip(*each, strict=True)))
    return a + b


def _blocks(lengths: tuple | dict) -> Iterable[int]:
    return lengths if isinstance(lengths, dict) else range(len(lengths))


def _at(lengths: Any, block: int) -> int:
    """The length in a block of the tower, where lengths by layer leave no block out."""
    if isinstance(lengths, dict):
        return lengths.get(block, 0)
    return lengths[block] if isinstance(lengths, tuple) else lengths
