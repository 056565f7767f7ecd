"""Where rows lie on disk. Byte ranges are kept, never rows: data may be larger than memory.

Served: LLaVA's JSON (an array) and JSONL; uncompressed tar shards, and folders, in which an image
and its text share a name (`pairs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastprompt.train import spans
from fastprompt.train.pairs import PairedRows, from_folder
from fastprompt.train.rows import BadRow, Blob, Problem, Row, parse, read_json, writable
from fastprompt.train.tars import from_tar


class JsonRows:
    """The rows of a JSON array, or of a JSONL file."""

    problems: Sequence[Problem] = ()  # damage has rows of its own: see `spans`

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


Source = JsonRows | PairedRows


def open_sources(paths: Sequence[str], images: str | None) -> list[Source]:
    """The sources of such paths, each a file or a folder.

    Raises:
        ValueError: a path that is not there, or of a kind that is not served.
    """
    return [_open(Path(path), Path(images) if images else None) for path in paths]


def _open(path: Path, images: Path | None) -> Source:
    if path.is_dir():
        return from_folder(path)
    if not path.is_file():
        raise ValueError(f"data: want a file or a folder, got {path}, which is not there")
    if path.suffix in (".json", ".jsonl"):
        return JsonRows(path, images)
    if path.suffix == ".tar":
        return from_tar(path)
    raise ValueError(
        f"data: want .json, .jsonl, an uncompressed .tar or a folder of images; got {path}"
    )
