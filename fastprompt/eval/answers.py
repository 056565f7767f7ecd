"""How a model's words are read: exact match, yes or no, and TextVQA's normalised answers."""

import re
from collections.abc import Mapping

from fastprompt.eval.questions import Question

# a missing prediction that is to count as wrong is None
Predictions = Mapping[str, str | None]


def plain(text: str) -> str:
    """Lower case, one space between words, without quotes and stops around it."""
    return " ".join(text.lower().split()).strip(" .,!?;:'\"`")


def right(questions: list[Question], predictions: Predictions) -> list[float]:
    """1.0 where the prediction is one of the answers after `plain`, else 0.0."""
    said = ((predictions[q.id], q.answers) for q in questions)
    return [float(s is not None and plain(s) in map(plain, answers)) for s, answers in said]


def accuracy(questions: list[Question], predictions: Predictions) -> dict[str, float]:
    """Exact match after `plain`, and how many predictions are no answer at all.

    Returns:
        "accuracy", and "other": the share of predictions that are no option, and no answer to any
        question. An untuned model that fails the format alone has a high one.
    """
    known = {plain(form) for q in questions for form in (*q.answers, *q.options)}
    said = [predictions[q.id] for q in questions]
    other = sum(text is None or plain(text) not in known for text in said)
    return {
        "accuracy": sum(right(questions, predictions)) / len(questions),
        "other": other / len(questions),
    }


# ---- TextVQA ----

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NUMBERS = {word: str(n) for n, word in enumerate((*DIGIT_WORDS, "ten"))} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_CONTRACTED = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
you've
"""
# each form with one apostrophe forgotten, to the form it is meant to be
_CONTRACTIONS = {
    word[: at.start()] + word[at.end() :]: word
    for word in _CONTRACTED.split()
    for at in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # so the published table has it


def vqa(text: str) -> str:
    """An answer as the VQA evaluation server normalises it before comparing.

    Lower case; commas and question marks go; other punctuation goes where a space is next to it in
    the text, else becomes a space; stops go unless a digit follows; number words become digits;
    articles go; forgotten apostrophes come back.
    Source: the answer processor of MMF (Pythia), which TextVQA's published scores use.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in _PUNCTUATION:
        beside_a_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_a_space else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = (_NUMBERS.get(word, word) for word in cleaned.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(said: str, answers: tuple[str, ...]) -> float:
    """min(n/3, 1), where n of the other annotators agree, averaged over leaving each one out.

    Source: VQA (arXiv 1505.00468), as the evaluation of TextVQA (arXiv 1904.08920) computes it.
    """
    total, agree = len(answers), [vqa(answer) for answer in answers].count(vqa(said))
    with_one_left_out = agree * min((agree - 1) / 3, 1) + (total - agree) * min(agree / 3, 1)
    return with_one_left_out / total
