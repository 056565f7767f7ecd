"""Finished runs as records, read from their folders; only runs that can be compared are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastprompt.samples import same_base
from fastprompt.sweep.running import EVALUATION
from fastprompt.train import run_folder
from fastprompt.train.config import TrainConfig

MEAN = "mean of tasks"
_SEED = re.compile(r"seed-\d+")


class MixedRuns(ValueError):
    """Runs that no one table may hold."""


@dataclass(frozen=True)
class Record:
    """What a table needs of one finished run.

    Attributes:
        name: its folder's; of a sweep's run, the folder above ``seed-S``.
        options: of `TrainConfig`.
        data: hashes of its data, and how many rows were held out of it.
        base: a sample of its frozen model.
        asked: how the tasks were asked, and of each how many questions and their hash; {} if none
            were.
        trainable, parameters: numbers that train, and of all.
        seconds: of training, evaluations included.
        memory: peak of training, in bytes; without a card, of the whole process.
        scores: held-out "loss" and "accuracy", each task's score from 0 to 1, `MEAN`; None where it
            is not finite.
        machine: card or processor.
    """

    name: str
    seed: int
    options: dict[str, Any]
    data: dict[str, Any]
    base: list[float]
    asked: dict[str, Any]
    trainable: int
    parameters: int
    seconds: float
    memory: int
    scores: dict[str, float | None]
    machine: str

    @property
    def label(self) -> str:
        return f"{self.name} seed {self.seed}"

    @property
    def tasks(self) -> list[str]:
        return list(self.asked.get("questions", {}))

    @classmethod
    def of(cls, folder: Path) -> Record:
        """Of a finished run's folder."""
        try:
            return cls._of(folder)
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder}: want a finished run, whole; {error!r}") from error

    @classmethod
    def _of(cls, folder: Path) -> Record:
        result = json.loads((folder / run_folder.RESULT).read_text())
        config = TrainConfig.load(folder / run_folder.CONFIG)
        began = run_folder.read_run(folder)
        asked, scores = _evaluation(folder / EVALUATION)
        return cls(
            name=folder.parent.name if _SEED.fullmatch(folder.name) else folder.name,
            seed=config.seed,
            options=json.loads(json.dumps(asdict(config))),
            data=began["data"] | {"hold_out": config.hold_out},
            base=began["base"],
            asked=asked,
            **{key: result[key] for key in ("trainable", "parameters", "seconds", "memory")},
            scores=result["held_out"] | scores,
            machine=began["machine"]["card"] or began["machine"]["cpu"],
        )


def _evaluation(path: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """How ``fastprompt eval`` asked, and each task's headline score."""
    if not path.is_file():
        return {}, {}
    found = json.loads(path.read_text())
    asked = {key: found["run"][key] for key in ("score", "suffix", "max_new_tokens")}
    # a plan's; else each run speaks as it trained, which is an option of it
    asked["chat_template"] = found["run"]["model"].get("chat_template sha256")
    asked["questions"] = {
        name: {key: task[key] for key in ("count", "digest")}
        for name, task in found["tasks"].items()
    }
    scores = {name: task["headline"] for name, task in found["tasks"].items()}
    mean = {MEAN: sum(scores.values()) / len(scores)} if len(scores) > 1 else {}
    return asked, scores | mean


def read_records(paths: Iterable[str | Path]) -> list[Record]:
    """All finished runs under folders, and those in files of results (results.json).

    What `fastprompt rerun` made of a run is no run of its own, unless it is itself the folder.

    Raises:
        ValueError: nothing finished there, or a broken file.
        MixedRuns: see `check_mixed`.
    """
    records = []
    for path in map(Path, paths):
        if path.is_file():
            found = _stored(path)
        else:
            finished = [each.parent for each in sorted(path.rglob(run_folder.RESULT))]
            found = [Record.of(f) for f in finished if f == path or not run_folder.repeats(f)]
        if not found:
            raise ValueError(f"{path}: want a folder with finished runs, found none")
        records += found
    check_mixed(records)
    return records


def _stored(path: Path) -> list[Record]:
    names = {f.name for f in fields(Record)}
    try:
        runs = json.loads(path.read_text())["runs"]
        if all(run.keys() == names for run in runs):
            return [Record(**run) for run in runs]
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError):
        pass
    raise ValueError(f"{path}: want a results.json of `fastprompt results`, got another file")


def check_mixed(records: list[Record]) -> None:
    """Raises MixedRuns unless all runs had the same data, frozen model and questions, and no run is
    there twice."""
    first, seen = records[0], dict[tuple[str, int], Record]()
    for record in records:
        both = f"{first.label} and {record.label}"
        if record.data != first.data:
            raise MixedRuns(
                f"{both}: want the same data, got {_short(first.data)} and {_short(record.data)}"
            )
        if not same_base(first.base, record.base):
            raise MixedRuns(
                f"{both}: want the same frozen model, got {first.options['model']} and "
                f"{record.options['model']}"
            )
        if record.asked and first.asked and record.asked != first.asked:
            raise MixedRuns(
                f"{both}: want the same questions, got {first.asked} and {record.asked}"
            )
        first = record if record.asked and not first.asked else first
        twin = seen.setdefault((record.name, record.seed), record)
        if twin is not record:
            raise MixedRuns(f"{record.label} is there twice: in {_out(twin)} and {_out(record)}")


def _short(data: dict[str, Any]) -> str:
    return ", ".join(f"{name} {str(value)[:12]}" for name, value in data.items())


def _out(record: Record) -> str:
    return record.options["out"]
