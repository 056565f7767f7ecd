"""4-bit weights on the CPU: decoding them, and products with them.

Set OMP_WAIT_POLICY=passive on a machine that other processes use too: OpenMP's spinning threads
then cost more than what is measured.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm as norm

from benchmarks.registry import Benchmark, NotMeasured, Provider, Step, Verdict
from fastprompt import native
from fastprompt.ops.nf4_linear import nf4_linear
from fastprompt.ops.packed import unpack

PLAIN, NESTED = "plain absmax", "nested absmax"
FORWARD, DX = "forward", "forward+backward (dx)"
DTYPES = dict(cpu=("bf16", "fp32", "fp16"))


@dataclass(frozen=True)
class Weight:
    rows: int
    columns: int
    tokens: int = 0

    def __str__(self) -> str:
        tokens = f"{self.tokens} tokens, " * bool(self.tokens)
        return f"{tokens}W {self.rows}x{self.columns}"


def _decode_shapes(device: str, quick: bool) -> dict[str, Weight]:
    if device != "cpu":
        return {}
    small = {"SmolLM2-135M up": Weight(1536, 576)}
    large = {"Llama-7B q": Weight(4096, 4096), "Llama-7B down": Weight(4096, 11008)}
    return small if quick else {**large, **small}


def _product_shapes(device: str, quick: bool) -> dict[str, Weight]:
    if device != "cpu":
        return {}
    small = {"SmolLM2-135M up": Weight(1536, 576, tokens=64 if quick else 2000)}
    large = {
        "Llama-7B q": Weight(4096, 4096, tokens=512),
        "Llama-7B q, one token": Weight(4096, 4096, tokens=1),
    }
    return small if quick else {**small, **large}


class Case:
    """A quantised weight, plain and nested, and what bitsandbytes decodes it to."""

    def __init__(self, shape: Weight, dtype: torch.dtype, device: str):
        if find_spec("bitsandbytes") is None:
            raise NotMeasured("bitsandbytes, which makes the weights, is not installed")
        import bitsandbytes.functional as bnbf  # not at the top: GPU machines do without it

        self.shape, self.dtype = shape, dtype
        dense = torch.randn(shape.rows, shape.columns, dtype=dtype)
        self.weights, self.dense = {}, {}
        for mode in (PLAIN, NESTED):
            nested = mode == NESTED
            weight = bnbf.quantize_4bit(dense, quant_type="nf4", compress_statistics=nested)
            self.weights[mode], self.dense[mode] = weight, bnbf.dequantize_4bit(*weight)
        if shape.tokens:
            self.x = torch.randn(shape.tokens, shape.columns, dtype=dtype)
            self.dy = torch.randn(shape.tokens, shape.rows, dtype=dtype)


# ---- decoding: bit for bit what bitsandbytes gives ----


def _judge_decoded(case: Case, mode: str, results: dict[str, Tensor]) -> Verdict:
    exact = torch.equal(results["w"], case.dense[mode])
    return Verdict("w", 0.0 if exact else float("inf"))


def _bitsandbytes(case, mode):
    import bitsandbytes.functional as bnbf

    weight = case.weights[mode]
    return Step(lambda: (bnbf.dequantize_4bit(*weight),), lambda given: dict(w=given[0]))


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


DECODE = Benchmark(
    name="decode_4bit",
    about="NF4 weights to dense ones on the CPU",
    modes=(PLAIN, NESTED),
    dtypes=DTYPES,
    baseline="bitsandbytes",
    shapes=_decode_shapes,
    case=Case,
    judge=_judge_decoded,
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

# ---- products ----


def _product(way):
    """``way(case, x) -> y``, with a nested weight."""

    def build(case, mode):
        x = case.x.detach().requires_grad_(mode == DX)

        def run():
            if mode == FORWARD:
                with torch.no_grad():
                    return (way(case, x),)
            y = way(case, x)
            return y, torch.autograd.grad(y, x, case.dy)[0]

        names = ("y", "dx")[: 1 + (mode == DX)]
        return Step(run, lambda given: {n: t.detach() for n, t in zip(names, given, strict=True)})

    return build


def _judge_product(case: Case, mode: str, results: dict[str, Tensor]) -> Verdict:
    """Within 1% of the dense product, as each rounds its sums in its own order."""
    dense = _product(_dense)(case, mode)
    want = dense.results(dense.run())
    shares = {
        name: float(norm(results[name].double() - t.double()) / (1e-2 * norm(t.double())))
        for name, t in want.items()
    }
    return Verdict(*max(shares.items(), key=lambda item: item[1]))


def _dense(case, x):
    return F.linear(x, case.dense[NESTED])


def _matmul_4bit(case, x):
    import bitsandbytes as bnb

    return bnb.matmul_4bit(x, *case.weights[NESTED])


PRODUCT = Benchmark(
    name="nf4_linear",
    about="x·Wᵀ with a nested NF4 weight on the CPU",
    modes=(FORWARD, DX),
    dtypes=DTYPES,
    baseline="dense",
    shapes=_product_shapes,
    case=Case,
    judge=_judge_product,
    providers={
        "dense": Provider(_product(_dense), "F.linear with the decoded weight kept"),
        "bitsandbytes": Provider(_product(_matmul_4bit), "bitsandbytes.matmul_4bit"),
        "fastprompt": Provider(
            _product(lambda case, x: nf4_linear(x, case.weights[NESTED])),
            "fastprompt.ops.nf4_linear",
            ours=True,
        ),
    },
)
