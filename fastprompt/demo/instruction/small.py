"""Ten classes, few images: Fashion-MNIST if Debian's package is there, else scikit-learn's."""

import gzip
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist
CLOTHES = [
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle boot",
]  # fmt: skip
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class Split(NamedTuple):
    """images [n, 3, h, w] between 0 and 1, labels [n]."""

    images: Tensor
    labels: Tensor

    def part(self, chosen: Tensor) -> "Split":
        return Split(self.images[chosen], self.labels[chosen])


class Small(NamedTuple):
    """A data set, its class names, and the words around them."""

    name: str
    names: list[str]
    template: str
    train: Split
    test: Split


def load(train: int, test: int) -> Small:
    """The first images of a fixed shuffle, `train` and `test` of them.

    Raises:
        ImportError: neither data set is installed.
    """
    if FASHION.is_dir():
        parts = [_fashion("train", train), _fashion("t10k", test)]
        return Small("Fashion-MNIST", CLOTHES, "a photo of a {class}.", *parts)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the small task wants Fashion-MNIST (apt install dataset-fashion-mnist) or "
            "scikit-learn's digits (pip install scikit-learn)"
        ) from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16)[:, None].expand(-1, 3, -1, -1)
    whole, order = Split(images, torch.from_numpy(digits.target).long()), _order(len(images))
    cut = min(train, len(images) - 500)
    parts = [whole.part(order[:cut]), whole.part(order[cut : cut + test])]
    return Small("digits", DIGITS, "a photo of the number {class}.", *parts)


def _fashion(split: str, count: int) -> Split:
    kinds = dict(images="idx3", labels="idx1")
    raw = {
        kind: gzip.decompress((FASHION / f"{split}-{kind}-{idx}-ubyte.gz").read_bytes())
        for kind, idx in kinds.items()
    }
    labels = torch.frombuffer(bytearray(raw["labels"][8:]), dtype=torch.uint8).long()
    images = torch.frombuffer(bytearray(raw["images"][16:]), dtype=torch.uint8)
    chosen = _order(len(labels))[:count]
    grey = images.view(-1, 1, 28, 28)[chosen].float() / 255
    return Split(grey.expand(-1, 3, -1, -1), labels[chosen])


def _order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))
