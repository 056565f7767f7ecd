"""Images and texts that share a name, in a folder or in a tar shard (`tars`).

``x.jpg`` goes with ``x.json`` or, for a caption, ``x.txt``; with both, the JSON is read. In a
folder a name's ending begins at its last dot, and ``x.jpg.json`` goes with ``x.jpg`` too. Hidden
files are no data.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from fastprompt.train.rows import BadRow, Blob, Problem, Row, parse, read_json, read_text, writable

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
TEXTS = (".json", ".txt")
STRAY = "file of no row"
_HIDDEN = re.compile(r"(?:^|/)\.[^./]")
Member = tuple[str, Blob | None]  # None: a link, a device; nothing that is read


class PairedRows:
    """Rows by their names.

    Args:
        split: a name into its stem and its ending, in small letters.
        problems: what was wrong with the whole.
    """

    def __init__(
        self,
        path: Path,
        members: Iterable[Member],
        split: Callable[[str], tuple[str, str]],
        problems: Iterable[Problem] = (),
    ):
        self.path, self.problems = path, [*problems]
        found: dict[str, list[tuple[str, Member]]] = {}
        others = []
        for name, blob in members:
            if _HIDDEN.search(name):
                continue  # ._x.jpg is not x.jpg's twin but macOS's
            stem, ending = split(name)
            if ending in IMAGES + TEXTS:
                found.setdefault(stem, []).append((ending, (name, blob)))
            else:
                others.append((stem, name))
        self.names, self.files = [*found], [*found.values()]
        want = f"want {', '.join(IMAGES + TEXTS)} after a name"
        for stem, name in others:
            # x.cls may stand beside x.jpg; a shard's x.1.jpg would have been a row's image
            if stem not in found or name.lower().endswith(IMAGES + TEXTS):
                bad = BadRow(STRAY, f"{want}; got {name}", id="-")
                self.problems.append(Problem.of(bad, writable(f"{path}:{name}")))

    def __len__(self) -> int:
        return len(self.names)

    def where(self, i: int) -> str:
        return writable(f"{self.path}:{self.names[i]}")

    def raw(self, i: int) -> bytes:
        text = self._one(i, ".json") or self._one(i, ".txt")
        return b"" if text is None else text.read()

    def row(self, i: int) -> Row:
        structured, image = self._one(i, ".json"), self._one(i, *IMAGES)
        if structured is not None:
            return parse(read_json(structured.read()), self.where(i), image)
        caption = self._one(i, ".txt")
        if caption is None:
            raise BadRow("no answer", "an image without a .json or .txt beside it")
        if image is None:
            raise BadRow("missing image", "a caption without an image beside it")
        return parse({"caption": read_text(caption.read()).strip()}, self.where(i), image)

    def _one(self, i: int, *endings: str) -> Blob | None:
        found = [member for ending, member in self.files[i] if ending in endings]
        names = ", ".join(name for name, _ in found)
        if len(found) > 1:
            raise BadRow("two files", f"want one of {', '.join(endings)}; got {names}")
        if found and found[0][1] is None:
            raise BadRow("cannot be read", f"want a file, got {names}, a link or a device")
        return found[0][1] if found else None


def from_folder(path: Path) -> PairedRows:
    """All that lies below it; links to folders, which may lead round, are not followed."""
    denied: list[OSError] = []
    found: list[Path] = []
    for top, folders, files in os.walk(path, onerror=denied.append):
        links = [name for name in folders if os.path.islink(os.path.join(top, name))]
        found += [Path(top, name) for name in files + links]
    members = [
        (str(p.relative_to(path)), Blob(p) if os.path.isfile(p) else None) for p in sorted(found)
    ]
    problems = [
        Problem(writable(str(e.filename)), "-", "cannot be read", f"a folder: {e.strerror}")
        for e in denied
    ]
    return PairedRows(path, members, _at_last_dot, problems)


def _at_last_dot(name: str) -> tuple[str, str]:
    stem, ending = os.path.splitext(name)
    if ending.lower() in TEXTS and stem.lower().endswith(IMAGES):
        stem = os.path.splitext(stem)[0]
    return stem, ending.lower()
