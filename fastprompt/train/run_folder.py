"""A run's folder: what it was given and what it ran on, so that it can be resumed and rerun.

config.yaml    every option, resolved
run.json       command, commit, versions, machine, threads, seeds, hash of the data, sample of the
               frozen model
metrics.jsonl  losses, learning rates, evaluations
bad_rows.jsonl rows that were left out, each with its reason
result.json    once it has finished: what trained, how long, in how much memory, its last scores
checkpoint-N/  the last ones; best/ and prompts/: what trained, for `fastprompt.load`
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastprompt.files import replace
from fastprompt.patching import Patch
from fastprompt.share import count
from fastprompt.train.checking import TrainingError
from fastprompt.train.config import TrainConfig
from fastprompt.train.distributed import processes

CONFIG, RUN, BAD_ROWS, PROMPTS = "config.yaml", "run.json", "bad_rows.jsonl", "prompts"
RESULT = "result.json"
# those that can change a loss
_PACKAGES = (
    *("torch", "torchvision", "transformers", "tokenizers", "accelerate", "bitsandbytes"),
    *("triton", "peft", "numpy", "pillow"),
)
# options of which no loss depends
_FREE = {"out", "on_nan", "on_bad_row", "workers", "keep", "save_every", "eval_every"}
_FREE |= {"tensorboard"}


def facts(config: TrainConfig, digests: dict[str, str]) -> dict[str, Any]:
    """What run.json holds. ``digests``: "train" and "held_out" -> hash of the data."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": sys.argv,
        "cwd": os.getcwd(),  # paths of config.yaml may count from it
        "commit": _commit(),
        "versions": _versions(),
        "machine": {"cpu": _cpu(), "card": card},
        "threads": torch.get_num_threads(),
        "processes": processes(),
        "seeds": config.seeds,
        "data": digests,
    }


def begin(folder: Path, config: TrainConfig, found: dict[str, Any]) -> None:
    """Write config.yaml and run.json of a new run."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    replace(folder / RUN, lambda part: part.write_text(text, encoding="utf-8"))


def finish(folder: Path, patch: Patch, entries: list[dict[str, Any]]) -> None:
    """Write result.json from the entries of metrics.jsonl: the last thing that a run does."""
    losses = [e["loss"] for e in entries if "loss" in e]
    found = [e for e in entries if "eval_loss" in e]
    result = {
        "trainable": sum(p.numel() for p in patch.trainable.values()),
        "parameters": count(patch.model),
        "steps": max((e["step"] for e in entries), default=0),
        "seconds": max((e["seconds"] for e in entries), default=0.0),
        "memory": max((e["memory"] for e in entries if "loss" in e), default=0),
        "loss": losses[-1] if losses else None,
        "held_out": {k: found[-1][f"eval_{k}"] for k in ("loss", "accuracy")} if found else {},
    }
    replace(folder / RESULT, lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))


def holds_run(folder: Path) -> bool:
    return (folder / RUN).is_file()


def is_finished(folder: Path) -> bool:
    return (folder / RESULT).is_file()


def read_run(folder: Path) -> dict[str, Any]:
    """run.json; raises TrainingError if the folder holds no run."""
    if not holds_run(folder):
        raise TrainingError(f"{folder}: want a run's folder, with {RUN} in it")
    return json.loads((folder / RUN).read_text(encoding="utf-8"))


def repeats(folder: Path) -> bool:
    """Whether `rerun` made it."""
    return bool(read_run(folder).get("again"))


def check_new(folder: Path) -> None:
    """Raises TrainingError if a run is there already."""
    if holds_run(folder):
        raise TrainingError(f"{folder} holds a run: go on with --resume, or give another --out")


def check_same(folder: Path, config: TrainConfig) -> None:
    """Raises TrainingError unless the run in ``folder`` has the same options, but for those that
    change no loss: what a run does about bad rows may change once it has met one."""
    old, new = asdict(TrainConfig.load(folder / CONFIG)), asdict(config)
    free = _FREE | ({"memory"} if "off" not in (old["memory"], new["memory"]) else set())
    other = [f"{n}: {old[n]!r}, now {new[n]!r}" for n in new if n not in free and new[n] != old[n]]
    if other:
        raise TrainingError(f"{folder}: to resume, want the run's own options; " + "; ".join(other))


def write_config(folder: Path, config: TrainConfig) -> None:
    replace(folder / CONFIG, lambda part: part.write_text(config.as_yaml(), encoding="utf-8"))


def check_processes(folder: Path) -> None:
    """Raises TrainingError unless the run in ``folder`` had as many: they share out each step."""
    had = read_run(folder)["processes"]
    if had != processes():
        raise TrainingError(f"{folder}: want {had} processes, as it began with; got {processes()}")


def check_data(folder: Path, digests: dict[str, str]) -> None:
    """Raises TrainingError unless the run in ``folder`` had the same data."""
    had = read_run(folder)["data"]
    if had != digests:
        raise TrainingError(
            f"{folder}: the data is no longer what it was (hash {_short(had)}, now "
            f"{_short(digests)}): losses would not be the same"
        )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint. What a killed run was writing is removed."""
    for part in folder.glob(".checkpoint-*.partial"):
        shutil.rmtree(part, ignore_errors=True)
    found = [p for p in folder.glob("checkpoint-*") if p.name.split("-")[-1].isdecimal()]
    return max(found, key=lambda p: int(p.name.split("-")[-1]), default=None)


def changed_versions(folder: Path) -> list[str]:
    """What of versions and commit differs from when the run began, in words."""
    began = read_run(folder)
    had = began["versions"] | {"commit": began["commit"], "cpu": began["machine"]["cpu"]}
    now = _versions() | {"commit": _commit(), "cpu": _cpu()}
    return [f"{name} {had.get(name)}, now {x}" for name, x in now.items() if x != had.get(name)]


def _cpu() -> str:
    """Its name, where Linux says it: a loss's last digits depend on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _short(digests: dict[str, str]) -> str:
    return ", ".join(f"{name} {value[:12]}" for name, value in digests.items())


def _versions() -> dict[str, str | None]:
    from fastprompt import __version__

    own = {"fastprompt": __version__, "python": platform.python_version()}
    return own | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that fastprompt runs from; "+" if it has changes; None outside of one."""
    import fastprompt

    root = Path(fastprompt.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    run = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
