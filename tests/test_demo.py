"""The demo's own logic, on a tiny LLaVA and a made-up vocabulary: no wheel is needed."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch

import fastprompt

pytest.importorskip("PIL", reason="the demo extra is not installed")

from fastprompt.concatenation import concatenate
from fastprompt.demo import evaluation, packing, training
from fastprompt.demo.data import Question
from fastprompt.methods import M2PT

WORDS = ["what", "is", "shape", "colour", "red", "circle", "yes", "no", "a", "there"]


class Tokenizer:
    """Ids 10, 11, … for words, 5 for the image, 2 for the end."""

    pad_token_id = 0

    def __call__(self, text, add_special_tokens):
        text = text.replace("<image>", " 5 ").replace("<|im_end|>", " 2 ")
        words = text.replace("<|im_start|>", " 1 ").replace("\n", " ").split()
        ids = [int(w) if w.isdigit() else 10 + WORDS.index(w.strip("?")) for w in words]
        return SimpleNamespace(input_ids=ids)


QUESTIONS = [
    [Question("what shape?", "circle", 0), Question("is there a red shape?", "yes", 0)],
    [Question("what colour is there?", "red", 1)],
    [Question(f"is there a {w}?", "no", 2) for w in ("circle", "red", "shape")],
]


@pytest.fixture
def setup(monkeypatch):
    monkeypatch.setattr(packing, "pixels", lambda images, size: images.double())
    model = tiny.build("llava", torch.float64)
    fastprompt.patch(model, M2PT(3, 4))
    packer = packing.Packer(Tokenizer(), size=28)  # 2 x 2 patches, as the tiny model has them
    torch.manual_seed(2)
    return model, packer, training.Split(torch.randn(3, 3, 16, 16), QUESTIONS)


def test_a_packed_question_is_answered_as_in_a_row_of_its_own(setup):
    model, packer, split = setup
    batch = packer.pack(split.images, split.asked)
    assert batch.inputs["input_ids"].shape[0] == 3 and len(batch.questions) == 6
    with torch.no_grad():
        packed, labels, owner = training.answer_logits(model, batch)
        for i, question in enumerate(batch.questions):
            row = packer.opening + packer.question(question.text) + packer.answer(question.answer)
            ids = torch.tensor([row[:-1]])
            image = split.images[[question.image_id]].double()
            alone = model(input_ids=ids, pixel_values=image).logits[0].float()
            wanted = packer.answer(question.answer)
            assert labels[owner == i].tolist() == wanted
            # float32: transformers' own rotation and norms
            torch.testing.assert_close(
                packed[owner == i], alone[-len(wanted) :], rtol=1e-4, atol=1e-4
            )


def test_packed_rows_equal_literal_concatenation(setup):
    model, packer, split = setup
    batch = packer.pack(split.images, split.asked)
    literal = tiny.build("llava", torch.float64)
    written = concatenate(literal, M2PT(3, 4))
    with torch.no_grad():
        for name, prompt in fastprompt.patch_of(model).prompts.items():
            written[name].tokens.copy_(prompt.tokens)
        got = training.answer_logits(model, batch)[0]
        want = training.answer_logits(literal, batch)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_training_learns_and_scoring_agrees_with_generate(setup, monkeypatch):
    model, packer, split = setup
    monkeypatch.setattr(evaluation, "pixels", lambda images, size: images.double())
    monkeypatch.setattr(evaluation, "_text", lambda tokenizer, ids: ids.tolist())
    monkeypatch.setattr(evaluation, "score", lambda questions, answers: None)
    tokenizer = Tokenizer()
    tokenizer.convert_tokens_to_ids = lambda token: 2
    recipe = training.Recipe(40, images=3, questions=3, warmup=2, prompt_lr=0.05, projector_lr=0.05)
    seen = []
    history = training.train(model, packer, split, recipe, lambda step, h: seen.append(step))
    assert seen == list(range(1, 41)) and history.losses[-1] < 0.5 * history.losses[0]
    _, questions, answers = evaluation.evaluate(model, packer, split)
    said = evaluation.generated(model, tokenizer, packer, split)
    judged = []
    for question, ids in zip(questions, said, strict=True):
        answer = packer.answer(question.answer)
        judged.append(ids[: len(answer)] == answer)
    assert judged == [a != evaluation.WRONG for a in answers] and any(judged)


def test_the_same_questions_every_time():
    split = training.Split(torch.zeros(3, 3, 4, 4), QUESTIONS)
    first, again = (evaluation.fixed_questions(split, 4) for _ in "12")
    assert first.asked == again.asked and sum(map(len, first.asked)) == 4


def test_plots_show_something(setup, tmp_path):
    plots = pytest.importorskip("fastprompt.demo.plots")
    model, packer, split = setup
    history = training.History([2.0, 1.0, 0.5], [(1, 0.2), (3, 0.9)])
    plots.training_plot({"M²PT": history}, tmp_path / "training.png")
    batch = packer.pack(split.images, split.asked)
    drawn = plots.attention_plot(model, batch, tmp_path / "attention.png")
    assert [len(drawn[kind]) for kind in ("vision", "text")] == [2, 3]
    assert all(0 < share < 1 for shares in drawn.values() for share in shares)
    from PIL import Image

    for name in ("training", "attention"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            colours = picture.convert("RGB").getcolors(1 << 20)
            assert len(colours) > 50, "an empty picture"
    assert json.dumps(drawn)


def test_shares_of_attention_are_those_of_the_weights():
    model = tiny.build("llama", attn_implementation="eager")
    fastprompt.patch(model, fastprompt.methods.DeepPrompts(text=4))
    given = tiny.inputs("llama")
    from fastprompt.viz import attention_to_prompts

    shares = attention_to_prompts(model, **given)
    with torch.no_grad():
        weights = model(**given, output_attentions=True).attentions
    for share, w in zip(shares.values(), weights, strict=True):
        torch.testing.assert_close(share, w[..., :4].sum(-1))
