"""Instruction-ViT on two CPU cores: ``python -m fastprompt.demo instruction-vit``.

DINOv2 ViT-S/14 as frozen backbone, class prompts from all-MiniLM-L6-v2's text features and from
exemplars. There is no CLIP checkpoint in a package: a linear map between the two frozen encoders,
fitted on emoji names, stands in for one. Writes results.json after every part, and plots.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console

import fastprompt
from fastprompt.demo.instruction import emoji, plots, small_run
from fastprompt.demo.instruction.encoder import DualEncoder, faster_dtype
from fastprompt.demo.instruction.large_run import (
    RATES,
    UNSEEN_RATES,
    Artwork,
    all_or_some,
    base_and_new,
    selecting,
)
from fastprompt.demo.instruction.learning import Recipe

PARTS = ("recipe", "baselines", "small", "adapt", "large", "unseen")  # "small" has baselines, too


def main(arguments: list[str]) -> None:
    given = _parse(arguments)
    console, out = Console(width=100), Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    say = lambda line: console.print(line, highlight=False, markup=False)  # noqa: E731
    dtype = faster_dtype() if given.dtype == "auto" else getattr(torch, given.dtype)
    record = dict(
        command=" ".join(["python -m fastprompt.demo instruction-vit", *arguments]),
        threads=given.threads,
        dtype=str(dtype).removeprefix("torch."),
        versions={m.__name__: m.__version__ for m in (torch, transformers, fastprompt)},
        parts={},
    )

    def part(name: str, work) -> None:
        console.rule(name)
        started = time.perf_counter()
        result = work()
        record["parts"][name] = dict(seconds=round(time.perf_counter() - started, 1), **result)
        (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
        plots.draw(record["parts"], out)

    encoder, cache = DualEncoder(given.cache, dtype), given.cache
    with console.status("emoji artwork: downloading, converting, encoding"):
        art = Artwork(_some(emoji.load(cache), given.classes), encoder)
    steps = lambda n: max(2, round(n * given.length))  # noqa: E731
    if {"recipe", "baselines", "small", "adapt"} & set(given.parts):
        art.fit(torch.arange(len(art.emoji.names)))
        with console.status("the small task"):
            bench = small_run.Bench(encoder, given.train, given.test, cache)
    if "recipe" in given.parts:
        kinds = ("none", "mixed", "VPT")
        part("recipes", lambda: small_run.recipes(bench, steps(100), kinds, say))
    if "baselines" in given.parts:
        part("baselines", bench.baselines)
        say(str(record["parts"]["baselines"]))
    if "small" in given.parts:
        part("kinds", lambda: small_run.kinds(bench, Recipe(steps(300)), given.seeds, say))
    if "adapt" in given.parts:
        shots = (1, 2, 4, 8, 16)
        part("adapting", lambda: small_run.adapting(bench, Recipe(steps(1000)), shots, say))
    if "large" in given.parts:
        ks = (None, 64, 16, 4, 1)
        recipe = Recipe(steps(1000), **RATES)
        part("selection", lambda: selecting(art, recipe, ks, given.images, cache, say))
        few = min(100, len(art.emoji.names))
        part("all or some", lambda: all_or_some(art, Recipe(steps(200), **RATES), few, cache, say))
    if "unseen" in given.parts:
        unseen = Recipe(steps(500), **UNSEEN_RATES)
        # last: it fits the encoder's map to a part of the classes
        part("base and new", lambda: base_and_new(art, unseen, cache, say))
    say(f"wrote {out}/results.json and plots")


def _some(all_of_it: emoji.Emoji, classes: int | None) -> emoji.Emoji:
    if classes is None:
        return all_of_it
    names, categories, images = all_of_it
    every = slice(None, None, max(1, len(names) // classes))
    return emoji.Emoji(names[every], categories[every], {k: v[every] for k, v in images.items()})


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastprompt.demo instruction-vit", description=__doc__
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS[2:]))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--length", type=float, default=1.0, help="times as many steps")
    parser.add_argument("--train", type=int, default=2000, help="images of the small task")
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--images", type=int, default=200, help="tested a k on the large task")
    parser.add_argument("--classes", type=int, help="of the large task (all 1,026)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of DINOv2; auto: bfloat16 where the CPU multiplies it faster",
    )  # fmt: skip
    parser.add_argument("--cache", help="where archives are kept (~/.cache/fastprompt)")
    parser.add_argument("--out", default="instruction_results", help="folder for what is written")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
