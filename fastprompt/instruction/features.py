"""Class features out of an encoder: from texts, and from exemplar images."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastprompt.instruction.encoders import Encoder

TEMPLATE = "a photo of a {class}."  # CLIP's, and Instruction-ViT's example
BATCH = 64


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for no class, a class without a name, or two of one name."""
    if isinstance(names, (str, set, frozenset)) or not len(names):
        raise ValueError(f"names: want a list of class names, got {names!r}")
    bad = [name for name in names if not isinstance(name, str) or not name.strip()]
    if bad:
        raise ValueError(f"names: want a text for every class, got {bad[0]!r}")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(
            f"names: want every class once, got {', '.join(map(repr, twice[:3]))} twice"
        )


def text_features(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """[C, width] unit rows: the mean over templates of each sentence's unit feature.

    Args:
        templates: each with ``{class}`` in it.

    Raises:
        ValueError: a template without its place for the class, or a feature that is not finite.
    """
    for template in templates:
        if "{class}" not in template:
            raise ValueError(f"templates: want '{{class}}' in each, got {template!r}")
    texts = [t.replace("{class}", name) for name in names for t in templates]
    parts = [encoder.encode_text(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
    rows = normalize(torch.cat(parts).float(), dim=-1).unflatten(0, (len(names), -1)).mean(1)
    return normalize(check_finite(rows, "text features", names), dim=-1)


def image_features(encoder: Encoder, images: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """[C, width] unit rows: the mean of each class's unit exemplar features.

    Args:
        images: for each class its exemplars' pixels [n, 3, H, W], or their features [n, width].

    Raises:
        ValueError: a class without exemplars, other widths, or a feature that is not finite.
    """
    if len(images) != len(names):
        raise ValueError(f"images: want exemplars of {len(names)} classes, got {len(images)}")
    rows = []
    for name, own in zip(names, images, strict=True):
        if not isinstance(own, Tensor) or own.ndim not in (2, 4) or not len(own):
            got = list(own.shape) if isinstance(own, Tensor) else type(own).__name__
            raise ValueError(f"images of {name!r}: want [n, 3, H, W] or [n, width], got {got}")
        own = own.to(encoder.device)
        if own.ndim == 4:
            own = torch.cat([encoder.encode_images(part) for part in own.split(BATCH)])
        if own.shape[1] != encoder.width:
            raise ValueError(f"images of {name!r}: want width {encoder.width}, got {own.shape[1]}")
        rows.append(normalize(own.float(), dim=-1).mean(0))
    return normalize(check_finite(torch.stack(rows), "image features", names), dim=-1)


def check_finite(rows: Tensor, what: str, names: Sequence[str]) -> Tensor:
    """``rows`` as they are; a ValueError that names the first class whose row is not finite."""
    bad = ~rows.detach().isfinite().all(-1)
    if bad.any():
        name = names[int(bad.nonzero()[0])]
        raise ValueError(f"{what}: want finite numbers, got NaN or infinity for {name!r}")
    return rows
