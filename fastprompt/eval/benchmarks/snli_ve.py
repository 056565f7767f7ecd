"""SNLI-VE, visual entailment (arXiv 1901.06706): what an image says of a sentence.

``snli_ve/snli_ve_test.jsonl``, a JSON object a line with ``pairID``, ``Flickr30K_ID`` (in older
files ``Flikr30kID``), ``sentence2`` and ``gold_label``; images are those of Flickr30k. The
question's wording is ours.
"""

from collections.abc import Iterator
from pathlib import Path

from fastprompt.eval.answers import accuracy
from fastprompt.eval.benchmarks.base import Benchmark
from fastprompt.eval.questions import Question, find, json_lines, one_of, value

OPTIONS = ("entailment", "neutral", "contradiction")
LABELS = {label: label for label in OPTIONS}


def read(root: Path) -> Iterator[Question]:
    """The questions of the test file."""
    for where, row in json_lines(find(root, "snli_ve/snli_ve_test.jsonl")):
        image = str(value(row, where, "Flickr30K_ID", "Flikr30kID")).removesuffix(".jpg")
        yield Question(
            id=f"snli_ve/{value(row, where, 'pairID')}",
            image=root / "snli_ve" / "flickr30k-images" / f"{image}.jpg",
            text=f"{value(row, where, 'sentence2')}\nIs this sentence an entailment of the image, "
            "neutral to it, or a contradiction? Options: entailment, neutral, contradiction",
            answers=(one_of(value(row, where, "gold_label"), where, LABELS),),
            options=OPTIONS,
            where=where,
        )


SNLI_VE = Benchmark("snli_ve", read, accuracy)
