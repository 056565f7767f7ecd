"""Rows as batches: read, encoded, in one order for each epoch, packed or padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import ProcessorMixin

from fastprompt.train.checking import Checked
from fastprompt.train.rows import BadRow, Problem, Row
from fastprompt.train.templates import IGNORE, ChatTemplate

ABOUT = "about"  # the batch's key of what is not the model's
_NEAR = 50  # batches within which rows are sorted by length


@dataclass(frozen=True)
class Example:
    """A row, ready: ids and labels of one length, pixels [3, H, W] if it has an image.

    One that could not be read has a ``problem`` and no label, so that it trains nothing and every
    other row stays where it was.
    """

    ids: list[int]
    labels: list[int]
    pixels: Tensor | None
    id: str
    where: str
    problem: Problem | None = None


class Examples(Dataset):
    """``examples[i]``: the list of rows that make up row ``i`` of a batch; one, if not packed.

    Args:
        checked: the usable rows.
        bins: of indices into ``checked``; None: each row alone.
        dtype: of pixels.
    """

    def __init__(
        self,
        checked: Checked,
        template: ChatTemplate,
        processor: ProcessorMixin,
        dtype: torch.dtype,
        bins: list[np.ndarray] | None = None,
    ):
        self.checked, self.template, self.dtype = checked, template, dtype
        self.process = processor.image_processor
        self.bins = bins if bins is not None else [np.array([i]) for i in range(len(checked))]
        self.lengths = np.array([checked.lengths[b].sum() for b in self.bins])

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, i: int) -> list[Example]:
        return [self._example(int(self.checked.indices[j])) for j in self.bins[i]]

    def _example(self, i: int) -> Example:
        where, row = self.checked.rows.where(i), None
        try:
            row = self.checked.rows[i]
            found = self.template.encode(row)
            pixels = None if row.image is None else self._pixels(row)
            return Example(found.ids, found.labels, pixels, row.id, where)
        except (BadRow, OSError) as error:  # it was good when it was checked
            problem = Problem.of(error, where, row and row.id)
            pad = self.template.tokenizer.eos_token_id or 0
            return Example([pad], [IGNORE], None, problem.id, where, problem)

    def _pixels(self, row: Row) -> Tensor:
        image = row.open_image()
        try:
            made = self.process(images=[image], return_tensors="pt")
            return made["pixel_values"][0].to(self.dtype)
        except Exception as error:  # a model's own code, which may raise any: of this row alone
            size = f"{image.width} × {image.height}"
            reason = f"of {size} pixels: {type(error).__name__}: {error}"
            raise BadRow("image processor", reason) from error


def pack(lengths: np.ndarray, room: int, seed: int) -> list[np.ndarray]:
    """Bins of indices whose lengths sum to at most ``room``.

    First fit over the rows in random order, with the 64 fullest open bins looked at: near enough to
    the best for short rows, and bins stay random mixtures.
    """
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room left, bin)
    for i in np.random.default_rng(seed).permutation(len(lengths)):
        need = int(lengths[i])
        place = next((p for p, (left, _) in enumerate(open_bins) if left >= need), None)
        if place is None:
            open_bins.append((room - need, len(bins)))
            bins.append([int(i)])
        else:
            left, number = open_bins[place]
            open_bins[place] = (left - need, number)
            bins[number].append(int(i))
        if len(open_bins) > 64:
            open_bins.remove(min(open_bins))
    return [np.array(b) for b in bins]


class Order(Sampler):
    """The order of an epoch's rows, by seed and epoch alone, so that a resumed run finds its place.

    Args:
        lengths: with ``bucket``, batches hold rows of similar length: random runs of 50 batches
            are sorted, cut into batches, and the batches shuffled.
    """

    def __init__(self, lengths: np.ndarray, batch: int, seed: int, bucket: bool):
        self.lengths, self.batch, self.seed, self.bucket = lengths, batch, seed, bucket
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        if self.bucket:
            near = self.batch * _NEAR
            runs = [order[at : at + near] for at in range(0, len(order), near)]
            order = np.concatenate([r[np.argsort(self.lengths[r], kind="stable")] for r in runs])
            full = len(order) // self.batch * self.batch  # what is left over stays last
            batches = order[:full].reshape(-1, self.batch)
            order = np.concatenate([rng.permutation(batches).reshape(-1), order[full:]])
        yield from order.tolist()


class Collator:
    """Lists of examples to a batch, padded on the right.

    One example a row: ``attention_mask`` [B, T]. Several: ``position_ids`` [B, T] that begin again
    at every example, by which transformers keeps them apart in its mask. Pixels [n, 3, H, W] of
    the examples that have an image, in their order; none, no key.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[list[Example]]) -> dict[str, Any]:
        width = max(sum(len(e.ids) for e in row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        labels = torch.full((len(rows), width), IGNORE)
        # padding counts from 0 as well: a conversation of its own, without labels
        positions = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for b, row in enumerate(rows):
            at = 0
            for e in row:
                here = slice(at, at := at + len(e.ids))
                ids[b, here], labels[b, here] = torch.tensor(e.ids), torch.tensor(e.labels)
                positions[b, here], mask[b, here] = torch.arange(len(e.ids)), 1
            positions[b, at:] = torch.arange(width - at)
        batch: dict[str, Any] = dict(input_ids=ids, labels=labels)
        packed = any(len(row) > 1 for row in rows)
        batch |= dict(position_ids=positions) if packed else dict(attention_mask=mask)
        examples = [e for row in rows for e in row]
        pixels = [e.pixels for e in examples if e.pixels is not None]
        if pixels:
            batch["pixel_values"] = torch.stack(pixels)
        batch[ABOUT] = dict(
            rows=[f"{e.id} ({e.where})" for e in examples],
            problems=[e.problem for e in examples if e.problem],
            tokens=int(mask.sum()),
        )
        return batch
