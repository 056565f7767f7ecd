"""Chat templates: which tokens train, in each of them; the ids are the template's own."""

import conversations
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastprompt.train.rows import BadRow, Blob, Row
from fastprompt.train.showing import marked
from fastprompt.train.templates import IGNORE, ChatTemplate, count_image_tokens

IMAGE = Blob(None)
ONE = [("user", "<image>\nWhat is it?"), ("assistant", "A cat.")]
TWO = [*ONE, ("user", "Sure?"), ("assistant", "Yes, a cat.")]
SYSTEM = [("system", "Be brief."), *TWO]
# treats the last answer differently, as Qwen3's does
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)
VICUNA = "A chat between a curious user"


def template(name="auto", chat_template=conversations.CHATML, **more):
    processor = conversations.processor(chat_template, **more)
    return ChatTemplate(processor, name, count_image_tokens(processor))


def row(turns):
    has = any("<image>" in text for _, text in turns)
    return Row("r", "f:1", turns, IMAGE if has else None)


def text_of(made, turns):
    found = made.encode(row(turns))
    return marked(found.ids, found.labels, made).plain


CASES = {
    "chatml": (
        template(),
        "<s><|im_start|>user\n<image>×4\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
        "⟦A cat.<|im_end|>⟧\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
        "⟦Yes, a cat.<|im_end|>⟧\n",
    ),
    "llama 3": (
        template(chat_template=conversations.LLAMA3),
        "<s><|start_header_id|>user<|end_header_id|>\n\n<image>×4\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A cat.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yes, a cat.<|eot_id|>⟧",
    ),
    # of a list of parts, without an end of its own: an answer that never ends cannot be learnt
    "llava 1.5": (
        template(chat_template=conversations.LLAVA),
        "<s>USER: <image>×4\nWhat is it? ASSISTANT: ⟦A cat.</s>⟧ USER: Sure? "
        "ASSISTANT: ⟦Yes, a cat.</s>⟧ ",
    ),
    "thinks": (
        template(chat_template=THINKS),
        "<s><|im_start|>user\n<image>×4\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
        "⟦A cat.<|im_end|>⟧\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n⟦Yes, a cat.<|im_end|>⟧\n",
    ),
    "vicuna_v1": (
        template("vicuna_v1", None),
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: <image>×4\n"
        "What is it? ASSISTANT: ⟦A cat.</s>⟧USER: Sure? ASSISTANT: ⟦Yes, a cat.</s>⟧",
    ),
    "no bos": (
        template(adds_bos=False),
        "<|im_start|>user\n<image>×4\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
        "⟦A cat.<|im_end|>⟧\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
        "⟦Yes, a cat.<|im_end|>⟧\n",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_and_their_ends_train(name):
    made, want = CASES[name]
    assert text_of(made, TWO) == want
    first = want[: want.index("⟧") + 1]  # a conversation of one turn begins the same way
    assert text_of(made, ONE).replace("<think>\n\n</think>\n\n", "").startswith(first)


def test_chatml_by_name_is_the_models_own():
    assert text_of(template("chatml", None), TWO) == CASES["chatml"][1]


def test_the_system_turn_replaces_vicunas():
    text = text_of(CASES["vicuna_v1"][0], SYSTEM)
    assert text.startswith("<s>Be brief. USER: ") and VICUNA not in text


def test_captions():
    made = template("plain", None)
    turns = [("user", "<image>\nDescribe it."), ("assistant", "a cat")]
    assert text_of(made, turns) == "<s><image>×4⟦a cat\n⟧"
    assert text_of(made, [("user", "Tell."), ("assistant", "a cat")]) == "<s>⟦a cat\n⟧"
    with pytest.raises(BadRow, match="want one question and one answer"):
        made.encode(row(TWO))


@pytest.mark.parametrize("name", ["chatml", "llama 3", "llava 1.5", "vicuna_v1"])
def test_ids_are_the_processors_own(name):
    """As the processor makes them of the same text and an image, but for an end that was added."""
    made, _ = CASES[name]
    processor = conversations.processor(made.jinja)
    pieces = made.pieces(TWO)
    text = "".join(piece for piece, _ in pieces)
    picture = conversations.draw("red", "circle")
    special = not text.startswith("<s>")
    own = processor(images=[picture], text=[text], add_special_tokens=special)["input_ids"][0]
    found = made.encode(row(TWO))
    assert found.ids == list(own)
    assert len(found.labels) == len(found.ids)
    assert all(
        label in (IGNORE, token) for token, label in zip(found.ids, found.labels, strict=True)
    )


def test_a_tokenizer_whose_tokens_begin_with_their_space():
    """As Llama's and Vicuna's: the answer's first token begins before the answer does."""
    words = ["▁USER", ":", "▁ASSISTANT", "▁What", "?", "▁A", "▁cat", ".", "▁Yes", "▁", "\n"]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), ("<image>", 0.0)]
    pieces += [(word, -1.0) for word in words]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    processor = conversations.processor()
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", additional_special_tokens=["<image>"],
    )  # fmt: skip
    processor.chat_template = conversations.LLAVA
    template = ChatTemplate(processor, "auto", 4)
    turns = [("user", "What?"), ("assistant", "A cat."), ("user", "What?"), ("assistant", "Yes")]
    found = template.encode(row(turns))
    trained = [token for token in found.labels if token != IGNORE]
    want = ["▁A", "▁cat", ".", "</s>", "▁Yes", "</s>"]
    assert processor.tokenizer.convert_ids_to_tokens(trained) == want


def test_the_first_token_never_trains():
    made = template("plain", None, adds_bos=False)
    found = made.encode(row([("user", "x"), ("assistant", "abc")]))
    assert found.labels == [IGNORE, *found.ids[1:]]


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        ("{{ raise_exception('users only') }}", "users only"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes an answer"),
        ("{{ messages[0].content }}", "write each answer once"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "answer once"),
    ],
)
def test_a_template_that_hides_its_answers_is_refused(jinja, message):
    with pytest.raises(BadRow) as refused:
        template(chat_template=jinja).encode(row([("user", "q"), ("assistant", "abc")]))
    assert message in refused.value.reason


def test_a_template_that_drops_the_image_is_refused():
    jinja = "{% for m in messages %}{{ m.content | replace('<image>', '') }}{% endfor %}"
    with pytest.raises(BadRow, match="image marks"):
        template(chat_template=jinja).encode(row(ONE))


def test_wrong_names():
    with pytest.raises(ValueError, match="want auto, vicuna_v1, chatml, plain; got 'vicuna'"):
        template("vicuna")
    with pytest.raises(ValueError, match="no chat template of its own; want one of vicuna_v1"):
        template(chat_template=None)
