"""A run from beginning to end: `train` of a `TrainConfig`, and the same again: `rerun`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    PrinterCallback,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.utils import logging

import fastprompt
from fastprompt.families import TEXT
from fastprompt.methods import M2PT, Method
from fastprompt.patching import Patch
from fastprompt.reporting import count
from fastprompt.train import run_folder
from fastprompt.train.batches import Examples, pack
from fastprompt.train.checking import Checked, Problems, Rows, TrainingError, check, choose
from fastprompt.train.config import TrainConfig
from fastprompt.train.progress import METRICS, Bar, KeepBest, Metrics, StopOnSignal, read_metrics
from fastprompt.train.templates import ChatTemplate, count_image_tokens
from fastprompt.train.trainer import PromptTrainer


def _m2pt(config: TrainConfig) -> Method:
    return M2PT(
        vision_tokens=config.vision_tokens, text_tokens=config.text_tokens,
        train_projector=config.train_projector, train_lm_head=config.train_lm_head,
        visual_prompts=config.visual_prompts,
    )  # fmt: skip


METHODS: dict[str, Callable[[TrainConfig], Method]] = {
    "m2pt": _m2pt,
    "vpt": lambda config: M2PT(config.vision_tokens, 0, train_projector=False),
    "text": lambda config: M2PT(0, config.text_tokens, train_projector=False),
    "projector": lambda config: M2PT(0, 0),
}


# where attention keeps packed conversations apart, as tested
PACKED = ("llama", "mistral", "qwen2", "qwen3")


@dataclass
class Data:
    """The rows of a run, and how they become tokens.

    Attributes:
        train, held_out: disjoint; ``held_out`` is None where nothing is evaluated.
        digests: hashes of the data, for run.json.
    """

    processor: ProcessorMixin
    template: ChatTemplate
    train: Checked
    held_out: Checked | None
    problems: Problems
    digests: dict[str, str]

    def examples(self, config: TrainConfig, checked: Checked, packed: bool) -> Examples:
        dtype = getattr(torch, config.dtype)
        bins = pack(checked.lengths, config.max_length, config.seeds["order"]) if packed else None
        return Examples(checked, self.template, self.processor, dtype, bins)

    @property
    def pad_id(self) -> int:
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@dataclass
class Result:
    """What `train` returns.

    Attributes:
        folder: the run's.
        model: patched and trained.
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
    resumes = resume and run_folder.holds_run(folder)
    if resumes:
        run_folder.check_same(folder, config)
        torch.set_num_threads(run_folder.read_run(folder)["threads"])  # sums depend on it
    else:
        run_folder.check_new(folder)
    patch = prepare_model(config)
    data = prepare_data(config, console, patch)
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
) -> Result:
    folder = Path(config.out)
    if not resumes:
        found = run_folder.facts(config, data.digests, run_folder.command_line())
        run_folder.begin(folder, config, found)
    start = run_folder.last_checkpoint(folder)
    stop, bar = StopOnSignal(console.print), Bar(console)
    own: list[TrainerCallback] = [stop]
    if int(os.environ.get("RANK", 0)) == 0:
        own += [Metrics(folder), bar, KeepBest(folder, config.best_metric)]
    trainer = make_trainer(config, data, patch, [*own, *callbacks])
    bar.trainer = trainer
    console.print(_headline(trainer, data, patch), highlight=False, markup=False)
    if resumes:
        at = start.name if start else "the beginning: there is no checkpoint yet"
        console.print(f"resuming from {at}", highlight=False)
    try:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    finally:
        bar.stop()
        stop.restore()
        data.problems.write(folder / run_folder.BAD_ROWS)
    if not stop.asked:
        fastprompt.save(patch.model, folder / run_folder.PROMPTS)
    entries = read_metrics(folder / METRICS)
    return Result(
        folder=folder,
        model=patch.model,
        losses={e["step"]: e["loss"] for e in entries if "loss" in e},
        evaluations={
            e["step"]: {k: e[f"eval_{k}"] for k in ("loss", "accuracy")}
            for e in entries
            if "eval_loss" in e
        },
        interrupted=stop.asked,
        problems=data.problems,
        skipped=trainer.skipped,
    )


def _headline(trainer: PromptTrainer, data: Data, patch: Patch) -> str:
    """What is about to be trained, in two lines."""
    config, share = trainer.config, sum(p.numel() for p in patch.trainable.values())
    held = "" if data.held_out is None else f", {len(data.held_out):,} held out"
    left = f", {len(data.problems):,} bad ones left out" if data.problems else ""
    return (
        f"{patch.method}: {share:,} parameters train ({100 * share / count(patch.model):.3f}%)\n"
        f"{len(data.train):,} rows{held}{left}; {trainer.steps():,} steps of "
        f"{config.batch_size * config.accumulate} rows; writing to {config.out}"
    )


