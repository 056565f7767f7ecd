"""Ask trained runs what they were not trained on, through ``fastprompt eval``."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fastprompt.train.config import TrainConfig

EXACT = ("seen", "z1", "z2", "z2_seen", "z3", "z4", "whole")
RANKED = ("z1", "z5")  # by likelihood: a model that never saw the format can be right too
LIMITS = {"exact": 150, "rank": 100}  # questions of each family; digits have one


def ask(folder: Path, run: Path) -> None:
    """Write ``run/eval/exact`` and ``rank``, each with a ``blank`` of blank images.

    Args:
        folder: what `prepare` wrote.
        run: of ``fastprompt train``. What was answered before is not asked again.
    """
    for command in commands(folder, run):
        subprocess.run([sys.executable, "-m", "fastprompt", "eval", *command], check=True)


def commands(folder: Path, run: Path) -> Iterator[list[str]]:
    """The arguments of ``fastprompt eval``, of each of its four calls."""
    config = TrainConfig.load(run / "config.yaml")
    model = ["--model", config.model, "--prompts", str(run / "prompts"), "--dtype", config.dtype]
    model += ["--four-bit"] * config.four_bit + ["--suffix", "", "--images", str(folder)]
    sizes = {"exact": ["--batch", "50", "--max-new-tokens", "4"], "rank": ["--batch", "10"]}
    for score, names in (("exact", EXACT), ("rank", RANKED)):
        files = [str(folder / "questions" / f"{name}.jsonl") for name in names]
        command = [*model, "--questions", *files, "--score", score, *sizes[score]]
        command += ["--limit", str(LIMITS[score]), "--output", str(run / "eval" / score)]
        yield command
        yield [*command, "--blank"]
