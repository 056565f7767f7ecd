"""The elementwise parts of a frozen block, and decoding: each against copying the same bytes.

Weights are frozen, and residuals added, as in a block. Liger-kernel's own functions compute their
weights' gradients whether wanted or not, and some overwrite their inputs: it gets copies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod

import torch
from torch import Tensor

from benchmarks import check
from benchmarks.registry import Benchmark, NotMeasured, Provider, Step, Verdict
from benchmarks.weights import bitsandbytes, nf4
from fastprompt import ops
from fastprompt.ops import reference

FORWARD, BACKWARD = "forward", "forward+backward"
EPS = 1e-6


@dataclass(frozen=True)
class Part:
    op: str
    rows: int  # tokens; of a weight, its output channels
    width: int  # channels; of rope, of all query heads
    keys: int = 0  # rope: channels of all key heads
    d: int = 128  # rope: channels of a head

    def __str__(self) -> str:
        return f"{self.rows}x{self.width}" + f"+{self.keys} d{self.d}" * bool(self.keys)


def _shapes(device: str, quick: bool) -> dict[str, Part]:
    # LLaVA-1.5-7B at batch 4: 1,024 tokens of text and image; 577 patches of CLIP-L/336. ViT-B/16.
    text, clip, vit = (4096, 4 * 577, 128 * 197) if device == "cuda" else (512, 577, 4 * 197)
    if quick:
        text, clip, vit = 64, 64, 64
    parts = {
        "Llama-7B rms_norm": Part("rms_norm", text, 4096),
        "CLIP-L layer_norm": Part("layer_norm", clip, 1024),
        "Llama-7B swiglu": Part("swiglu", text, 11008),
        "Gemma-7B geglu": Part("geglu", text, 24576),
        "CLIP-L gelu": Part("gelu_quick", clip, 4096),
        "ViT-B gelu": Part("gelu", vit, 3072),
        "Llama-7B rope": Part("rope", text, 4096, keys=4096),
        "Llama-8B rope": Part("rope", text, 4096, keys=1024),
        "Llama-7B decode": Part("decode", 11008, 4096),
    }
    few = {"Llama-7B rms_norm", "CLIP-L layer_norm", "CLIP-L gelu", "Llama-8B rope"}
    return {name: part for name, part in parts.items() if not quick or name in few}


# ---- the work: a function of these tensors, for eager PyTorch and for us ----


class Case:
    def __init__(self, shape: Part, dtype: torch.dtype, device: str):
        s, like = shape, dict(dtype=dtype, device=device)
        self.shape, self.dtype, self.device = shape, dtype, device
        self.frozen: tuple[Tensor, ...] = ()  # beside the inputs that want gradients
        self.weight = None
        if s.op == "decode":
            self.inputs, self.weight = (), nf4(torch.randn(s.rows, s.width, **like))
            return
        if s.op in ("swiglu", "geglu"):
            inputs = torch.randn(s.rows, 2 * s.width, **like).tensor_split(2, -1)
        elif s.op == "rope":
            inputs = [
                torch.randn(1, s.rows, n // s.d, s.d, **like).transpose(1, 2)
                for n in (s.width, s.keys)
            ]
            angle = torch.rand(1, s.rows, s.d // 2, device=device).repeat(1, 1, 2)
            self.frozen = angle.cos().to(dtype), angle.sin().to(dtype)
        else:
            both = s.op in ("rms_norm", "layer_norm")
            inputs = torch.randn(1 + both, s.rows, s.width, **like).unbind(0)
            if both:
                self.frozen = torch.randn(2, s.width, **like).unbind(0)
        self.inputs = tuple(t.detach() for t in inputs)
        self.grads = tuple(torch.randn_like(t) for t in self.eager(*self.inputs))
        self.truth, self.limits = self._truth()

    def eager(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return _tuple(EAGER[self.shape.op](*inputs, *(t.to(inputs[0].dtype) for t in self.frozen)))

    def ours(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return _tuple(OURS[self.shape.op](*inputs, *self.frozen))

    def _truth(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        truth = _run(
            self.eager, [t.double() for t in self.inputs], [g.double() for g in self.grads]
        )
        eager = _run(self.eager, self.inputs, self.grads)
        return truth, {name: check.limit(eager[name], want) for name, want in truth.items()}


def _tuple(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _run(way, inputs, grads) -> dict[str, Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    outs = way(*inputs)
    return _named(outs, torch.autograd.grad(outs, inputs, grads))


def _named(outs, grads=()) -> dict[str, Tensor]:
    named = {f"out[{i}]": t.detach() for i, t in enumerate(outs)}
    return named | {f"grad[{i}]": t for i, t in enumerate(grads)}


EAGER: dict[str, Callable] = {
    "rms_norm": lambda x, r, w, _: reference.rms_norm(x, w, EPS, residual=r),
    "layer_norm": lambda x, r, w, b: reference.layer_norm(x, w, b, EPS, residual=r),
    "swiglu": reference.swiglu,
    "geglu": lambda gate, up: reference.swiglu(gate, up, "gelu_tanh"),
    "gelu": reference.gelu,
    "gelu_quick": lambda x: reference.gelu(x, "quick"),
    "rope": reference.rope,
}
OURS: dict[str, Callable] = {
    "rms_norm": lambda x, r, w, _: ops.rms_norm(x, w, EPS, residual=r),
    "layer_norm": lambda x, r, w, b: ops.layer_norm(x, w, b, EPS, residual=r),
    "swiglu": ops.swiglu,
    "geglu": lambda gate, up: ops.swiglu(gate, up, activation="gelu_tanh"),
    "gelu": ops.gelu,
    "gelu_quick": lambda x: ops.gelu(x, "quick"),
    "rope": ops.rope,
}


def judge(case: Case, mode: str, results: dict[str, Tensor]) -> Verdict:
    """Decoded weights bit for bit; else the one rule of accuracy."""
    if case.weight is not None:
        want = bitsandbytes().dequantize_4bit(*case.weight)
        exact = torch.equal(results["out[0]"], want)
        return Verdict("out[0]", 0.0 if exact else float("inf"))
    truth = {n: t for n, t in case.truth.items() if mode == BACKWARD or n.startswith("out")}
    return check.judge(results, truth, case.limits, case.dtype)


# ---- providers ----


def _step(case: Case, mode: str, way: Callable, own_inputs: bool = False) -> Step:
    if case.weight is not None and mode == BACKWARD:
        raise NotMeasured("a frozen weight is decoded again in backward: see forward")
    if mode == FORWARD:
        inputs = [t.clone() if own_inputs else t for t in case.inputs]

        def run():
            with torch.no_grad():
                return (way(*inputs), ())
    else:
        inputs = [(t.clone() if own_inputs else t.detach()).requires_grad_() for t in case.inputs]
        grads = [g.clone() if own_inputs else g for g in case.grads]

        def run():
            outs = way(*inputs)
            return outs, torch.autograd.grad(outs, inputs, grads)

    return Step(run, lambda given: _named(*given))


def _eager(case, mode):
    if case.weight is None:
        return _step(case, mode, case.eager)
    decode = bitsandbytes().dequantize_4bit
    return _step(case, mode, lambda: (decode(*case.weight),))


def _compile(case, mode):
    if case.weight is not None:
        raise NotMeasured("bitsandbytes' kernel is not for torch.compile to fuse")
    return _step(case, mode, torch.compile(case.eager, dynamic=False))


def _liger(case, mode):
    if find_spec("liger_kernel") is None:
        raise NotMeasured("liger-kernel is not installed (pip install liger-kernel)")
    if case.device == "cpu":
        raise NotMeasured("liger-kernel's kernels need a GPU")
    from liger_kernel.transformers import functional as liger

    w, b = (*case.frozen, None, None)[:2]
    ways = {
        "rms_norm": lambda x, r: liger.liger_fused_add_rms_norm(x, r, w, EPS),
        "swiglu": liger.liger_swiglu,
        "geglu": liger.liger_geglu,
        "rope": lambda q, k: liger.liger_rope(q, k, w, b),
    }

    def layer_norm(x, r):
        total = x + r
        return liger.liger_layer_norm(total, w, b, EPS), total

    ways["layer_norm"] = layer_norm
    if case.shape.op not in ways:
        raise NotMeasured(f"liger-kernel has no {case.shape.op}")
    way = ways[case.shape.op]
    return _step(case, mode, lambda *x: _tuple(way(*x)), own_inputs=True)


def _copy(case, mode):
    if case.weight is not None and mode == BACKWARD:
        raise NotMeasured("as the others")
    half = cost(case.shape, mode, case.dtype.itemsize)[0] // 2  # read, and written
    source = torch.ones(half, dtype=torch.uint8, device=case.device)
    into = torch.empty_like(source)
    return Step(lambda: (into.copy_(source),), lambda given: {})


def _ours(case, mode):
    if case.weight is None:
        return _step(case, mode, case.ours)
    into = torch.empty(case.shape.rows, case.shape.width, dtype=case.dtype, device=case.device)
    return _step(case, mode, lambda: (ops.dequantize_4bit(case.weight, out=into),))


def cost(s: Part, mode: str, itemsize: int) -> tuple[int, int]:
    """Bytes of the tensors that are read and written, each once."""
    n = s.rows * s.width
    if s.op == "decode":
        return n // 2 + n // 64 + n * itemsize, 0
    forward, backward = {
        "rms_norm": (4, 4),  # x, residual, sum, y; dy, the sum's gradient, the sum, dx
        "layer_norm": (4, 4),
        "swiglu": (3, 5),
        "geglu": (3, 5),
        "gelu": (2, 3),
        "gelu_quick": (2, 3),
        "rope": (2, 2),
    }[s.op]
    elements = (n + s.rows * s.keys) * (forward + backward * (mode == BACKWARD))
    angles = prod((2, s.rows, s.d, 1 + (mode == BACKWARD))) if s.op == "rope" else 0
    return (elements + angles) * itemsize, 0


BENCHMARK = Benchmark(
    name="frozen_ops",
    about="norms, activations, rotation and decoding of frozen blocks",
    modes=(FORWARD, BACKWARD),
    dtypes=dict(cuda=("bf16", "fp16", "fp32"), cpu=("fp32", "bf16")),
    baseline="eager",
    shapes=_shapes,
    case=Case,
    judge=judge,
    cost=cost,
    providers={
        "eager": Provider(_eager, "torch's operations; decoding: bitsandbytes"),
        "compile": Provider(_compile, "torch.compile of the same", compiles=True),
        "liger": Provider(_liger, "liger-kernel, where it has the op"),
        "copy": Provider(
            _copy, "a copy of the bytes that the op reads and writes", exempt="only a copy"
        ),
        "fastprompt": Provider(_ours, "fastprompt.ops", ours=True),
    },
)
