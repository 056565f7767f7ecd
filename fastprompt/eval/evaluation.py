"""Ask a model a benchmark's questions, keep what it says, score it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
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
from fastprompt.eval.bootstrap import intervals
from fastprompt.eval.generate import SUFFIX, answers
from fastprompt.eval.identity import identity
from fastprompt.eval.questions import InputError, Question, check_images, digest
from fastprompt.eval.rank import choices
from fastprompt.eval.results import Result, write
from fastprompt.files import replace as write_whole

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
        blank: show no image, but one of its size in the colour that the processor makes about 0 of
            (colours are whole 255ths).
        model: what tells the model apart; `of` adds what its weights and processor say.
    """

    score: str = EXACT
    suffix: str = SUFFIX
    max_new_tokens: int = 16
    blank: bool = False
    model: dict[str, str] = field(default_factory=dict)

    def of(self, model: nn.Module, processor: ProcessorMixin) -> "Run":
        """The same of a model as it is now."""
        return replace(self, model=self.model | identity(model, processor))

    def settle(self, folder: Path) -> None:
        """Make the folder this run's. Raises InputError if it is another's."""
        if self.score not in SCORES:
            raise ValueError(f"score: want one of {SCORES}, got {self.score!r}")
        folder.mkdir(parents=True, exist_ok=True)
        path, mine = folder / "run.json", asdict(self)
        if path.exists() and (other := json.loads(path.read_text())) != mine:
            raise InputError(f"{path}: want {mine}, but what lies there is of {other}")
        write_whole(path, lambda part: part.write_text(json.dumps(mine, indent=1) + "\n"))


@dataclass(frozen=True)
class Task:
    """A benchmark's questions: all of them, and those within the limit of each group."""

    benchmark: Benchmark
    every: list[Question]
    wanted: list[Question]


def load(
    tasks: list[str | Benchmark], data: str | Path | None = None, limit: int | None = None
) -> dict[str, Task]:
    """Read benchmarks; published ones, given by name, from the folder that has their folders.

    Raises:
        ValueError: an unknown or no task, a published one without ``data``.
        InputError: two of one name, or own questions of a published one's; and see
            `Benchmark.questions`.
    """
    unknown = [t for t in tasks if not isinstance(t, Benchmark) and t not in BENCHMARKS]
    if unknown or not tasks:
        raise ValueError(f"tasks: want some of {list(BENCHMARKS)}, got {unknown or 'none'}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: want at least 1, got {limit}")
    if data is None and any(isinstance(t, str) for t in tasks):
        raise ValueError(f"data: want the folder of {tasks}, got none")
    found: dict[str, Task] = {}
    for benchmark in (BENCHMARKS[t] if isinstance(t, str) else t for t in tasks):
        if benchmark is not BENCHMARKS.get(benchmark.name, benchmark):
            raise InputError(
                f"own questions: want another name than the published benchmark's, {benchmark.name}"
            )
        if benchmark.name in found:
            raise InputError(f"tasks: want different names, got {benchmark.name!r} twice")
        every = benchmark.questions(Path(data or ""))
        found[benchmark.name] = Task(benchmark, every, benchmark.limited(every, limit))
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
    """Answers to all questions wanted, kept in ``predictions/<task>.jsonl`` of `folder_of`.

    What is there already is not asked again. Images are taken to be there: `check_images`. Other
    arguments and errors: see `evaluate`.
    """
    output = folder_of(output, run)
    run.settle(output)
    ask = partial(_answers, model, processor, run=run, batch=batch)
    was_training = model.training
    model.eval()
    said: Said = {}
    try:
        for name, task in tasks.items():
            said |= _kept(output / "predictions" / f"{name}.jsonl", name, task, ask)
    finally:
        model.train(was_training)
    return said


def folder_of(output: Path, run: Run) -> Path:
    """Where a run's files are: blank images' in ``output/blank``, beside the true ones'."""
    return output / "blank" if run.blank else output


def _answers(
    model: nn.Module, processor: ProcessorMixin, questions: list[Question], *, run: Run, batch: int
) -> Iterator[Said]:
    if run.blank:
        mean = processor.image_processor.image_mean
        if mean is None:
            raise InputError("blank: want a processor with an image_mean, got one without")
        colour = tuple(round(255 * channel) for channel in mean)
        questions = [replace(q, blank=colour) for q in questions]
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
    known = {q.id: q for q in task.every}
    said = predictions.resume(path, known)
    left = [q for q in task.wanted if q.id not in said]
    done, total = len(task.wanted) - len(left), len(task.wanted)
    with tqdm(total=total, initial=done, desc=name) as progress:
        for new in ask(left):
            predictions.append(path, new, known)
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
            shown = [(q.text, q.answers, joined[name][q.id]) for q in task.wanted]
            judged = json.dumps([identity(*by), shown]).encode()
            path = output / "verdicts" / f"{name}-{sha256(judged).hexdigest()[:12]}.jsonl"
            verdicts = _kept(path, f"{name}, judged", task, ask)
            scores["judge"] = judge.accuracy(task.wanted, verdicts)
        found = intervals(task.benchmark, task.wanted, joined[name])
        results[name] = Result(
            name,
            count=len(task.wanted),
            digest=digest(task.wanted),
            missing=sum(text is None for text in joined[name].values()),
            scores=scores,
            intervals={key: found[key] for key in found if key in scores},
            compared=task.benchmark.headline,
            full=task.benchmark.full,
        )
    if "mme" in tasks:
        write_results(tasks["mme"].wanted, joined["mme"], output / "mme_results")
    write(output, results, about)
    return results


def evaluate(
    model: nn.Module,
    processor: ProcessorMixin,
    tasks: list[str | Benchmark],
    data: str | Path | None,
    output: str | Path,
    *,
    run: Run | None = None,
    blank: bool = False,
    limit: int | None = None,
    batch: int = 8,
) -> dict[str, Result]:
    """Evaluate a model, patched or not, as it is.

    Args:
        model, processor: a LLaVA-like model of transformers and its processor.
        tasks: names out of `BENCHMARKS`, and benchmarks of one's own questions: `vqa`.
        data: the folder of the folders of all benchmarks given by name; None without any.
        output: gets ``predictions/<task>.jsonl``, ``results.json``, ``results.md``, ``radar.png``
            (three tasks and more) and, of MME, what its own tool reads.
        run: how to ask, and of whom. Greedy answers, if not given.
        blank: as ``run.blank``: what is right without looking. All files are then in
            ``output/blank``, so that both runs can share an output.
        limit: questions of each group.
        batch: questions (ranking: options of one question) that run at once.

    Returns:
        Task -> scores.

    Raises:
        InputError: a file is not of its benchmark's format, an image is not there, the folder holds
            another run's predictions. Nothing was asked then.
    """
    run, output, found = run or Run(), Path(output), load(tasks, data, limit)
    run = replace(run, blank=run.blank or blank)
    for task in found.values():
        check_images(task.wanted)
    run = run.of(model, processor)
    said = predict(model, processor, found, output, run=run, batch=batch)
    return score(found, said, folder_of(output, run), about=asdict(run))
