"""MNIST as questions: which digit is in the image.

``mnist/t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, plain or ``.gz`` (also in
``mnist/raw/`` and ``mnist/MNIST/raw/``, where torchvision puts them). The question's wording is
ours; the digit's word counts, too.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fastprompt.eval.answers import DIGIT_WORDS, accuracy
from fastprompt.eval.benchmarks.base import Benchmark
from fastprompt.eval.questions import InputError, Question, find

DIGITS = tuple(map(str, range(10)))


def read(root: Path) -> Iterator[Question]:
    """The questions of the test set."""
    path, images = _idx(root, "t10k-images-idx3-ubyte", 3)
    other, labels = _idx(root, "t10k-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise InputError(f"{other}: want {len(images)} labels, as {path} has images; {len(labels)}")
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        if label > 9:
            raise InputError(f"{other}: image {index}: want a label below 10, got {label}")
        yield Question(
            id=f"mnist/{index}",
            image=Image.fromarray(image.copy()),
            text="Which digit is in the image? Options: " + ", ".join(DIGITS),
            answers=(DIGITS[label], DIGIT_WORDS[label]),
            options=DIGITS,
            where=f"{path}: image {index}",
        )


def _idx(root: Path, name: str, axes: int) -> tuple[Path, np.ndarray]:
    """An IDX file of bytes: 0, 0, 8, the number of axes, each axis's length, the values."""
    folders = ("mnist", "mnist/raw", "mnist/MNIST/raw")
    path = find(root, *(f"{folder}/{name}{end}" for folder in folders for end in ("", ".gz")))
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: want a whole gzip file; {error}") from error
    head = 4 + 4 * axes
    if data[:4] != bytes([0, 0, 8, axes]) or len(data) < head:
        raise InputError(f"{path}: want an IDX file of bytes with {axes} axes; it does not say so")
    shape = np.frombuffer(data[4:head], ">u4").tolist()
    if len(data) != head + int(np.prod(shape)):
        raise InputError(f"{path}: want {shape} bytes after its head, got {len(data) - head}")
    return path, np.frombuffer(data, np.uint8, offset=head).reshape(shape)


MNIST = Benchmark("mnist", read, accuracy)
