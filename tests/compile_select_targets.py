"""Compile every kernel of `select_prompts` for the cards we serve: see compile_targets."""

import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch
from compile_targets import (
    LOCAL_LIMIT,
    SMEM_LIMIT,
    STACK_LIMIT,
    CompileOnly,
    Recorder,
    local_share,
    tool,
)
from triton.runtime import driver

from fastprompt.ops import select_prompts_triton as launcher

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INT8 = torch.int8


class Case(NamedTuple):
    query: torch.dtype
    keys: torch.dtype
    prompts: torch.dtype
    B: int
    C: int
    k: int
    D: int = 512
    E: int = 768
    L: int | None = None  # rows a class, two far apart
    rest: str = "sum"  # "sum", "total", "none"


# every row of the tables, each pair of dtypes, most and fewest candidates, odd sizes and strides
CASES = [
    Case(BF16, BF16, BF16, 64, 37, 5),
    Case(BF16, BF16, BF16, 64, 37, 1, rest="total"),
    Case(BF16, BF16, BF16, 256, 1000, 16),
    Case(FP16, FP16, FP16, 256, 1000, 64, D=515, E=1, rest="none"),
    Case(BF16, BF16, BF16, 1024, 1000, 16, L=5),
    Case(BF16, BF16, FP32, 1024, 1000, 64, D=1),
    Case(BF16, BF16, BF16, 4, 5000, 16),
    Case(BF16, BF16, BF16, 4, 5000, 64),
    Case(BF16, BF16, BF16, 64, 5000, 16),
    Case(BF16, BF16, FP64, 64, 5000, 64, L=5),
    Case(BF16, BF16, BF16, 1024, 5000, 16),
    Case(BF16, BF16, BF16, 1024, 5000, 64),
    Case(FP16, FP16, FP16, 1024, 5000, 64, D=515, E=77),
    Case(BF16, INT8, BF16, 256, 1000, 16),
    Case(FP16, INT8, FP16, 1024, 5000, 64),
    Case(FP32, INT8, FP32, 1024, 5000, 64),
    Case(FP32, FP32, FP32, 64, 1000, 16),
    Case(FP32, FP32, FP32, 64, 1000, 64, D=515, E=77),
    Case(FP32, FP32, FP32, 1024, 5000, 16),
    Case(FP32, FP32, FP32, 1024, 5000, 64, D=515),
    Case(FP16, BF16, FP32, 1024, 1000, 16),
    Case(FP32, FP64, BF16, 1024, 1000, 16),
]


def launch(case: Case):
    query = torch.empty(case.B, case.D, dtype=case.query)
    keys = torch.empty(case.C, case.D, dtype=case.keys)
    prompts = torch.empty(case.C, case.E, dtype=case.prompts)
    if case.L is not None:
        prompts = torch.empty(case.C, case.L, 2 * case.E, dtype=case.prompts)[..., : case.E]
    scale = torch.empty(case.C) if case.keys == INT8 else None
    total = torch.empty(*prompts.shape[1:], dtype=FP64) if case.rest == "total" else None
    launcher.forward(query, keys, prompts, case.k, case.rest != "none", scale, total)


def compile_case(sm: int, case: Case) -> list[str]:
    """One line for each kernel; those over a limit end in what they are over."""
    built = []
    driver.set_active(CompileOnly(sm))
    launcher.capability = lambda device: sm
    launcher.processors = lambda device: 132
    for name in ("rank_kernel", "gather_kernel"):
        kernel = getattr(launcher, name)
        kernel = kernel.kernel if isinstance(kernel, Recorder) else kernel
        setattr(launcher, name, Recorder(kernel, built))
    launch(case)

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


def main():
    jobs = [(sm, case) for sm in SMEM_LIMIT for case in CASES]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        lines = [line for done in pool.map(compile_case, *zip(*jobs, strict=True)) for line in done]
    print("\n".join(lines))
    if any("OVER" in line for line in lines):
        sys.exit("\n".join(line for line in lines if "OVER" in line))


if __name__ == "__main__":
    main()
