"""VSR, visual spatial reasoning (arXiv 2205.00363): is a caption true of its image.

``vsr/test.jsonl`` (the zero-shot split, or another one of the same format), a JSON object a line
with ``image``, ``caption`` and ``label`` (1 true, 0 false). It has no ids: image and caption are
one. The question's wording is ours; "yes" and "no" count as "true" and "false".
"""

from collections.abc import Iterator
from pathlib import Path

from fastprompt.eval.answers import accuracy
from fastprompt.eval.benchmarks.base import Benchmark
from fastprompt.eval.questions import Question, find, json_lines, one_of, value

LABELS = {1: ("true", "yes"), 0: ("false", "no")}


def read(root: Path) -> Iterator[Question]:
    """The questions of the test file."""
    path = find(root, "vsr/test.jsonl", "vsr/zeroshot/test.jsonl", "vsr/splits/zeroshot/test.jsonl")
    for where, row in json_lines(path):
        image, caption = (str(value(row, where, key)) for key in ("image", "caption"))
        yield Question(
            id=f"vsr/{image}/{caption}",
            image=root / "vsr" / "images" / image,
            text=f"Is this statement about the image true or false? {caption}",
            answers=one_of(value(row, where, "label"), where, LABELS),
            options=("true", "false"),
            where=where,
        )


VSR = Benchmark("vsr", read, accuracy)
