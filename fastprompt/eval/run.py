"""``fastprompt eval``: benchmarks from their own files, a model or its predictions, scores."""

import argparse
import gc
import hashlib
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from fastprompt.eval import predictions
from fastprompt.eval.benchmarks import BENCHMARKS, vqa
from fastprompt.eval.evaluation import EXACT, SCORES, Run, folder_of, load, predict, score
from fastprompt.eval.generate import SUFFIX
from fastprompt.eval.loading import DTYPES, load_judge, load_model
from fastprompt.eval.questions import InputError, check_images
from fastprompt.train.templates import NAMED

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
        "--projector", type=Path, help="of stage 1, or mm_projector.bin: put in first"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        choices=list(BENCHMARKS),
        help=", ".join(BENCHMARKS),
    )
    parser.add_argument("--data", type=Path, help="has a folder for each of --tasks")
    parser.add_argument(
        "--questions",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="one's own, .json or .jsonl: each a task by the file's name",
    )
    parser.add_argument("--images", type=Path, help="of --questions; else beside the file")
    parser.add_argument("--output", type=Path, required=True, help="results, and how far it got")
    parser.add_argument("--score", choices=SCORES, default=EXACT, help="exact match or ranking")
    parser.add_argument("--suffix", default=SUFFIX, help='after each question; "" for none')
    parser.add_argument("--max-new-tokens", type=_count, default=16, help="of a greedy answer")
    parser.add_argument("--blank", action="store_true", help="show blank images, into OUTPUT/blank")
    parser.add_argument("--limit", type=_count, help="questions of each group")
    parser.add_argument("--batch", type=_count, default=8, help="questions (or options) at once")
    parser.add_argument("--missing-is-wrong", action="store_true", help="or it is an error")
    parser.add_argument("--judge", help="a language model (Vicuna 13B v1.5) that judges as well")
    template = parser.add_mutually_exclusive_group()
    template.add_argument("--chat-template", type=Path, help="a Jinja file, for the processor")
    template.add_argument("--template", choices=list(NAMED), help="or one by name, as train's")
    parser.add_argument("--four-bit", action="store_true", help="NF4 weights")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the weights; auto: the checkpoint's, under --four-bit bfloat16",
    )
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
    if options.predictions and (options.prompts or options.projector):
        parser.error(
            "want --prompts and --projector with --model; --predictions are of one already"
        )
    if not options.tasks and not options.questions:
        parser.error("want --tasks or --questions")
    if options.tasks and not options.data:
        parser.error("want --data with --tasks")
    if options.predictions and options.blank:
        parser.error("want --blank with --model; --predictions are of images already")
    try:
        _run(options)
    except (InputError, OSError) as error:
        print(f"fastprompt eval: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    own = [vqa(path, options.images) for path in options.questions]
    tasks = load([*options.tasks, *own], options.data, options.limit)
    weights = dict(four_bit=options.four_bit, dtype=options.dtype, device=options.device)
    output = options.output
    if options.model:
        told = {name: str(getattr(options, name)) for name in ("model", "four_bit", "dtype")}
        told |= {"template": options.template} if options.template else {}
        files = {name: getattr(options, name) for name in ("prompts", "projector", "chat_template")}
        told |= {f"{name} sha256": _sha256(path) for name, path in files.items() if path}
        run = Run(options.score, options.suffix, options.max_new_tokens, options.blank, told)
        for task in tasks.values():  # what can be known to be wrong is, before a large model loads
            check_images(task.wanted)
        model, processor = load_model(options.model, template=options.template, **files, **weights)
        run = run.of(model, processor)
        said = predict(model, processor, tasks, output, run=run, batch=options.batch)
        output, about = folder_of(output, run), asdict(run)
        del model  # a judge may want the room
        gc.collect()  # a model and its patch hold each other
        torch.cuda.empty_cache()
    else:
        known = {q.id: q for task in tasks.values() for q in task.every}
        said = predictions.read(options.predictions, known)
        about = {"predictions": list(map(str, options.predictions))}
    results = score(
        tasks,
        said,
        output,
        about=about | ({"judge": options.judge} if options.judge else {}),
        missing_is_wrong=options.missing_is_wrong,
        by=load_judge(options.judge, **weights) if options.judge else None,
        batch=options.batch,
    )
    print((output / "results.md").read_text().split("\n\n")[0])
    if len(results) < 3:
        print("no radar plot: it wants three tasks")


def _sha256(path: Path) -> str:
    """Of a file, or of the weights in a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
