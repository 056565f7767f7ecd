"""Prompts that begin from something: another run, rows such as class features, k-means' centres.

Of a real text and real images: `prefill`. Lengths are fitted by leaving rows out at the end or by
beginning again with the first; depths by taking, for each block, the source's at the same place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt import checkpoint
from fastprompt.families import Block, Tower
from fastprompt.patching import Patch
from fastprompt.prefill import scaled
from fastprompt.prompts import CHILD, Prompt
from fastprompt.sets.sets import PromptSet
from fastprompt.without import all_blocks, taken_out

Layers = Mapping[
    str, Sequence[int]
]  # kind of tower -> for each prompted block the source's, from 0
Source = dict[str, dict[str, Tensor]]  # block -> parameter -> values, in the order of the blocks


@torch.no_grad()
def init_from(
    patch: Patch,
    source: str | Path | PromptSet | Mapping[str, Tensor],
    *,
    name: str | None = None,
    layers: Layers | None = None,
) -> None:
    """Fill the prompts of a set from something else; a projector or head stays as it is.

    Args:
        source: a folder that `save` wrote for a model of this kind (of another depth, or with
            other weights, too); a prompt set; or rows [n, D], by "vision" and "text" (class
            features: every block begins with them) or by block (`kmeans`), which are scaled to a
            root mean square of 0.1 as `prefill`'s.
        name: the set to fill; None: the one in use.
        layers: of a run or a set, kind of tower -> for each prompted block which of the source's
            prompted blocks, from 0, it takes. None: the one at the same relative depth.

    Raises:
        ValueError: a source of another kind of model or width; nothing has changed then.
    """
    target = _named(patch, name)
    if isinstance(source, Mapping):
        starts = _from_rows(patch, target, source)
    else:
        of = source.prompts if isinstance(source, PromptSet) else _run(patch, Path(source))
        if isinstance(source, PromptSet):
            of = {block: dict(prompt.named_parameters()) for block, prompt in of.items()}
        starts = _from_prompts(patch, target, of, layers)
    write(target, starts)


def _named(patch: Patch, name: str | None) -> PromptSet:
    sets = patch._of_sets()
    return sets[sets.active if name is None else name]


def write(target: PromptSet, starts: dict[nn.Parameter, Tensor]) -> None:
    """Fill parameters; all are known to fit by now."""
    for p, start in starts.items():
        p.copy_(start)
    for prompt in target.prompts.values():
        prompt.refresh()


def prompted(tower: Tower, target: PromptSet) -> list[Block]:
    return [b for b in (*tower.blocks, *tower.unread) if b.name in target.prompts]


def depths(count: int, of: int, given: Sequence[int] | None, kind: str) -> list[int]:
    """For each of ``count`` blocks, which of ``of`` it takes."""
    if given is None:
        return [round(i * (of - 1) / max(1, count - 1)) for i in range(count)]
    if len(given) != count or not all(0 <= i < of for i in given):
        raise ValueError(f"layers[{kind!r}]: want {count} of 0 .. {of - 1}, got {list(given)}")
    return list(given)


def fitted(rows: Tensor, like: Tensor, where: str) -> Tensor:
    """As many rows as ``like`` has: cut off at the end, or from the first again."""
    if rows.shape[1:] != like.shape[1:] or not len(rows):
        raise ValueError(f"{where}: want rows {list(like.shape)}, got {list(rows.shape)}")
    return rows.to(like)[torch.arange(len(like), device=like.device) % len(rows)]


def _from_prompts(
    patch: Patch, target: PromptSet, source: Source, layers: Layers | None
) -> dict[nn.Parameter, Tensor]:
    starts = {}
    for tower in patch.anatomy.towers:
        blocks = prompted(tower, target)
        stems = {_stem(block.name) for block in blocks}
        theirs = [each for name, each in source.items() if _stem(name) in stems]
        if blocks and not theirs:
            raise ValueError(f"init_from: want prompts of {tower.name}, got {[*source][:1]}")
        taken = depths(len(blocks), len(theirs), (layers or {}).get(tower.kind), tower.kind)
        for block, i in zip(blocks, taken, strict=True):
            for name, p in target.prompts[block.name].named_parameters():
                if name not in theirs[i]:
                    raise ValueError(f"{block.name}: want {name}, got {[*theirs[i]]}")
                starts[p] = fitted(theirs[i][name], p, f"{block.name}.{CHILD}.{name}")
    return starts


def _run(patch: Patch, folder: Path) -> Source:
    card, tensors = checkpoint.read(folder)
    kind, want = card["base"].get("model_type"), checkpoint.model_type(patch)
    if kind != want:
        raise ValueError(f"{folder}: want a run of a {want}, got one of a {kind}: `transfer` it")
    found: Source = {}
    for name in sorted(tensors, key=_places):
        block, child, parameter = name.partition(f".{CHILD}.")
        if child:
            found.setdefault(block, {})[parameter] = tensors[name]
    return found


def _places(name: str) -> list[tuple[int, str]]:
    """To sort layer 2 before layer 10."""
    return [(int(x), "") if x.isdecimal() else (-1, x) for x in name.split(".")]


def _stem(block: str) -> str:
    return re.sub(r"\b\d+\b", "*", block)


def _from_rows(
    patch: Patch, target: PromptSet, rows: Mapping[str, Tensor]
) -> dict[nn.Parameter, Tensor]:
    starts, used = {}, set()
    for tower in patch.anatomy.towers:
        for block in prompted(tower, target):
            key = block.name if block.name in rows else tower.kind
            if key in rows:
                used.add(key)
                p = tokens(target, block, "init_from")
                starts[p] = scaled(fitted(rows[key], p, block.name))
    if used != {*rows}:
        unknown = sorted({*rows} - used)
        raise ValueError(f"init_from: want rows by kind of tower or prompted block, got {unknown}")
    return starts


def tokens(target: PromptSet, block: Block, what: str) -> nn.Parameter:
    """[P, D]: the rows of hidden states of a block's prompt."""
    prompt = target.prompts[block.name]
    if not isinstance(prompt, Prompt) or prompt.tokens.shape[1:] != (block.width,):
        raise ValueError(f"{what}: want prompts that are rows of a block, got {target.method}")
    return prompt.tokens


