"""What is seen and kept of a run while it runs: a bar, metrics.jsonl, the best prompts."""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback

from fastprompt import checkpoint
from fastprompt.blocks.memory import size_text
from fastprompt.files import replace
from fastprompt.train.checking import Problems, read_problems
from fastprompt.train.distributed import asked_of_any, of_all, processes
from fastprompt.train.trainer import PromptTrainer

METRICS = "metrics.jsonl"
BEST, BEST_METRIC = "best", "metric.json"
_LINE_EVERY = 10.0  # seconds between lines, where there is no terminal for a bar


def peak_memory() -> int:
    """Most bytes in use, of the card since `forget_peak`, or, without a card, of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


class Metrics(TrainerCallback):
    """Every log entry as a line of metrics.jsonl, with the seconds trained so far and the peak of
    memory; a resumed run first drops what it will repeat, and counts on.

    An evaluation, whose logits may take more than training, has a peak of its own.
    """

    def __init__(self, folder: Path):
        self.path = folder / METRICS
        self.began = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        kept = [e for e in read_metrics(self.path) if e["step"] <= state.global_step]
        text = "".join(json.dumps(entry) + "\n" for entry in kept)
        replace(self.path, lambda part: part.write_text(text))
        forget_peak()  # of loading, of prefill, of a run before
        self.began = time.monotonic() - (kept[-1]["seconds"] if kept else 0)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        forget_peak()

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if "train_runtime" in logs:
            return
        entry = {"step": state.global_step, **logs}
        entry |= {"seconds": round(time.monotonic() - self.began, 3), "memory": peak_memory()}
        none = {k: None for k, v in entry.items() if isinstance(v, float) and not math.isfinite(v)}
        with open(self.path, "a") as file:
            file.write(json.dumps(entry | none) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; a last line that a killed run left unfinished is passed."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


class ListBadRows(TrainerCallback):
    """bad_rows.jsonl: those of all processes, written at the beginning and with each checkpoint, so
    that a run that was killed and goes on lists what it met before."""

    def __init__(self, path: Path, problems: Problems):
        self.path, self.problems = path, problems
        problems.merge(read_problems(path))

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.write(state.is_world_process_zero)

    def on_save(self, args, state, control, **kwargs) -> None:
        self.problems.merge(of_all([*self.problems]))  # each process reads rows of its own
        self.write(state.is_world_process_zero)

    def write(self, main: bool) -> None:
        if main:
            self.problems.write(self.path)


class KeepBest(TrainerCallback):
    """``best/``: the prompts of the best evaluation so far, and metric.json that says which.

    One that is not finite is never the best.

    The weights are replaced before the metric: a run killed in between finds the old metric,
    evaluates the same step again when resumed, and writes both.
    """

    def __init__(self, folder: Path, metric: str):
        self.folder, self.metric = folder / BEST, metric

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs) -> None:
        value = metrics[f"eval_{self.metric}"]
        best = self.read()
        better = best is None or (value < best if self.metric == "loss" else value > best)
        if better and math.isfinite(value) and state.is_world_process_zero:
            checkpoint.save(model, self.folder)
            text = json.dumps({"metric": self.metric, "value": value, "step": state.global_step})
            replace(self.folder / BEST_METRIC, lambda part: part.write_text(text + "\n"))

    def read(self) -> float | None:
        path = self.folder / BEST_METRIC
        return json.loads(path.read_text())["value"] if path.is_file() else None


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM: the step is finished, a checkpoint written, the run ends. A second Ctrl-C
    ends it at once.

    ``stopped``: whether it has ended the run, the same in all processes.
    """

    def __init__(self, say):
        self.say, self.asked, self.stopped, self.before = say, False, False, {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets the main one alone take signals
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.say(f"{signal.Signals(number).name}: finishing this step, then a checkpoint")
        self.asked = True
        self.restore()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if asked_of_any(self.asked, args.device):
            self.stopped = state.global_step < state.max_steps  # else there is nothing left to do
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before.clear()


class Bar(TrainerCallback):
    """A bar with loss, tokens/s, memory and the time left; lines where there is no terminal."""

    def __init__(self, console: Console, trainer: PromptTrainer):
        self.console, self.trainer = console, trainer
        self.bar: Progress | None = None
        self.loss, self.began, self.first, self.told = math.nan, 0.0, 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.began, self.first, self.told = time.monotonic(), state.global_step, 0.0
        if self.console.is_terminal:
            columns = (TextColumn("training"), BarColumn(24), MofNCompleteColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console)
            self.bar.add_task("", total=state.max_steps, completed=state.global_step, text="")
            self.bar.start()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.loss = logs.get("loss", self.loss)
        if "eval_loss" in logs:
            found = f"held-out loss {logs['eval_loss']:.4f}, accuracy {logs['eval_accuracy']:.3f}"
            self._print(f"step {state.global_step}/{state.max_steps}  {found}")
        elif "loss" in logs:
            self._show(state)

    def _show(self, state) -> None:
        seconds, done = time.monotonic() - self.began, state.global_step - self.first
        left = seconds / max(1, done) * (state.max_steps - state.global_step)
        rate = processes() * self.trainer.tokens / max(1e-9, seconds)  # all see about as many
        text = f"loss {self.loss:.4f}  {rate:,.0f} tokens/s  {size_text(peak_memory())}"
        text += f"  {_time(left)} left"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step, text=text)
        elif time.monotonic() - self.told > _LINE_EVERY or state.global_step == state.max_steps:
            self.told = time.monotonic()
            self._print(f"step {state.global_step}/{state.max_steps}  {text}")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back; also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
