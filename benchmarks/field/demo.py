"""The demo's task: its real LLaVA answers questions about pictures of coloured shapes (easy-VQA).

One question a row, padded on the right, with the ordinary two-dimensional mask: the demo's own
packing needs a mask of its own, which not everybody takes.
"""

import random
from collections.abc import Sequence

import torch

from benchmarks.field.tasks import IGNORE, Batch, Task
from fastprompt.demo import data, language, wheels
from fastprompt.demo import model as assembled
from fastprompt.demo.data import Question
from fastprompt.demo.packing import Packer
from fastprompt.demo.training import SENTENCE, Recipe, Split, beginning
from fastprompt.methods import M2PT

WATCHED = 20  # training images kept aside
ROWS = 24


def prepare(steps: int, questions: int, cache: str | None, seed: int = Recipe.seed) -> Task:
    """The task of so many steps, with so many questions for an exam; the seed draws both."""
    folder = wheels.converted(assembled.FOLDER, lambda to: assembled.assemble(to, cache), cache)
    tokenizer = language.tokenizer(cache)
    packer, rng = Packer(tokenizer, Recipe.size), random.Random(seed)
    pupils, exam = (
        Split.of(data.images(cache, split), data.load(cache, split)) for split in data.SPLITS
    )
    watched = _asked(pupils.part(list(range(WATCHED))))
    asked = _asked(Split(pupils.images, [[]] * WATCHED + pupils.asked[WATCHED:]))
    chosen = [rng.sample(asked, ROWS) for _ in range(steps)]
    examined = rng.sample(_asked(exam), questions)
    ids, images = beginning(tokenizer, pupils.images, Recipe.size, M2PT(20, 10))
    start = dict(input_ids=ids, pixel_values=images, text=language.BOS + SENTENCE)
    start["tokenizer"] = str(wheels.cache_folder(cache) / language.FOLDER)
    return Task(
        name="demo",
        model=str(folder),
        four_bit=True,
        batches=[_batch(packer, pupils, some) for some in chosen],
        watched=_batches(packer, pupils, rng.sample(watched, 4 * ROWS)),
        exam=_batches(packer, exam, examined),
        families=[data.family(question) for question in examined],
        start=start,
    )


def _asked(split: Split) -> list[Question]:
    return [question for asked in split.asked for question in asked]


def _batches(packer: Packer, split: Split, questions: Sequence[Question]) -> list[Batch]:
    groups = (questions[i : i + ROWS] for i in range(0, len(questions), ROWS))
    return [_batch(packer, split, group) for group in groups]


def _batch(packer: Packer, split: Split, questions: Sequence[Question]) -> Batch:
    """Rows of the opening, a question, its answer and its end; labels at the last two."""
    rows = [packer.opening + packer.question(q.text) for q in questions]
    answers = [packer.answer(q.answer) for q in questions]
    T = max(len(row) + len(answer) for row, answer in zip(rows, answers, strict=True))
    ids = torch.full((len(rows), T), packer.tokenizer.pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for b, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        n = len(row) + len(answer)
        ids[b, :n], mask[b, :n] = torch.tensor(row + answer), 1
        labels[b, len(row) : n] = torch.tensor(answer)
    seen = data.pixels(split.images[[q.image_id for q in questions]], packer.size)
    return dict(input_ids=ids, attention_mask=mask, pixel_values=seen, labels=labels)
