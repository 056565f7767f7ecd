"""``fastprompt inspect FILE``: what a checkpoint's prompts are like, row by row."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt import checkpoint, tapping
from fastprompt.families import TEXT, VISION
from fastprompt.patching import Patch, patch_of
from fastprompt.prefill import hidden_states
from fastprompt.prompts import CHILD
from fastprompt.viz.prompts import effective_rank

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

STILL = 0.01  # a row that moved by less of its norm is called dead
NEAREST = 3


@dataclass(frozen=True)
class Look:
    """One block's prompt.

    Attributes:
        name: of its block.
        norms: [P], of the rows.
        rank: `effective_rank` of the rows.
        moved: [P], the distance of each row from where it began over its norm there; None if that
            is not known.
        dead: rows that are zero, or that moved by less than a hundredth.
        words: row -> the tokens whose embeddings point most nearly its way, if asked for.
        patches: row -> (image, patch) whose hidden states before the block do, if asked for.
    """

    name: str
    norms: Tensor
    rank: float
    moved: Tensor | None
    dead: list[int]
    words: list[list[str]] = field(default_factory=list)
    patches: list[list[tuple[int, int]]] = field(default_factory=list)


def inspect(path: str | Path, start: str | Path | None = None) -> list[Look]:
    """Look at a checkpoint's prompts; no model is loaded.

    Args:
        path: what `fastprompt.save` wrote, or a checkpoint folder of Trainer's.
        start: the same of the prompts before training (``fastprompt.save`` just after ``patch``).

    Raises:
        ValueError: no such file, one without prompts, a start with other prompts.
    """
    rows, before = _prompts(path), {} if start is None else _prompts(start)
    if start is not None:
        shapes = [{name: list(t.shape) for name, t in each.items()} for each in (rows, before)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{start}: want the prompts of {path}, got others")
    return [_look(name, t, before.get(name)) for name, t in rows.items()]


def _prompts(path: str | Path) -> dict[str, Tensor]:
    """Block name -> rows [P, …] float32."""
    ending = f".{CHILD}.tokens"
    _, tensors = checkpoint.read(path)
    found = {n.removesuffix(ending): t for n, t in tensors.items() if n.endswith(ending)}
    if not found:
        raise ValueError(f"{path}: want prompts in it, got {', '.join(tensors) or 'nothing'}")
    return {name: t.flatten(1).float() for name, t in found.items()}


def _look(name: str, rows: Tensor, before: Tensor | None) -> Look:
    norms, moved = rows.norm(dim=-1), None
    dead = norms == 0
    if before is not None:
        moved = (rows - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-12)
        dead = dead | (moved < STILL)
    return Look(name, norms, effective_rank(rows), moved, dead.nonzero().flatten().tolist())


# ---- beside a model ----


def near(
    looks: list[Look],
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image] = (),
) -> list[Look]:
    """The same with the words, and the patches of ``images``, that each row is nearest to.

    Args:
        model: patched, with the prompts in it.
        processor: its own, or a tokenizer if there are no images.

    By cosine. Words: of rows as wide as the input embeddings; deep in a model they say little,
    since its hidden states have turned away from words by then. Patches: hidden states before the
    block, in a pass without prompts.
    """
    patch = patch_of(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    states = _states(patch, processor, images) if images else {}
    kinds = {b.name: t.kind for t in patch.anatomy.towers for b in (*t.blocks, *t.unread)}
    words = None
    if TEXT in kinds.values():  # an image's embeddings are no table
        words = F.normalize(model.get_input_embeddings().weight.detach().float(), dim=-1)
    found = []
    for look in looks:
        rows = patch.prompts[f"{look.name}.{CHILD}"].learned().detach().flatten(1).float()
        rows = F.normalize(rows, dim=-1)
        if kinds[look.name] == TEXT and rows.shape[-1] == words.shape[-1]:
            ids = (rows @ words.T).topk(NEAREST).indices.tolist()
            look = replace(look, words=[tokenizer.convert_ids_to_tokens(row) for row in ids])
        if look.name in states:
            flat = F.normalize(states[look.name].float().flatten(0, 1), dim=-1)
            places = (rows @ flat.T).topk(NEAREST).indices.tolist()
            N = states[look.name].shape[1]
            look = replace(look, patches=[[divmod(i, N) for i in row] for row in places])
        found.append(look)
    return found


@torch.no_grad()
def _states(patch: Patch, processor: ProcessorMixin, images: Sequence[Image]) -> dict[str, Tensor]:
    """Vision block name -> hidden states before it [B, N, D], its patches alone."""
    pixels = processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
    found = {}
    for tower in patch.anatomy.towers:
        if tower.kind == VISION:
            if tower.packed:
                raise ValueError(f"images: want a tower that takes them apart, got {tower.family}")
            blocks = [b for b in (*tower.blocks, *tower.unread) if hasattr(b.layer, CHILD)]
            every = hidden_states(patch, tower, blocks, pixels)
            front = tapping.rows_before_patches(tower.model)
            found |= {b.name: states[:, front:] for b, states in zip(blocks, every, strict=True)}
    return found


# ---- the command ----


def command(arguments: list[str]) -> int:
    """``fastprompt inspect``; 0, or 1 with a message."""
    from rich.console import Console

    given = _parser().parse_args(arguments)
    try:
        looks = inspect(given.file, given.start)
        if given.model:
            looks = _near_by_name(looks, given)
        elif given.images:
            raise ValueError("--images: want --model too")
    except (ValueError, OSError) as error:
        print(f"fastprompt inspect: {error}", file=sys.stderr)
        return 1
    Console().print(_table(looks))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastprompt inspect", description=__doc__)
    parser.add_argument("file", type=Path, help="of fastprompt.save, or a Trainer's checkpoint")
    parser.add_argument("--start", type=Path, help="the prompts before training, saved likewise")
    parser.add_argument("--model", help="say the nearest words, too: hub id or folder")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="and nearest patches")
    parser.add_argument("--four-bit", action="store_true", help="NF4 weights")
    return parser


def _near_by_name(looks: list[Look], given: argparse.Namespace) -> list[Look]:
    from PIL import Image

    from fastprompt.eval.loading import load_model

    model, processor = load_model(
        given.model, prompts=given.file, four_bit=given.four_bit, dtype="auto", device="cpu"
    )
    images = [Image.open(path).convert("RGB") for path in given.images]
    return near(looks, model, processor, images)


def _table(looks: list[Look]) -> object:
    from rich.table import Table

    moved, words, patches = (
        any(getattr(look, name) is not None and len(getattr(look, name)) for look in looks)
        for name in ("moved", "words", "patches")
    )
    table = Table("block", "rows", "norm: least, mean, most", "rank", box=None)
    for title in ("moved",) * moved + ("dead",) + ("words",) * words + ("patches",) * patches:
        table.add_column(title)
    for look in looks:
        norms = look.norms
        cells = [look.name, str(len(norms))]
        cells += [f"{norms.min():.3g}, {norms.mean():.3g}, {norms.max():.3g}", f"{look.rank:.1f}"]
        if moved:
            cells.append("" if look.moved is None else f"{look.moved.mean():.3g}")
        cells.append(", ".join(map(str, look.dead)) or "–")
        if words:
            cells.append(" ".join(repr(row[0]) for row in look.words))
        if patches:
            cells.append(" ".join(f"{image}:{place}" for [(image, place), *_] in look.patches))
        table.add_row(*cells)
    return table
