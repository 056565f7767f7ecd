"""Where rows lie on disk. Byte ranges are kept, never rows: data may be larger than memory.

Served: LLaVA's JSON (an array) and JSONL; uncompressed tar shards, and folders, in which an image
and its text (``x.jpg`` and ``x.json`` or, for a caption, ``x.txt``) share a name.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fastprompt.train import spans
from fastprompt.train.rows import BadRow, Blob, Row, parse, read_json, read_text, writable

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_TEXTS = (".json", ".txt")


class JsonRows:
    """The rows of a JSON array, or of a JSONL file."""

    def __init__(self, path: Path, images: Path | None):
        self.path, self.images = path, images or path.parent
        self.newlines = spans.newlines_of(path)
        self.spans = spans.of_file(path, self.newlines)

    def __len__(self) -> int:
        return len(self.spans)

    def where(self, i: int) -> str:
        """``file:line``; of several on a line ``file:line[i]``, so that no two are the same."""
        near = self.spans[max(i - 1, 0) : i + 2, 0]
        lines = np.searchsorted(self.newlines, near) + 1
        line = lines[min(i, 1)]
        several = np.count_nonzero(lines == line) > 1
        return writable(f"{self.path}:{line}" + (f"[{i}]" if several else ""))

    def raw(self, i: int) -> bytes:
        start, end = map(int, self.spans[i])
        return Blob(self.path, start, min(end - start, spans.LONGEST)).read()

    def row(self, i: int) -> Row:
        raw = self._json(i)
        name = raw.get("image") if isinstance(raw, dict) else None
        if name is not None and not isinstance(name, str):
            raise BadRow("not a row", f"'image': want a file's name, got {type(name).__name__}")
        return parse(raw, self.where(i), Blob(self.images / name) if name else None)

    def _json(self, i: int) -> object:
        start, end = map(int, self.spans[i])
        if start == end:
            raise BadRow("not JSON", "want ']' after the last row, got the end of the file")
        try:
            return read_json(self.raw(i))
        except BadRow as bad:
            line = np.searchsorted(self.newlines, start) + 1
            bad.reason = f"{end - start:,} bytes from line {line} on: {bad.reason}"
            raise


class PairedRows:
    """The rows of a tar shard or of a folder: images and texts of the same name."""

    def __init__(self, path: Path, members: Iterable[tuple[str, Blob]]):
        self.path = path
        found: dict[str, list[Blob | None]] = {}
        self.names: list[str] = []
        for name, blob in members:
            stem, suffix = _split(name)
            if suffix in _IMAGES or suffix in _TEXTS:
                self.names += [] if stem in found else [stem]
                pair = found.setdefault(stem, [None, None, None])
                pair[_TEXTS.index(suffix) if suffix in _TEXTS else 2] = blob
        self.pairs = [found[name] for name in self.names]

    def __len__(self) -> int:
        return len(self.pairs)

    def where(self, i: int) -> str:
        return f"{self.path}:{self.names[i]}"

    def raw(self, i: int) -> bytes:
        text = self._text(i)
        return b"" if text is None else text.read()

    def row(self, i: int) -> Row:
        structured, caption, image = self.pairs[i]
        if structured is None and caption is None:
            raise BadRow("no answer", "an image without a .json or .txt beside it")
        if structured is None:
            if image is None:
                raise BadRow("missing image", "a caption without an image beside it")
            raw = {"caption": read_text(caption.read()).strip()}
        else:
            raw = read_json(structured.read())
        return parse(raw, self.where(i), image)

    def _text(self, i: int) -> Blob | None:
        structured, caption, _ = self.pairs[i]
        return structured or caption


Source = JsonRows | PairedRows


def open_sources(paths: Sequence[str], images: str | None) -> list[Source]:
    """The sources of such paths, each a file or a folder.

    Raises:
        ValueError: a path that is not there, or of a kind that is not served.
    """
    return [_open(Path(path), Path(images) if images else None) for path in paths]


def _open(path: Path, images: Path | None) -> Source:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return PairedRows(path, ((str(p.relative_to(path)), Blob(p)) for p in files))
    if not path.is_file():
        raise ValueError(f"data: want a file or a folder, got {path}, which is not there")
    if path.suffix in (".json", ".jsonl"):
        return JsonRows(path, images)
    if path.suffix == ".tar":
        return PairedRows(path, _members(path))
    raise ValueError(
        f"data: want .json, .jsonl, an uncompressed .tar or a folder of images; got {path}"
    )


def _members(path: Path) -> list[tuple[str, Blob]]:
    try:
        with tarfile.open(path, "r:") as tar:
            return [(m.name, Blob(path, m.offset_data, m.size)) for m in tar if m.isfile()]
    except tarfile.TarError as error:
        raise ValueError(f"{path}: want an uncompressed tar; {error}") from error


def _split(name: str) -> tuple[str, str]:
    """Folder and stem, and the suffix, as WebDataset has it: from the base name's first dot."""
    folder, base = os.path.split(name)
    stem, _, suffix = base.partition(".")
    return os.path.join(folder, stem), f".{suffix.lower()}"
