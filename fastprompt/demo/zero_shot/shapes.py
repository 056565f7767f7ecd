"""easy-VQA cut by what a model is not to see: question families, phrasings, pairs of shape and
colour."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fastprompt.demo.data import COLOURS, SHAPES, Question, family

# Z1: yes and no about shape; what remains are six families, here in the order in which the curve
# over the number of families takes them
UNSEEN_FAMILIES = ("is shape", "is not shape")
SEEN_FAMILIES = (
    "is colour", "shape", "is not colour", "colour", "shape given colour", "colour given shape",
)  # fmt: skip
# Z2: one phrasing of each family that has several
UNSEEN_PHRASINGS = {
    "shape": "what shape is present?",
    "colour": "what is the color of the shape?",
    "colour given shape": "what is the color of the SHAPE?",
    "is colour": "is a COLOUR shape present?",
    "is not colour": "is no COLOUR shape present?",
}
# Z3: each shape with two colours, no colour twice
UNSEEN_PAIRS = frozenset(
    {
        ("circle", "blue"), ("circle", "yellow"), ("rectangle", "green"), ("rectangle", "red"),
        ("triangle", "black"), ("triangle", "teal"),
    }
)  # fmt: skip

_SHAPE, _COLOUR = (re.compile("|".join(words)) for words in (SHAPES, COLOURS))


class Pair(NamedTuple):
    shape: str
    colour: str


def phrasing(text: str) -> str:
    """The question with SHAPE and COLOUR in place of the words themselves."""
    return _SHAPE.sub("SHAPE", _COLOUR.sub("COLOUR", text))


def pairs(questions: Iterable[Question]) -> dict[int, Pair]:
    """Image -> what is on it, from the answers; of images whose questions do not say, nothing."""
    shapes, colours = _left(questions)
    return {
        i: Pair(*shapes[i], *colours[i])
        for i in shapes.keys() & colours.keys()
        if len(shapes[i]) == len(colours[i]) == 1
    }


def _left(questions: Iterable[Question]) -> tuple[dict[int, set[str]], dict[int, set[str]]]:
    """Image -> shapes, and colours, that no answer rules out."""
    shapes: dict[int, set[str]] = defaultdict(lambda: set(SHAPES))
    colours: dict[int, set[str]] = defaultdict(lambda: set(COLOURS))
    for q in questions:
        for left, word in ((shapes[q.image_id], _SHAPE), (colours[q.image_id], _COLOUR)):
            named, answered = word.search(q.text), word.fullmatch(q.answer)
            if answered:
                left &= {q.answer}
            elif named:
                # "is there not a circle?" "no": there is one; what names a thing takes it as there
                negated = " not " in q.text or " no " in q.text
                there = q.answer not in ("yes", "no") or (q.answer == "yes") != negated
                left &= {named[0]} if there else left - {named[0]}
    return shapes, colours


def is_seen(question: Question, pair: Mapping[int, Pair]) -> bool:
    """Whether it may train: a seen family, phrasing and pair. Images of unknown pairs may not."""
    name = family(question)
    return (
        name in SEEN_FAMILIES
        and UNSEEN_PHRASINGS.get(name) != phrasing(question.text)
        and question.image_id in pair
        and pair[question.image_id] not in UNSEEN_PAIRS
    )
