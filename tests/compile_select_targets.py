"""Compile the kernels of `select_prompts` and `cosine_logits` for the cards we serve.

See compile_targets.
"""

from typing import NamedTuple

import torch
from compile_targets import SMEM_LIMIT, CompileOnly, Recorder, compile_all, described
from triton.runtime import driver

from fastprompt.ops import cosine_logits_triton as cosines
from fastprompt.ops import select_prompts_triton as launcher
from fastprompt.ops.cosine_logits import MOST_CHANNELS

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
    Case(BF16, FP32, FP32, 32, 1000, 16, E=0, rest="none"),  # classes kept in training
]


class Cosines(NamedTuple):
    cls: torch.dtype
    tokens: torch.dtype
    C: int
    D: int
    gap: int = 0  # between rows


# one token a program and many, widths that are powers of two and are not, unaligned rows
COSINES = [
    Cosines(BF16, BF16, 1, 8),
    Cosines(BF16, BF16, 37, 384),
    Cosines(FP16, FP16, 1000, 768, gap=1),
    Cosines(FP32, FP32, 37, 768),
    Cosines(FP32, BF16, 102, 1024),
    Cosines(BF16, BF16, 37, MOST_CHANNELS),
    Cosines(FP32, FP32, 5, MOST_CHANNELS - 3, gap=2),
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


def compile_case(sm: int, case: Case | Cosines) -> list[str]:
    """One line for each kernel; those over a limit end in what they are over."""
    built = []
    driver.set_active(CompileOnly(sm))
    if isinstance(case, Cosines):
        _record(cosines, ("forward_kernel", "backward_kernel"), built)
        row = torch.empty(2, case.C, case.D + case.gap, dtype=case.tokens)[..., : case.D]
        cls = torch.empty(2, case.D, dtype=case.cls)
        cosines.forward(cls, row)
        cosines.backward(torch.empty(2, case.C), cls, row)
        return described(sm, case, built)
    launcher.capability = lambda device: sm
    launcher.processors = lambda device: 132
    _record(launcher, ("rank_kernel", "gather_kernel"), built)
    launch(case)
    return described(sm, case, built)


def _record(module, names: tuple[str, ...], built: list) -> None:
    for name in names:
        kernel = getattr(module, name)
        kernel = kernel.kernel if isinstance(kernel, Recorder) else kernel
        setattr(module, name, Recorder(kernel, built))


def main():
    compile_all(compile_case, [(sm, case) for sm in SMEM_LIMIT for case in (*CASES, *COSINES)])


if __name__ == "__main__":
    main()
