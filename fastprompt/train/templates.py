"""Conversations as token ids, and which of them train: the answers, each with its end.

A chat template is a Jinja program that nobody can ask where an answer stands. So it is run a second
time with a marker in each answer's place: the text around the markers is the template's, and what
follows the last marker is how an answer ends (``<|im_end|>``, ``<|eot_id|>``, ``</s>``). This needs
no ``{% generation %}`` in the template, and holds for those that treat the last answer differently.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from fastprompt.train.rows import IMAGE, BadRow, Row

IGNORE = -100
Turns = list[tuple[str, str]]


class Named(NamedTuple):
    """A template by name: its Jinja, and what ends an answer (None: found out)."""

    jinja: str
    end: str | None = None


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
NAMED = {
    # what Vicuna 1.1 to 1.5, LLaVA 1 and M²PT speak
    "vicuna_v1": Named(
        "{% if messages[0].role != 'system' %}" + _VICUNA_SYSTEM + " {% endif %}"
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} "
        "{% elif m.role == 'user' %}USER: {{ m.content }} "
        "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "chatml": Named(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # captions, for stage 1: the image, then the caption; the question is not shown
    "plain": Named(
        "{% if messages | length > 2 %}"
        "{{ raise_exception('plain: want one question and one answer') }}{% endif %}"
        "{% if image_token in messages[0].content %}{{ image_token }}{% endif %}"
        "{% if not add_generation_prompt %}{{ messages[1].content }}\n{% endif %}",
        end="\n",
    ),
}


@dataclass(frozen=True)
class Encoded:
    """A conversation as lists of one length: token ids, and the same or IGNORE."""

    ids: list[int]
    labels: list[int]


class NoTemplate(ValueError):
    """A model has no chat template of its own."""


class ChatTemplate:
    """Turns rows into ids and labels, for one processor and one template.

    Args:
        processor: a vision-language processor: tokenizer, image token, image processor.
        name: "auto": the processor's own chat template; or one of `NAMED`.
        image_tokens: how many tokens an image takes.

    Raises:
        ValueError: no such template, a tokenizer without offsets, or without the image token.
    """

    def __init__(self, processor: ProcessorMixin, name: str, image_tokens: int):
        tokenizer = processor.tokenizer
        if not tokenizer.is_fast:
            raise ValueError(
                f"want a fast tokenizer (with offsets), got {type(tokenizer).__name__}"
            )
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.image_token, self.image_tokens = processor.image_token, image_tokens
        self.image_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"want a tokenizer that knows {self.image_token!r}; this one does not")
        self.name = name
        end = None
        if name == "auto":
            self.jinja = getattr(processor, "chat_template", None) or tokenizer.chat_template
            if not self.jinja:
                raise NoTemplate(
                    "template: this model has no chat template of its own; want one of "
                    f"{', '.join(NAMED)}"
                )
        elif name in NAMED:
            self.jinja, end = NAMED[name]
        else:
            raise ValueError(f"template: want auto, {', '.join(NAMED)}; got {name!r}")
        self.parted = name == "auto" and self._takes_parts()
        self.appended = ""  # after each answer, where the template has no end of its own
        self.end = self._find_end() if end is None else end
        self.bos = self._bos()

    def encode(self, row: Row) -> Encoded:
        """Ids and labels, both with every token of the image.

        Raises:
            BadRow: the template refuses the conversation, or writes an answer differently.
        """
        pieces = self.pieces(row.turns)
        text = "".join(piece for piece, _ in pieces)
        images = text.count(self.image_token)
        if images != (row.image is not None):
            raise BadRow("image marks", f"the template makes {images} {self.image_token} of them")
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans, at = [], 0
        for piece, trains in pieces:
            spans += [(at, at + len(piece))] if trains else []
            at += len(piece)
        ids, labels = self._bos_for(text), []
        labels += [IGNORE] * len(ids)
        span = 0
        for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            while span < len(spans) and spans[span][1] <= start:
                span += 1
            trains = span < len(spans) and spans[span][0] < end and start < end
            repeat = self.image_tokens if token == self.image_id else 1
            ids += [token] * repeat
            labels += [token if trains else IGNORE] * repeat
        labels[0] = IGNORE  # nothing before it foretells it; and packed, another row is there
        if all(label == IGNORE for label in labels):
            raise BadRow("no answer", "the template leaves nothing to train")
        return Encoded(ids, labels)

    def pieces(self, turns: Turns) -> list[tuple[str, bool]]:
        """The conversation's text, cut where training begins and ends: (text, does it train)."""
        answers = [text for role, text in turns if role == "assistant"]
        marks = [_mark(i) for i in range(len(answers))]
        marked, left = [], iter(marks)
        for role, text in turns:
            marked.append((role, next(left) if role == "assistant" else text))
        parts = re.split("|".join(map(re.escape, marks)), self._render(marked))
        if len(parts) != len(answers) + 1:
            raise BadRow("template", "it does not write each answer once")
        whole = parts[0] + "".join(a + p for a, p in zip(answers, parts[1:], strict=True))
        if self._render(turns) != whole:
            raise BadRow("template", "it changes an answer, so that its tokens are not known")
        pieces = [(parts[0], False)]
        for answer, after in zip(answers, parts[1:], strict=True):
            end = self.appended or (self.end if after.startswith(self.end) else "")
            pieces += [(answer + end, True), (after if self.appended else after[len(end) :], False)]
        return pieces

    def text(self, turns: Turns) -> str:
        """A conversation; one that ends with a question ends where its answer would begin.

        Spaces before the answer are the answer's, as tokens have them.
        """
        if turns[-1][0] == "assistant":
            return self._render(turns)
        marked = self._render([*turns, ("assistant", _mark(0))])
        return marked.partition(_mark(0))[0].rstrip(" ")

    def _render(self, turns: Turns) -> str:
        messages = [{"role": role, "content": self._content(text)} for role, text in turns]
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.jinja,
                tokenize=False,
                image_token=self.image_token,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise BadRow("template", f"it refuses the conversation: {error}") from error

    def _content(self, text: str) -> str | list[dict[str, str]]:
        if not self.parted:
            return text.replace(IMAGE, self.image_token)
        before, image, after = text.partition(IMAGE)
        parts = [before.strip(), image, after.strip()]
        return [
            {"type": "image"} if part == IMAGE else {"type": "text", "text": part}
            for part in parts
            if part
        ]

    def _takes_parts(self) -> bool:
        """Whether the template wants a message as a list of images and texts."""
        self.parted = True
        try:
            text = self._render([("user", f"{IMAGE}\n{_mark(0)}"), ("assistant", _mark(1))])
        except BadRow:
            return False
        once = all(text.count(each) == 1 for each in (_mark(0), _mark(1), self.image_token))
        return once and "'type'" not in text

    def _find_end(self) -> str:
        text = self._render([("user", "Why?"), ("assistant", _mark(0))])
        end = text.partition(_mark(0))[2].rstrip()
        if not end:
            self.appended = self.tokenizer.eos_token or ""
        return end

    def _bos(self) -> list[int]:
        """What the tokenizer puts before a text of its own accord."""
        bos = self.tokenizer.bos_token_id
        own = self.tokenizer("a", add_special_tokens=True).input_ids
        return [bos] if bos is not None and own[:1] == [bos] else []

    def _bos_for(self, text: str) -> list[int]:
        written = bool(self.bos) and text.startswith(self.tokenizer.bos_token)
        return [] if written else [*self.bos]


def _mark(i: int) -> str:
    return f"\ue000{i}\ue001"  # of the private use area: no text has it


def count_image_tokens(processor: ProcessorMixin) -> int:
    """Tokens of one image: counted on a blank one, since all are brought to one size."""
    from PIL import Image

    blank = Image.new("RGB", (64, 64))
    made = processor(images=[blank], text=[processor.image_token], return_tensors="pt")
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return int((made["input_ids"] == image_id).sum())
