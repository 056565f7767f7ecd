"""Models to evaluate and to judge, as ``fastprompt train`` loads them."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from fastprompt import checkpoint, linear4bit
from fastprompt.eval.questions import InputError
from fastprompt.importers import load_projector
from fastprompt.loading import four_bit as nf4
from fastprompt.patching import patch_of
from fastprompt.train.templates import NAMED

DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_model(
    name: str | Path,
    *,
    prompts: Path | None = None,
    projector: Path | None = None,
    chat_template: Path | None = None,
    template: str | None = None,
    four_bit: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A vision-language model with prompts in it, and its processor.

    Args:
        name: hub id or folder.
        prompts: folder of `fastprompt.save`.
        projector: what `load_projector` takes, put in before the prompts.
        chat_template: a Jinja file for the processor; ``template``: one of training's by name.
        four_bit: NF4, as ``fastprompt train`` has it.
        dtype: of `DTYPES`; "auto" is the checkpoint's, and with ``four_bit`` bfloat16.
        device: of all weights.

    Raises:
        InputError: an option or a file that is not what it should be.
    """
    weights = _weights(four_bit, dtype, device)
    if template is not None and template not in NAMED:
        raise InputError(f"template: want one of {', '.join(NAMED)}; got {template!r}")
    processor = AutoProcessor.from_pretrained(name)
    _pads(processor.tokenizer)
    if template:
        processor.chat_template = NAMED[template].jinja
    elif chat_template:
        processor.chat_template = chat_template.read_text()
    model = AutoModelForImageTextToText.from_pretrained(name, **weights)
    option = "projector"
    try:
        if projector:
            load_projector(model, projector)
        option = "prompts"
        if prompts:
            checkpoint.load(model, prompts)
    except ValueError as error:
        raise InputError(f"--{option}: {error}") from error
    linear4bit.adopt(model)  # as a patch does
    if prompts and patch_of(model).method.shown() != "drop":
        patch_of(model).prepare(processor)  # prompts that the projector sees lengthen an image
    return model, processor


def load_judge(
    name: str | Path, *, four_bit: bool = False, dtype: str = "auto", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model that judges, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    _pads(tokenizer)
    weights = _weights(four_bit, dtype, device)
    model = AutoModelForCausalLM.from_pretrained(name, **weights).eval()
    linear4bit.adopt(model)  # as a patch does
    return model, tokenizer


def _weights(four_bit: bool, dtype: str, device: str) -> dict:
    if dtype not in DTYPES:
        raise InputError(f"dtype: want one of {', '.join(DTYPES)}; got {dtype!r}")
    if not four_bit:
        return {"dtype": dtype, "device_map": device}
    of = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return {"dtype": of, "device_map": device, "quantization_config": nf4(of)}


def _pads(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:  # any token will do where the mask hides it
        tokenizer.pad_token = tokenizer.eos_token
