"""The runs of a plan, each in a process of its own: passed over once finished, gone on with if not.

Beside a run's folder lie its options (``seed-S.yaml``) and what it printed (``seed-S.log``).
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

import torch

from fastprompt.files import replace
from fastprompt.sweep.plan import Plan, Run
from fastprompt.train import run_folder

EVALUATION = Path("eval", "results.json")  # of a run's folder
ASKED = Path("eval", "asked.json")  # by which options of the plan
_SHOWN = 3  # last lines of a failed run's log
_INTERRUPTED = 130


def state(run: Run, plan: Plan) -> str:
    """ "finished", "trained" (but not yet evaluated), "begun" or "to do"."""
    if (run.folder / run_folder.RESULT).is_file():
        return "finished" if _evaluated(run, plan) else "trained"
    return "begun" if run_folder.holds_run(run.folder) else "to do"


def _evaluated(run: Run, plan: Plan) -> bool:
    """Whether it was asked what the plan asks, and as the plan asks it."""
    if not plan.eval:
        return True
    try:
        asked = json.loads((run.folder / ASKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return asked == plan.eval and (run.folder / EVALUATION).is_file()


def check_begun(plan: Plan) -> None:
    """Raises TrainingError if a folder holds a run of other options."""
    for run in plan.runs:
        if run_folder.holds_run(run.folder):
            run_folder.check_same(run.folder, run.config)


@dataclass
class Report:
    """What `run_plan` did: labels of runs, and of those that failed the end of what they printed.

    ``interrupted``: a signal ended it; running the plan again goes on.
    """

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def run_plan(plan: Plan, *, jobs: int = 1, say: Callable[[str], object] = print) -> Report:
    """Run what is not finished, ``jobs`` at a time; cards, if there are several, in turn.

    Ctrl-C or SIGTERM lets each process under way finish its step and write a checkpoint; a second
    one ends them at once.

    Raises:
        TrainingError: a folder holds a run of other options; nothing has run then.
    """
    check_begun(plan)
    report, sweep = Report(), _Processes(plan)
    left = [run for run in plan.runs if state(run, plan) != "finished"]
    done = len(plan.runs) - len(left)
    say(f"{len(plan.runs)} runs, {done} of them finished" if done else f"{len(left)} runs")
    with ThreadPoolExecutor(jobs) as pool, _terminable():
        pending: dict[Future, Run] = {pool.submit(sweep.run, run, say): run for run in left}
        while pending:
            try:
                over, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in over:
                    _note(report, pending.pop(future), _why(future), say)
            except KeyboardInterrupt:
                report.interrupted = True
                say("stopping: each run finishes its step and writes a checkpoint")
                sweep.stop()
    return report


def _why(future: Future) -> str | None:
    """Why its run is not finished, if it is not; a full disk ends that run alone."""
    try:
        return future.result()
    except OSError as error:
        return str(error)


def _note(report: Report, run: Run, why: str | None, say: Callable[[str], object]) -> None:
    if why is None:
        report.finished.append(run.label)
    elif not report.interrupted:
        report.failed[run.label] = why
        say(f"{run.label}: failed\n{why}")


class _Processes:
    """Those of a sweep that are under way."""

    def __init__(self, plan: Plan):
        self.plan, self.stopping = plan, False
        self.lock, self.running = threading.Lock(), set[subprocess.Popen]()
        self.cards: SimpleQueue[str] = SimpleQueue()
        for card in _cards():
            self.cards.put(card)
        self.several = self.cards.qsize() > 1

    def run(self, run: Run, say: Callable[[str], object]) -> str | None:
        """Train and evaluate one; why it is not finished, if it is not."""
        if self.stopping:
            return "not begun"
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        options = run.folder.with_name(f"{run.folder.name}.yaml")
        with open(run.folder.with_name(f"{run.folder.name}.log"), "ab") as log:
            try:  # a process that outlives us inherits the file, and with it the lock
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return f"{run.folder}: another process is at it"
            commands = []
            if state(run, self.plan) != "trained":
                replace(options, lambda part: part.write_text(run.config.as_yaml(), "utf-8"))
                commands.append(["train", "--config", str(options), "--resume"])
            if self.plan.eval:
                commands.append(evaluation(run, self.plan.eval))
            with self._card() as environment:
                for command in commands:
                    say(f"{run.label}: fastprompt {command[0]}")
                    code = self._call(command, log, environment)
                    if code:
                        return f"exit status {code}; the end of {log.name}:\n{_end(log.name)}"
        if self.plan.eval:
            text = json.dumps(self.plan.eval)
            replace(run.folder / ASKED, lambda part: part.write_text(text, encoding="utf-8"))
        if state(run, self.plan) != "finished":
            return f"{run.folder}: want a result, found none"
        return None

    def _call(self, command: list[str], log: BinaryIO, environment: dict[str, str]) -> int:
        """The exit status of ``fastprompt COMMAND``."""
        with self.lock:
            if self.stopping:
                return _INTERRUPTED
            process = subprocess.Popen(
                [sys.executable, "-m", "fastprompt", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a terminal's Ctrl-C comes through `stop` alone, once
            )
            self.running.add(process)
        code = process.wait()
        with self.lock:
            self.running.discard(process)
        return code

    def stop(self) -> None:
        with self.lock:
            self.stopping = True
            for process in self.running:
                process.send_signal(signal.SIGINT)

    @contextmanager
    def _card(self) -> Iterator[dict[str, str]]:
        """The environment of a process, which sees one card if there are several."""
        if not self.several:
            yield dict(os.environ)
            return
        card = self.cards.get()
        try:
            yield os.environ | {"CUDA_VISIBLE_DEVICES": card}
        finally:
            self.cards.put(card)


def _cards() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def evaluation(run: Run, asked: dict[str, Any]) -> list[str]:
    """``fastprompt eval`` of a trained run, as arguments."""
    config = run.config
    command = ["eval", "--model", config.model, "--prompts", str(run.folder / run_folder.PROMPTS)]
    command += ["--dtype", config.dtype, "--output", str(run.folder / EVALUATION.parent)]
    command += ["--four-bit"] * config.four_bit
    if config.template_name != "auto" and "chat_template" not in asked:
        command += ["--template", config.template_name]
    for name, value in asked.items():
        values = value if isinstance(value, list) else [value]
        command += [f"--{name.replace('_', '-')}", *map(str, values)]
    return command


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is as Ctrl-C, where signals can be taken."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(log: str) -> str:
    lines = [line for line in Path(log).read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-_SHOWN:])
