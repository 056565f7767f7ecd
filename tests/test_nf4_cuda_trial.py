"""What csrc/cuda's kernels have to get right on a card before they are used there."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from nf4_cuda import Emulated, build_emulator

from fastprompt import native_cuda
from fastprompt.ops import nf4_linear_cuda as cuda

CPU = torch.device("cpu")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_trial_that_every_card_gets_first(monkeypatch, tmp_path):
    emulated = Emulated(build_emulator(tmp_path))
    emulated.install(monkeypatch)
    assert cuda._trial(CPU) is None
    text = (Path(__file__).parent.parent / "csrc" / "cuda" / "product.h").read_text()
    assert set(emulated.launched) == set(re.findall(r"X\((nf4_\w+)", text))  # every kernel

    tried = set()

    def seen(kernel, grid, threads, tensors, sizes, gain):
        tried.add((kernel, sizes[-1], sizes[2] % 8 > 0, tensors[2] is not None))
        assert (tensors[-1] is None) == (sizes[2] % 8 > 0)  # plain scales
        emulated(kernel, grid, threads, tensors, sizes, gain)

    monkeypatch.setattr(native_cuda, "launch", seen)
    monkeypatch.setattr(native_cuda, "multiprocessors", lambda device: 132)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert cuda._trial(CPU) is None
    finally:
        torch.set_default_dtype(before)
    for ways, kinds, back in (
        (cuda.FORWARD, ("bf16", "fp16"), False), (cuda.BACKWARD, ("bf16",), True),
    ):  # fmt: skip
        for way in ways:
            for across in {1, way.across}:  # warps side by side, on a card of any size
                for kind in kinds:
                    kernel = f"nf4_{'backward' if back else 'forward'}_{kind}_{way.tile}"
                    assert (kernel, across, True, not back) in tried
                    assert (kernel, across, False, False) in tried

    def spoiled(kernel, grid, threads, tensors, *rest):
        emulated(kernel, grid, threads, tensors, *rest)
        if kernel in broken:
            tensors[1][-1] = torch.nan

    monkeypatch.setattr(native_cuda, "launch", spoiled)
    broken = ["nf4_backward_bf16_8"]
    assert cuda._trial(CPU) == "backward of 8 tokens in torch.bfloat16 is wrong"
    broken.append("nf4_forward_fp16_32")
    assert cuda._trial(CPU) == "forward of 32 tokens in torch.float16 is wrong"

    def refused(*arguments):
        raise RuntimeError("no image for this card")

    monkeypatch.setattr(native_cuda, "launch", refused)
    assert cuda._trial(CPU) == "no image for this card"
