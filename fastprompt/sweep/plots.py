"""Pictures of a table: a radar of tasks, a line along one option, a heat map of two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastprompt.eval.results import radar
from fastprompt.files import replace
from fastprompt.sweep.records import MEAN

if TYPE_CHECKING:
    from fastprompt.sweep.table import Row, Stat

# where runs lie, what they print: differences that are none of the comparison's
_ASIDE = {
    "out", "seed", "init_seed", "order_seed", "subset_seed", "model", "data", "image_folder",
    "eval_data", "projector", "workers", "tensorboard", "save_every", "keep",
}  # fmt: skip
_POLYGONS = 8  # more cannot be told apart


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Of three tasks and more ``radar.png``; of rows that differ by one option ``line.png``, by two
    ``heatmap.png``, if the rows fill at least half of it."""
    paths = []
    tasks = [task for task in rows[0].tasks if all(task in row.tasks for row in rows)]
    if len(tasks) >= 3 and len(rows) <= _POLYGONS:
        runs = {row.name: {task: row.stats[task].mean for task in tasks} for row in rows}
        radar(runs, folder / "radar.png")
        paths.append(folder / "radar.png")
    score, options = shown(rows), varying(rows)
    if score is None or len(rows) < 2:
        return paths
    if len(options) == 1:
        paths.append(_line(rows, options[0], score, folder / "line.png"))
    if len(options) == 2:
        cells = [len({repr(row.options[o]) for row in rows}) for o in options]
        if 2 * len(rows) >= cells[0] * cells[1]:
            paths.append(_heat_map(rows, options, score, folder / "heatmap.png"))
    return paths


def varying(rows: list[Row]) -> list[str]:
    """The options of training in which rows differ."""
    names = [name for name in rows[0].options if name not in _ASIDE]
    return [n for n in names if len({repr(row.options.get(n)) for row in rows}) > 1]


def shown(rows: list[Row]) -> str | None:
    """The one score to draw: the tasks' mean, the task, held-out accuracy or loss."""
    for score in (MEAN, *rows[0].tasks, "accuracy", "loss"):
        if all(score in row.stats for row in rows):
            return score
    return None


def _axis(rows: list[Row], option: str) -> list[Any]:
    """The option's values: numbers in their order, others as they come."""
    values = list({repr(row.options[option]): row.options[option] for row in rows}.values())
    return sorted(values) if _numbers(values) else values


def _numbers(values: list[Any]) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def _line(rows: list[Row], option: str, score: str, path: Path) -> Path:
    from matplotlib.figure import Figure

    values = _axis(rows, option)
    ordered = sorted(rows, key=lambda row: values.index(row.options[option]))
    stats: list[Stat] = [row.stats[score] for row in ordered]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    style = "o-" if _numbers(values) else "o"
    axes.errorbar(
        values if _numbers(values) else list(map(str, values)),
        [stat.mean for stat in stats],
        yerr=[stat.sd or 0 for stat in stats],
        fmt=style,
        capsize=4,
    )
    axes.set(xlabel=option.replace("_", " "), ylabel=_title(score))
    axes.grid(alpha=0.3)
    return _save(figure, path)


def _heat_map(rows: list[Row], options: list[str], score: str, path: Path) -> Path:
    from matplotlib.figure import Figure

    down, across = (_axis(rows, option) for option in options)
    grid = np.full((len(down), len(across)), np.nan)
    for row in rows:
        place = down.index(row.options[options[0]]), across.index(row.options[options[1]])
        grid[place] = row.stats[score].mean
    figure = Figure(figsize=(1.5 + len(across), 1.5 + 0.8 * len(down)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (y, x), value in np.ndenumerate(grid):
        if np.isfinite(value):
            colour = "white" if value < middle else "black"
            axes.text(x, y, f"{value:.3f}", ha="center", va="center", color=colour)
    axes.set(
        xlabel=options[1].replace("_", " "), ylabel=options[0].replace("_", " "),
        xticks=range(len(across)), xticklabels=list(map(str, across)),
        yticks=range(len(down)), yticklabels=list(map(str, down)),
    )  # fmt: skip
    figure.colorbar(image, label=_title(score))
    return _save(figure, path)


def _title(score: str) -> str:
    return f"held-out {score}" if score in ("loss", "accuracy") else score


def _save(figure: Any, path: Path) -> Path:
    replace(path, lambda part: figure.savefig(part, dpi=120, format="png"))
    return path
