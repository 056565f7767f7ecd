"""Other pictures: captions for stage 1, an emoji font's circles and squares (Z4), digits (Z5)."""

import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fastprompt.demo.instruction import emoji
from fastprompt.demo.instruction.small import DIGITS
from fastprompt.demo.zero_shot.shapes import Pair

SIDE = 64  # pixels, as easy-VQA's
GROUND = (245, 245, 245)  # behind what has no ground of its own; easy-VQA's are near white too
COLOURS = ("black", "blue", "brown", "green", "red", "yellow")  # easy-VQA's that emoji have too
PLACES = 10  # of each emoji: sizes and places on the ground
# no caption of stage 1 names what Z4 and Z5 ask for
NOT_TOLD = ("circle", "square", "triangle", "digit", "keycap", "dot", "button")


class Picture(NamedTuple):
    """A picture and what it is of."""

    image: Image.Image
    name: str


def captions(cache: str | Path | None = None) -> Iterator[Picture]:
    """Emoji of Google's artwork and their names, people and flags too, Z4's and Z5's left out."""
    with tarfile.open(emoji.fetch("google", cache)) as archive:
        for entry in _listed(archive):
            name = (entry["name"] or entry["short_name"]).lower()
            if entry["has_img_google"] and not any(word in name for word in NOT_TOLD):
                drawn = _artwork(archive, "google", entry["image"])
                yield Picture(_placed(drawn, SIDE, 0, 0), name)


def shapes(cache: str | Path | None = None) -> Iterator[tuple[Image.Image, Pair]]:
    """Coloured circles and squares of two artworks, each at `PLACES` sizes and places."""
    rng = random.Random(0)
    for artwork in emoji.ARTWORK:
        with tarfile.open(emoji.fetch(artwork, cache)) as archive:
            named = {entry["short_name"]: entry for entry in _listed(archive)}
            for colour in COLOURS:
                for shape, words in (("circle", "circle"), ("rectangle", "square")):
                    names = (f"large_{colour}_{words}", f"{colour}_{words}", f"black_large_{words}")
                    entry = next(named[n] for n in names if n in named)
                    drawn = _artwork(archive, artwork, entry["image"])
                    for _ in range(PLACES):
                        side = rng.randint(20, 44)
                        x, y = (rng.randint(0, SIDE - side) for _ in "xy")
                        yield _placed(drawn, side, x, y), Pair(shape, colour)


def digits(count: int) -> Iterator[Picture]:
    """scikit-learn's handwritten digits (8x8, 16 greys), dark on light, enlarged."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for i in random.Random(0).sample(range(len(found.target)), count):
        grey = (255 - found.images[i] * (255 / 16)).astype("uint8")
        image = Image.fromarray(grey).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        yield Picture(image, DIGITS[found.target[i]])


def _listed(archive: tarfile.TarFile) -> list[dict]:
    return json.load(archive.extractfile("package/emoji.json"))


def _artwork(archive: tarfile.TarFile, artwork: str, file: str) -> Image.Image:
    data = archive.extractfile(f"package/img/{artwork}/{emoji.SIDE}/{file}").read()
    return Image.open(io.BytesIO(data)).convert("RGBA")


def _placed(drawn: Image.Image, side: int, x: int, y: int) -> Image.Image:
    ground = Image.new("RGB", (SIDE, SIDE), GROUND)
    drawn = drawn.resize((side, side), Image.Resampling.LANCZOS)
    ground.paste(drawn, (x, y), drawn)
    return ground
