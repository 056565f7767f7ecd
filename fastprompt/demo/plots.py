"""The demo's two pictures: how training went, and how much attention prompts get."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is wanted
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from fastprompt.demo.packing import IGNORE, Batch
from fastprompt.demo.training import History
from fastprompt.patching import patch_of
from fastprompt.viz import attention_to_prompts


def training_plot(histories: dict[str, History], path: Path) -> None:
    """Loss of every step (smoothed) and accuracy on held-out training images."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for name, history in histories.items():
        left.plot(_smooth(history.losses), label=name)
        if history.accuracy:
            right.plot(*zip(*history.accuracy, strict=True), marker="o", label=name)
    left.set(title="training loss", xlabel="step", ylabel="cross-entropy", yscale="log")
    right.set(title="exact match, held-out images", xlabel="step", ylim=(0, 1))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    _save(figure, path)


def attention_plot(model: nn.Module, batch: Batch, path: Path) -> dict[str, list[float]]:
    """Attention to prompts per layer: of patches in vision, of answers in the language model.

    Returns:
        Tower kind -> one share per layer, as drawn.
    """
    shares, drawn = attention_to_prompts(model, **batch.inputs, use_cache=False), {}
    anatomy, method = patch_of(model).anatomy, patch_of(model).method
    figure, panels = plt.subplots(1, len(anatomy.towers), figsize=(10, 3.6), squeeze=False)
    due = batch.labels != IGNORE
    for tower, axes in zip(anatomy.towers, panels[0], strict=True):
        heads = [
            shares[b.name].transpose(1, 2) for b in tower.blocks if b.name in shares
        ]  # [B,N,H]
        if not heads:
            axes.set(title=f"{tower.kind}: no prompts")
            continue
        rows = [h[due] if tower.kind == "text" else h[:, 1:].flatten(0, 1) for h in heads]
        P = method.lengths()[tower.kind]
        seen = _seen(batch) if tower.kind == "text" else float(heads[0].shape[1])
        who = "answers to textual prompts" if tower.kind == "text" else "patches to visual prompts"
        drawn[tower.kind] = _draw(axes, rows, P / (P + seen), f"attention of {who}")
    _save(figure, path)
    return drawn


def _draw(axes: Axes, rows: list[Tensor], even: float, title: str) -> list[float]:
    """One line for the mean over heads, a band from the least to the most attentive head."""
    per_head = torch.stack([r.mean(0) for r in rows])  # [layers, H]
    mean, layers = per_head.mean(1).tolist(), range(1, len(rows) + 1)
    low, high = (t.values.tolist() for t in (per_head.min(1), per_head.max(1)))
    axes.fill_between(layers, low, high, alpha=0.25, label="heads")
    axes.plot(layers, mean, marker="o", label="mean")
    axes.axhline(even, linestyle="--", color="grey", label="if spread evenly")
    axes.set(title=title, xlabel="layer", ylabel="share of attention", ylim=(0, 1))
    axes.legend(loc="best", fontsize="small", framealpha=0.6)
    return mean


def _seen(batch: Batch) -> float:
    """Tokens that a place with an answer due sees, on average."""
    due = batch.labels != IGNORE
    return batch.inputs["attention_mask"][:, 0].sum(-1)[due].float().mean().item()


def _smooth(values: list[float], keep: float = 0.8) -> list[float]:
    smooth = values[:1]
    for value in values[1:]:
        smooth.append(keep * smooth[-1] + (1 - keep) * value)
    return smooth


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
