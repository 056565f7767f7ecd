"""Decoding 4-bit weights on the CPU.

Set OMP_WAIT_POLICY=passive on a machine that other processes use too: OpenMP's spinning threads
then cost more than what is measured.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.registry import Benchmark, NotMeasured, Provider, Step, Verdict
from benchmarks.weights import bitsandbytes, nf4
from fastprompt import native
from fastprompt.ops.packed import unpack

PLAIN, NESTED = "plain absmax", "nested absmax"


@dataclass(frozen=True)
class Weight:
    rows: int
    columns: int

    def __str__(self) -> str:
        return f"W {self.rows}x{self.columns}"


def _shapes(device: str, quick: bool) -> dict[str, Weight]:
    if device != "cpu":
        return {}
    small = {"SmolLM2-135M up": Weight(1536, 576)}
    large = {"Llama-7B q": Weight(4096, 4096), "Llama-7B down": Weight(4096, 11008)}
    return small if quick else {**large, **small}


class Case:
    """A quantised weight, plain and nested, and what bitsandbytes decodes it to."""

    def __init__(self, shape: Weight, dtype: torch.dtype, device: str):
        self.shape, self.dtype = shape, dtype
        dense = torch.randn(shape.rows, shape.columns, dtype=dtype)
        self.weights, self.dense = {}, {}
        for mode in (PLAIN, NESTED):
            weight = self.weights[mode] = nf4(dense, nested=mode == NESTED)
            self.dense[mode] = bitsandbytes().dequantize_4bit(*weight)


def judge(case: Case, mode: str, results: dict[str, Tensor]) -> Verdict:
    """Bit for bit what bitsandbytes gives."""
    exact = torch.equal(results["w"], case.dense[mode])
    return Verdict("w", 0.0 if exact else float("inf"))


def _bitsandbytes(case, mode):
    weight, decode = case.weights[mode], bitsandbytes().dequantize_4bit
    return Step(lambda: (decode(*weight),), lambda given: dict(w=given[0]))


def _decode(variant=None, fresh=False):
    """As the products do it, into one buffer; or each time into new memory."""

    def build(case, mode):
        if not native.available():
            raise NotMeasured(native.why_missing())
        if variant and variant not in native.variants():
            raise NotMeasured(f"this machine does not run {variant}")
        w, size = unpack(case.weights[mode]), (case.shape.rows, case.shape.columns)
        shared = torch.full(size, torch.nan, dtype=case.dtype)

        def run():
            to = torch.empty(size, dtype=case.dtype) if fresh else shared
            native.decode_4bit(to, w.packed, w.code, w.absmax, w.blocksize, w.nested, variant)
            return (to,)

        return Step(run, lambda given: dict(w=given[0]))

    return build


BENCHMARK = Benchmark(
    name="decode_4bit",
    about="NF4 weights to dense ones on the CPU",
    modes=(PLAIN, NESTED),
    dtypes=dict(cpu=("bf16", "fp32", "fp16")),
    baseline="bitsandbytes",
    shapes=_shapes,
    case=Case,
    judge=judge,
    providers={
        "bitsandbytes": Provider(_bitsandbytes, "bitsandbytes.functional.dequantize_4bit"),
        "fastprompt": Provider(_decode(), "fastprompt.native, into the shared buffer", ours=True),
        "new-memory": Provider(_decode(fresh=True), "the same, into new memory", ours=True),
        **{
            name: Provider(_decode(name), f"the same, {name} code", ours=True)
            for name in ("avx512", "avx2", "neon", "portable")
        },
    },
)
