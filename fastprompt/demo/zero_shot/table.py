"""What runs answered, as one table in Markdown: mean ± standard deviation over their seeds."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple


class Column(NamedTuple):
    """A figure of a run: of ``eval/<folder>/results.json``, task ``task``, ``score``."""

    title: str
    folder: str
    task: str
    score: str


COLUMNS = (
    Column("seen", "exact", "seen", "macro_accuracy"),
    Column("Z1 balanced", "exact", "z1", "balanced_accuracy"),
    Column("Z1 blank", "exact/blank", "z1", "balanced_accuracy"),
    Column("Z1 ranked", "rank", "z1", "balanced_accuracy"),
    Column("Z2", "exact", "z2", "macro_accuracy"),
    Column("Z2, seen words", "exact", "z2_seen", "macro_accuracy"),
    Column("Z3", "exact", "z3", "macro_accuracy"),
    Column("Z3 blank", "exact/blank", "z3", "macro_accuracy"),
    Column("Z4", "exact", "z4", "macro_accuracy"),
    Column("Z4 blank", "exact/blank", "z4", "macro_accuracy"),
    Column("Z5 ranked", "rank", "z5", "accuracy"),
    Column("Z5 blank", "rank/blank", "z5", "accuracy"),
)


def figures(run: Path) -> dict[str, dict[str, Any]]:
    """Column title -> {"value", "interval"} of one run that was asked.

    Raises:
        ValueError: it was not asked all of it.
    """
    found = {}
    for column in COLUMNS:
        path = run / "eval" / column.folder / "results.json"
        if not path.is_file():
            raise ValueError(f"{run}: want a run that was asked (zero-shot ask), found no {path}")
        task = json.loads(path.read_text())["tasks"][column.task]
        found[column.title] = dict(
            value=task["scores"][column.score], interval=task["intervals"].get(column.score)
        )
    return found


def markdown(named: dict[str, Sequence[Path]]) -> str:
    """A row of each name, over its runs; of one run with its 95% interval over images."""
    lines = [["run", "seeds", *(column.title for column in COLUMNS)]]
    lines.append(["---"] * len(lines[0]))
    for name, runs in named.items():
        each = [figures(run) for run in runs]
        cells = (_cell([found[column.title] for found in each]) for column in COLUMNS)
        lines.append([name, str(len(runs)), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(found: list[dict[str, Any]]) -> str:
    values = [each["value"] for each in found]
    if len(values) > 1:
        return f"{fmean(values):.3f} ± {stdev(values):.3f}"
    interval = found[0]["interval"]
    ends = "" if interval is None else " ({:.3f}–{:.3f})".format(*interval)
    return f"{values[0]:.3f}{ends}"
