"""A look at every row before training: which can be used, how long each is, what others lack."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from fastprompt.files import replace
from fastprompt.train.pairs import STRAY
from fastprompt.train.rows import BadRow, Problem, Row, writable
from fastprompt.train.sources import Source, open_sources
from fastprompt.train.templates import ChatTemplate

SHOWN = 5  # problems of each kind that `summary` names


class TrainingError(ValueError):
    """A run that cannot begin or go on, in words for the user."""


class Rows:
    """All rows of some files and folders, by one index; each is read when it is asked for."""

    def __init__(self, paths: Sequence[str], images: str | None = None):
        self.sources: list[Source] = open_sources(paths, images)
        self.starts = np.cumsum([0, *map(len, self.sources)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _at(self, i: int) -> tuple[Source, int]:
        place = bisect_right(self.starts, i) - 1
        return self.sources[place], i - int(self.starts[place])

    def where(self, i: int) -> str:
        source, i = self._at(i)
        return source.where(i)

    def raw(self, i: int) -> bytes:
        source, i = self._at(i)
        return source.raw(i)

    def __getitem__(self, i: int) -> Row:
        source, i = self._at(int(i))
        return source.row(i)


@dataclass
class Problems:
    """Bad rows so far; each is kept once."""

    found: dict[str, Problem] = field(default_factory=dict)  # by where
    fatal: bool = False

    def add(self, problem: Problem) -> None:
        """Raises TrainingError if bad rows are fatal."""
        self.found.setdefault(problem.where, problem)
        if self.fatal:
            raise TrainingError(f"bad row: {problem}\n--on-bad-row skip goes on without such rows")

    def merge(self, problems: Iterable[Problem]) -> None:
        """Add what other processes have found."""
        for problem in problems:
            self.found.setdefault(problem.where, problem)

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self):
        return iter(self.found.values())

    def summary(self) -> str:
        """Counts by kind, and the first few of each; "" if there are none."""
        lines = []
        for kind, count in Counter(p.kind for p in self).most_common():
            lines.append(f"  {count} × {kind}")
            some = [p for p in self if p.kind == kind][:SHOWN]
            lines += [f"    {p.where} (id {p.id}): {p.reason}" for p in some]
            lines += [f"    … and {count - SHOWN} more"] * (count > SHOWN)
        return "\n".join([f"bad rows, left out: {len(self)}", *lines]) if lines else ""

    def write(self, path: Path) -> None:
        """As JSONL; with no problems, no file."""
        text = "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in self)
        if text:
            replace(path, lambda part: part.write_text(text, encoding="utf-8"))


def read_problems(path: Path) -> list[Problem]:
    """What `Problems.write` wrote; none if there is no file, or another's."""
    if not path.is_file():
        return []
    found = []
    with open(path, encoding="utf-8", newline="\n") as file:  # names may hold other line ends
        for line in file:
            with suppress(ValueError, TypeError):
                found.append(Problem(**json.loads(line)))
    return found


@dataclass(frozen=True)
class Checked:
    """The usable rows of `Rows`.

    Attributes:
        indices: int64 [n], ascending.
        lengths: int64 [n], tokens of each, those of its image included.
        digest: SHA-256 over every row's text and the size of its image.
    """

    rows: Rows
    indices: np.ndarray
    lengths: np.ndarray
    digest: str

    def part(self, chosen: np.ndarray) -> Checked:
        return Checked(self.rows, self.indices[chosen], self.lengths[chosen], self.digest)

    def __len__(self) -> int:
        return len(self.indices)


def check(
    rows: Rows,
    template: ChatTemplate,
    problems: Problems,
    *,
    max_length: int,
    keep_duplicates: bool = False,
    decode: bool = False,
    tick: Callable[[], object] = lambda: None,
) -> Checked:
    """Read every row once: its text, its image's head (or, with ``decode``, its pixels).

    Args:
        problems: bad rows are added here.
        tick: called after each row.

    Raises:
        TrainingError: a bad row where such are fatal, or no row is left.
    """
    digest, seen = hashlib.sha256(), set()
    indices, lengths = [], []
    for source in rows.sources:
        for problem in source.problems:
            # a README beside the rows is told, and ends no run
            if problem.kind == STRAY:
                problems.merge([problem])
            else:
                problems.add(problem)
        if not len(source):
            problems.add(Problem(writable(str(source.path)), "-", "empty file", "it has no row"))
    for i in range(len(rows)):
        row = None
        try:
            digest.update(rows.raw(i))
            row = rows[i]
            if row.image is not None:
                row.open_image(decode)
                digest.update(str(row.image.length()).encode())
            key = hashlib.blake2b(row.id.encode(), digest_size=8).digest()
            if key in seen and not keep_duplicates:
                reason = "a row before it has the same id (--duplicate-ids keep trains on both)"
                raise BadRow("duplicate id", reason)
            length = len(template.encode(row).ids)
            if length > max_length:
                raise BadRow("too long", f"{length} tokens; want at most {max_length}")
            seen.add(key)
            indices.append(i)
            lengths.append(length)
        except (BadRow, OSError) as error:
            problems.add(Problem.of(error, rows.where(i), row and row.id))
        tick()
    if not indices:
        paths = ", ".join(str(source.path) for source in rows.sources)
        raise TrainingError(f"no usable row in {paths}\n{problems.summary()}")
    arrays = (np.array(x, dtype=np.int64) for x in (indices, lengths))
    return Checked(rows, *arrays, digest.hexdigest())


def choose(checked: Checked, hold_out: int, subset: float, seed: int) -> tuple[Checked, Checked]:
    """(rows that train, rows held out): disjoint, in the data's order, chosen by the seed.

    Raises:
        TrainingError: there are not so many rows.
    """
    total = len(checked)
    order = np.random.default_rng(seed).permutation(total)
    kept, rest = order[:hold_out], order[hold_out:]
    count = int(subset) if subset > 1 else max(1, round(subset * len(rest)))
    if not len(rest) or count > len(rest):
        raise TrainingError(
            f"want {hold_out} rows held out and {count} to train on, got {total} usable rows"
        )
    return checked.part(np.sort(rest[:count])), checked.part(np.sort(kept))
