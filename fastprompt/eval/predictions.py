"""Predictions on disk: a JSON object a line, ``{"id": …, "prediction": …}``, in any order.

Our own have the question's digest as well, ``"asked"``, since one's own questions may be edited.
"""

import json
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

from fastprompt.eval.questions import InputError, Question, json_lines


def read(paths: list[Path], known: Mapping[str, Question]) -> dict[str, str]:
    """{id: prediction} of all files.

    Args:
        known: questions by their ids.

    Raises:
        InputError: a line is not of the format, its id is not among ``known`` or stands twice, or
            it answers what is no longer asked.
    """
    found: dict[str, str] = {}
    for where, row in chain.from_iterable(map(json_lines, paths)):
        if not isinstance(row, dict) or not {"id", "prediction"} <= row.keys():
            raise InputError(f'{where}: want {{"id": …, "prediction": …}}, got {row}')
        name, said = row["id"], row["prediction"]
        if not isinstance(name, str) or not isinstance(said, str):
            raise InputError(f"{where}: want text for id and prediction, got {name!r} and {said!r}")
        if name not in known:
            raise InputError(f"{where}: no question has the id {name!r}")
        if row.get("asked", known[name].digest) != known[name].digest:
            raise InputError(f"{where}: {name!r} was another question then: want it asked anew")
        if name in found:
            raise InputError(f"{where}: a second prediction for {name!r}")
        found[name] = said
    return found


def resume(path: Path, known: Mapping[str, Question]) -> dict[str, str]:
    """What an interrupted run left; a last line that it did not finish is cut off."""
    if not path.exists() or not path.stat().st_size:
        return {}
    with open(path, "rb+") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
    return read([path], known) if b"\n" in text else {}


def append(path: Path, said: dict[str, str], known: Mapping[str, Question]) -> None:
    """Add lines at the end, on disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        for name, text in said.items():
            line = {"id": name, "prediction": text, "asked": known[name].digest}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def join(
    questions: list[Question], said: dict[str, str], *, missing_is_wrong: bool = False
) -> dict[str, str | None]:
    """{id: prediction} of exactly these questions; None for what is missing and is to be wrong.

    Raises:
        InputError: predictions are missing and ``missing_is_wrong`` is not set.
    """
    missing = [q.id for q in questions if q.id not in said]
    if missing and not missing_is_wrong:
        raise InputError(
            f"{len(missing)} of {len(questions)} questions have no prediction, the first is "
            f"{missing[0]!r}; --missing-is-wrong counts them as wrong"
        )
    return {q.id: said.get(q.id) for q in questions}
