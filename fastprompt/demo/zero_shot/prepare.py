"""Files as any user of ``fastprompt train`` and ``fastprompt eval`` has them: a model's folder,
pictures, conversations in LLaVA's format, questions a line.

    model/               the demo's LLaVA with a processor
    images/              train/, test/ (easy-VQA), captions/, emoji/, digits/
    captions.json        stage 1
    whole.json           all of easy-VQA's training questions
    seen.json            what is left of them without Z1, Z2 and Z3
    families-1.json …    of those, the first 1, 2, 4 and 6 families, as many rows of each
    watched.json         500 rows of the test split's seen kind, to watch a run by
    questions/*.jsonl    what is asked: see `asked`
"""

import json
import random
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, LlavaProcessor

from fastprompt.demo import data, language, vision, wheels
from fastprompt.demo.data import Question, family
from fastprompt.demo.model import FOLDER, assemble
from fastprompt.demo.zero_shot import pictures
from fastprompt.demo.zero_shot.shapes import (
    SEEN_FAMILIES,
    UNSEEN_FAMILIES,
    UNSEEN_PAIRS,
    UNSEEN_PHRASINGS,
    Pair,
    is_seen,
    pairs,
    phrasing,
)

SIZE = 56  # pixels a side, 16 patches
ASKED = 1000  # questions of each kind at most
CURVE = (1, 2, 4, 6)  # families
# as the demo's rows: the image and its question, then the answer
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' }}"
    "{% for p in m.content %}{% if p.type == 'image' %}{{ '<image>\\n' }}"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% else %}{{ ' ' }}{% for p in m.content %}{{ p.text }}{% endfor %}{{ '<|im_end|>' }}"
    "{% endif %}{% endfor %}"
)


def prepare(out: Path, cache: str | Path | None = None) -> None:
    """Write it all under ``out``, some 300 MB, in a minute; what is there is left."""
    if (out / "questions").is_dir():
        return
    _model(out / "model", cache)
    questions = {split: data.load(cache, split) for split in data.SPLITS}
    shown = {split: pairs(questions[split]) for split in data.SPLITS}
    for split in data.SPLITS:
        _pictures(out / "images" / split, _images(data.images(cache, split)))
    captions = [*pictures.captions(cache)]
    files = _pictures(out / "images" / "captions", [p.image for p in captions])
    _write(out / "captions.json", [
        {"id": f"emoji-{i}", "image": file, "caption": picture.name}
        for i, (file, picture) in enumerate(zip(files, captions, strict=True))
    ])  # fmt: skip
    rng = random.Random(0)
    train = questions["train"]
    seen = [q for q in train if is_seen(q, shown["train"])]
    _conversations(out / "whole.json", train, "train")
    _conversations(out / "seen.json", seen, "train")
    few = min(sum(family(q) in SEEN_FAMILIES[:n] for q in seen) for n in CURVE)
    for n in CURVE:
        chosen = [q for q in seen if family(q) in SEEN_FAMILIES[:n]]
        _conversations(out / f"families-{n}.json", rng.sample(chosen, few), "train")
    test = [q for q in questions["test"] if is_seen(q, shown["test"])]
    _conversations(out / "watched.json", rng.sample(test, 500), "test")
    kept = out / "questions.partial"  # renamed when all is there
    kept.mkdir(exist_ok=True)  # one that was cut short is written over
    for name, rows in asked(out, questions["test"], shown["test"], cache).items():
        lines = (json.dumps(row) + "\n" for row in rows)
        (kept / f"{name}.jsonl").write_text("".join(lines))
    kept.rename(out / "questions")


def asked(
    out: Path, test: Sequence[Question], shown: dict[int, Pair], cache: str | Path | None
) -> dict[str, list[dict]]:
    """File -> questions, of images that did not train, at most `ASKED` of each.

    seen   families, phrasings and pairs that trained
    z1     yes and no about shape
    z2     unseen phrasings; ``z2_seen``: the same questions in one that trained
    z3     unseen pairs of shape and colour, otherwise as ``seen``
    z4     z1's and ``seen``'s kinds of questions about circles and squares of an emoji font
    z5     handwritten digits
    whole  all kinds
    """
    rng = random.Random(1)

    def some(questions: Iterable[Question]) -> list[Question]:
        questions = list(questions)
        return rng.sample(questions, min(ASKED, len(questions)))

    seen = [q for q in test if is_seen(q, shown)]
    unseen_phrasing = some(
        q
        for q in test
        if UNSEEN_PHRASINGS.get(family(q)) == phrasing(q.text)
        and shown.get(q.image_id) not in UNSEEN_PAIRS
    )
    unseen_pair = [
        q
        for q in test
        if shown.get(q.image_id) in UNSEEN_PAIRS
        and family(q) in SEEN_FAMILIES
        and UNSEEN_PHRASINGS.get(family(q)) != phrasing(q.text)
    ]
    return {
        "seen": _lines(some(seen), "test"),
        "z1": _lines(some(q for q in test if family(q) in UNSEEN_FAMILIES), "test"),
        "z2": _lines(unseen_phrasing, "test"),
        "z2_seen": _lines([_said_otherwise(q) for q in unseen_phrasing], "test"),
        "z3": _lines(some(unseen_pair), "test"),
        "z4": _emoji(out, cache),
        "z5": _digits(out),
        "whole": _lines(some(test), "test"),
    }


