"""Prompts of one model as a start on another: copied, or through linear maps of hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt.patching import Patch
from fastprompt.sets.beginning import Layers, depths, fitted, prompted, states_before, tokens, write


@torch.no_grad()
def transfer(
    source: Patch,
    target: Patch,
    batch: Mapping[str, Any] | None = None,
    target_batch: Mapping[str, Any] | None = None,
    *,
    layers: Layers | None = None,
) -> dict[str, float]:
    """Fill the target's set in use from the source's, tower by tower.

    Where both blocks are equally wide, rows are copied. Where not, they go through the matrix W
    that maps the source's hidden states before its block to the target's before its own with the
    least squares, over the tokens of a batch:

        W = argmin ‖H_source W - H_target‖²,    rows_target = rows_source W

    Lengths and depths are fitted as by `init_from`; a projector or head stays as it is.

    Args:
        batch: keyword arguments of the source's forward. Wanted if widths differ. Many more tokens
            than the source is wide make a W that holds for other tokens, too.
        target_batch: the same content for the target, with as many tokens; None: ``batch``.
        layers: see `init_from`.

    Returns:
        Target's block -> the share of its states that W leaves over, ‖H_source W - H_target‖ over
        ‖H_target‖; 0 where rows were copied.

    Raises:
        ValueError: no tower of the same kind on both sides, prompts that are not rows of hidden
            states, no batch, or batches of unlike tokens. Nothing has changed then.
    """
    ours, theirs = target.sets[target.in_use], source.sets[source.in_use]
    pairs = []
    for tower in target.anatomy.towers:
        blocks, other = prompted(tower, ours), source.anatomy.tower(tower.kind)
        sources = [] if other is None else prompted(other, theirs)
        if blocks and sources:
            given = (layers or {}).get(tower.kind)
            taken = depths(len(blocks), len(sources), given, tower.kind)
            pairs += [(block, sources[i]) for block, i in zip(blocks, taken, strict=True)]
    if not pairs:
        raise ValueError("transfer: want prompts in towers of the same kind, got none")

    left, states = {}, None
    starts: dict[nn.Parameter, Tensor] = {}
    for block, old in pairs:
        p, rows = tokens(ours, block, "transfer"), tokens(theirs, old, "transfer")
        left[block.name] = 0.0
        if old.width != block.width:
            states = states or _states(source, target, pairs, batch, target_batch)
            rows, left[block.name] = _mapped(rows, states[0][old.name], states[1][block.name])
        starts[p] = fitted(rows, p, block.name)
    write(ours, starts)
    return left


def _states(source, target, pairs, batch, target_batch) -> tuple[dict, dict]:
    if batch is None:
        raise ValueError("transfer: want a batch that both models read, as their widths differ")
    sources = states_before(source, [old for _, old in pairs], batch)
    targets = states_before(
        target, [new for new, _ in pairs], batch if target_batch is None else target_batch
    )
    for new, old in pairs:
        counts = len(sources[old.name]), len(targets[new.name])
        if counts[0] != counts[1]:
            raise ValueError(
                f"transfer: want as many tokens in both batches, got {counts[0]} before {old.name} "
                f"and {counts[1]} before {new.name}"
            )
    return sources, targets


def _mapped(rows: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Rows through the least squares' W of states x [n, D] and y [n, E], and what it leaves."""
    x, y = (states.double().cpu() for states in (x, y))
    W = torch.linalg.lstsq(x, y, driver="gelsd").solution  # of the least norm, where many fit
    left = float((x @ W - y).norm() / y.norm())
    return rows.double().cpu() @ W, left
