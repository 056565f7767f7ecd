"""A plan in YAML: options over others, values that are crossed, seeds.

about: what it compares
base:  options of ``fastprompt train`` that all runs share
runs:  name -> options over base
grid:  option -> values; each run is made with each combination
tune:  one option -> values; tables show each run with the best of them on held-out rows
seeds: of each run
eval:  options of ``fastprompt eval``, which follows each run
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastprompt.train.config import TrainConfig, check_names

KEYS = ("about", "base", "runs", "grid", "tune", "seeds", "eval")
EVAL = ("tasks", "data", "questions", "images")  # what is asked
EVAL += ("score", "suffix", "max_new_tokens", "limit", "batch", "chat_template")  # and how
LISTS = ("tasks", "questions")
_OURS = ("out", "seed")  # of each run
_NAME = re.compile(r"[\w.,=+-]+")


@dataclass(frozen=True)
class Run:
    """One run of ``fastprompt train``; its folder is ``config.out``."""

    name: str
    seed: int
    config: TrainConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def label(self) -> str:
        return f"{self.name} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """What a sweep runs, a whole comparison of the first seed first.

    Attributes:
        eval: options of ``fastprompt eval``; none: nothing is evaluated after training.
        tune: the option whose best value tables show.
        unasked: the plan's tasks, where nobody said which folder they are in.
    """

    runs: list[Run]
    eval: dict[str, Any] = field(default_factory=dict)
    tune: str | None = None
    unasked: tuple[str, ...] = ()


def read_plan(
    path: str | Path,
    out: str | Path,
    *,
    over: Mapping[str, Any] | None = None,
    seeds: Sequence[int] | None = None,
    eval: Mapping[str, Any] | None = None,
) -> Plan:
    """Read a plan.

    Args:
        path: of the YAML.
        out: the sweep's folder; a run's is ``out/NAME/seed-S``.
        over: options that go before the plan's ``base``.
        seeds, eval: likewise. Without ``eval["data"]`` tasks are left out.

    Raises:
        ValueError: not such a YAML, an unknown key or option, a wrong or a missing one.
    """
    path = Path(path)
    plan = _read(path)
    base = _options(plan.get("base"), f"{path}: base") | dict(over or {})
    _refuse(base, f"{path}: base")
    named = plan.get("runs") or {"": {}}
    if not isinstance(named, dict):
        raise ValueError(f"{path}: runs: want name: options, got {named!r}")
    named = {str(name): _options(given, f"{path}: runs: {name}") for name, given in named.items()}
    tune = _values(plan.get("tune"), f"{path}: tune")
    if len(tune) > 1:
        raise ValueError(f"{path}: tune: want one option, got {', '.join(tune)}")
    crossed = _values(plan.get("grid"), f"{path}: grid") | tune
    configs = dict(_expand(path, Path(out), base, named, crossed))
    seeds = plan.get("seeds", [0]) if seeds is None else list(seeds)
    if not _are_seeds(seeds):
        raise ValueError(f"{path}: seeds: want different whole numbers from 0, got {seeds!r}")
    runs = []
    for seed in seeds:
        for name, (values, folder) in configs.items():
            own = {"seed": seed, "out": str(folder / f"seed-{seed}")}
            runs.append(Run(name, seed, TrainConfig.of(values | own, f"{path}: {name}")))
    if tune and not all(run.config.evaluates for run in runs):
        raise ValueError(f"{path}: tune: want rows held out (hold_out or eval_data), got none")
    asked, unasked = _asked((plan.get("eval") or {}) | dict(eval or {}), path)
    return Plan(runs, asked, next(iter(tune), None), unasked)


def _read(path: Path) -> dict[str, Any]:
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: want a plan in YAML; {error}") from error
    if not isinstance(plan, dict) or not plan.keys() <= set(KEYS):
        got = ", ".join(map(str, plan)) if isinstance(plan, dict) else type(plan).__name__
        raise ValueError(f"{path}: want a plan of {', '.join(KEYS)}; got {got}")
    return plan


def _options(given: Any, where: str) -> dict[str, Any]:
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise ValueError(f"{where}: want options and their values, got {given!r}")
    check_names(given, where)
    _refuse(given, where)
    return given


def _refuse(given: Mapping[str, Any], where: str) -> None:
    for name in _OURS:
        if name in given:
            raise ValueError(f"{where}: {name} is each run's own; want none, got {given[name]!r}")


def _values(given: Any, where: str) -> dict[str, list]:
    given = _options(given, where)
    for name, values in given.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}: {name}: want a list of values, got {values!r}")
    return given


def _expand(
    path: Path,
    out: Path,
    base: dict[str, Any],
    named: dict[str, dict[str, Any]],
    crossed: dict[str, list],
) -> Iterator[tuple[str, tuple[dict[str, Any], Path]]]:
    """Name -> options and folder of its seeds."""
    for first, options in named.items():
        for values in itertools.product(*crossed.values()):
            point = dict(zip(crossed, values, strict=True))
            parts = [first] * bool(first) + [f"{k}={v}" for k, v in point.items()]
            name = ",".join(parts) or "run"
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"{path}: want letters, digits and .,=+- in a run's name, which is a folder; "
                    f"got {name!r}"
                )
            yield name, (base | options | point, out / name)


def _are_seeds(seeds: Any) -> bool:
    whole = isinstance(seeds, list) and all(type(s) is int and s >= 0 for s in seeds)
    return whole and 0 < len(seeds) == len(set(seeds))


def _asked(given: dict[str, Any], path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What is asked, and tasks that cannot be."""
    unknown = given.keys() - set(EVAL)
    if unknown:
        raise ValueError(
            f"{path}: eval: want some of {', '.join(EVAL)}; got {', '.join(sorted(unknown))}"
        )
    if "data" in given and not given.get("tasks"):
        raise ValueError(f"{path}: eval: want tasks beside data, got none")
    given = {k: [v] if k in LISTS and isinstance(v, str) else v for k, v in given.items()}
    unasked = ()
    if "data" not in given:
        unasked = tuple(given.pop("tasks", ()))
    return (given if given.keys() & {"tasks", "questions"} else {}), unasked
