"""Class features out of an encoder: from texts, from exemplar images, and kept on disk."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from fastprompt.files import replace
from fastprompt.instruction.encoders import Encoder

TEMPLATE = "a photo of a {class}."  # CLIP's, and Instruction-ViT's example
BATCH = 64


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for no class, a class without a name, or two of one name."""
    if isinstance(names, str) or not len(names):
        raise ValueError(f"names: want a list of class names, got {names!r}")
    bad = [name for name in names if not isinstance(name, str) or not name.strip()]
    if bad:
        raise ValueError(f"names: want a text for every class, got {bad[0]!r}")
    twice = (
        sorted({name for name in names if list(names).count(name) > 1})
        if (len(set(names)) < len(names))
        else []
    )
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


class FeatureCache:
    """Image features on disk, keyed by the file's content and the encoder's weights.

    Args:
        folder: made if it is not there. Each call that adds features writes one safetensors file,
            whole or not at all, so that an interrupted run loses its last batch alone.
        encoder: whose features they are.
        preprocess: (path) -> [3, H, W], decodes and normalises one file.
        key: names the preprocessing, since a function cannot be told from another: change it
            when the pixels change.
    """

    def __init__(
        self, folder: str | Path, encoder: Encoder, preprocess: Callable[[Path], Tensor], key: str
    ):
        self.encoder, self.preprocess = encoder, preprocess
        name = hashlib.sha256(f"{encoder.fingerprint} {key}".encode()).hexdigest()[:16]
        self.folder = Path(folder) / name
        self._known: dict[str, Tensor] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            self._known |= load_file(file)

    @torch.no_grad()
    def features(
        self, files: Iterable[str | Path], *, bad: str = "raise"
    ) -> tuple[Tensor, list[int]]:
        """[n, width] float32 features, and the places in ``files`` that they are of.

        Args:
            bad: "raise" a ValueError that names a file which cannot be decoded, or "skip" it with
                a warning; what was encoded before it is kept either way.
        """
        if bad not in ("raise", "skip"):
            raise ValueError(f"bad: want 'raise' or 'skip', got {bad!r}")
        files = [Path(f) for f in files]
        hashes, waiting, new = [], {}, {}
        try:
            for file in files:
                content = hashlib.sha256(file.read_bytes()).hexdigest()
                hashes.append(content)
                if content in self._known or content in waiting or content in new:
                    continue
                pixels = self._decode(file, bad)
                if pixels is not None:
                    waiting[content] = pixels
                if len(waiting) == BATCH:
                    new |= self._encode(waiting)
                    waiting = {}
            new |= self._encode(waiting)
        finally:
            self._keep(new)
        places = [i for i, content in enumerate(hashes) if content in self._known]
        rows = [self._known[hashes[i]] for i in places]
        return torch.stack(rows) if rows else torch.empty(0, self.encoder.width), places

    def _decode(self, file: Path, bad: str) -> Tensor | None:
        try:
            return self.preprocess(file)
        except (OSError, ValueError, SyntaxError) as error:  # what PIL raises
            if bad == "raise":
                raise ValueError(f"{file}: want an image that can be decoded; {error}") from error
            warnings.warn(f"{file} was skipped: {error}", stacklevel=3)
            return None

    def _encode(self, waiting: dict[str, Tensor]) -> dict[str, Tensor]:
        if not waiting:
            return {}
        rows = self.encoder.encode_images(torch.stack([*waiting.values()])).float().cpu()
        check_finite(rows, "image features", [*waiting])
        return dict(zip(waiting, rows, strict=True))

    def _keep(self, new: dict[str, Tensor]) -> None:
        if not new:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256("".join(sorted(new)).encode()).hexdigest()[:16]
        own = {key: row.clone() for key, row in new.items()}
        replace(self.folder / f"{name}.safetensors", lambda part: save_file(own, part))
        self._known |= new
