"""One's own questions about images, in a JSON array or as JSON lines.

A row is ``{"id", "image", "question", "answer", "options", "group"}``, or LLaVA's ``{"id", "image",
"conversations"}``, whose every question is asked alone (its id then ends with ``/0``, ``/1``, … if
there are several). ``answer`` is a text or a number, or a list of forms that all count, the first
of which is the answer's name. ``options``, what rank scoring chooses from, and ``group`` may be
left out, and so may ``id``, where image and question tell rows apart.
"""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from fastprompt.eval.answers import Predictions, accuracy, plain, right
from fastprompt.eval.benchmarks.base import Benchmark
from fastprompt.eval.questions import InputError, Question, parse, value
from fastprompt.train import rows
from fastprompt.train.sources import JsonRows

UNNAMED = "no group"  # in scores, where other rows have one


def vqa(path: str | Path, images: str | Path | None = None, name: str | None = None) -> Benchmark:
    """A benchmark of the questions in a file.

    Args:
        path: ``.json`` or ``.jsonl``; see the module.
        images: the folder that the rows' ``image`` is relative to; None: the file's own.
        name: of the benchmark; None: the file's, without its ending.

    Returns:
        What `evaluate` takes beside the names of published benchmarks. Its scores: see `score`.
    """
    path = Path(path)
    name = name or path.stem
    read = partial(_read, name, path, Path(images) if images else path.parent)
    return Benchmark(
        name,
        lambda _: read(),
        score,
        means={
            "accuracy": lambda q: "",
            "balanced_accuracy": lambda q: plain(q.answers[0]),
            "macro_accuracy": lambda q: q.group,
        },
    )


def score(questions: list[Question], predictions: Predictions) -> dict[str, float]:
    """How many are right, and for whom.

    Returns:
        ``accuracy``; ``balanced_accuracy``: mean recall over the true answers, so that who always
        says the commoner of two gets 0.50; ``other`` (see `accuracy`). Where rows have groups also
        ``macro_accuracy``, the mean of the groups' accuracies, their ``group_min``, ``group_max``
        and ``group_sd`` (of just these groups: divided by their number), and each
        ``<group>/accuracy``; rows without a group are one more, "no group".
    """
    by_answer, by_group = defaultdict(list), defaultdict(list)
    for q, point in zip(questions, right(questions, predictions), strict=True):
        by_answer[plain(q.answers[0])].append(point)
        by_group[q.group].append(point)
    scores = accuracy(questions, predictions)
    scores["balanced_accuracy"] = fmean(map(fmean, by_answer.values()))
    if list(by_group) != [""]:
        each = {group: fmean(points) for group, points in by_group.items()}
        scores["macro_accuracy"] = fmean(each.values())
        scores |= {f"group_{f.__name__}": f(each.values()) for f in (min, max)}
        scores["group_sd"] = pstdev(each.values())
        scores |= {f"{group or UNNAMED}/accuracy": points for group, points in sorted(each.items())}
    return scores


# ---- reading ----


def _read(name: str, path: Path, images: Path) -> Iterator[Question]:
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        raise InputError(f"{path}: want a .json or .jsonl file of questions")
    source = JsonRows(path, images)
    for index in range(len(source)):
        where = source.where(index)
        yield from _questions(name, parse(source.raw(index), where), where, images)


def _questions(name: str, row: Any, where: str, images: Path) -> Iterator[Question]:
    image = value(row, where, "image")
    if not isinstance(image, str):
        raise InputError(f"{where}: want a file's name in 'image', got {image!r}")
    asked = _asked(row, where, rows.Blob(images / image))
    options = row.get("options") or []
    texts = isinstance(options, list) and all(isinstance(o, str) for o in options)
    if not texts or (options and not 1 < len(set(map(plain, options))) == len(options)):
        raise InputError(f"{where}: want several different texts in 'options', got {options!r}")
    for turn, (text, answers) in enumerate(asked):
        if options and plain(answers[0]) not in map(plain, options):
            raise InputError(
                f"{where}: want the answer among options {options}, got {answers[0]!r}"
            )
        own = f"{image}/{text}" if row.get("id") is None else row["id"]
        yield Question(
            id=f"{name}/{own}/{turn}" if len(asked) > 1 else f"{name}/{own}",
            image=images / image,
            text=text,
            answers=answers,
            options=tuple(options),
            group="" if row.get("group") is None else str(row["group"]),
            where=where,
        )


def _asked(row: dict, where: str, image: rows.Blob) -> list[tuple[str, tuple[str, ...]]]:
    """Each question of a row, with the forms of its answer."""
    if "conversations" not in row:
        answer = value(row, where, "answer")
        forms = answer if isinstance(answer, list) else [answer]
        kinds = {type(form) for form in forms}
        if not forms or kinds - {str, int, float} or not all(plain(str(form)) for form in forms):
            raise InputError(f"{where}: want a text, or several, in 'answer'; got {answer!r}")
        return [(_alone(str(value(row, where, "question"))), tuple(map(str, forms)))]
    try:
        turns = rows.parse(row, where, image).turns
    except rows.BadRow as bad:
        raise InputError(f"{where}: {bad.reason}") from bad
    if turns[0][0] == "system":
        raise InputError(f"{where}: want questions alone, got a system's turn")
    return [
        (_alone(question), (answer,))
        for (_, question), (_, answer) in zip(turns[::2], turns[1::2], strict=True)
    ]


def _alone(text: str) -> str:
    return text.replace(rows.IMAGE, "").strip()  # the chat template has the image's place