# what an unseen phrasing becomes, so that both ask the same of the same images
_OTHERWISE = {
    "what shape is present?": "what shape is in the image?",
    "what is the color of the": "what color is the",
    "is a": "is there a",
    "is no": "is there not a",
}


def _said_otherwise(q: Question) -> Question:
    for text, other in _OTHERWISE.items():
        if q.text.startswith(text):
            said = q.text.replace(text, other, 1).replace(" present?", "?")
            return Question(said, q.answer, q.image_id)
    raise ValueError(f"no other phrasing of {q.text!r} is known")


def _emoji(out: Path, cache: str | Path | None) -> list[dict]:
    """Each question of Z1's and the seen families that fits, in its first phrasing, for each."""
    drawn = [*pictures.shapes(cache)]
    files = _pictures(out / "images" / "emoji", [image for image, _ in drawn])
    rng, rows = random.Random(2), []
    for i, (file, (_, pair)) in enumerate(zip(files, drawn, strict=True)):
        other = rng.choice([s for s in ("circle", "rectangle") if s != pair.shape])
        another = rng.choice([c for c in pictures.COLOURS if c != pair.colour])
        no = "not " * rng.randint(0, 1)
        it, colour = rng.choice([pair.shape, other]), rng.choice([pair.colour, another])
        asked = [
            ("what shape is in the image?", pair.shape),
            ("what color is the shape?", pair.colour),
            (f"is there {no}a {it}?", _yes((it == pair.shape) != bool(no))),
            (f"is there {no}a {colour} shape?", _yes((colour == pair.colour) != bool(no))),
        ]
        for text, answer in asked:
            rows.append(_line(f"{i}-{len(rows)}", file, Question(text, answer, i)))
    return rows


def _digits(out: Path) -> list[dict]:
    drawn = [*pictures.digits(500)]
    files = _pictures(out / "images" / "digits", [picture.image for picture in drawn])
    text = "what digit is in the image?"
    return [
        dict(id=str(i), image=file, question=text, answer=picture.name, options=pictures.DIGITS)
        for i, (file, picture) in enumerate(zip(files, drawn, strict=True))
    ]


def _yes(so: bool) -> str:
    return "yes" if so else "no"


# ---- writing ----


def _lines(questions: Iterable[Question], split: str) -> list[dict]:
    return [
        _line(f"{q.image_id}-{i}", f"images/{split}/{q.image_id}.png", q)
        for i, q in enumerate(questions)
    ]


def _line(name: str, file: str, q: Question) -> dict:
    options = next(kind for kind in (data.SHAPES, data.COLOURS, ("yes", "no")) if q.answer in kind)
    return dict(
        id=name, image=file, question=q.text, answer=q.answer, options=options, group=family(q)
    )


def _conversations(path: Path, questions: Iterable[Question], split: str) -> None:
    _write(path, [
        {
            "id": f"{split}-{q.image_id}-{i}",
            "image": f"images/{split}/{q.image_id}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{q.text}"},
                {"from": "gpt", "value": q.answer},
            ],
        }
        for i, q in enumerate(questions)
    ])  # fmt: skip


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


def _images(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def _pictures(folder: Path, images: Sequence[Image.Image]) -> list[str]:
    """The files' names, as rows of data give them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    return [f"images/{folder.name}/{i}.png" for i in range(len(images))]


def _model(folder: Path, cache: str | Path | None) -> None:
    whole = wheels.converted(FOLDER, lambda to: assemble(to, cache), cache)
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    size = dict(height=SIZE, width=SIZE)
    image_processor = CLIPImageProcessor(
        size=size, do_center_crop=False, image_mean=vision.IMAGE_MEAN, image_std=vision.IMAGE_STD
    )
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=language.tokenizer(cache),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token=language.IMAGE_TOKEN,
    ).save_pretrained(folder)
