"""csrc/cuda as it was compiled for every card: registers, shared memory, spills."""

import re
import subprocess
from pathlib import Path

import pytest

from fastprompt import native, native_cuda

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KB of a multiprocessor
STATIC = 48 * 1024  # bytes a thread block may have without asking
REGISTERS = 64 * 1024  # of a multiprocessor
STACK = 64  # bytes a thread: a dozen spills in a loop of some 500 instructions
RESERVED = 1024  # bytes of shared memory that every thread block takes besides
FATBIN = b"\x50\xed\x55\xba\x01\x00\x10\x00"  # it begins so; then 8 bytes: how many follow


@pytest.mark.skipif(not native_cuda.archs(), reason="built without CUDA kernels")
def test_every_card_has_room_for_two_blocks(tmp_path):
    """Two at least, so that one multiplies while the other waits for memory; next to no spills."""
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("triton has no cuobjdump here")
    module = Path(native.compiled()[0].__file__).read_bytes()
    first = module.index(FATBIN)
    size = int.from_bytes(module[first + 8 : first + 16], "little")
    fatbin = tmp_path / "cuda.fatbin"
    fatbin.write_bytes(module[first : first + 16 + size])
    said = subprocess.check_output([cuobjdump, "-res-usage", fatbin], text=True)
    found = {}
    for cubin in said.split("arch = sm_")[1:]:
        sm = int(re.match(r"\d+", cubin)[0])
        pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
        found |= {(name, sm): map(int, rest) for name, *rest in re.findall(pattern, cubin)}
    text = (CUDA / "product.h").read_text()
    warps = {name: int(n) for name, n in re.findall(r"X\((nf4_\w+), .*, (\d+)\)", text)}
    assert found.keys() == {(name, sm) for name in warps for sm in native_cuda.archs()}
    assert SHARED.keys() == set(native_cuda.archs())
    for (name, sm), (registers, stack, shared, local) in found.items():
        assert stack <= STACK and not local, f"{name} for sm_{sm}: {stack} bytes of stack"
        assert shared <= STATIC and 2 * (shared + RESERVED) <= SHARED[sm] * 1024, (name, sm)
        assert 2 * 32 * warps[name] * -(-registers // 8) * 8 <= REGISTERS, (name, sm, registers)
