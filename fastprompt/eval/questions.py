"""What every benchmark is read into: questions about images, each with an id of its own."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError


class InputError(ValueError):
    """What was given cannot be evaluated. The message names file and line, if it is a file's."""


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        id: unique in the benchmark, made of what the benchmark itself tells questions apart by,
            so that it does not depend on the order of a file. Begins with the benchmark's name.
        image: a file, or the image.
        text: what is asked, without the task's suffix.
        answers: what counts as right. TextVQA: what its ten annotators answered.
        options: what rank scoring chooses from; the first form of each answer. () if it is open.
        group: the subtask or category that is scored apart.
        where: file and line it was read from, for messages.
        blank: a colour (RGB) that stands in for every pixel of the image.
    """

    id: str
    image: Path | Image.Image
    text: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    group: str = ""
    where: str = ""
    blank: tuple[int, int, int] | None = None

    @property
    def digest(self) -> str:
        """A short hash of what is asked: text, options, name of the image's file."""
        image = self.image.name if isinstance(self.image, Path) else ""
        asked = json.dumps([self.text, self.options, image])
        return sha256(asked.encode()).hexdigest()[:8]

    def open(self) -> Image.Image:
        """The image, RGB. Raises InputError if it is not there or broken."""
        image = self._opened()
        return image if self.blank is None else Image.new("RGB", image.size, self.blank)

    def _opened(self) -> Image.Image:
        if isinstance(self.image, Image.Image):
            return self.image.convert("RGB")
        try:
            with Image.open(self.image) as image:
                return image.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"{self.where}: want an image in {self.image}; {error}") from error


def collect(questions: Iterable[Question], name: str) -> list[Question]:
    """All of them, or InputError if two have one id, or there is none."""
    found: dict[str, Question] = {}
    for question in questions:
        other = found.setdefault(question.id, question)
        if other is not question:
            raise InputError(f"{question.where}: {question.id!r} is also at {other.where}")
    if not found:
        raise InputError(f"{name}: want questions, found none")
    return list(found.values())


def digest(questions: list[Question]) -> str:
    """A short hash of what is asked and what is right, in any order."""
    each = sorted([q.id, q.digest, q.group, q.answers] for q in questions)
    return sha256(json.dumps(each).encode()).hexdigest()[:16]


def check_images(questions: list[Question]) -> None:
    """Raises InputError if an image file is not there, before a model is asked anything."""
    missing = [q for q in questions if isinstance(q.image, Path) and not q.image.is_file()]
    if missing:
        raise InputError(
            f"{missing[0].where}: want an image in {missing[0].image}, which is not there "
            f"({len(missing)} of {len(questions)} questions lack theirs)"
        )


# ---- reading ----


def find(root: Path, *names: str) -> Path:
    """The first of ``names`` that is under ``root``, or InputError with all that was tried."""
    for name in names:
        if (root / name).exists():
            return root / name
    raise InputError(f"{root}: want {' or '.join(names)} in it")


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """``file:line`` and what it says, of each line that is not blank."""
    empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                empty = False
                yield f"{path}:{number}", parse(line, f"{path}:{number}")
    if empty:
        raise InputError(f"{path}: want a JSON object a line, the file is empty")


def parse(text: bytes, where: str) -> Any:
    """What a JSON text says, or InputError."""
    try:
        return json.loads(text.decode("utf-8"))
    except ValueError as error:  # of the decoder too
        raise InputError(f"{where}: want JSON in UTF-8; {error}") from error


def value(row: Any, where: str, *keys: str) -> Any:
    """What stands under the first key that is there, or InputError."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: want a JSON object, got {type(row).__name__}")
    for key in keys:
        if row.get(key) not in (None, ""):
            return row[key]
    raise InputError(f"{where}: want {' or '.join(map(repr, keys))}, got {sorted(row)}")


def one_of(label: Any, where: str, labels: dict[Any, Any]) -> Any:
    """What ``label`` stands for, or InputError."""
    if not isinstance(label, str | int) or label not in labels:
        raise InputError(f"{where}: want a label of {list(labels)}, got {label!r}")
    return labels[label]
