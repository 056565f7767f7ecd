"""What a run needs: its rows, its model, its trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PrinterCallback,
    ProcessorMixin,
    TrainerCallback,
)

import fastprompt
from fastprompt.families import TEXT, VISION
from fastprompt.loading import four_bit
from fastprompt.methods import M2PT, FullTuning, LoRA, Method, PrefixTuning
from fastprompt.patching import Patch
from fastprompt.prefill import prefill
from fastprompt.train import sharding
from fastprompt.train.batches import Examples, pack
from fastprompt.train.checking import Checked, Problems, Rows, TrainingError, check, choose
from fastprompt.train.config import TrainConfig
from fastprompt.train.distributed import start_processes
from fastprompt.train.templates import ChatTemplate, count_image_tokens
from fastprompt.train.trainer import PromptTrainer


def _m2pt(config: TrainConfig) -> Method:
    return M2PT(
        vision_tokens=config.vision_tokens, text_tokens=config.text_tokens,
        train_projector=config.train_projector, train_lm_head=config.train_lm_head,
        visual_prompts=config.visual_prompts, **_prompts(config),
    )  # fmt: skip


def _prompts(config: TrainConfig) -> dict[str, str]:
    own = config.init in (None, "prefill")  # the method's
    return dict(layers=config.layers) | ({} if own else dict(init=config.init))


_MAKES: dict[str, Callable[[TrainConfig], Method]] = {
    "m2pt": _m2pt,
    "vpt": lambda config: M2PT(config.vision_tokens, 0, train_projector=False, **_prompts(config)),
    "text": lambda config: M2PT(0, config.text_tokens, train_projector=False, **_prompts(config)),
    "projector": lambda config: M2PT(0, 0),
    "prefix": lambda config: PrefixTuning(config.text_tokens, **_prompts(config)),
    "lora": lambda config: LoRA(config.lora_rank),
    "full": lambda config: FullTuning(),
}


# where attention keeps packed conversations apart, as tested
PACKED = ("llama", "mistral", "qwen2", "qwen3")


@dataclass
class Data:
    """The rows of a run, and how they become tokens.

    Attributes:
        train, held_out: disjoint; ``held_out`` is None where nothing is evaluated.
        digests: hashes of the data, for run.json.
        max_length: of a row, in tokens: ``config.max_length``, or the model's context if shorter.
    """

    processor: ProcessorMixin
    template: ChatTemplate
    train: Checked
    held_out: Checked | None
    problems: Problems
    digests: dict[str, str]
    max_length: int

    def examples(self, config: TrainConfig, checked: Checked, packed: bool) -> Examples:
        dtype = getattr(torch, config.dtype)
        bins = pack(checked.lengths, self.max_length, config.seeds["order"]) if packed else None
        return Examples(checked, self.template, self.processor, dtype, bins)

    @property
    def pad_id(self) -> int:
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def prepare(config: TrainConfig, console: Console | None = None) -> tuple[Patch, Data]:
    """The model and its rows; these first, where they do not depend on it: a path that is wrong is
    known before a large model is loaded."""
    start_processes()
    sharding.check(config)
    _MAKES[config.method](config)  # options that it refuses
    if config.visual_prompts != "drop":
        patch = prepare_model(config)
        return patch, prepare_data(config, console, patch)
    data = prepare_data(config, console)
    return prepare_model(config), data


def prepare_data(
    config: TrainConfig, console: Console | None = None, patch: Patch | None = None
) -> Data:
    """Look at every row, and choose those that train and those that are held out.

    Args:
        patch: of the model that will see them; wanted where ``visual_prompts`` is not "drop", since
            images then take more tokens.
    """
    processor = AutoProcessor.from_pretrained(config.model)
    if not hasattr(processor, "image_processor"):
        raise TrainingError(
            f"{config.model}: want the processor of a vision-language model, got "
            f"{type(processor).__name__}"
        )
    made = set(processor.image_processor(images=[Image.new("RGB", (32, 32))]))
    if made != {"pixel_values"}:
        raise TrainingError(
            f"{config.model}: want images that are pixel_values alone, as LLaVA's; its "
            f"{type(processor.image_processor).__name__} makes {', '.join(sorted(made))}"
        )
    if patch is not None and config.visual_prompts != "drop":
        patch.prepare(processor)
    template = ChatTemplate(processor, config.template_name, count_image_tokens(processor))
    text = AutoConfig.from_pretrained(config.model).get_text_config()
    max_length = min(config.max_length, getattr(text, "max_position_embeddings", math.inf))
    problems = Problems(fatal=config.on_bad_row == "fatal")

    def checked(paths: list[str]) -> Checked:
        rows = Rows(paths, config.image_folder)
        shown = console is not None and console.is_terminal
        with Progress(console=console, transient=True, disable=not shown) as bar:
            task = bar.add_task("reading rows", total=len(rows))
            return check(
                rows, template, problems, max_length=max_length,
                keep_duplicates=config.duplicate_ids == "keep", decode=config.decode_images,
                tick=lambda: bar.advance(task),
            )  # fmt: skip

    if config.eval_data and config.hold_out:
        raise TrainingError("want eval_data or hold_out, got both")
    whole = checked(config.data)
    train, held_out = choose(whole, config.hold_out, config.subset, config.seeds["subset"])
    digests = {"train": whole.digest}
    if config.eval_data:
        held_out = checked(config.eval_data)
        digests["held_out"] = held_out.digest
    if not config.evaluates:
        held_out = None
    return Data(processor, template, train, held_out, problems, digests, max_length)


def prepare_model(config: TrainConfig) -> Patch:
    """The frozen model, new prompts from the seed, and its projector if one is given."""
    sharding.check(config)
    method = _MAKES[config.method](config)
    dtype, options = getattr(torch, config.dtype), {}
    if config.four_bit:
        options["quantization_config"] = four_bit(dtype)
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
    if config.init == "prefill":
        prefill(patch, *_first_rows(config, data, patch.method.lengths()))
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


def _first_rows(
    config: TrainConfig, data: Data, lengths: dict[str, int]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Text tokens [T] and images [B, 3, H, W] of the first rows that train, as many as the prompts
    have rows; None of none."""
    ids: list[int] = []
    pixels: list[torch.Tensor] = []
    text, vision = lengths.get(TEXT, 0), lengths.get(VISION, 0)
    examples = data.examples(config, data.train, packed=False)
    for i in range(len(examples)):
        if len(ids) >= text and len(pixels) >= vision:
            break
        example = examples[i][0]
        if example.problem is None:
            ids += [token for token in example.ids if token != data.template.image_id]
            pixels += [] if example.pixels is None else [example.pixels]
    images = torch.stack(pixels[:vision]) if pixels and vision else None
    return torch.tensor(ids) if ids else None, images
