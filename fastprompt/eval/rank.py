"""Rank scoring: the option a model finds likeliest, whatever it would have said.

The score of an option is its length-normalised log-likelihood, (1/n) Σ log p(token_i | image,
question, tokens before), over its own n tokens. The image and the question are run once; options
go on from their keys and values.
"""

import copy
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import ProcessorMixin

from fastprompt.eval.generate import SUFFIX, asked, conversation, encode, special_tokens
from fastprompt.eval.questions import InputError, Question


def choices(
    model: nn.Module,
    processor: ProcessorMixin,
    questions: list[Question],
    *,
    batch: int = 8,
    suffix: str = SUFFIX,
) -> Iterator[dict[str, str]]:
    """{id: likeliest option} of a question at a time; ``batch`` options are run at once.

    Ties go to the option that stands first.
    """
    for q in questions:
        text = asked(q, suffix)
        found = log_likelihoods(model, processor, q.open(), text, q.options, batch=batch)
        means = torch.stack([tokens.mean() for tokens, _ in found])
        yield {q.id: q.options[int(means.argmax())]}


@torch.no_grad()
def log_likelihoods(
    model: nn.Module,
    processor: ProcessorMixin,
    image: Image.Image,
    text: str,
    options: tuple[str, ...],
    *,
    batch: int = 8,
) -> list[tuple[Tensor, bool]]:
    """How likely each option is as the answer to ``text``.

    Returns:
        For each option its tokens' log-probabilities, [n] in float32 or better, and whether
        greedy decoding would give just these.
    """
    prompt = conversation(processor, text)
    dropped, endings = _tokens(processor, prompt, text, options)
    given = encode(model, processor, [image], [prompt])
    length = given["input_ids"].shape[1] - dropped
    for name in ("input_ids", "attention_mask"):
        given[name] = given[name][:, :length]
    out = model(**given, use_cache=True, logits_to_keep=1)
    found = []
    for begin in range(0, len(endings), batch):
        part = endings[begin : begin + batch]
        longest = max(map(len, part))
        # what fills a row up comes after all that is read of it
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in part], device=model.device)
        logits = out.logits.expand(len(part), -1, -1)
        if longest > 1:
            cache = copy.deepcopy(out.past_key_values)
            cache.batch_repeat_interleave(len(part))
            more = model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits
            logits = torch.cat([logits, more], dim=1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        tokens = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].cpu()
        greedy = (logits.argmax(-1) == ids).cpu()
        found += [
            (tokens[row, : len(ending)], bool(greedy[row, : len(ending)].all()))
            for row, ending in enumerate(part)
        ]
    return found


def _tokens(
    processor: ProcessorMixin, prompt: str, text: str, options: tuple[str, ...]
) -> tuple[int, list[list[int]]]:
    """How many tokens at the prompt's end depend on what follows, and each option's tokens.

    An option stands where the chat template puts an answer (after a space, or not). A tokenizer may
    join its first letters with the prompt's last: what all have in common is the prompt.
    """
    texts = [prompt]
    for option in options:
        whole = conversation(processor, text, option)
        begin = whole.find(option, len(prompt))
        if not option or not whole.startswith(prompt) or begin < 0:
            raise InputError(
                f"want a chat template that puts {option!r} after {prompt!r}: {whole!r}"
            )
        texts.append(whole[: begin + len(option)])
    extra = special_tokens(processor, prompt)
    base, *full = (processor.tokenizer(t, **extra)["input_ids"] for t in texts)
    common = 0
    while common < len(base) and all(ids[common : common + 1] == [base[common]] for ids in full):
        common += 1
    return len(base) - common, [ids[common:] for ids in full]
