"""Compile every kernel for the cards we serve, on a machine without one. Run by test_targets.

A process of its own: under TRITON_INTERPRET the kernels are not compilable objects, and the
interpreter accepts programs that the compiler refuses. The launchers themselves are run, on CPU
tensors and with a driver that only compiles, so that what is compiled is what would be launched:
the tile that the table chooses, and what Triton concludes from alignments, strides and sizes.

Held: shared memory against the smallest card of a generation, and spills. Of these the stack tells
too little (a value parked across a loop costs nothing), so what counts is the share of local
loads and stores among the instructions of any innermost loop.
"""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastprompt.ops import prompt_attention_tiles, prompt_attention_triton
from fastprompt.ops.options import Options

SMEM_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes one block may take
STACK_LIMIT = 384  # bytes a thread
LOCAL_LIMIT = 0.08  # of the instructions of an innermost loop
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    dtype: torch.dtype
    d: int
    N: int
    M: int
    P: int
    groups: int = 1
    causal: bool = False
    masks: str = (
        ""  # of "key", "bool", "float", "half", "bias", "window", "softcap", "sets", "packed"
    )
    views: str = "aligned"  # "odd": strides that divide by nothing; "far": rows 2**24 apart
    tokens: bool = True


# Every row of the tile tables, each dtype, each kind of mask, each assumption on strides; a float
# mask takes the most shared memory. Where only the forward's row is new, the tokens are frozen.
HALF = [
    Case(BF16, 64, 1, 1, 5, causal=True, tokens=False),
    Case(BF16, 64, 197, 197, 50),
    Case(BF16, 64, 197, 197, 50, masks="float bias"),
    Case(BF16, 64, 197, 197, 50, masks="bias", tokens=False),
    Case(FP16, 64, 577, 577, 20, causal=True, masks="key float bias"),
    Case(BF16, 72, 729, 729, 20, tokens=False),
    Case(BF16, 128, 1, 300, 5, groups=4, tokens=False),
    Case(BF16, 128, 1024, 1024, 10, causal=True),
    Case(BF16, 128, 2048, 2048, 150, groups=4, causal=True, masks="key float bias"),
    Case(BF16, 128, 300, 300, 20, views="odd"),
    Case(BF16, 256, 300, 300, 20, causal=True),
    Case(FP16, 256, 300, 300, 150, groups=2, masks="key float bias", tokens=False),
    Case(FP16, 16, 20, 20, 3, masks="key bool", views="far"),
    Case(BF16, 64, 577, 577, 20, masks="key window softcap sets"),
    Case(BF16, 128, 1024, 1024, 10, causal=True, masks="window"),
    Case(BF16, 128, 2048, 2048, 150, groups=4, causal=True, masks="softcap packed sets"),
    Case(BF16, 128, 1, 8192, 20, groups=4, masks="key", tokens=False),
    Case(BF16, 128, 1, 8192, 20, groups=4, masks="float bias", tokens=False),
    Case(FP16, 64, 197, 197, 50, masks="half bias softcap"),
    Case(BF16, 256, 1024, 1024, 20, groups=2, causal=True, masks="window softcap packed"),
]
# The widths that no row of the tables names share its tiles, but not how rows are loaded
WIDTHS = [Case(BF16, d, 300, 300, 20) for d in (8, 32, 80, 96, 112)]
WIDTHS += [Case(FP32, d, 300, 300, 20, causal=True) for d in (8, 96)]
DECODE_256 = Case(BF16, 256, 1, 4096, 20, groups=4, tokens=False)
CASES = {
    80: [HALF[2], HALF[8], HALF[-1]],  # sm_89's tiles, and more room
    89: [
        *HALF,
        *WIDTHS,
        DECODE_256,
        Case(FP32, 64, 197, 197, 50, causal=True, masks="key float bias"),
        Case(FP32, 256, 300, 300, 20),
        Case(FP32, 128, 300, 300, 20, groups=2, causal=True, masks="window softcap packed sets"),
    ],
    90: [
        *HALF,
        DECODE_256,
        Case(BF16, 80, 300, 300, 20, groups=2, causal=True, masks="sets"),
        # float32 takes the same tiles on every card
        Case(BF16, 64, 577, 577, 20),
        Case(FP32, 128, 1, 50, 20, tokens=False),
        Case(FP32, 128, 300, 300, 20),
    ],
}


class CompileOnly:
    """A driver for a card that is not there."""

    def __init__(self, sm: int):
        self.sm = sm

    def get_current_target(self):
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self):
        return self.sm  # the key of a kernel's cache

    def get_current_stream(self, device):
        return 0


class Recorder:
    """In a kernel's place: compiles where it would launch."""

    def __init__(self, kernel, built: list):
        self.kernel, self.built = kernel, built

    def __getitem__(self, grid):
        def launch(*args, **options):
            done = self.kernel.warmup(*args, grid=grid, **options)
            sizes = [v for k, v in options.items() if k.startswith(("BLOCK", "num"))]
            self.built.append((self.kernel.__name__, sizes, done))

        return launch


