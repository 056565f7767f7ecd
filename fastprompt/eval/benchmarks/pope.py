"""POPE (arXiv 2305.10355): is an object in the image, asked of objects that are not there, too.

``pope/coco_pope_{adversarial,popular,random}.json``, a JSON object a line with ``question_id``,
``image``, ``text`` and ``label`` (yes, no); images are COCO's ``val2014``.
"""

from collections.abc import Iterator
from pathlib import Path

from fastprompt.eval.answers import Predictions
from fastprompt.eval.benchmarks.base import Benchmark
from fastprompt.eval.questions import Question, find, json_lines, one_of, value

CATEGORIES = ("adversarial", "popular", "random")
LABELS = {"yes": "yes", "no": "no"}


def read(root: Path) -> Iterator[Question]:
    """The questions of the three categories."""
    for category in CATEGORIES:
        name = f"coco_pope_{category}.json"
        path = find(root, f"pope/{name}", f"pope/coco/{name}", f"pope/output/coco/{name}")
        for where, row in json_lines(path):
            yield Question(
                id=f"pope/{category}/{value(row, where, 'question_id')}",
                image=root / "pope" / "val2014" / str(value(row, where, "image")),
                text=str(value(row, where, "text")),
                answers=(one_of(value(row, where, "label"), where, LABELS),),
                options=("Yes", "No"),
                group=category,
                where=where,
            )


def yes_or_no(said: str) -> str:
    """POPE's own reading: "no" if the first sentence has a word No, no or not, else "yes"."""
    words = said.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def score(questions: list[Question], predictions: Predictions) -> dict[str, float]:
    """``accuracy``, ``precision``, ``recall``, ``f1`` (yes is positive) and ``yes_ratio`` of each
    category (``category/…``), and their means over the categories."""
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    by_category = {}
    for category in CATEGORIES:
        by_category[category] = _of([q for q in questions if q.group == category], predictions)
    means = {name: sum(s[name] for s in by_category.values()) / len(CATEGORIES) for name in names}
    apart = {f"{c}/{name}": s[name] for c, s in by_category.items() for name in names}
    return means | apart


def _of(questions: list[Question], predictions: Predictions) -> dict[str, float]:
    pairs = []
    for q in questions:
        said, label = predictions[q.id], q.answers[0] == "yes"
        # one that is missing counts as wrong, whatever the label
        pairs.append((not label if said is None else yes_or_no(said) == "yes", label))
    hits = sum(said and label for said, label in pairs)
    said_yes, are_yes = (sum(column) for column in zip(*pairs, strict=True))
    precision = hits / said_yes if said_yes else 0.0
    recall = hits / are_yes if are_yes else 0.0
    return {
        "accuracy": sum(said == label for said, label in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": said_yes / len(pairs),
    }


def points(questions: list[Question], predictions: Predictions) -> list[float]:
    """1.0 where the prediction is read as the answer, else 0.0."""
    said = ((predictions[q.id], q.answers[0]) for q in questions)
    return [float(text is not None and yes_or_no(text) == answer) for text, answer in said]


POPE = Benchmark("pope", read, score, points=points, means={"accuracy": lambda q: q.group})
