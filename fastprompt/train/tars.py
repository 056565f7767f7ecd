"""Rows in an uncompressed tar shard, whole or damaged.

A name's ending begins at the base name's first dot, as WebDataset has it.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from tarfile import TarInfo

from fastprompt.train.pairs import IMAGES, TEXTS, PairedRows
from fastprompt.train.rows import Blob, Problem, writable

_CHUNK = 2**24


def from_tar(path: Path) -> PairedRows:
    """A damaged shard has the rows before the damage, and one problem that says where it begins.

    Raises:
        ValueError: it is not an uncompressed tar.
    """
    size = path.stat().st_size
    if not size:
        return PairedRows(path, [], _at_first_dot)
    try:
        with tarfile.open(path, "r:") as tar:
            members, end = _members(tar, size)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: want an uncompressed tar; {error}") from error
    problems = []
    if not _only_zeros(path, end):
        members, end = _whole_rows(members, min(end, size))
        got = f"{size - end:,} bytes of neither" if end < size else "the end of the file"
        reason = f"want whole rows and the archive's end, got {got}; the rows before are kept"
        problems = [Problem(writable(f"{path}: from byte {end} on"), "-", "damaged tar", reason)]
    pairs = [(info.name, _blob(path, info)) for info in members]
    return PairedRows(path, pairs, _at_first_dot, problems)


def _members(tar: tarfile.TarFile, size: int) -> tuple[list[TarInfo], int]:
    """All but folders, and the byte after the last one that is whole."""
    found = []
    try:
        for info in tar:
            if info.isreg() and not info.issparse() and info.offset_data + info.size > size:
                return found, info.offset
            found += [] if info.isdir() else [info]
    except (tarfile.TarError, OSError, ValueError):
        pass  # tarfile passes over some damage without a word; what lies behind is looked at anyway
    return found, tar.offset


def _only_zeros(path: Path, start: int) -> bool:
    """Whether an archive's end is there, a block of zeros at least, and nothing behind it."""
    with open(path, "rb") as file:
        file.seek(start)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            return False
        return not any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(_CHUNK), b""))


def _whole_rows(members: list[TarInfo], end: int) -> tuple[list[TarInfo], int]:
    """Without the last row, if damage may have taken its image or its text; and where they end."""
    stems = [_at_first_dot(info.name)[0] for info in members]
    first = stems.index(stems[-1]) if stems else 0
    endings = {_at_first_dot(info.name)[1] for info in members[first:]}
    if not members or (endings & {*IMAGES} and endings & {*TEXTS}):
        return members, end
    return members[:first], members[first].offset


def _blob(path: Path, info: TarInfo) -> Blob | None:
    plain = info.isreg() and not info.issparse()
    return Blob(path, info.offset_data, info.size) if plain else None


def _at_first_dot(name: str) -> tuple[str, str]:
    folder, base = os.path.split(name)
    stem, _, ending = base.partition(".")
    return os.path.join(folder, stem), f".{ending.lower()}"
