"""A run from beginning to end: `train` of a `TrainConfig`, and the same again: `rerun`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, TrainerCallback

import fastprompt
from fastprompt.patching import Patch
from fastprompt.samples import base_sample
from fastprompt.share import count
from fastprompt.train import run_folder, sharding
from fastprompt.train.checking import Problems
from fastprompt.train.config import TrainConfig
from fastprompt.train.distributed import of_all, of_the_first, processes, sent_bytes
from fastprompt.train.preparing import Data, make_trainer, prepare
from fastprompt.train.progress import (
    METRICS,
    Bar,
    KeepBest,
    ListBadRows,
    Metrics,
    StopOnSignal,
    read_metrics,
)
from fastprompt.train.trainer import PromptTrainer


@dataclass
class Result:
    """What `train` returns.

    Attributes:
        folder: the run's.
        model: patched and trained; under ``shard`` in shards, which all processes run together.
        losses: step -> loss, of the whole run, what it did before it was resumed included.
        evaluations: step -> {"loss", "accuracy"} of held-out rows.
        interrupted: whether a signal ended it early; ``train(config, resume=True)`` goes on.
        problems: rows left out.
        skipped: steps left out because their loss or gradient was not finite.
    """

    folder: Path
    model: PreTrainedModel
    losses: dict[int, float | None]
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    interrupted: bool = False
    problems: Problems = field(default_factory=Problems)
    skipped: list[str] = field(default_factory=list)


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    console: Console | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> Result:
    """Train as ``config`` says, and write the run's folder.

    Args:
        resume: go on from the last checkpoint in ``config.out`` (from the beginning, if there is
            none). Losses are then those of a run that was never interrupted.
        console: where progress is shown; None: on standard output.
        callbacks: of transformers' Trainer, beside those of the run.

    Raises:
        TrainingError: bad data, options of another run, a loss that is not finite, a full disk.
        ValueError: a model or an option that is not served.
    """
    console, folder = console or Console(), Path(config.out)
    there = of_the_first(run_folder.holds_run(folder))
    resumes = resume and there
    if resumes:
        run_folder.check_same(folder, config)
        run_folder.check_processes(folder)
        torch.set_num_threads(run_folder.read_run(folder)["threads"])  # sums depend on it
    elif there:
        run_folder.check_new(folder)
    patch, data = prepare(config, console)
    if resumes:
        run_folder.check_data(folder, data.digests)
    return _run(config, patch, data, resumes, console, callbacks or [])


def _run(
    config: TrainConfig,
    patch: Patch,
    data: Data,
    resumes: bool,
    console: Console,
    callbacks: list[TrainerCallback],
    again: str | None = None,
) -> Result:
    """``again``: the folder of the run that this one repeats."""
    folder = Path(config.out)
    trainer = make_trainer(config, data, patch, callbacks)
    stop, bar = StopOnSignal(console.print), Bar(console, trainer)
    trainer.add_callback(stop)
    listed = ListBadRows(folder / run_folder.BAD_ROWS, data.problems)
    trainer.add_callback(listed)
    start = run_folder.last_checkpoint(folder) if resumes else None
    main = trainer.is_world_process_zero()
    if main:
        if not resumes:
            found = run_folder.facts(config, data.digests)
            found["base"] = base_sample(patch.model, trained=True)
            found["again"] = again
            run_folder.begin(folder, config, found)
        for callback in (Metrics(folder), bar, KeepBest(folder, config.best_metric)):
            trainer.add_callback(callback)
        console.print(_headline(trainer, data, patch), highlight=False, markup=False)
    if resumes:
        if main and not run_folder.is_finished(folder):
            run_folder.write_config(folder, config)
        for change in run_folder.changed_versions(folder):
            console.print(f"not as when it began: {change}", highlight=False, markup=False)
        at = start.name if start else "the beginning: there is no checkpoint yet"
        console.print(f"resuming from {at}", highlight=False)
    try:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        data.problems.merge(of_all([*data.problems]))  # each process reads rows of its own
    finally:
        bar.stop()
        stop.restore()
        listed.write(main)
    if not stop.stopped and config.evaluates and not _evaluated(trainer):
        trainer.evaluate()
    entries = read_metrics(folder / METRICS)
    if main and not stop.stopped:
        fastprompt.save(patch.model, folder / run_folder.PROMPTS)
        run_folder.finish(folder, patch, entries)
    return Result(
        folder=folder,
        model=patch.model,
        losses={e["step"]: e["loss"] for e in entries if "loss" in e},
        evaluations={
            e["step"]: {k: e[f"eval_{k}"] for k in ("loss", "accuracy")}
            for e in entries
            if "eval_loss" in e
        },
        interrupted=stop.stopped,
        problems=data.problems,
        skipped=trainer.skipped,
    )


def _evaluated(trainer: PromptTrainer) -> bool:
    """Whether held-out rows were asked after the last step."""
    step = trainer.state.global_step
    return any("eval_loss" in e and e["step"] == step for e in trainer.state.log_history)


def _headline(trainer: PromptTrainer, data: Data, patch: Patch) -> str:
    """What is about to be trained, in two lines."""
    config, share = trainer.config, sum(p.numel() for p in patch.trainable.values())
    held = "" if data.held_out is None else f", {len(data.held_out):,} held out"
    left = f", {len(data.problems):,} bad ones left out" if data.problems else ""
    text = (
        f"{patch.method}: {share:,} parameters train ({100 * share / count(patch.model):.3f}%)\n"
        f"{len(data.train):,} rows{held}{left}; {trainer.steps():,} steps of "
        f"{config.batch_size * config.accumulate * processes()} rows; writing to {config.out}"
    )
    if processes() > 1:
        sent = sent_bytes(list(patch.trainable.values()), processes())
        text += f"\n{processes()} processes; each sends {sent:,} bytes of gradients a step"
        if config.shard:
            text += f"\n{sharding.describe(patch, config)}"
    elif torch.cuda.device_count() > 1:
        text += f"\none card of {torch.cuda.device_count()}: torchrun starts a process for each"
    return text


def rerun(
    folder: str | Path, out: str | Path | None = None, console: Console | None = None
) -> tuple[Result, list[str]]:
    """Run a finished run again, with its options, seeds and threads, into a folder beside it.

    Returns:
        The new run, and every difference found: of versions and CPU, steps that the old run never
        came to, and the first whose loss is not the same. On the CPU that it ran on, and the same
        versions, there is none.

    Raises:
        TrainingError: no run there, or its data has changed since.
    """
    folder, console = Path(folder), console or Console()
    found = run_folder.read_run(folder)
    torch.set_num_threads(found["threads"])
    config = TrainConfig.load(folder / run_folder.CONFIG)
    run_folder.check_processes(folder)
    config = replace(config, out=str(out or f"{folder}-rerun"))
    differences = run_folder.changed_versions(folder)
    run_folder.check_new(Path(config.out))
    patch, data = prepare(config, console)
    run_folder.check_data(folder, data.digests)
    result = _run(config, patch, data, False, console, [], again=str(folder))
    before = {e["step"]: e["loss"] for e in read_metrics(folder / METRICS) if "loss" in e}
    compared = sorted(before.keys() & result.losses.keys())
    if len(compared) < len(result.losses):
        differences.append(f"losses there are of {len(compared)} of {len(result.losses)} steps")
    for step in compared:
        if before[step] != result.losses[step]:
            differences.append(f"loss of step {step}: {before[step]}, now {result.losses[step]}")
            break
    return result, differences
