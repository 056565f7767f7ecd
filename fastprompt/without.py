"""A patched model without its prompts: for a while all of them, or one to see what it does."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastprompt import attention, undoing
from fastprompt.families import Block
from fastprompt.methods import Method
from fastprompt.prompts import CHILD, BlockPrompt

if TYPE_CHECKING:
    from fastprompt.patching import Patch

_NEXT_TO_NOTHING = 1e-4  # of the logits; what other kernels change by themselves is less


@contextmanager
def taken_out(patch: Patch, blocks: Iterable[Block]) -> Iterator[None]:
    """These blocks see no prompts."""
    patch._check_outside("without prompts")  # the sets in use there would be seen all the same
    with ExitStack() as stack:
        for block in blocks:
            side = vars(block.attention).get(attention.ATTRIBUTE)
            if side is not None:
                stack.callback(setattr, side, "prompt", side.prompt)
                side.prompt = None
        yield


def all_blocks(patch: Patch) -> list[Block]:
    return [b for tower in patch.anatomy.towers for b in (*tower.blocks, *tower.unread)]


def seen(patch: Patch) -> tuple[list[dict[str, BlockPrompt]], list[int] | None]:
    """Block name -> prompt of each set that forwards see just now, and which of them each row has
    (None: all have the first)."""
    if patch.mixing is not None:
        return patch.mixing.sets, patch.mixing.which
    sides = {b.name: vars(b.attention).get(attention.ATTRIBUTE) for b in all_blocks(patch)}
    prompts = {name: None if side is None else side.prompt for name, side in sides.items()}
    return [{name: prompt for name, prompt in prompts.items() if prompt is not None}], None


@contextmanager
def disabled(patch: Patch) -> Iterator[None]:
    """The base model: no prompts, and its own projector and head."""
    _check(patch, "disabled")
    with ExitStack() as stack:
        for step, what in patch._undo:
            if step == "module":
                parent, child, _ = what
                stack.callback(setattr, parent, child, getattr(parent, child))
                undoing.put_back(what)
        stack.enter_context(taken_out(patch, all_blocks(patch)))
        yield


@torch.no_grad()
def check(patch: Patch, batch: Mapping[str, Any]) -> dict[str, float]:
    """Block name -> how far the logits move when that block's prompt is taken out."""
    _check(patch, "check")
    model, given = patch.model, {name: x for name, x in batch.items() if name != "labels"}
    blocks = [block for block in all_blocks(patch) if hasattr(block.layer, CHILD)]
    if not blocks:
        raise ValueError(f"check: want a prompt or more, got {patch.method}")
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        whole, moves = _logits(model(**given), given), {}
        for block in blocks:
            with taken_out(patch, [block]):
                moved = _logits(model(**given), given) - whole
            moves[block.name] = float(moved.norm() / whole.norm())
    finally:
        for module in training:
            module.training = True
    least = max(_NEXT_TO_NOTHING, 4 * torch.finfo(blocks[0].like.weight.dtype).eps)
    if all(move < least for move in moves.values()):
        warnings.warn(
            f"check: no prompt moves the logits by more than {least:.0e} of them: were your "
            "prompts loaded?",
            stacklevel=3,
        )
    return moves


def _logits(out: Any, given: Mapping[str, Any]) -> Tensor:
    """In float64, of tokens that are no padding."""
    if not isinstance(out, Tensor):  # timm's are tensors
        names = ("logits", "logits_per_image", "last_hidden_state")
        found = [out[name] for name in names if name in out] if isinstance(out, Mapping) else []
        if not found:
            raise ValueError(f"check: want an output of {', '.join(names)}; got {_kind(out)}")
        out = found[0]
    logits = out.double()
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == logits.shape[:2]:
        logits = logits[mask.bool()]
    return logits


def _kind(out: Any) -> str:
    return f"{', '.join(out)}" if isinstance(out, Mapping) else f"a {type(out).__name__}"


def _check(patch: Patch, what: str) -> None:
    if patch.undone:
        raise ValueError(f"{what}: want a patch, got one that was undone")
    if any(map(patch.method.as_tokens, patch.anatomy.towers)):
        raise ValueError(f"{what}: want prompts as side keys, got {patch.method}")
    if type(patch.method).adapt is not Method.adapt:
        raise ValueError(f"{what}: want a method of prompts, got {patch.method}")
    if patch.method.shown() != "drop":
        raise ValueError(
            f"{what}: want visual_prompts='drop', got {patch.method.shown()!r}: without prompts "
            "its images are shorter than the text has room for"
        )
