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
    validation: Split  # what recipes are picked on
    test: Split


def load(train: int, validation: int, test: int) -> Small:
    """The first images of a fixed shuffle, so many of each; no two splits share one.

    Raises:
        ImportError: neither data set is installed.
    """
    if FASHION.is_dir():
        known = _cut(_fashion("train", train + validation), train, validation)
        return Small(
            "Fashion-MNIST", CLOTHES, "a photo of a {class}.", *known, _fashion("t10k", test)
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the small task wants Fashion-MNIST (apt install dataset-fashion-mnist) or "
            "scikit-learn's digits (pip install scikit-learn)"
        ) from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16)[:, None].expand(-1, 3, -1, -1)
    whole = Split(images, torch.from_numpy(digits.target).long()).part(_order(len(images)))
    test, validation = min(test, 400), min(validation, 200)  # there are 1,797
    train = min(train, len(images) - test - validation)
    splits = _cut(whole, train, validation, test)
    return Small("digits", DIGITS, "a photo of the number {class}.", *splits)


def _cut(whole: Split, *sizes: int) -> list[Split]:
    places = torch.arange(sum(sizes)).split(sizes)
    return [whole.part(own) for own in places]


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
