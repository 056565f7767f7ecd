"""Helpers of test_nf4_cuda: random 4-bit weights, and csrc/cuda's kernels run on the host."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from fastprompt import native_cuda
from fastprompt.ops import nf4_linear_cuda
from fastprompt.ops.packed import Packed, decode_by_torch

EMULATOR = Path(__file__).parent / "emulator"
SANITIZE = "FASTPROMPT_SANITIZE"  # in the environment: build the emulator with sanitizers
SOURCES = [EMULATOR / "emulator.cpp", EMULATOR / "driver.cpp"]


def build_emulator(folder: Path) -> Path:
    """The emulator as a library that passes for CUDA's driver."""
    target = folder / "libcuda.so.1"
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    if SANITIZE in os.environ:
        flags += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    command = [shutil.which("g++"), *flags, "-shared", "-fPIC", *SOURCES, "-o", target]
    subprocess.run(command, check=True)
    return target


class Emulated:
    """In `native_cuda.launch`'s place, for tensors on the CPU."""

    def __init__(self, library: Path):
        self.emulate = ctypes.CDLL(str(library)).emulate
        self.backwards = False  # threads run from the last to the first
        self.launched: list[str] = []

    def __call__(self, kernel, grid, threads, tensors, sizes, gain) -> None:
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        found = self.emulate(
            kernel.encode(), *grid, threads,
            (ctypes.c_int64 * 9)(*addresses), (ctypes.c_int * 6)(*sizes), ctypes.c_float(gain),
            int(self.backwards),
        )  # fmt: skip
        assert found == 0, f"no kernel {kernel} of {threads} threads"
        self.launched.append(kernel)

    def install(self, monkeypatch) -> None:
        monkeypatch.setattr(native_cuda, "launch", self)
        monkeypatch.setattr(nf4_linear_cuda, "why_not", lambda device: None)
        monkeypatch.setattr(native_cuda, "multiprocessors", lambda device: 4)


def exact(rows: int, columns: int, blocksize: int, nested: bool, seed: int, device) -> Packed:
    """A random weight whose products with small integers no rounding touches, if gains are 1."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*values: float, count: int) -> Tensor:
        return torch.tensor(values)[torch.randint(0, len(values), (count,), generator=rng)]

    numel = rows * columns
    packed = torch.randint(0, 256, (numel // 2,), dtype=torch.uint8, generator=rng)
    code, blocks = torch.arange(-8, 8) / 8.0, -(numel // -blocksize)
    second = (None, None, None, 1)
    absmax = draw(0.5, 1, 2, count=blocks)
    if nested:
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=rng)
        second = (
            draw(-1, 0.5, 1, count=256), draw(0.5, 1, count=-(blocks // -16)), torch.tensor(0.25),
            16,  # small, so that small weights have several
        )  # fmt: skip
    *second, blocksize2 = second
    tensors = [t if t is None else t.to(device) for t in (packed, code, absmax, *second)]
    return Packed(*tensors, blocksize, blocksize2, rows, columns, "nf4")


def integers(*shape: int, dtype: torch.dtype, device, seed: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=rng).to(device, dtype)


def dense(w: Packed) -> Tensor:
    """In float64, which holds an `exact` weight."""
    return decode_by_torch(w, torch.float64)
