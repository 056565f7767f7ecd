"""``fastprompt train``, ``rerun`` and ``inspect-data``."""

from __future__ import annotations

import argparse
import difflib
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from transformers.utils import logging

from fastprompt.train import preparing, run, run_folder, showing
from fastprompt.train.checking import TrainingError
from fastprompt.train.config import TrainConfig, add_options, given_options, read_yaml
from fastprompt.train.distributed import end_processes, rank
from fastprompt.train.templates import IGNORE


def train(arguments: list[str]) -> int:
    """0; 1 if training failed; 130 if a signal ended it; 2 on wrong options."""
    parser = _parser("train", "Train prompts on conversations about images.")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    given = _parsed(parser, arguments)
    console = _console()
    try:
        config = _config(given)
        if given.dry_run:
            _dry_run(config, console)
            return 0
        result = run.train(config, resume=given.resume, console=console)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        return _failed(console, error)
    _report(result, console)
    end_processes()
    return 130 if result.interrupted else 0


def rerun(arguments: list[str]) -> int:
    """0 if all losses are the same; 1 if not, or it failed."""
    parser = argparse.ArgumentParser(
        "fastprompt rerun", description="Run a run again, and compare its losses."
    )
    parser.add_argument("folder", help="a run's folder")
    parser.add_argument("--out", help="the new run's folder (FOLDER-rerun)")
    given = parser.parse_args(arguments)
    console = _console()
    try:
        result, differences = run.rerun(given.folder, given.out, console)
    except (ValueError, OSError) as error:
        return _failed(console, error)
    for difference in differences:
        _say(console, f"differs: {difference}")
    same = not any(d.startswith("loss") for d in differences)
    _say(console, f"losses of {len(result.losses)} steps: {'the same' if same else 'not the same'}")
    return 0 if same and not result.interrupted else 1


def inspect_data(arguments: list[str]) -> int:
    """0, and 1 if rows are bad. The model's processor is read, the model is not."""
    parser = _parser("inspect-data", "Show rows with the tokens that train in ⟦ ⟧.")
    parser.add_argument("--count", type=int, default=3, help="rows shown (3)")
    given = _parsed(parser, arguments)
    console = _console()
    try:
        data = preparing.prepare_data(_config(given, out=""), console)
    except (ValueError, OSError) as error:
        return _failed(console, error)
    for i in data.train.indices[: given.count]:
        row = data.train.rows[i]
        found = data.template.encode(row)
        trained = sum(label != IGNORE for label in found.labels)
        _say(console, f"{row.id} ({row.where}): {len(found.ids)} tokens, {trained} trained")
        console.print(showing.marked(found.ids, found.labels, data.template), "\n")
    _say(console, f"{len(data.train):,} rows, template {data.template.name}")
    if data.problems:
        _say(console, data.problems.summary())
    return 1 if data.problems else 0


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    usage = f"fastprompt {name} --model MODEL --data PATH … --out FOLDER [options]"
    parser = argparse.ArgumentParser(
        f"fastprompt {name}", usage, description=description, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML of the options below; the command line goes first")
    add_options(parser)
    return parser


def _console() -> Console:
    """Where all is printed; transformers' own bars and warnings are kept out of it."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return Console(soft_wrap=True, quiet=rank() > 0)


def _parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """As ``parse_args``; an unknown option is answered with the nearest one."""
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1, cutoff=0.5)
        parser.error(
            f"unknown option {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "")
        )
    return given


def _config(given: argparse.Namespace, **fallbacks: str) -> TrainConfig:
    options = given_options(given)
    values = read_yaml(given.config) if given.config else {}
    out = options.get("out", values.get("out"))
    if getattr(given, "resume", False) and out and not given.config:
        stored = Path(out) / run_folder.CONFIG
        if stored.is_file():
            values = read_yaml(stored)
    return TrainConfig.of(fallbacks | values | options)


def _dry_run(config: TrainConfig, console: Console) -> None:
    with tempfile.TemporaryDirectory() as folder:  # Trainer makes its own at once
        _plan(replace(config, out=folder), console)


def _plan(config: TrainConfig, console: Console) -> None:
    patch, data = preparing.prepare(config, console)
    trainer = preparing.make_trainer(config, data, patch)
    _say(console, showing.plan(trainer, patch, config))
    batch = next(iter(trainer.get_train_dataloader()))
    B, T = batch["input_ids"].shape
    _say(console, f"\nfirst batch: {B} rows of {T} tokens; what trains stands in ⟦ ⟧")
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        while ids[-1] == data.pad_id and labels[-1] == IGNORE:  # padding
            ids, labels = ids[:-1], labels[:-1]
        console.print(showing.marked(ids, labels, data.template))


def _report(result: run.Result, console: Console) -> None:
    if result.problems:
        _say(console, result.problems.summary())
    for step in result.skipped:
        _say(console, f"left out: {step}")
    steps = max(result.losses, default=0)
    if result.interrupted:
        again = f"fastprompt train --out {result.folder} --resume"
        _say(console, f"interrupted after step {steps}; `{again}` goes on")
        return
    last = result.losses.get(steps)
    _say(console, f"trained {steps} steps, last loss {last if last is None else f'{last:.4f}'}")
    prompts = result.folder / run_folder.PROMPTS
    _say(console, f'wrote {prompts}: fastprompt.load(model, "{prompts}")')


def _failed(console: Console, error: Exception) -> int:
    _say(console, f"error: {error}")
    return 1 if isinstance(error, TrainingError) else 2


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)
