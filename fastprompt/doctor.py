"""What of fastprompt is active on this machine, and whether it works: ``fastprompt doctor``."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from fastprompt import native, native_cuda, ops
from fastprompt.ops import nf4_linear_cuda, reference
from fastprompt.ops.fp8_linear import fp8_linear, fp8_linear_backward, row_scales
from fastprompt.ops.nf4_linear import nf4_linear_backward
from fastprompt.ops.packed import unpack
from fastprompt.ops.prompt_attention import chosen_backend
from fastprompt.ops.quantize_rows import quantize_rows
from fastprompt.ops.select_prompts import chosen_backend as selection_backend

PACKAGES = ("torch", "transformers", "triton", "bitsandbytes", "accelerate")
EXTRAS = ("open_clip_torch", "timm", "xformers", "liger-kernel")


def command(arguments: list[str]) -> int:
    """``fastprompt doctor``: 1 if something is wrong."""
    description = "What is active on this machine, and whether it works."
    argparse.ArgumentParser("fastprompt doctor", description=description).parse_args(arguments)
    text, well = examine()
    print(text)
    return 0 if well else 1


def report() -> str:
    """What is active here: versions, devices, backends, the compiled part. Nothing is run
    but a small product of each CUDA kernel."""
    from fastprompt import __version__

    versions = ", ".join(f"{name} {_version(name) or 'missing'}" for name in PACKAGES)
    extras = ", ".join(f"{name} {_version(name) or 'not installed'}" for name in EXTRAS)
    lines = [f"fastprompt {__version__}: {versions}", f"extras: {extras}"]
    lines.append(f"threads on the CPU: {torch.get_num_threads()}")
    for device in _devices():
        like = torch.empty(0, device=device)
        lines.append(
            f"{_named(device)}: attention backend {chosen_backend(like)}, "
            f"selection {selection_backend(like, k=1)}"
        )
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "this torch is built without CUDA" if built is None else "no card or driver is found"
        lines.append(f"cuda: none ({why})")
    active = native.isa() if native.available() else f"missing, {native.why_missing()}"
    serves = "on the CPU: attention, selection, 4-bit weights, norms, activations, rotation"
    lines.append(f"compiled part ({serves}): {active}")
    if native.available():
        lines.append(
            f"4-bit products of few tokens on the CPU by {', '.join(native.multipliers())}"
        )
    lines.append(f"CUDA kernels (4-bit products of few tokens): {_cuda_kernels()}")
    return "\n".join(lines)


def _cuda_kernels() -> str:
    built = native_cuda.archs()
    if not built:
        return "none, the compiled part is missing or was built without them"
    lines = [f"for sm_{', sm_'.join(map(str, built))}"]
    for index in range(torch.cuda.device_count()):
        why = nf4_linear_cuda.why_not(torch.device("cuda", index))
        lines.append(f"cuda:{index} " + (f"not used, {why}" if why else "active"))
    return "; ".join(lines)


def examine() -> tuple[str, bool]:
    """`report`, and each op run once on each device against what it must be: (text, all well).

    A kernel that is not compiled yet is compiled, so the first examination of a GPU takes a while.
    """
    with contextlib.suppress(ImportError):  # the checks that want it will say so
        import bitsandbytes  # noqa: F401 (long, and no check's time)

    lines, well = [report(), ""], True
    for device in _devices():
        if not _has_fp8(device):
            capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
            lines.append(f"{device}  fp8: not here, capability {capability}")
        for name, check in _checks(device):
            started = time.perf_counter()
            try:
                wrong = check()
            except Exception as error:  # whatever it is, the others are worth knowing
                wrong = f"{type(error).__name__}: {error}".splitlines()[0]
            word = f"WRONG: {wrong}" if wrong else f"ok ({time.perf_counter() - started:.2f} s)"
            lines.append(f"{device}  {name:<44} {word}")
            well &= not wrong
    return "\n".join(lines), well


def _checks(device: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, what says what is wrong; "" if nothing is)."""
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        like = torch.empty(0, dtype=dtype, device=device)
        backend = chosen_backend(like)
        yield f"prompt_attention, {kind} ({backend})", lambda like=like: _attention(like, 33)
        yield f"prompt_attention, one query, {kind}", lambda like=like: _attention(like, 1)
        yield f"prompt_attention, 4-D mask, {kind}", lambda like=like: _attention(like, 33, True)
        yield f"select_prompts, {kind}", lambda like=like: _selection(like)
        for name, (define, *given) in _defined(like).items():
            yield f"{name}, {kind}", partial(_as_defined, name, define, *given)
    if _has_fp8(device):
        kind = "emulated" if device == "cpu" else "torch._scaled_mm"
        yield f"4-bit weights in fp8 ({kind})", lambda: _fp8(device)
    yield "dequantize_4bit against bitsandbytes'", lambda: _decoded(device)
    yield "4-bit weights against bitsandbytes'", lambda: _four_bit(device)


def _has_fp8(device: str) -> bool:
    return device == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


def _attention(like: Tensor, N: int, masked: bool = False) -> str:
    """Causal, grouped queries, each sample with its own set of prompts."""
    shapes = [(2, 4, N, 64), (2, 2, 33, 64), (2, 2, 33, 64), (3, 2, 5, 64), (3, 2, 5, 64)]
    which = torch.tensor([2, 0], device=like.device)
    inputs = [_random(like, *shape).requires_grad_() for shape in shapes]
    mask = _random(like, 2, 1, N, 33) > -0.5 if masked else None

    def run(attend, dtype):
        given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = attend(*given, causal=True, prompt_index=which, attn_mask=mask)
        if N == 1:  # so few numbers that the error of a gradient is luck
            return (out,)
        return out, *torch.autograd.grad(out.float().square().sum(), given)

    truth = run(reference.prompt_attention, torch.float64)
    eager = run(reference.prompt_attention, like.dtype)
    return _no_worse(run(ops.prompt_attention, like.dtype), eager, truth)


