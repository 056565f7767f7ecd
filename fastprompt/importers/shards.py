"""Named tensors out of checkpoint files: only those asked for are read, and nothing is executed.

Files are safetensors, or what ``torch.save`` wrote (a zip of one record per storage, mapped into
memory and loaded with ``weights_only``). torch does not check the records' CRCs; here those of
the tensors asked for are checked, so that a download that went wrong is named and not trained on.
"""

from __future__ import annotations

import ctypes
import json
import pickle
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# what a folder's files may be called: the first that is there, by the first pattern that finds any
_PATTERNS = (
    "*.index.json",
    "prompts.safetensors",
    "model.safetensors",
    "model-*.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
    "open_clip_pytorch_model.bin",
    "mm_projector.bin",
)


class Pickled(NamedTuple):
    """A file of torch.save."""

    tensors: dict[str, Tensor]
    records: set[tuple[int, int]] | None  # (bytes, CRC) of each; None: no zip, no CRCs


@dataclass(eq=False)
class Shards:
    """A checkpoint: a file, or a folder of files, with an index or without.

    Attributes:
        path: what was asked for.
        files: tensor name -> the file that holds it.
    """

    path: Path
    files: dict[str, Path]
    _opened: dict[Path, Pickled] = field(default_factory=dict)

    @classmethod
    def at(cls, path: str | Path) -> Shards:
        """Find out what a checkpoint holds, without reading a tensor.

        Raises:
            ValueError: nothing there, or a file that is damaged or of another kind; it is named.
        """
        path = Path(path)
        made = cls(path, {})
        found = (sorted(path.glob(pattern)) for pattern in _PATTERNS)
        files = [path] if path.is_file() else next((f for f in found if f), [])
        if not files:
            raise ValueError(f"{path}: want a file, or a folder with one of {', '.join(_PATTERNS)}")
        if files[0].name.endswith(".index.json"):
            made.files = {n: files[0].parent / file for n, file in _index(files[0]).items()}
            return made
        for file in files:
            made.files |= dict.fromkeys(made._names(file), file)
        return made

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The tensors of these names, on the CPU.

        Raises:
            ValueError: a name that is nowhere, a file that is missing, truncated or damaged.
        """
        self._check(names)
        return {name: self._tensor(name, self.files[name]) for name in names}

    def shapes(self, names: list[str]) -> dict[str, torch.Size]:
        """The shapes of the tensors of these names, which are not read; raises as `read` does."""
        self._check(names)
        return {name: self._shape(name, self.files[name]) for name in names}

    def _check(self, names: list[str]) -> None:
        missing = [name for name in names if name not in self.files]
        if missing:
            raise ValueError(f"{self.path}: want {missing[0]} in it ({len(missing)} are missing)")
        for file in dict.fromkeys(self.files[name] for name in names):
            there = {*self._names(file)}
            for name in names:
                if self.files[name] == file and name not in there:
                    raise ValueError(f"{file}: want {name} in it, as the index says")

    def _shape(self, name: str, file: Path) -> torch.Size:
        if file.suffix != ".safetensors":
            return self._pickled(file).tensors[name].shape
        with _safe(file) as opened:
            return torch.Size(opened.get_slice(name).get_shape())

    def _names(self, file: Path) -> list[str]:
        if file.suffix == ".safetensors":
            with _safe(file) as opened:
                return list(opened.keys())
        return list(self._pickled(file).tensors)

    def _tensor(self, name: str, file: Path) -> Tensor:
        if file.suffix == ".safetensors":
            with _safe(file) as opened:
                return opened.get_tensor(name)
        tensors, records = self._pickled(file)
        # torch does not say which record a storage came from: one of its size and CRC is it
        if records is not None and _record(tensors[name]) not in records:
            raise ValueError(f"{file}: damaged: {name} fails its CRC; fetch the file again")
        return tensors[name].clone()  # out of the map

    def _pickled(self, file: Path) -> Pickled:
        """What torch.save wrote: mapped, so that a tensor costs nothing until it is used."""
        if file not in self._opened:
            try:
                records = _records(file) if zipfile.is_zipfile(file) else None
                # before torch 1.6 it wrote no zip, which can only be read whole
                mapped = records is not None
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            except (OSError, RuntimeError, EOFError, *_DAMAGED) as error:
                raise ValueError(
                    f"{file}: want a whole file of tensors that torch.save wrote; {error}"
                ) from error
            if not isinstance(found, dict):
                raise ValueError(f"{file}: want tensors by name, got a {type(found).__name__}")
            inner = found.get("model")  # beside a trainer's optimizer and such
            found = inner if isinstance(inner, dict) else found
            tensors = {name: t for name, t in found.items() if isinstance(t, Tensor)}
            self._opened[file] = Pickled(tensors, records)
        return self._opened[file]


_DAMAGED = (zipfile.BadZipFile, pickle.UnpicklingError)


def _index(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: want an index with a weight_map; {error!r}") from error
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise ValueError(f"{path}: want names of files in its weight_map, got {found!r:.80}")
    return found


def _records(file: Path) -> set[tuple[int, int]]:
    with zipfile.ZipFile(file) as archive:
        for record in archive.namelist():
            if record.endswith("data.pkl"):
                archive.read(record)  # raises where its CRC is wrong
        return {(r.file_size, r.CRC) for r in archive.infolist()}


def _record(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    return size, zlib.crc32((ctypes.c_char * size).from_address(storage.data_ptr())) if size else 0


def _safe(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: want a whole safetensors file; {error}") from error
