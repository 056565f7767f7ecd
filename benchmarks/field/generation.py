"""Whether `generate` writes what the model's own forward says is likeliest."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.field.case import WORKS, Case, logits_of, said
from benchmarks.field.tasks import IGNORE, Batch

NEW = 8  # tokens to generate
CLOSE = 1e-3  # a token whose logit is as near to the likeliest one's is as likely
TIE = 0.02  # the same in bfloat16, as a share of the logit: about five roundings
PADDING = 4


def generate(case: Case) -> str:
    """Two whole rows."""
    N = case.batch["input_ids"].shape[1]
    return _with_or_without_cache(case, [N, N])


def left_padding(case: Case) -> str:
    """A row that is padded on the left goes on as it does alone."""
    N = case.batch["input_ids"].shape[1]
    return _with_or_without_cache(case, [N, N - PADDING])


def static_cache(case: Case) -> str:
    N = case.batch["input_ids"].shape[1]
    return _generate(case, [N, N], cache_implementation="static")


def _with_or_without_cache(case: Case, lengths: Sequence[int]) -> str:
    """With a cache; where that fails, it also says what comes without."""
    found = said(lambda: _generate(case, lengths))
    if found == WORKS:
        return found
    return f"{found} (use_cache=False: {said(lambda: _generate(case, lengths, use_cache=False))})"


def _generate(case: Case, lengths: Sequence[int], **options) -> str:
    return greedy(case.model().eval(), case.batch["input_ids"][:2], lengths, **options)


@torch.no_grad()
def greedy(model: nn.Module, ids: Tensor, lengths: Sequence[int], **options) -> str:
    """Greedy tokens are the likeliest ones of a forward over each row alone, without padding.

    Args:
        lengths: of the rows; each is the last tokens of its row of ``ids``, padding before them.
    """
    N = ids.shape[1]
    mask = torch.stack([torch.arange(N) >= N - length for length in lengths]).long()
    out = model.generate(
        input_ids=ids * mask,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    new, worse = out[:, N:], 0
    if new.shape[1] != NEW:
        return f"wrong: {new.shape[1]} tokens came, {NEW} were asked for"
    for row, tokens, length in zip(ids, new, lengths, strict=True):
        logits = logits_of(model, torch.cat([row[-length:], tokens])[None])[0, length - 1 : -1]
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        worse += int((logits.max(1).values - chosen > CLOSE).sum())
    return f"wrong: {worse} of {new.numel()} tokens are not the likeliest" if worse else WORKS


@torch.no_grad()
def answers(model: nn.Module, batch: Batch, count: int) -> str:
    """Generated answers, a row at a time, are the likeliest of a forward over that row and them.

    In bfloat16 two ways to the same logits differ, so near ties are as good: `TIE`.
    """
    rows, disagree = min(count, len(batch["labels"])), 0
    for i in range(rows):
        [places] = (batch["labels"][i] != IGNORE).nonzero(as_tuple=True)
        start, end = int(places[0]), int(places[-1]) + 1
        asked = {name: value[i : i + 1] for name, value in batch.items() if name != "labels"}
        asked |= {name: x[:, :start] for name, x in asked.items() if name != "pixel_values"}
        out = model.generate(
            **asked,
            max_new_tokens=end - start,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        written = asked | dict(input_ids=out, attention_mask=torch.ones_like(out))
        logits = model(**written).logits[0, -out.shape[1] :][start - 1 : -1].float()
        best, chosen = logits.max(1).values, logits.gather(1, out[0, start:, None])[:, 0]
        disagree += bool((best - chosen > TIE * best.abs()).any())
    return f"wrong: {disagree} of {rows} answers are not the likeliest" if disagree else WORKS
