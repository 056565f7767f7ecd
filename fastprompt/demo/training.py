"""The demo's training loop: plain PyTorch, since a patched model needs nothing else."""

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastprompt.demo import data, language
from fastprompt.demo.data import Question
from fastprompt.demo.packing import IGNORE, Batch, Packer
from fastprompt.methods import M2PT
from fastprompt.patching import patch_of

SENTENCE = "Look at the picture and answer the question about the shape in it with one word."


@dataclass(frozen=True)
class Recipe:
    """How the demo trains. Learning rates are peaks of a cosine after a linear warm-up."""

    steps: int
    images: int = 24  # a step
    questions: int = 3  # about each: seeing wants many images more than many questions
    size: int = 56  # pixels a side, in patches of 14
    prompt_lr: float = 5e-4  # 1.5e-3 is too high: docs/demo.md
    projector_lr: float = 3e-3
    warmup: int = 15
    clip: float = 1.0  # norm of the gradient
    seed: int = 0


@dataclass
class Split:
    """Images uint8 [n, 3, 64, 64] and, for each, its questions."""

    images: Tensor
    asked: list[list[Question]]

    @classmethod
    def of(cls, images: Tensor, questions: list[Question]) -> "Split":
        asked: list[list[Question]] = [[] for _ in images]
        for question in questions:
            asked[question.image_id].append(question)
        return cls(images, asked)

    def part(self, ids: list[int]) -> "Split":
        return Split(self.images[ids], [self.asked[i] for i in ids])


@dataclass
class History:
    losses: list[float] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)  # (step, on held-out images)
    seconds: float = 0.0


def beginning(
    tokenizer: PreTrainedTokenizerBase, images: Tensor, size: int, method: M2PT
) -> tuple[Tensor, Tensor]:
    """A sentence and training images whose hidden states prompts begin as: `prefill`'s arguments.

    M²PT starts from Xavier-uniform rows, which in this language model's later layers soak up 60% of
    the attention: a short run then never sees the image.
    """
    ids = tokenizer(language.BOS + SENTENCE, add_special_tokens=False).input_ids
    few = images[: method.vision_tokens]
    return torch.tensor(ids[: method.text_tokens]), data.pixels(few, size)


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, vocabulary] where an answer's token is due, those tokens [n], their questions [n].

    The vocabulary product runs on those places alone: it is a quarter of the model.
    """
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
    due = batch.labels != IGNORE
    return model.lm_head(hidden[due]).float(), batch.labels[due], batch.owner[due]


def step_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits, labels, _ = answer_logits(model, batch)
    return F.cross_entropy(logits, labels)


def optimizer_for(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    named = patch_of(model).trainable.items()
    prompts = [p for name, p in named if name.endswith("fastprompt.tokens")]
    others = [p for name, p in named if not name.endswith("fastprompt.tokens")]
    groups = [(prompts, recipe.prompt_lr), (others, recipe.projector_lr)]
    return torch.optim.AdamW(
        [dict(params=params, lr=lr, peak=lr) for params, lr in groups if params], weight_decay=0.0
    )


def train(
    model: nn.Module,
    packer: Packer,
    split: Split,
    recipe: Recipe,
    each_step: Callable[[int, History], None],
) -> History:
    """Train what the patch names for ``recipe.steps`` steps."""
    optimizer, history = optimizer_for(model, recipe), History()
    parameters = list(patch_of(model).trainable.values())
    model.train()
    for step, part in enumerate(_parts(split, recipe), start=1):
        start = time.perf_counter()
        rate = _schedule(step, recipe)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        loss = step_loss(model, packer.pack(part.images, part.asked))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        history.losses.append(loss.item())
        history.seconds += time.perf_counter() - start
        each_step(step, history)
    model.eval()
    return history


def _schedule(step: int, recipe: Recipe) -> float:
    warm = min(1.0, step / recipe.warmup)
    return warm * 0.5 * (1 + math.cos(math.pi * (step - 1) / recipe.steps))


def _parts(split: Split, recipe: Recipe) -> Iterator[Split]:
    """Images and questions of each step: every image once before any comes again."""
    rng, left = random.Random(recipe.seed), []
    for _ in range(recipe.steps):
        if len(left) < recipe.images:
            left = rng.sample(range(len(split.images)), len(split.images))
        ids, left = left[: recipe.images], left[recipe.images :]
        some = [rng.sample(q, min(recipe.questions, len(q))) for q in (split.asked[i] for i in ids)]
        yield Split(split.images[ids], some)
