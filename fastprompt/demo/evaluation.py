"""Exact match of greedy answers.

Greedy decoding gives the right answer and stops exactly if, fed the right answer, the model's most
likely next token is the right one at every place, its end included. So one packed forward scores
all questions about an image; `generated` asks the model's own `generate` for a sample of them.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastprompt.demo import language
from fastprompt.demo.data import Question, Score, pixels, score
from fastprompt.demo.packing import Packer
from fastprompt.demo.training import Split, answer_logits

WRONG = "?"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    packer: Packer,
    split: Split,
    *,
    blank: bool = False,
    images: int = 32,
    each: Callable[[int], None] = lambda done: None,
) -> tuple[Score, list[Question], list[str]]:
    """Score every question of a split; ``blank`` shows the model an even grey instead.

    Returns:
        The score, the questions, and for each the right answer or WRONG.
    """
    was_training = model.training
    model.eval()
    questions, answers = [], []
    for start in range(0, len(split.images), images):
        part = split.part(list(range(start, min(start + images, len(split.images)))))
        batch = packer.pack(part.images, part.asked)
        if blank:  # zero is the mean that pixels were normalised by
            batch.inputs["pixel_values"].zero_()
        logits, labels, owner = answer_logits(model, batch)
        wrong = set(owner[logits.argmax(-1) != labels].tolist())
        questions += batch.questions
        answers += [WRONG if i in wrong else q.answer for i, q in enumerate(batch.questions)]
        each(len(part.images))
    model.train(was_training)
    return score(questions, answers), questions, answers


def fixed_questions(split: Split, count: int, seed: int = 0) -> Split:
    """A part of a split with exactly ``count`` questions, the same at every run."""
    ids, kept = [], []
    for i in random.Random(seed).sample(range(len(split.images)), len(split.images)):
        room = count - sum(map(len, kept))
        if not room:
            break
        ids.append(i)
        kept.append(split.asked[i][:room])
    return Split(split.images[ids], kept)


@torch.no_grad()
def generated(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, packer: Packer, split: Split
) -> list[str]:
    """Answers of ``model.generate``, greedy, at most 3 tokens, one question a row."""
    pairs = [(i, q) for i, asked in enumerate(split.asked) for q in asked]
    rows = [packer.opening + packer.question(q.text) for _, q in pairs]
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, length - len(tokens) :], mask[row, length - len(tokens) :] = (
            torch.tensor(tokens),
            1,
        )
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=pixels(split.images[[i for i, _ in pairs]], packer.size),
        max_new_tokens=3,
        do_sample=False,
        eos_token_id=tokenizer.convert_tokens_to_ids(language.EOS),
        pad_token_id=tokenizer.pad_token_id,
    )
    return [_text(tokenizer, row) for row in out[:, length:]]


def _text(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    # without its end an answer is not finished, and counts as wrong
    ended = tokenizer.convert_tokens_to_ids(language.EOS) in ids.tolist()
    return tokenizer.decode(ids, skip_special_tokens=True).strip() if ended else WRONG
