"""``fastprompt eval``: benchmarks from their own files, a model or its predictions, scores."""

import argparse
import hashlib
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from fastprompt import checkpoint
from fastprompt.eval import predictions
from fastprompt.eval.benchmarks import BENCHMARKS
from fastprompt.eval.evaluation import EXACT, SCORES, Run, load, predict, score
from fastprompt.eval.generate import SUFFIX
from fastprompt.eval.questions import InputError
from fastprompt.patching import patch_of

DESCRIPTION = "Scores of a model, or of its predictions, on benchmarks from their own files."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastprompt eval", description=DESCRIPTION)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a LLaVA-like model of transformers: hub id or folder")
    source.add_argument(
        "--predictions",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="score these instead: JSON lines with id and prediction",
    )
    parser.add_argument("--prompts", type=Path, help="folder of fastprompt.save, put into --model")
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        choices=list(BENCHMARKS),
        help=", ".join(BENCHMARKS),
    )
    parser.add_argument("--data", type=Path, required=True, help="has a folder for each task")
    parser.add_argument("--output", type=Path, required=True, help="results, and how far it got")
    parser.add_argument("--score", choices=SCORES, default=EXACT, help="exact match or ranking")
    parser.add_argument("--suffix", default=SUFFIX, help='after each question; "" for none')
    parser.add_argument("--max-new-tokens", type=_count, default=16, help="of a greedy answer")
    parser.add_argument("--limit", type=_count, help="questions of each group")
    parser.add_argument("--batch", type=_count, default=8, help="questions (or options) at once")
    parser.add_argument("--missing-is-wrong", action="store_true", help="or it is an error")
    parser.add_argument("--judge", help="a language model (Vicuna 13B v1.5) that judges as well")
    parser.add_argument("--chat-template", type=Path, help="a Jinja file, for the processor")
    parser.add_argument("--four-bit", action="store_true", help="NF4 weights")
    parser.add_argument("--dtype", default="auto", help="of the weights: bfloat16, float32, …")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"want a number from 1, got {text!r}")
    return int(text)


def main(arguments: list[str]) -> int:
    """0; 1 with a message if files are not what they should be."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.predictions and options.prompts:
        parser.error("want --prompts with --model; --predictions are of a model already")
    try:
        _run(options)
    except (InputError, OSError) as error:
        print(f"fastprompt eval: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    tasks = load(options.tasks, options.data, options.limit)
    if options.model:
        told = {name: str(getattr(options, name)) for name in ("model", "four_bit", "dtype")}
        files = {"prompts": options.prompts, "chat_template": options.chat_template}
        told |= {f"{name} sha256": _sha256(path) for name, path in files.items() if path}
        run = Run(options.score, options.suffix, options.max_new_tokens, told)
        model, processor = load_model(options)
        said = predict(model, processor, tasks, options.output, run=run, batch=options.batch)
        about = asdict(run)
        del model  # a judge may want the room
    else:
        known = {q.id for task in tasks.values() for q in task.every}
        said = predictions.read(options.predictions, known)
        about = {"predictions": list(map(str, options.predictions))}
    results = score(
        tasks,
        said,
        options.output,
        about=about | ({"judge": options.judge} if options.judge else {}),
        missing_is_wrong=options.missing_is_wrong,
        by=load_judge(options) if options.judge else None,
        batch=options.batch,
    )
    print((options.output / "results.md").read_text().split("\n\n")[0])
    if len(results) < 3:
        print("no radar plot: it wants three tasks")


def _sha256(path: Path) -> str:
    """Of a file, or of the weights in a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def load_model(options: argparse.Namespace) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model of ``--model`` with ``--prompts`` in it, and its processor."""
    processor = AutoProcessor.from_pretrained(options.model)
    _pads(processor.tokenizer)
    if options.chat_template:
        processor.chat_template = options.chat_template.read_text()
    model = AutoModelForImageTextToText.from_pretrained(options.model, **_weights(options))
    if options.prompts:
        try:
            checkpoint.load(model, options.prompts)
        except ValueError as error:
            raise InputError(f"--prompts: {error}") from error
        patch = patch_of(model)
        if patch.method.shown() != "drop":
            patch.prepare(processor)  # prompts that the projector sees make an image longer
    return model, processor


def load_judge(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model of ``--judge`` and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(options.judge)
    _pads(tokenizer)
    return AutoModelForCausalLM.from_pretrained(
        options.judge, **_weights(options)
    ).eval(), tokenizer


def _weights(options: argparse.Namespace) -> dict:
    given = {"dtype": options.dtype, "device_map": options.device}
    if options.four_bit:
        dtype = torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype)
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return given


def _pads(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:  # any token will do where the mask hides it
        tokenizer.pad_token = tokenizer.eos_token
