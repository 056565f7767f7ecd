"""Ask a model a benchmark's questions, keep what it says, score it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastprompt.eval import judge, predictions
from fastprompt.eval.benchmarks import BENCHMARKS, Benchmark
from fastprompt.eval.benchmarks.mme import write_results
from fastprompt.eval.generate import SUFFIX, answers
from fastprompt.eval.questions import InputError, Question, check_images
from fastprompt.eval.rank import choices
from fastprompt.eval.results import Result, write
from fastprompt.files import replace

EXACT, RANK = "exact", "rank"
SCORES = (EXACT, RANK)
Said = dict[str, str]


@dataclass(frozen=True)
class Run:
    """What makes predictions what they are. A folder holds those of one run alone.

    Attributes:
        score: "exact": greedy answers; "rank": the likeliest option (open questions: greedy).
        suffix: put after each question.
        max_new_tokens: of a greedy answer.
        model: whatever tells the model apart: its name, its prompts' hash, its dtype.
    """

    score: str = EXACT
    suffix: str = SUFFIX
    max_new_tokens: int = 16
    model: dict[str, str] = field(default_factory=dict)

    def settle(self, folder: Path) -> None:
        """Make the folder this run's. Raises InputError if it is another's."""
        if self.score not in SCORES:
            raise ValueError(f"score: want one of {SCORES}, got {self.score!r}")
        folder.mkdir(parents=True, exist_ok=True)
        path, mine = folder / "run.json", asdict(self)
        if path.exists() and (other := json.loads(path.read_text())) != mine:
            raise InputError(f"{path}: want {mine}, but what lies there is of {other}")
        replace(path, lambda part: part.write_text(json.dumps(mine, indent=1) + "\n"))


@dataclass(frozen=True)
class Task:
    """A benchmark's questions: all of them, and those within the limit of each group."""

    benchmark: Benchmark
    every: list[Question]
    wanted: list[Question]


def load(tasks: list[str], data: str | Path, limit: int | None = None) -> dict[str, Task]:
    """Read benchmarks from the folder that has their folders. Raises InputError."""
    unknown = [task for task in tasks if task not in BENCHMARKS]
    if unknown or not tasks:
        raise ValueError(f"tasks: want some of {list(BENCHMARKS)}, got {unknown or 'none'}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: want at least 1, got {limit}")
    found = {}
    for task in tasks:
        every = BENCHMARKS[task].questions(Path(data))
        found[task] = Task(BENCHMARKS[task], every, BENCHMARKS[task].limited(every, limit))
    return found


def predict(
    model: nn.Module,
    processor: ProcessorMixin,
    tasks: dict[str, Task],
    output: Path,
    *,
    run: Run,
    batch: int = 8,
) -> Said:
    """Answers to all questions wanted, kept in ``output/predictions/<task>.jsonl``.

    What is there already is not asked again. Arguments and errors: see `evaluate`.
    """
    for task in tasks.values():
        check_images(task.wanted)
    run.settle(output)
    ask = partial(_answers, model, processor, run=run, batch=batch)
    was_training = model.training
    model.eval()
    said: Said = {}
    for name, task in tasks.items():
        said |= _kept(output / "predictions" / f"{name}.jsonl", name, task, ask)
    model.train(was_training)
    return said


def _answers(
    model: nn.Module, processor: ProcessorMixin, questions: list[Question], *, run: Run, batch: int
) -> Iterator[Said]:
    ranked = [q for q in questions if run.score == RANK and q.options]
    greedy = [q for q in questions if run.score == EXACT or not q.options]
    shared = dict(batch=batch, suffix=run.suffix)
    yield from choices(model, processor, ranked, **shared)
    yield from answers(model, processor, greedy, max_new_tokens=run.max_new_tokens, **shared)


def _kept(
    path: Path, name: str, task: Task, ask: Callable[[list[Question]], Iterator[Said]]
) -> Said:
    """What ``path`` has of a task, and what ``ask`` yields of the rest, added to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    said = predictions.resume(path, {q.id for q in task.every})
    left = [q for q in task.wanted if q.id not in said]
    done, total = len(task.wanted) - len(left), len(task.wanted)
    with tqdm(total=total, initial=done, desc=name) as progress:
        for new in ask(left):
            predictions.append(path, new)
            said |= new
            progress.update(len(new))
    return said


def score(
    tasks: dict[str, Task],
    said: Said,
    output: Path,
    *,
    about: dict[str, Any],
    missing_is_wrong: bool = False,
    by: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    batch: int = 8,
) -> dict[str, Result]:
    """Join predictions to questions by id, score them and write the results.

    Args:
        tasks, output, batch: see `evaluate`.
        said: {id: prediction} of all tasks.
        about: what is written down of the run.
        missing_is_wrong: count questions without a prediction as wrong; else they are an error.
        by: a judge, whose verdicts on just these predictions are kept in ``output/verdicts/`` and
            are a score more, "judge".
    """
    output.mkdir(parents=True, exist_ok=True)
    joined, results = {}, {}
    for name, task in tasks.items():  # all are complete before a judge is asked
        joined[name] = predictions.join(task.wanted, said, missing_is_wrong=missing_is_wrong)
    for name, task in tasks.items():
        scores = task.benchmark.score(task.wanted, joined[name])
        if by is not None:
            ask = partial(judge.verdicts, *by, predictions=joined[name], batch=batch)
            judged = json.dumps([by[0].config.name_or_path, joined[name]]).encode()
            path = output / "verdicts" / f"{name}-{sha256(judged).hexdigest()[:12]}.jsonl"
            verdicts = _kept(path, f"{name}, judged", task, ask)
            scores["judge"] = judge.accuracy(task.wanted, verdicts)
        missing = sum(text is None for text in joined[name].values())
        results[name] = Result(name, len(task.wanted), missing, scores)
    if "mme" in tasks:
        write_results(tasks["mme"].wanted, joined["mme"], output / "mme_results")
    write(output, results, about)
    return results


def evaluate(
    model: nn.Module,
    processor: ProcessorMixin,
    tasks: list[str],
    data: str | Path,
    output: str | Path,
    *,
    run: Run | None = None,
    limit: int | None = None,
    batch: int = 8,
) -> dict[str, Result]:
    """Evaluate a model, patched or not, as it is.

    Args:
        model, processor: a LLaVA-like model of transformers and its processor.
        tasks: names out of `BENCHMARKS`.
        data: the folder of all benchmarks' folders.
        output: gets ``predictions/<task>.jsonl``, ``results.json``, ``results.md``, ``radar.png``
            (three tasks and more) and, of MME, what its own tool reads.
        run: how to ask, and of whom. Greedy answers, if not given.
        limit: questions of each group.
        batch: questions (ranking: options of one question) that run at once.

    Returns:
        Task -> scores.

    Raises:
        InputError: a file is not of its benchmark's format, an image is not there, the folder holds
            another run's predictions. Nothing was asked then.
    """
    run, output, found = run or Run(), Path(output), load(tasks, data, limit)
    said = predict(model, processor, found, output, run=run, batch=batch)
    return score(found, said, output, about=asdict(run))
