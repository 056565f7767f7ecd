"""A row of training data: a conversation and the image it is about; and what is wrong with it."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from PIL import Image

IMAGE = "<image>"
SIDES = 200  # one side to the other; a processor brings the shorter to a size, and the longer grows
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES |= {"system": "system"}


class BadRow(ValueError):
    """Why a row cannot be used: a ``kind`` to count by, the reason in words, the row's id if it is
    known."""

    def __init__(self, kind: str, reason: str, id: str = "?"):
        super().__init__(kind, reason)
        self.kind, self.reason, self.id = kind, reason, id


@dataclass(frozen=True)
class Problem:
    """A bad row, as it is listed."""

    where: str
    id: str
    kind: str
    reason: str

    @classmethod
    def of(cls, error: Exception, where: str, id: str | None = None) -> Problem:
        """What a row's error says; ``id``: the row's, if it was read so far."""
        bad = error if isinstance(error, BadRow) else BadRow("cannot be read", _line(error))
        return cls(where, writable(id or bad.id), bad.kind, writable(bad.reason))

    def __str__(self) -> str:
        return f"{self.where}: {self.kind} (id {self.id}): {self.reason}"


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes in a file; a file opened for each reading may be read by several processes."""

    path: Path
    offset: int = 0
    size: int | None = None  # None: to the end

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)

    def length(self) -> int:
        return self.path.stat().st_size if self.size is None else self.size


@dataclass(frozen=True)
class Row:
    """A conversation.

    Attributes:
        id, where: its own name; file and line.
        turns: (role, text), role of "system", "user", "assistant"; the last is an assistant's.
        image: what it is about, if anything; then one user turn has one ``<image>``.
    """

    id: str
    where: str
    turns: list[tuple[str, str]]
    image: Blob | None = None

    def open_image(self, decode: bool = True) -> Image.Image:
        """The image as RGB; ``decode=False`` reads its head alone, and no pixel can be asked for.

        Raises:
            BadRow: it is missing, cannot be read as an image, or has a side of more than `SIDES`
                times the other.
        """
        try:
            with open(self.image.path, "rb") as file:
                return self._read_image(file, decode)
        except BadRow:
            raise
        except (OSError, ValueError) as error:  # ValueError: no file can have such a name
            reason = getattr(error, "strerror", None) or str(error)
            raise BadRow("missing image", f"{self.image.path}: {reason}") from error

    def _read_image(self, file: BinaryIO, decode: bool) -> Image.Image:
        from PIL import Image
        from PIL.ContainerIO import ContainerIO

        size = self.image.length()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of EXIF and palettes
                image = Image.open(ContainerIO(file, self.image.offset, size))
                if max(image.size) > SIDES * min(image.size):
                    want, got = f"want at most 1 to {SIDES}", f"{image.width} × {image.height}"
                    raise BadRow("image shape", f"{self.image.path}: {want}, got {got}")
                return image.convert("RGB") if decode else image
        except BadRow:
            raise
        except Exception as error:  # what a decoder stumbles on is any of them
            reason = f"{self.image.path} ({size} bytes): {_line(error)}"
            raise BadRow("broken image", reason) from error


def parse(raw: object, where: str, image: Blob | None) -> Row:
    """A row of LLaVA's format, or a caption.

    Args:
        raw: ``{"id", "image", "conversations": [{"from", "value"}, …]}``, or with ``"caption"`` in
            place of ``"conversations"``.
        where: file and line; also the id of a row that has none, so that no two are the same.
        image: where its image is, if ``raw`` names one.

    Raises:
        BadRow: it is not such a row.
    """
    if not isinstance(raw, dict):
        raise BadRow("not a row", f"want an object, got {type(raw).__name__}")
    name = where if raw.get("id") is None else str(raw["id"])
    try:
        if image is None and raw.get("image"):
            raise BadRow("missing image", f"want {raw['image']!r} beside it, got no image")
        turns = _placed(_checked(_turns(raw)), image is not None)
        _check_characters([name, *(text for _, text in turns)])
        return Row(name, where, turns, image)
    except BadRow as bad:
        bad.id = name
        raise


def _turns(raw: dict) -> list[tuple[str, str]]:
    if isinstance(raw.get("caption"), str) and "conversations" not in raw:
        return [("user", IMAGE), ("assistant", raw["caption"].strip())]
    if "conversations" not in raw:
        keys = ", ".join(map(str, raw)) or "none"
        raise BadRow("not a row", f"want 'conversations' or 'caption', got the keys {keys}")
    turns = raw["conversations"]
    if not isinstance(turns, list):
        raise BadRow("not a row", f"'conversations': want a list, got {type(turns).__name__}")
    return [_turn(turn, i) for i, turn in enumerate(turns)]


def _checked(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Questions and answers in turn, none of the answers empty."""
    spoken = [role for role, _ in turns if role != "system"]
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or any(
        role == "system" for role, _ in turns[1:]
    ):
        if spoken and spoken[-1] == "user":
            raise BadRow("no answer", "the conversation ends with a question")
        order = " ".join(spoken) or "nothing"
        raise BadRow("not a row", f"want user and assistant in turn, got {order}")
    if not spoken:
        raise BadRow("no answer", "the conversation is empty")
    if any(role == "assistant" and not text for role, text in turns):
        raise BadRow("no answer", "an answer is empty")
    return turns


def _turn(turn: object, i: int) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise BadRow("not a row", f"turn {i}: want an object, got {type(turn).__name__}")
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
        want = "want 'from' (human, gpt, system) and 'value' (text)"
        raise BadRow("not a row", f"turn {i}: {want}, got {role!r} and {type(text).__name__}")
    return _ROLES[role], text.strip()  # many templates strip, so that all do


def _placed(turns: list[tuple[str, str]], has_image: bool) -> list[tuple[str, str]]:
    """With one ``<image>``, in a question, if there is an image, and none if there is not."""
    marks = sum(text.count(IMAGE) for _, text in turns)
    asked = sum(text.count(IMAGE) for role, text in turns if role == "user")
    if has_image and not marks:
        first = next(i for i, (role, _) in enumerate(turns) if role == "user")
        turns = [*turns]
        turns[first] = ("user", f"{IMAGE}\n{turns[first][1]}")
    elif marks != has_image or asked != marks:
        images = "one image" if has_image else "no image"
        raise BadRow("image marks", f"{images}, but {marks} {IMAGE} ({asked} of them in questions)")
    return turns


def _check_characters(texts: list[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise BadRow("not UTF-8", f"want whole characters, got {half!r}") from error


def read_text(data: bytes) -> str:
    """Raises BadRow if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")  # with a byte order mark or without
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"byte {data[error.start]:#04x} at {error.start}") from error


def read_json(data: bytes) -> object:
    """Raises BadRow if it is not JSON in UTF-8."""
    text = read_text(data)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: of a number too long as well
        raise BadRow("not JSON", str(error)) from error


def writable(text: str) -> str:
    """It, as can be printed and written: halves of characters as ``\\udc80``."""
    return text.encode("utf-8", "backslashreplace").decode()


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
