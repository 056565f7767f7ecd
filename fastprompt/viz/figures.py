"""Pictures of prompts; each function returns a matplotlib Figure, to show or to save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


def draw_attention(shares: dict[str, Tensor], title: str = "attention to prompts") -> Figure:
    """Layers down, heads across: what `attention_to_prompts` returned, the mean over tokens.

    Args:
        shares: block name -> [B, Hq, N]; blocks of one tower, say those whose name has "text".

    Raises:
        ValueError: no block, or blocks with different numbers of heads.
    """
    heads = {tuple(share.shape[1:2]) for share in shares.values()}
    if len(heads) != 1:
        raise ValueError(f"draw_attention: want blocks with as many heads each, got {len(shares)}")
    values = torch.stack([share.float().mean((0, 2)) for share in shares.values()]).cpu().numpy()
    return _matrix(values, title, "head", "layer", 0.0, max(float(values.max()), 1e-6))


def draw_similarity(matrix: Tensor, title: str = "similarity of prompts") -> Figure:
    """Layers against layers: one tower's of `similarity`, [L, L]."""
    return _matrix(matrix.float().cpu().numpy(), title, "layer", "layer", -1.0, 1.0)


def draw_overlay(image: Image, heat: Tensor, title: str = "") -> Figure:
    """An image, and over it the attention that its patches pay to one prompt.

    Args:
        image: as the model was shown it.
        heat: [high, wide], one row's of `patches_to_prompts`.
    """
    figure, axes = _axes((4, 4.2))
    wide, high = image.size
    axes.imshow(np.asarray(image.convert("RGB")), extent=(0, wide, high, 0))
    shown = axes.imshow(
        heat.float().cpu().numpy(), extent=(0, wide, high, 0), cmap="inferno", alpha=0.6,
        interpolation="nearest", vmin=0.0,
    )  # fmt: skip
    axes.set(title=title, xticks=[], yticks=[])
    figure.colorbar(shown, label="share of attention")
    return figure


def _matrix(
    values: np.ndarray, title: str, across: str, down: str, low: float, high: float
) -> Figure:
    rows, columns = values.shape
    figure, axes = _axes((2.5 + 0.25 * columns, 1.5 + 0.25 * rows))
    shown = axes.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    axes.set(
        title=title, xlabel=across, ylabel=down,
        xticks=_ticks(columns), yticks=_ticks(rows),
    )  # fmt: skip
    figure.colorbar(shown)
    return figure


def _ticks(count: int) -> Sequence[int]:
    return range(0, count, max(1, count // 8))


def _axes(size: tuple[float, float]) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure  # not pyplot: no state, no display

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()
