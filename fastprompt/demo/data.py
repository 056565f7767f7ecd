"""easy-VQA: questions about one coloured shape in a 64x64 image, their families and their scores.

74% of the questions are yes/no, and most of those have "no" (or, negated, "yes") for an answer, so
overall accuracy says little: whoever never looks gets 0.670. The 24 templates fall into
eight families, and the mean over families (`macro`) is what tells looking from guessing:

    on the test split                          accuracy   macro
    commonest training answer to the text         0.670   0.504
    knows the colour, guesses the rest            0.850   0.754
    knows the shape, guesses the rest             0.820   0.750
"""

import io
import json
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastprompt.demo import wheels
from fastprompt.demo.vision import IMAGE_MEAN, IMAGE_STD

SPLITS = ("train", "test")
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
ANSWERS = (*SHAPES, *COLOURS, "yes", "no")


def _patterns() -> dict[str, re.Pattern[str]]:
    shape, colour = f"({'|'.join(SHAPES)})", f"({'|'.join(COLOURS)}) shape"
    what_colour = r"what (color is|is the color of) the"
    templates = {
        "shape": r"what shape (does the image contain|is in the image|is present)",
        "shape given colour": rf"what is the {colour}",
        "colour": rf"{what_colour} shape",
        "colour given shape": rf"{what_colour} {shape}",
    }
    for kind, it in (("shape", shape), ("colour", colour)):
        templates[f"is {kind}"] = (
            rf"is there a {it}( in the image)?|is a {it} present|does the image contain a {it}"
        )
        templates[f"is not {kind}"] = (
            rf"is there not a {it}( in the image)?|is no {it} present"
            rf"|does the image not contain a {it}"
        )
    return {family: re.compile(rf"({text})\?") for family, text in templates.items()}


_PATTERNS = _patterns()
FAMILIES = tuple(_PATTERNS)
_ASKS_FOR = {
    "shape": ("shape", "shape given colour", "is shape", "is not shape"),
    "colour": ("colour", "colour given shape", "is colour", "is not colour"),
}


@dataclass(frozen=True)
class Question:
    """One question about the image `image_id` of its split; `answer` is one of ANSWERS."""

    text: str
    answer: str
    image_id: int


@dataclass(frozen=True)
class Score:
    """Fractions of right answers.

    Attributes:
        accuracy: over all questions.
        macro: mean of `families`, each family weighing the same.
        balanced: mean recall over the answers, each true answer weighing the same.
        families: accuracy per family, in the order of FAMILIES; those not asked are left out.
    """

    accuracy: float
    macro: float
    balanced: float
    families: dict[str, float]


def load(cache: str | Path | None, split: str) -> list[Question]:
    """All questions of "train" (38,575) or "test" (9,673), in the wheel's order, by image.

    Raises:
        ValueError: another split; and what `wheels.fetch` raises.
    """
    rows = json.loads(wheels.member("data", f"{_folder(split)}/questions.json", cache))
    return [Question(text, answer, image_id) for text, answer, image_id in rows]


def images(cache: str | Path | None, split: str) -> Tensor:
    """All images of a split: uint8 [4000 or 1000, 3, 64, 64], row = image_id; decoded in 0.5 s."""
    folder = _folder(split)
    with zipfile.ZipFile(wheels.fetch("data", cache)) as wheel:
        names = [n for n in wheel.namelist() if n.startswith(f"{folder}/images/")]
        numbered = (f"{folder}/images/{i}.png" for i in range(len(names)))
        return torch.stack([_decode(wheel.read(name)) for name in numbered])


def image(cache: str | Path | None, split: str, image_id: int) -> Tensor:
    """One image: uint8 [3, 64, 64]. Raises KeyError if the split has no such image."""
    return _decode(wheels.member("data", f"{_folder(split)}/images/{image_id}.png", cache))


def pixels(images: Tensor, size: int) -> Tensor:
    """`images`, uint8 [n, 3, h, w], as a vision tower takes them: float32 [n, 3, size, size].

    Resized bicubically (antialiased where it shrinks), clamped to what a picture can hold, and
    normalised by ImageNet's mean and deviation; on the device of `images`.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"wanted uint8 [n, 3, h, w], got {images.dtype} {list(images.shape)}")
    x = images.float() / 255
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(c, device=x.device).view(3, 1, 1) for c in (IMAGE_MEAN, IMAGE_STD))
    return (x - mean) / std


def family(question: Question) -> str:
    """Which of FAMILIES the question belongs to. Raises ValueError for a text of no template."""
    for name, pattern in _PATTERNS.items():
        if pattern.fullmatch(question.text):
            return name
    raise ValueError(f"no template of easy-VQA fits {question.text!r}")


def score(questions: Sequence[Question], answers: Sequence[str]) -> Score:
    """Score one answer per question; right means equal.

    Raises:
        ValueError: the lengths differ, or there is nothing to score.
    """
    if len(questions) != len(answers) or not questions:
        raise ValueError(f"{len(questions)} questions, {len(answers)} answers: wanted as many, > 0")
    by_family, by_answer = defaultdict(list), defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        right = answer == question.answer
        by_family[family(question)].append(right)
        by_answer[question.answer].append(right)
    families = {name: fmean(by_family[name]) for name in FAMILIES if name in by_family}
    return Score(
        accuracy=sum(map(sum, by_answer.values())) / len(questions),
        macro=fmean(families.values()),
        balanced=fmean(fmean(right) for right in by_answer.values()),
        families=families,
    )


def commonest_answer(train: Sequence[Question]) -> dict[str, str]:
    """The commonest answer to each question text; of equally common ones the first to appear."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        counts[question.text][question.answer] += 1
    return {text: answers.most_common(1)[0][0] for text, answers in counts.items()}


def seer(train: Sequence[Question], test: Sequence[Question], sees: str) -> list[str]:
    """The answers of one who sees "colour" (or "shape") perfectly and nothing else.

    It is right wherever the question asks for what it sees, and gives the commonest training
    answer to the text elsewhere.

    Raises:
        ValueError: `sees` is neither.
        KeyError: a question to be guessed whose text `train` lacks.
    """
    if sees not in _ASKS_FOR:
        raise ValueError(f"a seer sees 'colour' or 'shape', got {sees!r}")
    guess = commonest_answer(train)
    return [q.answer if family(q) in _ASKS_FOR[sees] else guess[q.text] for q in test]


def _folder(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"the splits are {', '.join(SPLITS)}; got {split!r}")
    return f"easy_vqa/data/{split}"


def _decode(png: bytes) -> Tensor:
    with Image.open(io.BytesIO(png)) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
