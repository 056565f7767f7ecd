"""About 1,000 emoji as two sets of artwork: Google's to learn from, Twitter's to be tested on.

From the npm packages emoji-datasource-google and -twitter (code MIT; Google's images Apache-2.0,
Twitter's CC-BY 4.0), fetched from the npm registry and pinned by hash.
"""

import hashlib
import io
import json
import os
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fastprompt.demo.wheels import cache_folder, converted

ARTWORK = {
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}
VERSION = "16.0.0"
URL = "https://registry.npmjs.org/emoji-datasource-{0}/-/emoji-datasource-{0}-{1}.tgz"
# people come in series that differ by one hair, flags and symbols have no picture of a thing
LEFT_OUT = ("People & Body", "Flags", "Symbols", "Component")
SIDE = 64  # pixels of the artwork


class Emoji(NamedTuple):
    """Classes of one or two sets of artwork; images [C, 4, 64, 64] uint8, with alpha."""

    names: list[str]
    categories: list[str]
    images: dict[str, Tensor]


def fetch(artwork: str, cache: str | Path | None = None) -> Path:
    """The verified archive of one set of artwork, downloaded unless the cache holds it.

    Raises:
        ValueError: the file has another hash; it is not used. OSError: the registry was not
        reached.
    """
    folder, url = cache_folder(cache), URL.format(artwork, VERSION)
    path = folder / url.rpartition("/")[2]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as aside:
            part = Path(aside, path.name)
            with urllib.request.urlopen(url, timeout=600) as given:
                part.write_bytes(given.read())
            _verify(part, artwork)
            os.replace(part, path)
    _verify(path, artwork)
    return path


def load(cache: str | Path | None = None) -> Emoji:
    """The classes that both sets of artwork draw, in Unicode's order."""
    folder = converted(f"emoji-{VERSION}", lambda to: _convert(to, cache), cache)
    about = json.loads((folder / "classes.json").read_text())
    images = torch.load(folder / "images.pt", weights_only=True)
    return Emoji(about["names"], about["categories"], images)


def _convert(folder: Path, cache: str | Path | None) -> None:
    archives = {name: tarfile.open(fetch(name, cache)) for name in ARTWORK}  # noqa: SIM115
    with archives["google"] as google, archives["twitter"] as twitter:
        listed = json.load(google.extractfile("package/emoji.json"))
        wanted = [e for e in listed if _wanted(e)]
        wanted.sort(key=lambda e: e["sort_order"])
        images = {
            name: torch.stack([_image(archive, name, e["image"]) for e in wanted])
            for name, archive in (("google", google), ("twitter", twitter))
        }
    about = dict(names=[_name(e) for e in wanted], categories=[e["category"] for e in wanted])
    (folder / "classes.json").write_text(json.dumps(about))
    torch.save(images, folder / "images.pt")


def _wanted(emoji: dict) -> bool:
    drawn = emoji["has_img_google"] and emoji["has_img_twitter"]
    return drawn and emoji["category"] not in LEFT_OUT and "obsoleted_by" not in emoji


def _name(emoji: dict) -> str:
    """The short name: there is one each, and it is what people say ("hot_pepper")."""
    return emoji["short_name"].replace("_", " ").replace("-", " ").strip()


def _image(archive: tarfile.TarFile, artwork: str, file: str) -> Tensor:
    data = archive.extractfile(f"package/img/{artwork}/{SIDE}/{file}").read()
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(SIDE, SIDE, 4).permute(2, 0, 1).contiguous()


def _verify(path: Path, artwork: str) -> None:
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != ARTWORK[artwork]:
        raise ValueError(
            f"{path} is not the pinned emoji-datasource-{artwork}@{VERSION} and is not used: "
            f"wanted sha256 {ARTWORK[artwork]}, got {got}"
        )