def heads(case: Case, count: int, rows: int) -> torch.Tensor:
    """[2, count, rows, d] with the case's strides; meta memory would have no address to align."""
    if case.views == "far":  # gigabytes of addresses, none of them touched
        return torch.empty_strided((2, count, rows, case.d), (16, 16, 2**24, 1), dtype=case.dtype)
    gap = 1 if case.views == "odd" else 0
    return torch.empty(2, rows, count, case.d + gap, dtype=case.dtype)[..., : case.d].transpose(
        1, 2
    )


def launch(case: Case):
    _, d, N, M, P = case[:5]
    H = 2 * case.groups
    q, k, v = heads(case, H, N), heads(case, 2, M), heads(case, 2, M)
    prompt_k, prompt_v = torch.empty(2, 2, P, d, dtype=case.dtype).unbind(0)
    options = dict(causal=case.causal, scale=d**-0.5)
    if "key" in case.masks:
        options["key_mask"] = torch.ones(2, M, dtype=torch.bool)
    kinds = dict(bool=torch.bool, float=torch.float32, half=torch.float16)
    if kind := next((kinds[name] for name in kinds if name in case.masks), None):
        options["attn_mask"] = torch.ones(2, 1, N, M, dtype=kind)
    if "bias" in case.masks:
        options["prompt_bias"] = torch.zeros(1, H, N, P)
    if "window" in case.masks:
        options["window"] = 100
    if "softcap" in case.masks:
        options["softcap"] = 50.0
    if "packed" in case.masks:
        q, k, v = (x[:1] for x in (q, k, v))
        options |= dict(cu_seqlens_q=torch.tensor([0, 3, N]), cu_seqlens_k=torch.tensor([0, 3, M]))
    if "sets" in case.masks:
        prompt_k, prompt_v = torch.empty(2, 3, 2, P, d, dtype=case.dtype).unbind(0)
        options |= dict(prompt_index=torch.zeros(2, dtype=torch.int64))
        options |= dict(prompt_len=torch.ones(3, dtype=torch.int32))
    inputs = (q, k, v, prompt_k, prompt_v, Options(**options))
    out, lse = prompt_attention_triton.forward(*inputs)
    prompt_attention_triton.backward(out, out, lse, *inputs, case.tokens, True)


def tool(name: str, flag: str, cubin: bytes) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([path, flag, file.name], check=True, capture_output=True, text=True)
        return done.stdout


def local_share(sass: str) -> float:
    """The largest share of local loads and stores in an innermost loop."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    code = [(int(at, 16), text) for at, text in code]
    jumps = [(int(m[1], 16), at) for at, t in code if (m := re.search(r"BRA.*0x([0-9a-f]+)", t))]
    loops = [(first, last) for first, last in jumps if first < last]
    shares = [0.0]
    for first, last in loops:
        if any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops):
            continue
        body = [text for at, text in code if first <= at <= last]
        shares.append(sum("LDL" in text or "STL" in text for text in body) / len(body))
    return max(shares)


def compile_case(sm: int, case: Case) -> list[str]:
    """One line for each kernel; those over a limit end in what they are over."""
    built = []
    driver.set_active(CompileOnly(sm))
    prompt_attention_tiles.capability = lambda device: sm
    prompt_attention_triton.processors = lambda device: 132
    for name in ("fwd", "merge", "dq", "dkv", "prompts", "sum"):
        kernel = getattr(prompt_attention_triton, f"{name}_kernel")
        kernel = kernel.kernel if isinstance(kernel, Recorder) else kernel
        setattr(prompt_attention_triton, f"{name}_kernel", Recorder(kernel, built))
    launch(case)
    return described(sm, case, built)


def described(sm: int, case: NamedTuple, built: list) -> list[str]:
    lines = []
    for name, sizes, done in built:
        usage = tool("cuobjdump", "-res-usage", done.asm["cubin"])
        registers, stack = (int(re.search(rf"{w}:(\d+)", usage)[1]) for w in ("REG", "STACK"))
        shared = done.metadata.shared
        local = local_share(tool("cuobjdump", "-sass", done.asm["cubin"])) if stack else 0.0
        limits = [
            ("bytes shared", shared, SMEM_LIMIT[sm]),
            ("bytes stack", stack, STACK_LIMIT),
            ("local share", local, LOCAL_LIMIT),
        ]
        over = [f"OVER {limit} {what}" for what, got, limit in limits if got > limit]
        lines.append(
            f"sm_{sm} {name} {sizes}: {registers} registers, {shared} bytes shared, "
            f"{stack} stack, {local:.1%} local; {case} {' '.join(over)}"
        )
    return lines


def compile_all(compile_case, jobs: list[tuple[int, NamedTuple]]) -> None:
    """Prints a line for each kernel; exits with those over a limit, if any."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        lines = [line for done in pool.map(compile_case, *zip(*jobs, strict=True)) for line in done]
    print("\n".join(lines))
    if any("OVER" in line for line in lines):
        sys.exit("\n".join(line for line in lines if "OVER" in line))


def main():
    jobs = [(sm, case) for sm, cases in CASES.items() for case in cases]
    jobs.sort(key=lambda job: job[1].dtype != FP32)  # the slowest first
    compile_all(compile_case, jobs)


if __name__ == "__main__":
    main()
