"""``fastprompt sweep`` and ``fastprompt results``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from fastprompt.eval.evaluation import load
from fastprompt.sweep.plan import Plan, read_plan
from fastprompt.sweep.records import read_records
from fastprompt.sweep.running import check_begun, run_plan, state
from fastprompt.sweep.table import write_results
from fastprompt.train.config import add_options, given_options

_USAGE = "fastprompt sweep PLAN --model MODEL --data PATH … --out FOLDER [options]"


def sweep(arguments: list[str]) -> int:
    """0; 1 if a run failed; 130 if a signal ended it; 2 on wrong options."""
    parser = argparse.ArgumentParser(
        "fastprompt sweep", _USAGE, allow_abbrev=False,
        description="Train what a plan names, run by run, and make a table of it. Stopped or "
        "killed, it goes on where it was.",
    )  # fmt: skip
    parser.add_argument("plan", help="YAML: base, runs, grid, tune, seeds, eval (docs/sweeps.md)")
    parser.add_argument("--list", action="store_true", help="say what there is to do, and end")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these runs alone")
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of the plan's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--benchmarks", metavar="FOLDER", help="of fastprompt eval: its --data")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="of fastprompt eval")
    options = parser.add_argument_group("options of fastprompt train", "go before the plan's base")
    add_options(options)
    given = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    try:
        plan, out = _plan(given)
        if given.list:
            _list(plan, console)
            return 0
        _check_tasks(plan, console)
        report = run_plan(plan, jobs=given.jobs, say=lambda text: _say(console, text))
    except (ValueError, OSError) as error:
        _say(console, f"error: {error}")
        return 2
    if report.failed:
        _say(console, f"failed: {', '.join(report.failed)}")
    if report.interrupted:
        _say(console, "interrupted; the same command goes on")
        return 130
    if any(state(run, plan) == "finished" for run in plan.runs):
        by = plan.runs[0].config.best_metric
        return max(_results([out], out, plan.tune, by, console), int(bool(report.failed)))
    return 1


def _plan(given: argparse.Namespace) -> tuple[Plan, str]:
    over = given_options(given)
    out = over.pop("out", None)
    if out is None:
        raise ValueError("want --out, the sweep's folder")
    if given.jobs < 1:
        raise ValueError(f"--jobs: want 1 or more, got {given.jobs}")
    asked = {"data": given.benchmarks, "tasks": given.tasks}
    asked = {name: value for name, value in asked.items() if value is not None}
    plan = read_plan(given.plan, out, over=over, seeds=given.seeds, eval=asked)
    if given.only:
        names = list(dict.fromkeys(run.name for run in plan.runs))
        unknown = [name for name in given.only if name not in names]
        if unknown:
            raise ValueError(f"--only: want some of {', '.join(names)}; got {', '.join(unknown)}")
        runs = [run for run in plan.runs if run.name in given.only]
        plan = replace(plan, runs=runs)
    return plan, out


def _check_tasks(plan: Plan, console: Console) -> None:
    """Before hours of training: are the tasks' files there?"""
    if plan.unasked:
        tasks = " ".join(plan.unasked)
        _say(console, f"not asked, for want of --benchmarks FOLDER: {tasks}; given it, the same "
             "command asks the trained runs")  # fmt: skip
    if "tasks" in plan.eval and any(state(run, plan) != "finished" for run in plan.runs):
        load(plan.eval["tasks"], plan.eval["data"])


def _list(plan: Plan, console: Console) -> None:
    check_begun(plan)
    for run in plan.runs:
        _say(console, f"{state(run, plan):<9} {run.label}")
    asked = [*plan.eval.get("tasks", []), *plan.eval.get("questions", [])]
    tasks = " ".join(asked) or "none, for want of --benchmarks and tasks"
    _say(console, f"{len(plan.runs)} runs; tasks after training: {tasks}")


def results(arguments: list[str]) -> int:
    """0; 2 where runs are mixed, or there are none."""
    parser = argparse.ArgumentParser(
        "fastprompt results", description="One table of finished runs: Markdown, JSON, pictures."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="of the runs in one folder")
    show.add_argument("folders", nargs=1, metavar="FOLDER")
    merge = commands.add_parser("merge", help="of the runs in several, such as many machines'")
    merge.add_argument("folders", nargs="+", metavar="FOLDER", help="or a results.json")
    for each in (show, merge):
        each.add_argument("--out", required=each is merge, help="gets results.md, .json and .png")
        each.add_argument(
            "--pick", metavar="OPTION", help="show its best value alone, such as learning_rate"
        )
        each.add_argument("--by", default="loss", choices=("loss", "accuracy"), help="best by")
    given = parser.parse_args(arguments)
    out = given.out or given.folders[0]
    return _results(given.folders, out, given.pick, given.by, Console(soft_wrap=True))


def _results(folders: list[str], out: str, tune: str | None, by: str, console: Console) -> int:
    try:
        text = write_results(out, read_records(folders), tune=tune, by=by)
    except (ValueError, OSError) as error:
        _say(console, f"error: {error}")
        return 2
    _say(console, text)
    _say(console, f"wrote {Path(out) / 'results.md'} and results.json")
    return 0


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)