def _defined(like: Tensor) -> dict[str, tuple[Callable, list[Tensor], list]]:
    """Op -> (what it must be, inputs that get gradients, the others)."""
    x, y = _random(like, 33, 200), _random(like, 3, 11, 200).view(33, 200)
    weight, bias = 1 + _random(like, 200), _random(like, 200)
    heads, angles = [_random(like, 2, n, 33, 64) for n in (4, 2)], _random(like, 2, 33, 64)
    labels = torch.arange(33, device=like.device)
    return {
        "rms_norm": (reference.rms_norm, [x], [weight, 1e-6]),
        "layer_norm": (reference.layer_norm, [x], [weight, bias, 1e-6]),
        "swiglu": (reference.swiglu, [x, y], []),
        "gelu": (reference.gelu, [x], []),
        "rope": (reference.rope, heads, [angles.cos(), angles.sin()]),
        "cosine_logits": (reference.cosine_logits, [x, _random(like, 33, 7, 200)], [4.0]),
        "linear_cross_entropy": (_cross_entropy, [x], [_random(like, 101, 200) / 10, labels]),
    }


def _as_defined(op: str, define: Callable, trained: list[Tensor], rest: list) -> str:
    """Results and gradients."""

    def run(f: Callable, dtype: torch.dtype) -> list[Tensor]:
        given = [x.to(dtype).requires_grad_() for x in trained]
        floats = (isinstance(x, Tensor) and x.is_floating_point() for x in rest)
        others = [x.to(dtype) if is_float else x for x, is_float in zip(rest, floats, strict=True)]
        found = f(*given, *others)
        found = found if isinstance(found, tuple) else (found,)
        grads = torch.autograd.grad(sum(y.double().square().sum() for y in found), given)
        return [*(y for y in found if y.ndim), *grads]  # the error of a single number is luck

    dtype = trained[0].dtype
    return _no_worse(run(getattr(ops, op), dtype), run(define, dtype), run(define, torch.float64))


def _cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ weight.mT
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits.to(wide), labels)


def _selection(like: Tensor) -> str:
    query, keys, prompts = (_random(like, n, 64) for n in (4, 100, 100))
    _, indices, scores = ops.select_prompts(query, keys, prompts, k=5)
    exact = torch.nn.functional.cosine_similarity(
        query.double()[:, None], keys.double()[None], dim=-1
    )
    best = exact.topk(5).values
    off = (exact.gather(1, indices) - best).abs().max().item()
    off = max(off, (scores.double() - best).abs().max().item())
    return "" if off <= 1e-2 else f"the best cosines are missed by {off:.1e}"


def _decoded(device: str) -> str:
    from bitsandbytes import functional as bnb

    packed, state = _quantized(device, 128, 256)
    same = torch.equal(ops.dequantize_4bit((packed, state)), bnb.dequantize_4bit(packed, state))
    return "" if same else "other numbers"


def _quantized(device: str, rows: int, columns: int) -> tuple[Tensor, Any]:
    """A random NF4 weight, and its state."""
    from bitsandbytes import functional as bnb

    weight = _random(torch.empty(0, dtype=torch.bfloat16, device=device), rows, columns)
    return bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)


def _four_bit(device: str) -> str:
    from bitsandbytes import functional as bnb

    packed, state = _quantized(device, 128, 256)
    dense = bnb.dequantize_4bit(packed, state)
    exact = dense.double()
    for tokens in (3, 33, 700):  # each way of multiplying has its own numbers of them
        x, dy = _random(dense, tokens, 256), _random(dense, tokens, 128)
        ours = ops.nf4_linear(x, (packed, state)), nf4_linear_backward(dy, (packed, state))
        eager, truth = (x @ dense.mT, dy @ dense), (x.double() @ exact.mT, dy.double() @ exact)
        wrong = _no_worse(ours, eager, truth)
        if wrong:
            return f"{tokens} tokens: {wrong}"
    return ""


def _fp8(device: str) -> str:
    """Both directions, against the numbers that the weight was quantised to."""
    from bitsandbytes import functional as bnb

    packed, state = _quantized(device, 256, 128)
    opened, dense = [unpack((packed, state))], bnb.dequantize_4bit(packed, state).double()
    scales = row_scales(opened)
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    x, dy = _random(like, 33, 128), _random(like, 33, 256)
    y = fp8_linear(quantize_rows(x), opened, scales, None)
    dx = fp8_linear_backward(quantize_rows(dy, scales), opened, scales)
    for got, want in ((y, x.double() @ dense.mT), (dx, dy.double() @ dense)):
        off = (got - want).norm() / want.norm()
        if not off <= 0.05:  # two operands, each rounded to 0.027 of itself on average
            return f"off by {off:.1e}, where 5.0e-02 is allowed"
    return ""


def _no_worse(ours, eager, truth) -> str:
    """The one rule of accuracy: at most twice eager's own error, and a rounding."""
    for got, other, exact in zip(ours, eager, truth, strict=True):
        scale = exact.norm()
        limit = 2 * (other - exact).norm() + torch.finfo(got.dtype).eps * scale
        off = (got - exact).norm()
        if not off <= limit:
            return f"off by {off / scale:.1e}, where {limit / scale:.1e} is allowed"
    return ""


def _random(like: Tensor, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(like)


def _devices() -> list[str]:
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def _named(device: str) -> str:
    if device == "cpu":
        return device
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} ({torch.cuda.get_device_name(device)}, sm_{major}{minor})"


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # with its build (+cu130)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
