"""M2PT's judge: a language model says whether an answer is right.

The paper (arXiv 2409.15657) and Vision-Flan (arXiv 2402.11690) score all but MME by asking a Vicuna
13B v1.5. The wording is theirs, since another one would be another judge. The verdict is read from
what the judge says alone (the released script reads the prompt with it, which has a "Yes").
"""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprompt.eval.answers import Predictions
from fastprompt.eval.generate import GREEDY
from fastprompt.eval.questions import Question

TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: Decide if the prediction "
    "is correct given the question and the answer.\nQuestions: {question}\nAnswer: {answer}\n"
    "Prediction: {prediction}\nYour response should only be Yes or No. ASSISTANT:"
)


@torch.no_grad()
def verdicts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    predictions: Predictions,
    *,
    batch: int = 8,
) -> Iterator[dict[str, str]]:
    """{id: what the judge says} of a batch at a time, greedy, at most five tokens.

    The right answer that it is shown is the first; of TextVQA's ten, the commonest. What has no
    prediction is not asked about.
    """
    questions = [q for q in questions if predictions[q.id] is not None]
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        prompts = [
            TEMPLATE.format(
                question=q.text,
                answer=max(q.answers, key=q.answers.count),
                prediction=predictions[q.id],
            )
            for q in part
        ]
        given = tokenizer(prompts, return_tensors="pt", padding=len(part) > 1, padding_side="left")
        given = given.to(model.device)
        out = model.generate(
            **given, **GREEDY, max_new_tokens=5, pad_token_id=tokenizer.pad_token_id
        )
        new = out[:, given["input_ids"].shape[1] :]
        said = tokenizer.batch_decode(new, skip_special_tokens=True)
        yield {q.id: text.strip() for q, text in zip(part, said, strict=True)}


def accuracy(questions: list[Question], said: dict[str, str]) -> float:
    """The share that the judge lets pass ("yes" in what it says), averaged over the groups."""
    groups: dict[str, list[bool]] = {}
    for q in questions:
        groups.setdefault(q.group, []).append("yes" in said.get(q.id, "").lower())
    return sum(sum(passed) / len(passed) for passed in groups.values()) / len(groups)