def prepare_data(
    config: TrainConfig, console: Console | None = None, patch: Patch | None = None
) -> Data:
    """Look at every row, and choose those that train and those that are held out.

    Args:
        patch: of the model that will see them; wanted where ``visual_prompts`` is not "drop", since
            images then take more tokens.
    """
    logging.disable_progress_bar()
    processor = AutoProcessor.from_pretrained(config.model)
    if not hasattr(processor, "image_processor"):
        raise TrainingError(
            f"{config.model}: want the processor of a vision-language model, got "
            f"{type(processor).__name__}"
        )
    if patch is not None and config.visual_prompts != "drop":
        patch.prepare(processor)
    name = config.template
    if name == "auto" and config.method == "projector":
        name = "plain"
    template = ChatTemplate(processor, name, count_image_tokens(processor))
    problems = Problems(fatal=config.on_bad_row == "fatal")

    def checked(paths: list[str]) -> Checked:
        rows = Rows(paths, config.image_folder)
        shown = console is not None and console.is_terminal
        with Progress(console=console, transient=True, disable=not shown) as bar:
            task = bar.add_task("reading rows", total=len(rows))
            return check(
                rows, template, problems, max_length=config.max_length,
                keep_duplicates=config.duplicate_ids == "keep", decode=config.decode_images,
                tick=lambda: bar.advance(task),
            )  # fmt: skip

    whole = checked(config.data)
    train, held_out = choose(whole, config.hold_out, config.subset, config.seeds["subset"])
    digests = {"train": whole.digest}
    if config.eval_data:
        if config.hold_out:
            raise TrainingError("want eval_data or hold_out, got both")
        held_out = checked(config.eval_data)
        digests["held_out"] = held_out.digest
    return Data(
        processor, template, train, held_out if config.evaluates else None, problems, digests
    )


def prepare_model(config: TrainConfig) -> Patch:
    """The frozen model, new prompts from the seed, and its projector if one is given."""
    if config.method not in METHODS:
        raise TrainingError(f"method: want one of {', '.join(METHODS)}; got {config.method!r}")
    method = METHODS[config.method](config)
    dtype, options = getattr(torch, config.dtype), {}
    if config.four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # small, and trained or loaded from a file: not worth an error of 9%
            llm_int8_skip_modules=["multi_modal_projector", "lm_head"],
        )
    logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(config.model, dtype=dtype, **options)
    torch.manual_seed(config.seeds["init"])
    patch = fastprompt.patch(model, method, memory=config.memory)
    if config.projector:  # into the float32 copy, if it trains
        from fastprompt.importers import load_projector

        load_projector(model, config.projector)
    return patch


def make_trainer(
    config: TrainConfig, data: Data, patch: Patch, callbacks: list[TrainerCallback] | None = None
) -> PromptTrainer:
    """A Trainer over prepared data and a prepared model."""
    family = patch.anatomy.tower(TEXT).family
    if config.pack and family not in PACKED:
        raise TrainingError(f"pack: want a language model of {', '.join(PACKED)}; got {family}")
    if config.tensorboard and find_spec("tensorboard") is None:
        raise TrainingError("tensorboard: want the package of that name, which is not installed")
    logging.set_verbosity_error()
    trainer = PromptTrainer(
        patch.model,
        config,
        data.examples(config, data.train, config.pack),
        None if data.held_out is None else data.examples(config, data.held_out, packed=False),
        pad_id=data.pad_id,
        problems=data.problems,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def rerun(
    folder: str | Path, out: str | Path | None = None, console: Console | None = None
) -> tuple[Result, list[str]]:
    """Run a finished run again, with its options, seeds and threads, into a folder beside it.

    Returns:
        The new run, and every difference found: of versions, and the first step whose loss is not
        the same. On the CPU that it ran on, and the same versions, there is none.

    Raises:
        TrainingError: no run there, or its data has changed since.
    """
    folder, console = Path(folder), console or Console()
    found = run_folder.read_run(folder)
    torch.set_num_threads(found["threads"])
    config = TrainConfig.load(folder / run_folder.CONFIG)
    config = replace(config, out=str(out or f"{folder}-rerun"))
    differences = run_folder.changed_versions(folder)
    run_folder.check_new(Path(config.out))
    patch = prepare_model(config)
    data = prepare_data(config, console, patch)
    run_folder.check_data(folder, data.digests)
    result = _run(config, patch, data, False, console, [])
    before = {e["step"]: e["loss"] for e in read_metrics(folder / METRICS) if "loss" in e}
    for step in sorted(before.keys() & result.losses.keys()):
        if before[step] != result.losses[step]:
            differences.append(f"loss of step {step}: {before[step]}, now {result.losses[step]}")
            break
    return result, differences
