"""What a run scored, as JSON, as Markdown and as a radar plot."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import fastprompt
from fastprompt.eval.benchmarks import MM_AVG
from fastprompt.files import replace


@dataclass(frozen=True)
class Result:
    """One task's scores.

    Attributes:
        task: its name.
        count: questions scored.
        digest: of these questions (`questions.digest`).
        missing: of them without a prediction, counted as wrong.
        scores: name -> score; fractions, but for MME's points.
        intervals: name -> 95% interval over images, of those scores that have one.
        compared: the name of the task's one score; ``full`` is its highest value.
    """

    task: str
    count: int
    digest: str
    missing: int
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    compared: str = "accuracy"
    full: float = 1.0

    @property
    def headline(self) -> float:
        """The task's one score as a fraction of its highest value."""
        return self.scores[self.compared] / self.full


def mm_avg(results: dict[str, Result], score: str = "accuracy") -> float | None:
    """M2PT's MMAvg: the mean accuracy of its seven data sets; None unless all are there.

    Source: arXiv 2409.15657 and its released evaluation. POPE counts once, as the mean of its three
    categories; MME is not among them. ``score="judge"`` is the paper's own.
    """
    if not all(task in results and score in results[task].scores for task in MM_AVG):
        return None
    return sum(results[task].scores[score] for task in MM_AVG) / len(MM_AVG)


def write(folder: Path, results: dict[str, Result], about: dict[str, Any]) -> None:
    """``results.json``, ``results.md`` and, of three tasks and more, ``radar.png``.

    Args:
        about: the run; what is ``"blank"`` in it is said in the table.
    """
    averages = {"mm_avg": mm_avg(results), "mm_avg_judge": mm_avg(results, "judge")}
    averages = {name: value for name, value in averages.items() if value is not None}
    tasks = {name: asdict(r) | {"headline": r.headline} for name, r in results.items()}
    versions = {module.__name__: module.__version__ for module in (fastprompt, torch, transformers)}
    whole = {"run": about, "versions": versions, "tasks": tasks} | averages
    replace(
        folder / "results.json", lambda part: part.write_text(json.dumps(whole, indent=1) + "\n")
    )
    text = markdown(results, averages, blank=about.get("blank", False))
    replace(folder / "results.md", lambda part: part.write_text(text))
    if len(results) >= 3:
        radar({"": {name: r.headline for name, r in results.items()}}, folder / "radar.png")


def markdown(results: dict[str, Result], averages: dict[str, float], *, blank: bool = False) -> str:
    """A table of the tasks, and one of every score."""
    task = "task, on blank images" if blank else "task"
    lines = [f"| {task} | questions | missing | score | 95% |", "|---|---|---|---|---|"]
    for name, r in results.items():
        score = f"{r.compared} {_number(r.scores[r.compared])} | {_interval(r, r.compared)}"
        lines.append(f"| {name} | {r.count} | {r.missing} | {score} |")
    lines += [f"| {name} | | | {_number(value)} | |" for name, value in averages.items()]
    lines += ["", f"| {task} | score | value | 95% |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {score} | {_number(value)} | {_interval(r, score)} |"
        for name, r in results.items()
        for score, value in r.scores.items()
    ]
    return "\n".join(lines) + "\n"


def _interval(result: Result, score: str) -> str:
    return " to ".join(map(_number, result.intervals.get(score, ())))


def _number(value: float) -> str:
    return f"{value:.3f}" if value <= 1 else f"{value:.1f}"


def radar(runs: dict[str, dict[str, float]], path: Path) -> None:
    """A radar plot: one polygon a run, one axis a task, from 0 in the middle to 1.

    Args:
        runs: legend -> task -> fraction. All runs have the same tasks; "" has no legend.
        path: of the picture; its ending says the format.

    Raises:
        ValueError: the runs differ in their tasks, or have fewer than three.
    """
    from matplotlib.figure import Figure

    tasks = list(next(iter(runs.values())))
    if len(tasks) < 3 or any(set(run) != set(tasks) for run in runs.values()):
        raise ValueError(f"radar: want the same three tasks or more in each run, got {runs}")
    angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    for name, run in runs.items():
        values = [run[task] for task in tasks]
        around = np.append(angles, angles[0])
        axes.plot(around, [*values, values[0]], marker="o", label=name)
        axes.fill(around, [*values, values[0]], alpha=0.15)
    axes.set(ylim=(0, 1), xticks=angles, xticklabels=tasks)
    if any(runs):
        figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)
