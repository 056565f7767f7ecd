"""One row of `zoo.py`'s table, and inputs that many of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IMAGE = 5  # the token that stands for a row of an image


@dataclass(frozen=True)
class Row:
    """How a family's model is built and called.

    Attributes:
        build: makes the model, in training mode, with its own initial weights.
        inputs: its forward's keyword arguments, of a dtype.
        vision, text: whether it has such a tower.
        generates: whether it has ``generate``.
        next_type: the ``token_type_ids`` of a token that it generates.
        library: whose it is.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], dict[str, Any]]
    vision: bool = False
    text: bool = False
    generates: bool = False
    next_type: int = 0
    library: str = "transformers"


def ids(images: int = 0, length: int = 11, batch: int = 2) -> Tensor:
    ids = torch.randint(6, 63, (batch, length))
    ids[:, 1 : 1 + images] = IMAGE
    return ids


def pixels(dtype: torch.dtype) -> dict[str, Any]:
    return dict(pixel_values=torch.randn(2, 3, 16, 16, dtype=dtype))
