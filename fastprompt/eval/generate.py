"""Greedy answers of a vision-language model, several questions at once, padded on the left."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import ProcessorMixin

from fastprompt.eval.questions import InputError, Question
from fastprompt.train.rows import IMAGE, BadRow
from fastprompt.train.templates import ChatTemplate, NoTemplate

# what LLaVA-1.5 was trained to answer briefly after, and is evaluated with
SUFFIX = "Answer the question using a single word or phrase."
# whatever the checkpoint says of sampling; what it says would only be warned about
GREEDY = dict(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None)


def conversation(processor: ProcessorMixin, text: str, answer: str | None = None) -> str:
    """The processor's chat template around an image and ``text``, and around an answer if given.

    As training has it: without an answer it ends where training's answers begin.

    Raises:
        InputError: the processor has no chat template or image token, or a template that refuses
            the conversation.
    """
    turns = [("user", f"{IMAGE}\n{text}")] + [("assistant", answer)] * (answer is not None)
    try:
        return _template(processor, processor.chat_template).text(turns)
    except BadRow as bad:
        raise InputError(f"the chat template: {bad.reason}") from bad
    except NoTemplate as error:
        raise InputError(f"{error} (--template NAME or --chat-template FILE gives one)") from error
    except ValueError as error:
        raise InputError(str(error)) from error


@lru_cache(maxsize=1)
def _template(processor: ProcessorMixin, jinja: str | None) -> ChatTemplate:
    return ChatTemplate(processor, "auto", image_tokens=1)  # reads ``jinja`` off the processor


def special_tokens(processor: ProcessorMixin, prompt: str) -> dict[str, bool]:
    """Whether the tokenizer is to add a BOS: not if the template wrote it."""
    bos = processor.tokenizer.bos_token
    return {"add_special_tokens": bos is None or not prompt.startswith(bos)}


def encode(
    model: nn.Module, processor: ProcessorMixin, images: list[Image.Image], prompts: list[str]
) -> dict[str, Any]:
    """A model's inputs for one image and one prompt a row, on its device, in its dtype."""
    given = processor(
        images=images,
        text=prompts,
        return_tensors="pt",
        padding=len(prompts) > 1,
        padding_side="left",
        **special_tokens(processor, prompts[0]),
    )
    return given.to(model.device, model.dtype)


@torch.no_grad()
def generate(
    model: nn.Module,
    processor: ProcessorMixin,
    images: list[Image.Image],
    texts: list[str],
    *,
    max_new_tokens: int = 16,
) -> list[str]:
    """The greedy answer to each text about its image, as text without special tokens.

    Args:
        model: a LLaVA-like model of transformers in evaluation mode, patched or not.
        processor: its processor, with a chat template, and a padding token for more than one.
    """
    given = encode(model, processor, images, [conversation(processor, text) for text in texts])
    out = model.generate(
        **given,
        **GREEDY,
        max_new_tokens=max_new_tokens,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    new = out[:, given["input_ids"].shape[1] :]
    return [t.strip() for t in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


def answers(
    model: nn.Module,
    processor: ProcessorMixin,
    questions: list[Question],
    *,
    batch: int = 8,
    max_new_tokens: int = 16,
    suffix: str = SUFFIX,
) -> Iterator[dict[str, str]]:
    """{id: answer} of a batch at a time, questions of like length together."""
    order = sorted(questions, key=lambda q: len(q.text))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        said = generate(
            model,
            processor,
            [q.open() for q in part],
            [asked(q, suffix) for q in part],
            max_new_tokens=max_new_tokens,
        )
        yield {q.id: text for q, text in zip(part, said, strict=True)}


def asked(question: Question, suffix: str) -> str:
    """The question's text with the task's suffix on a line of its own."""
    return f"{question.text}\n{suffix}" if suffix else question.text
