"""Run the comparison, each contender on each model in processes of its own.

Prints a Markdown table a model, and what every probe said that does not work. `adapters` wants
transformers 4, so a folder of its own (--adapters): benchmarks/README.md says how to fill it.
"""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.field import jobs, table, tiny
from benchmarks.field.contenders import CONTENDERS
from benchmarks.field.tasks import Task

STEPS = dict(tiny=300, demo=170)  # the demo's own; its models' names
RATES = (5e-4, 5e-3, 5e-2)
QUICK = 3  # steps


def main(arguments: list[str] | None = None) -> int:
    """0; 1 if a contender of fastprompt's did not run."""
    given = _parser().parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    command = "python -m benchmarks.field " + shlex.join(words)
    torch.set_num_threads(given.threads)
    env, rows = report.environment("cpu", given.commit, command), []
    print(report.header(env), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tasks = _tasks(given, Path(folder))
        env |= dict(rates=given.rates, quick=given.quick, seed=given.seed)
        for name in given.only or CONTENDERS:
            for model, file in tasks.items():
                rows.append(jobs.row(CONTENDERS[name], model, file, _steps(given, model), given))
                print(f"{name} {model}: {rows[-1]['status']}", file=sys.stderr, flush=True)
                rows.sort(key=lambda row: list(STEPS).index(row["model"]))  # stable
                if given.json:  # hours of rows must not wait for the last
                    report.write_json(given.json, env, rows)
    print(f"\n{table.markdown(rows)}\n\n{table.details(rows)}")
    ours = [row for row in rows if row["contender"].startswith("fastprompt")]
    return int(any(row["status"] != "measured" for row in ours))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.field", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--models", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--steps", type=int, help="of training (tiny 300, demo 170)")
    parser.add_argument("--questions", type=int, default=500, help="of the demo's exam")
    parser.add_argument("--seed", type=int, default=0, help="of the demo's questions")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="one: no search")
    parser.add_argument("--rate-steps", type=int, help="to try each rate for (a quarter of steps)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--adapters", default=os.environ.get("FIELD_ADAPTERS"), metavar="DIR")
    parser.add_argument("--cache", help="the demo's (~/.cache/fastprompt)")
    parser.add_argument("--quick", action="store_true", help="no measurement: a few steps")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--commit", help="what to report where git does not know")
    return parser


def _tasks(given: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """The file of each model's task."""
    if given.quick:
        given.rates, given.questions = given.rates[:1], 24
    made: dict[str, Callable[[], Task]] = {
        "tiny": lambda: tiny.prepare(
            folder, _steps(given, "tiny"), QUICK if given.quick else tiny.TAUGHT
        ),
        "demo": lambda: _demo(given),
    }
    files = {}
    for model in given.models:
        files[model] = folder / f"{model}.pt"
        made[model]().save(files[model])
    return files


def _steps(given: argparse.Namespace, model: str) -> int:
    return given.steps or (QUICK if given.quick else STEPS[model])


def _demo(given: argparse.Namespace) -> Task:
    from benchmarks.field import demo  # its packages are an extra

    return demo.prepare(_steps(given, "demo"), given.questions, given.cache, given.seed)


if __name__ == "__main__":
    sys.exit(main())
