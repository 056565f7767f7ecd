"""Where rows lie on disk. Byte ranges are kept, never rows: data may be larger than memory.

Served: LLaVA's JSON (an array) and JSONL; uncompressed tar shards, and folders, in which an image
and its text (``x.jpg`` and ``x.json`` or, for a caption, ``x.txt``) share a name.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fastprompt.train.rows import BadRow, Blob, Row, parse

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_TEXTS = (".json", ".txt")
_CHUNK = 2**24
_BETWEEN = re.compile(rb"[^\s,\xef\xbb\xbf](?:.*[^\s,])?", re.DOTALL)  # no comma, no space, no BOM
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


class JsonRows:
    """The rows of a JSON array, or of a JSONL file."""

    def __init__(self, path: Path, images: Path | None):
        self.path, self.images = path, images or path.parent
        self.newlines = _newlines(path)
        with open(path, "rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        self.spans = _array(path) if head.startswith(b"[") else _lines(path, self.newlines)

    def __len__(self) -> int:
        return len(self.spans)

    def where(self, i: int) -> str:
        return f"{self.path}:{np.searchsorted(self.newlines, self.spans[i][0]) + 1}"

    def raw(self, i: int) -> bytes:
        start, end = map(int, self.spans[i])
        return Blob(self.path, start, end - start).read()

    def row(self, i: int) -> Row:
        raw = _json(self.raw(i))
        name = raw.get("image") if isinstance(raw, dict) else None
        if name is not None and not isinstance(name, str):
            raise BadRow("not a row", f"'image': want a file's name, got {type(name).__name__}")
        return parse(raw, self.where(i), Blob(self.images / name) if name else None)


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
            raw = {"caption": _text(caption.read()).strip()}
        else:
            raw = _json(structured.read())
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


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"byte {data[error.start]:#04x} at {error.start}") from error


def _json(data: bytes) -> object:
    try:
        return json.loads(_text(data))
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRow("not JSON", str(error)) from error


def _newlines(path: Path) -> np.ndarray:
    """int64 offsets of a file's newlines."""
    found, start = [np.empty(0, np.int64)], 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + start)
            start += len(chunk)
    return np.concatenate(found)


def _lines(path: Path, newlines: np.ndarray) -> np.ndarray:
    """[n, 2] int64, begin and end of each line that is not blank."""
    size = path.stat().st_size
    if not size:
        return np.empty((0, 2), np.int64)
    spans = np.stack([np.append(0, newlines + 1), np.append(newlines, size)], axis=1)
    with _mapped(path) as data:
        return spans[[bool(data[start:end].strip()) for start, end in spans]]


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _array(path: Path) -> np.ndarray:
    """[n, 2] int64, begin and end of each element of a JSON array.

    What lies between two objects and is no comma becomes an element too, which no reader takes: so
    a truncated file, or a number among the rows, is reported and not lost.
    """
    spans, depth, start, last = [], 0, 0, 0

    def between(begin: int, end: int) -> None:
        found = _BETWEEN.search(data, begin, end)
        if found:
            spans.append(found.span())

    with _mapped(path) as data:
        for token in _TOKEN.finditer(data):
            mark = data[token.start()]
            if mark in b"[{":
                if depth == 0:
                    last = token.end()
                elif depth == 1 and mark == ord("{"):
                    between(last, token.start())
                    start = last = token.start()
                depth += 1
            elif mark in b"]}":
                depth -= 1
                if depth == 1 and mark == ord("}"):
                    spans.append((start, token.end()))
                    last = token.end()
                elif depth == 0:
                    between(last, token.start())
                    last = token.end()
        between(last, len(data))
    return np.array(spans, dtype=np.int64).reshape(-1, 2)
