"""Where the rows of a JSON array or of a JSONL file begin and end, in bytes.

Nothing is parsed that need not be. What lies between two rows and is no comma gets a span too,
which no reader takes: so a truncated file, or a number among the rows, is reported and not lost.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np

from fastprompt.train.rows import BadRow, read_json

BOM = b"\xef\xbb\xbf"
LONGEST = 2**26  # bytes of a row; a span of more is damage, which is not read into memory whole
_CHUNK = 2**24
_BETWEEN = re.compile(rb"[^\s,\xef\xbb\xbf](?:.*[^\s,])?", re.DOTALL)  # no comma, no space, no BOM
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_ROW = rb'\[?\{(?!\s*"(?:from|value|role|content)")'  # and no turn, which may begin a line too


def newlines_of(path: Path) -> np.ndarray:
    """int64 offsets of a file's newlines."""
    found, start = [np.empty(0, np.int64)], 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + start)
            start += len(chunk)
    return np.concatenate(found)


def of_file(path: Path, newlines: np.ndarray) -> np.ndarray:
    """[n, 2] int64, begin and end of each row: an array's elements, or lines that are not blank."""
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(BOM).lstrip()
    if not path.stat().st_size:
        return np.empty((0, 2), np.int64)
    with _mapped(path) as data:
        return (_array if head.startswith(b"[") else _lines)(data, newlines)


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _lines(data: mmap.mmap, newlines: np.ndarray) -> np.ndarray:
    begin = len(BOM) if data[:3] == BOM else 0
    spans = np.stack([np.append(begin, newlines + 1), np.append(newlines, len(data))], axis=1)
    return spans[[bool(data[start:end].strip()) for start, end in spans]]


def _array(data: mmap.mmap, newlines: np.ndarray) -> np.ndarray:
    """The elements as their brackets tell; from the first that is no object and has more than one
    row in it, as lines tell, if rows begin on lines of their own: a bracket or a quote that is
    missing in one row would take in all that follow.
    """
    spans = np.array([*_elements(data)], dtype=np.int64).reshape(-1, 2)
    first = re.search(rb"\n([ \t]*)" + _ROW, data)
    if first is None:
        return spans
    row = re.compile(rb"\n" + first[1] + _ROW)
    lines = np.searchsorted(newlines, spans)
    for i in np.flatnonzero(lines[:, 0] < lines[:, 1]):
        start, end = map(int, spans[i])
        if row.search(data, start, end) and not _is_object(data, start, end):
            by_lines = np.array([*_by_lines(data, start, row)], dtype=np.int64)
            return np.concatenate([spans[:i], by_lines])
    return spans


def _elements(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    depth, last = 0, 0  # brackets that are open; where the last element, or this one's inside, is
    for token in _TOKEN.finditer(data):
        start, end, mark = token.start(), token.end(), token[0]
        if mark == b"{" and depth <= 1:  # at 0: after a bracket too many
            yield from _between(data, last, start)
            depth, last = 2, start
        elif mark == b"[" and not depth:
            yield from _between(data, last, start)
            depth, last = 1, end
        elif mark in (b"{", b"["):
            depth += 1
        elif mark in (b"}", b"]"):
            depth = max(depth - 1, 0)
            if depth == 1 and mark == b"}":
                yield last, end
                last = end
            elif depth == 0:
                yield from _between(data, last, start if mark == b"]" else end)
                last = end
    rest = [*_between(data, last, len(data))]
    # an array that does not end may have lost rows, and has an empty row to say so
    yield from rest or [(len(data), len(data))] * (depth > 0)


def _between(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int]]:
    """What is there beside commas and spaces: one span or none."""
    found = _BETWEEN.search(data, start, end)
    if found:
        yield found.span()


def _is_object(data: mmap.mmap, start: int, end: int) -> bool:
    try:
        return isinstance(read_json(data[start : min(end, start + LONGEST)]), dict)
    except BadRow:
        return False


def _by_lines(data: mmap.mmap, start: int, row: re.Pattern) -> Iterator[tuple[int, int]]:
    """From ``start`` to the end of the file, an element wherever a line begins like a row."""
    starts = [start, *(found.start() + 1 for found in row.finditer(data, start))]
    end = len(data)
    while data[end - 1 : end].isspace():
        end -= 1
    end -= data[end - 1 : end] == b"]"
    for begin, stop in pairwise([*starts, end]):
        yield from _between(data, begin, stop)
