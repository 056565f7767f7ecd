"""Records as one table: mean ± standard deviation over seeds, as Markdown, JSON and pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastprompt.files import replace
from fastprompt.sweep.records import MEAN, Record


class Stat(NamedTuple):
    """Over seeds; ``sd``, of a sample, is None of one."""

    mean: float
    sd: float | None


@dataclass(frozen=True)
class Row:
    """Runs that differ by their seed alone.

    ``stats``: "share" (of parameters that train), "memory" (bytes), "seconds", and `Record.scores`.
    """

    name: str
    seeds: list[int]
    options: dict[str, Any]
    trainable: int
    tasks: list[str]
    stats: dict[str, Stat]


def summarise(records: list[Record]) -> list[Row]:
    """A row of each name, in the order in which they come, with the scores that are there, and
    finite, for all its seeds."""
    named: dict[str, list[Record]] = {}
    for record in records:
        named.setdefault(record.name, []).append(record)
    return [_row(name, same) for name, same in named.items()]


def _row(name: str, same: list[Record]) -> Row:
    values = {
        "share": [r.trainable / r.parameters for r in same],
        "memory": [r.memory for r in same],
        "seconds": [r.seconds for r in same],
    }
    for score in same[0].scores:
        if all(r.scores.get(score) is not None for r in same):
            values[score] = [r.scores[score] for r in same]
    stats = {
        key: Stat(statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else None)
        for key, v in values.items()
    }
    first = same[0]
    tasks = [task for task in first.tasks if task in stats]
    return Row(name, [r.seed for r in same], first.options, first.trainable, tasks, stats)


def pick(records: list[Record], option: str, by: str = "loss") -> list[Record]:
    """Of runs that differ by ``option`` alone, those with its best value.

    Args:
        by: "loss" or "accuracy" of held-out rows, the mean over the seeds that all values have; one
            that is not finite is the worst. Not a task's score: a value picked by that would make
            it look better than it is.

    Returns:
        Records whose names no longer say the option.

    Raises:
        ValueError: runs without held-out rows, an option that no run has, or values that were
            tried with no seed in common.
    """
    families: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        if option not in record.options:
            raise ValueError(f"pick: want an option of training, got {option!r}")
        if by not in ("loss", "accuracy") or by not in record.scores:
            raise ValueError(
                f"pick: want loss or accuracy of held-out rows; {record.label} has no {by!r}"
            )
        # values may hold commas: up to the next option's name
        name = re.sub(rf",?\b{option}=.*?(?=,\w+=|$)", "", record.name).strip(",") or record.name
        families.setdefault(name, {}).setdefault(str(record.options[option]), []).append(record)
    return [
        dataclasses.replace(record, name=name)
        for name, tried in families.items()
        for record in _best(name, list(tried.values()), by)
    ]


def _best(name: str, tried: list[list[Record]], by: str) -> list[Record]:
    """The records of the best value, of which ``tried`` has a list for each."""
    shared = set.intersection(*({r.seed for r in same} for same in tried))
    if not shared:
        seeds = "; ".join(", ".join(str(r.seed) for r in same) for same in tried)
        raise ValueError(f"pick: want {name} tried with the same seeds, got {seeds}")

    def mean(same: list[Record]) -> float:
        scores = [r.scores[by] for r in same if r.seed in shared]
        if None in scores:
            return math.inf
        return statistics.fmean(scores) * (1 if by == "loss" else -1)

    return min(tried, key=mean)


def write_results(
    folder: str | Path,
    records: list[Record],
    *,
    tune: str | None = None,
    by: str = "loss",
) -> str:
    """Write ``results.json``, ``results.md`` and, where there is something to see, pictures.

    Args:
        tune, by: see `pick`; results.json has all runs, the table those picked.

    Returns:
        The Markdown.
    """
    from fastprompt.sweep.plots import draw

    folder = Path(folder)
    rows = summarise(records if tune is None else pick(records, tune, by))
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"runs": [asdict(r) for r in records], "table": [asdict(row) for row in rows]}
    text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    replace(folder / "results.json", lambda part: part.write_text(text, encoding="utf-8"))
    lines = [markdown(rows, tune)]
    machines = sorted({r.machine for r in records})
    if len(machines) > 1:
        lines.append(f"Time and memory are of different machines: {', '.join(machines)}.\n")
    lines += [f"![{path.stem}]({path.name})\n" for path in draw(rows, folder)]
    said = "\n".join(lines)
    replace(folder / "results.md", lambda part: part.write_text(said, encoding="utf-8"))
    return said


# ---- Markdown ----


def markdown(rows: list[Row], tune: str | None = None) -> str:
    """The table; ``tune``: an option whose value is a column."""
    scores = list(dict.fromkeys(key for row in rows for key in row.stats if key not in _COST))
    titles = {"loss": "held-out loss", "accuracy": "held-out accuracy"}
    tasks = {task for row in rows for task in row.tasks} | {MEAN, "accuracy"}
    head = ["run", "seeds", *[tune] * bool(tune), "trains", "share", "memory", "time"]
    lines = [head + [titles.get(score, score) for score in scores]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        cells = [row.name, str(len(row.seeds)), *[str(row.options.get(tune))] * bool(tune)]
        cells += [f"{row.trainable:,}"]
        cells += [_cell(row.stats.get(key), show) for key, show in _COST.items()]
        cells += [_cell(row.stats.get(s), _percent if s in tasks else _plain) for s in scores]
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(stat: Stat | None, show: Callable[[float], str]) -> str:
    if stat is None:
        return "–"
    return show(stat.mean) if stat.sd is None else f"{show(stat.mean)} ± {show(stat.sd)}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _plain(value: float) -> str:
    return f"{value:.4f}"


_COST: dict[str, Callable[[float], str]] = {
    "share": lambda value: f"{100 * value:.3f}%",
    "memory": lambda value: f"{value / 2**30:.2f} GB",
    "seconds": lambda value: f"{value:,.1f} s",
}
