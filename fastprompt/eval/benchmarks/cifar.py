"""CIFAR-10 and CIFAR-100 as questions: which of the classes is the main object.

The test sets as Krizhevsky's page has them, the Python version (pickles) or the binary one:
``cifar10/cifar-10-batches-{py,bin}/``, ``cifar100/cifar-100-{python,binary}/``. The question's
wording is ours.
"""

import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastprompt.eval.answers import accuracy
from fastprompt.eval.benchmarks.base import Benchmark
from fastprompt.eval.questions import InputError, Question, find

_MALFORMED = (ValueError, TypeError, AttributeError, LookupError)  # all of them, says pickle's page
PIXELS = 3 * 32 * 32
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(module, "_reconstruct"): np.empty(0).__reduce__()[0] for module in _MULTIARRAY},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArraysAlone(pickle.Unpickler):
    """A pickle may call anything it can name: let it name what makes an array, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, not an array")
        return _ALLOWED[module, name]


@dataclass(frozen=True)
class _Files:
    """Names and fields of one of the two data sets."""

    name: str
    folders: tuple[str, str]  # of the Python and the binary version
    python: tuple[str, str]  # test set, class names
    binary: tuple[str, str]
    keys: tuple[bytes, bytes]  # labels, class names
    label_bytes: int  # before each image of the binary version; the last is the label


FILES = (
    _Files(
        "cifar10",
        ("cifar-10-batches-py", "cifar-10-batches-bin"),
        ("test_batch", "batches.meta"),
        ("test_batch.bin", "batches.meta.txt"),
        (b"labels", b"label_names"),
        label_bytes=1,
    ),
    _Files(
        "cifar100",
        ("cifar-100-python", "cifar-100-binary"),
        ("test", "meta"),
        ("test.bin", "fine_label_names.txt"),
        (b"fine_labels", b"fine_label_names"),
        label_bytes=2,  # coarse, fine
    ),
)


def _reader(files: _Files) -> Callable[[Path], Iterator[Question]]:
    def read(root: Path) -> Iterator[Question]:
        folder = find(root, *(f"{files.name}/{folder}" for folder in files.folders))
        of_version = _python if folder.name == files.folders[0] else _binary
        path, images, labels, names = of_version(folder, files)
        names = [name.replace("_", " ") for name in names]
        options = ", ".join(names)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            where = f"{path}: image {index}"
            if not 0 <= label < len(names):
                raise InputError(f"{where}: want a label below {len(names)}, got {label}")
            yield Question(
                id=f"{files.name}/{index}",
                image=Image.fromarray(image.reshape(3, 32, 32).transpose(1, 2, 0).copy()),
                text=f"Classify the main object in the image. Options: {options}",
                answers=(names[label],),
                options=tuple(names),
                where=where,
            )

    return read


def _python(folder: Path, files: _Files) -> tuple[Path, np.ndarray, list[int], list[str]]:
    path, meta = (folder / name for name in files.python)
    batch, names = _unpickle(path), _unpickle(meta)
    data, labels = batch.get(b"data"), batch.get(files.keys[0])
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (PIXELS,):
        raise InputError(f"{path}: want b'data', uint8 [N, {PIXELS}]")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise InputError(f"{path}: want {len(data)} labels in {files.keys[0]!r}")
    if files.keys[1] not in names:
        raise InputError(f"{meta}: want {files.keys[1]!r}, got {sorted(names)}")
    return path, data, labels, [name.decode() for name in names[files.keys[1]]]


def _unpickle(path: Path) -> dict[bytes, Any]:
    try:
        found = _ArraysAlone(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except (OSError, EOFError, pickle.UnpicklingError, *_MALFORMED) as error:
        raise InputError(f"{path}: want a pickle of CIFAR's Python version; {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: want a dictionary, got {type(found).__name__}")
    return found


def _binary(folder: Path, files: _Files) -> tuple[Path, np.ndarray, list[int], list[str]]:
    path, meta = (find(folder, name) for name in files.binary)
    data, row = np.fromfile(path, np.uint8), files.label_bytes + PIXELS
    if len(data) % row:
        raise InputError(f"{path}: want rows of {row} bytes, got {len(data)} bytes")
    data = data.reshape(-1, row)
    labels = data[:, files.label_bytes - 1].tolist()
    return path, data[:, files.label_bytes :], labels, meta.read_text().split()


CIFAR10, CIFAR100 = (Benchmark(files.name, _reader(files), accuracy) for files in FILES)