# ---- activations ----


@torch.no_grad()
def kmeans(
    patch: Patch,
    batches: Iterable[Mapping[str, Any]],
    *,
    name: str | None = None,
    iterations: int = 20,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Centres of the hidden states before each prompted block, as many as its prompt has rows.

        fastprompt.init_from(patch, kmeans(patch, batches))

    Lloyd's algorithm from states that are drawn by chance.

    Args:
        batches: keyword arguments of the model's forward, each; all their states are kept at once.
        name: the set whose blocks and lengths count; None: the one in use.

    Returns:
        Block name -> [P, D] float32, the largest cluster's centre first.
    """
    target, found = _named(patch, name), {}
    blocks = [b for tower in patch.anatomy.towers for b in prompted(tower, target)]
    for batch in batches:
        for block, states in states_before(patch, blocks, batch).items():
            found.setdefault(block, []).append(states.float())
    if not found:
        raise ValueError("kmeans: want a batch or more, got none")
    generator = torch.Generator().manual_seed(seed)
    return {
        block.name: _centres(
            torch.cat(found[block.name]),
            len(tokens(target, block, "kmeans")),
            iterations,
            generator,
        )
        for block in blocks
    }


def _centres(x: Tensor, k: int, iterations: int, generator: torch.Generator) -> Tensor:
    """[k or fewer, D] of x [n, D]."""
    x = x.unique(dim=0) if len(x) <= k else x
    centres = x[torch.randperm(len(x), generator=generator)[:k].to(x.device)]
    for _ in range(iterations + 1):
        nearest = torch.cdist(x, centres).argmin(1)
        sizes = nearest.bincount(minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        # a centre that nothing is near stays where it is
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centres)
    return centres[sizes.argsort(descending=True, stable=True)]


@torch.no_grad()
def states_before(patch: Patch, blocks: list[Block], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Block name -> [tokens, D]: what the model without prompts has before it, padding left out."""
    found: dict[str, Tensor] = {}
    model, mask = patch.model, batch.get("attention_mask")

    def keep(block: Block) -> Any:
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            seen = isinstance(mask, Tensor) and mask.shape == states.shape[:-1]
            found[block.name] = states[mask.bool()] if seen else states.flatten(0, -2)

        return hook

    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        stack.enter_context(taken_out(patch, all_blocks(patch)))
        for block in blocks:
            handle = block.layer.register_forward_pre_hook(keep(block), with_kwargs=True)
            stack.callback(handle.remove)
        for module in training:
            stack.callback(setattr, module, "training", True)
        model.eval()
        model(**{key: x for key, x in batch.items() if key != "labels"})
    for tower in patch.anatomy.towers:
        if any(b in blocks and b.name not in found for b in (*tower.blocks, *tower.unread)):
            raise ValueError(f"want a batch that the {tower.kind} tower reads, got {[*batch]}")
    return found
