"""All questions about one image in one row: what they share is computed once.

A row is the image and its turn's opening, then one segment a question:

    <|im_start|><image>…<image>\\n | question answer<|im_end|> | question answer<|im_end|> | …

A 4-D mask lets a segment see the opening and itself alone, and its positions count on from the
opening, so every question is answered exactly as in a row of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastprompt.demo import language
from fastprompt.demo.data import Question, pixels

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Inputs of the model for some images and all the questions asked about each.

    Attributes:
        inputs: keyword arguments of the model's forward.
        labels: [B, T]; IGNORE but where an answer's token (or its end) is to be predicted next.
        owner: [B, T]; the index in `questions` of each labelled place's question.
        questions: in the order of the rows.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    owner: Tensor
    questions: list[Question]


class Packer:
    """Makes batches for one tokenizer and image size; remembers the few texts there are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int):
        self.tokenizer, self.size = tokenizer, size
        self._texts: dict[str, list[int]] = {}
        patches = (size // 14) ** 2
        image = language.IMAGE_TOKEN * patches
        self.opening = self._ids(f"{language.BOS}{image}\n")

    def question(self, text: str) -> list[int]:
        """Token ids from the question to where the answer begins."""
        return self._ids(text)

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer with its end."""
        return self._ids(f" {text}{language.EOS}")

    def pack(self, images: Tensor, asked: Sequence[Sequence[Question]]) -> Batch:
        """`images` uint8 [B, 3, h, w]; `asked` the questions about each."""
        rows = [self._row(questions) for questions in asked]
        B, T, start = len(rows), max(len(ids) for ids, *_ in rows), len(self.opening)
        ids = torch.full((B, T), self.tokenizer.pad_token_id)
        labels = torch.full((B, T), IGNORE)
        segment = torch.full((B, T), -2)  # -2 padding, -1 opening, else the question's place
        positions = torch.zeros(B, T, dtype=torch.long)
        for b, (row, targets, segments) in enumerate(rows):
            n = len(row)
            ids[b, :n], labels[b, :n] = torch.tensor(row), torch.tensor(targets)
            segment[b, :n] = torch.tensor(segments)
            counts = [start + i for k in range(len(asked[b])) for i in range(segments.count(k))]
            positions[b, :n] = torch.tensor([*range(start), *counts])
        same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == -1)
        mask = (same & torch.ones(T, T, dtype=torch.bool).tril())[:, None]
        first = torch.tensor([0, *[len(questions) for questions in asked]]).cumsum(0)[:-1, None]
        inputs = dict(
            input_ids=ids,
            pixel_values=pixels(images, self.size),
            attention_mask=mask,
            position_ids=positions,
        )
        return Batch(inputs, labels, segment + first, [q for questions in asked for q in questions])

    def _row(self, questions: Sequence[Question]) -> tuple[list[int], list[int], list[int]]:
        ids, segments = [*self.opening], [-1] * len(self.opening)
        targets = [IGNORE] * len(self.opening)
        for place, q in enumerate(questions):
            asked, answer = self.question(q.text), self.answer(q.answer)
            # a place's label is the token after it: the answer's first is due where `asked` ends
            ids += asked + answer[:-1]
            targets += [IGNORE] * (len(asked) - 1) + answer
            segments += [place] * (len(asked) + len(answer) - 1)
        return ids, targets, segments

    def _ids(self, text: str) -> list[int]:
        if text not in self._texts:
            self._texts[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._texts[text]
