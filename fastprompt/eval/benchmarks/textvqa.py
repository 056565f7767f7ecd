"""TextVQA (arXiv 1904.08920): questions about text in images, ten answers each.

``textvqa/TextVQA_0.5.1_val.json``: ``{"data": [{"question_id", "image_id", "question", "answers":
[ten strings]}, …]}``; images are ``textvqa/train_images/<image_id>.jpg`` (validation's too).
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from fastprompt.eval.answers import Predictions, soft_accuracy
from fastprompt.eval.benchmarks.base import Benchmark
from fastprompt.eval.questions import InputError, Question, find, parse, value

ANNOTATORS = 10


def read(root: Path) -> Iterator[Question]:
    """The questions of the validation file, which is one JSON object without lines."""
    path = find(root, "textvqa/TextVQA_0.5.1_val.json")
    rows = value(parse(path.read_bytes(), str(path)), str(path), "data")
    if not isinstance(rows, list):
        raise InputError(f"{path}: want a list in 'data', got {type(rows).__name__}")
    for index, row in enumerate(rows):
        where = f"{path}: data[{index}]"
        answers = value(row, where, "answers")
        if not isinstance(answers, list) or len(answers) != ANNOTATORS:
            raise InputError(f"{where}: want {ANNOTATORS} answers, got {answers!r}")
        yield Question(
            id=f"textvqa/{value(row, where, 'question_id')}",
            image=root / "textvqa" / "train_images" / f"{value(row, where, 'image_id')}.jpg",
            text=str(value(row, where, "question")),
            answers=tuple(map(str, answers)),
            where=where,
        )


def score(questions: list[Question], predictions: Predictions) -> dict[str, float]:
    """``accuracy``: the mean soft accuracy."""
    return {"accuracy": fmean(points(questions, predictions))}


def points(questions: list[Question], predictions: Predictions) -> list[float]:
    """Soft accuracy of each."""
    said = ((predictions[q.id], q.answers) for q in questions)
    return [0.0 if text is None else soft_accuracy(text, answers) for text, answers in said]


TEXTVQA = Benchmark("textvqa", read, score, points=points)
