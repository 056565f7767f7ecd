"""MME (arXiv 2306.13394): 14 subtasks of yes/no questions, two about each image.

``mme/<subtask>/`` holds images and, of the same name, text files with two lines
``question<tab>Yes|No``; in five subtasks they lie in ``images/`` and ``questions_answers_YN/``.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from fastprompt.eval.answers import Predictions
from fastprompt.eval.benchmarks.base import Benchmark
from fastprompt.eval.questions import InputError, Question, find, one_of

SUBTASKS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR",
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning",
}
IMAGES = (".jpg", ".png", ".jpeg")
LABELS = {"Yes": "yes", "No": "no", "yes": "yes", "no": "no"}


def read(root: Path) -> Iterator[Question]:
    """Questions of all subtasks; a subtask that is not there is an error."""
    folder = find(root, "mme/MME_Benchmark_release_version/MME_Benchmark", "mme")
    for subtask in " ".join(SUBTASKS.values()).split():
        here = find(folder, subtask)
        texts, images = here / "questions_answers_YN", here / "images"
        if not texts.is_dir():
            texts = images = here
        found = sorted(texts.glob("*.txt"))
        if not found:
            raise InputError(f"{texts}: want text files of questions, found none")
        for text in found:
            yield from _of_image(subtask, text, images)


def _of_image(subtask: str, text: Path, images: Path) -> Iterator[Question]:
    try:
        lines = text.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{text}: want UTF-8; {error}") from error
    rows = [(f"{text}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if len(rows) != 2:
        raise InputError(f"{text}: want two questions about an image, got {len(rows)}")
    paths = [images / f"{text.stem}{suffix}" for suffix in IMAGES]
    image = next((path for path in paths if path.is_file()), paths[0])
    for where, line in rows:
        if line.count("\t") != 1:
            raise InputError(f"{where}: want question<tab>answer, got {line!r}")
        asked, answer = (part.strip() for part in line.split("\t"))
        yield Question(
            id=f"mme/{subtask}/{text.stem}/{asked}",
            image=image,
            text=asked,
            answers=(one_of(answer, where, LABELS),),
            options=("Yes", "No"),
            group=subtask,
            where=where,
        )


def yes_or_no(said: str) -> str:
    """ "yes", "no" or "other", as MME's own tool reads it: by the first four letters."""
    start = said.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def score(questions: list[Question], predictions: Predictions) -> dict[str, float]:
    """``subtask/acc``, ``subtask/acc+`` (images with both questions right) of each subtask, and
    the sums of 100·(acc + acc+): ``perception`` (to 2000), ``cognition`` (to 800), ``total``.
    ``other``: the share of predictions that say neither yes nor no.
    """
    right = _right(questions, predictions)
    other = sum(yes_or_no(predictions[q.id] or "") == "other" for q in questions)
    scores = {}
    for half, subtasks in SUBTASKS.items():
        points = 0.0
        for subtask in subtasks.split():
            images = right[subtask].values()
            every = [r for image in images for r in image]
            scores[f"{subtask}/acc"] = sum(every) / len(every)
            scores[f"{subtask}/acc+"] = sum(map(all, images)) / len(images)
            points += 100 * (scores[f"{subtask}/acc"] + scores[f"{subtask}/acc+"])
        scores[half] = points
    total = scores["perception"] + scores["cognition"]
    return {"total": total, **scores, "other": other / len(questions)}


def points(questions: list[Question], predictions: Predictions) -> list[float]:
    """Half a point for a right answer, half for both of the image's: acc and acc+."""
    right = _right(questions, predictions)
    both = {(group, image): all(r) for group, of in right.items() for image, r in of.items()}
    return [(_is_right(q, predictions) + both[q.group, str(q.image)]) / 2 for q in questions]


def _right(questions: list[Question], predictions: Predictions) -> dict[str, dict[str, list[bool]]]:
    """Subtask -> image -> which of its questions are right."""
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for q in questions:
        right[q.group][str(q.image)].append(_is_right(q, predictions))
    return right


def _is_right(question: Question, predictions: Predictions) -> bool:
    return yes_or_no(predictions[question.id] or "") in question.answers


def write_results(questions: list[Question], predictions: Predictions, folder: Path) -> None:
    """What MME's own ``calculation.py`` reads: ``<subtask>.txt``, a line each
    ``image<tab>question<tab>answer<tab>prediction``."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = defaultdict(list)
    for q in questions:
        said = " ".join((predictions[q.id] or "").split())
        answer = q.answers[0].capitalize()
        lines[q.group].append(f"{Path(str(q.image)).name}\t{q.text}\t{answer}\t{said}\n")
    for subtask, rows in lines.items():
        (folder / f"{subtask}.txt").write_text("".join(rows), encoding="utf-8")


MME = Benchmark(
    "mme",
    read,
    score,
    headline="total",
    full=2800.0,
    unit=2,
    points=points,
    means={"total": lambda q: q.group},
)
