"""The parent's side: a row's jobs, each in a process of its own (``--quick``: all in one)."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.field import lines
from benchmarks.field.contenders import Contender

ROOT = Path(__file__).parents[2]


def row(
    contender: Contender, model: str, task: Path, steps: int, given: argparse.Namespace
) -> dict:
    """All that is found of a contender on a model; why, where nothing is.

    Args:
        task: a file of `tasks.Task`, of so many ``steps``.
        given: the command line's ``rates``, ``rate_steps``, ``threads``, ``adapters``, ``quick``.
    """
    found = dict(
        contender=contender.name,
        model=model,
        title=contender.title_on(model),
        lines=lines.count(contender.file(model)),
    )
    absent = _absent(contender, given.adapters)
    if absent:
        return found | dict(status="not measured", reason=absent)
    jobs, rates = ["rates", "train", *["probes"] * (model == "tiny")], given.rates
    for some in [jobs] if given.quick else [[job] for job in jobs]:
        if "error" not in found:
            looking = given.rate_steps or -(-steps // 4)
            found |= _run(some, contender, task, given, rates, looking)
            rates = [found["rate"]] if "rate" in found else rates
    if "error" in found:
        return found | dict(status="error", reason=found["error"])
    return found | dict(status="measured")


def _absent(contender: Contender, apart: str | None) -> str:
    """Why it cannot run here; empty if it can. ``apart``: the folder of those that live apart."""
    if contender.apart:
        here = apart and (Path(apart) / contender.needs).is_dir()
    else:
        here = not contender.needs or importlib.util.find_spec(contender.needs)
    return "" if here else f"{contender.needs} is not installed"


def _run(
    jobs: list[str],
    contender: Contender,
    task: Path,
    given: argparse.Namespace,
    rates: Iterable[float],
    looking: int,
) -> dict:
    """What `run` prints; {"error": …} of a process that died."""
    command = [sys.executable, "-m", "benchmarks.field.run", contender.name, str(task), *jobs]
    command += ["--rates", *map(str, rates), "--rate-steps", str(looking)]
    command += ["--threads", str(given.threads)]
    path = [given.adapters] if contender.apart else []
    path += [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, path)))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return dict(error=f"its process ended with {done.returncode}: {last}"[:300])
