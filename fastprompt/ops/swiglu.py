"""The gated activation of a decoder's MLP: ``silu(gate) · up``, or with GELU's tanh form (Gemma).

    y = a(g) u,    dg = dy u a'(g),    du = dy a(g)

    silu:       a(g) = g s(g)        s the logistic sigmoid, a' = s (1 + g (1 - s))
    gelu_tanh:  a(g) = g s(2t)       t = sqrt(2/π) (g + 0.044715 g³)

Computed in float32 and rounded once. Gate and up are kept, y is not: the frozen product behind it
does not need it. GLU variants: arXiv 2002.05202.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt import native_elementwise
from fastprompt.ops import reference
from fastprompt.ops.checks import (
    AND_NATIVE,
    by_native,
    by_reference,
    by_triton,
    check_backend,
    check_floats,
    check_shape,
)
from fastprompt.ops.layout import distinct, pieces

ACTIVATIONS = ("silu", "gelu_tanh")

# ---- without autograd: what a hand-written backward calls ----


def forward(
    gate: Tensor,
    up: Tensor,
    *,
    activation: str = "silu",
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """As `swiglu`, whose checks it leaves out; ``out`` (any strides) may be gate or up itself."""
    y = gate.new_empty(gate.shape) if out is None else out
    check_shape("out", y, gate.shape)
    if by_triton(gate, backend):
        from fastprompt.ops import activations_triton as triton

        triton.forward(gate, up, activation, y)
        return y
    if by_native(backend, gate, up, y, alike=True):
        native_elementwise.activate(gate, up, activation, y)
        return y
    for gate_, up_, y_ in pieces(gate, up, y):
        _multiply(_active(gate_, activation), up_, y_)
    return y


def backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    activation: str = "silu",
    into: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(dgate, dup), the halves of one new [..., 2F], or of whatever strides ``into`` has.

    ``into`` may be (gate, up) themselves, whose values are then gone, and either may be dy.
    """
    if into is None:
        both = gate.new_empty(*gate.shape[:-1], 2 * gate.shape[-1])
        into = both.tensor_split(2, dim=-1)
    dgate, dup = into
    check_shape("into[0]", dgate, gate.shape)
    check_shape("into[1]", dup, gate.shape)
    if by_triton(gate, backend):
        from fastprompt.ops import activations_triton as triton

        triton.backward(dy, gate, up, activation, dgate, dup)
        return dgate, dup
    if by_native(backend, gate, dy, up, dgate, dup, alike=True):
        native_elementwise.activate_backward(dy, gate, up, activation, dgate, dup)
        return dgate, dup
    for dy_, gate_, up_, dgate_, dup_ in pieces(dy, gate, up, dgate, dup):
        # both are made before either is written, since any may be memory of an input
        active, pulled = _active(gate_, activation), dy_ * up_
        if activation == "silu":
            torch.ops.aten.silu_backward.grad_input(pulled, gate_, grad_input=pulled)
        else:
            inputs = (pulled, gate_)
            torch.ops.aten.gelu_backward.grad_input(*inputs, approximate="tanh", grad_input=pulled)
        _multiply(active, dy_, dup_)
        dgate_.copy_(pulled)
    return dgate, dup


def _active(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def _multiply(made: Tensor, other: Tensor, out: Tensor) -> None:
    if torch.compiler.is_compiling():  # takes no ``out`` with gaps
        out.copy_(made * other)
    else:
        torch.mul(made, other, out=out)


# ---- op: schema, fake, autograd ----

torch.library.define(
    "fastprompt::swiglu", "(Tensor gate, Tensor up, str activation, str backend) -> Tensor"
)
torch.library.define(
    "fastprompt::swiglu_backward",
    "(Tensor dy, Tensor gate, Tensor up, str activation, str backend) -> Tensor",
)


def _forward(gate, up, activation, backend):
    return forward(gate, up, activation=activation, backend=backend)


def _backward(dy, gate, up, activation, backend):
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    both = gate.new_empty(*gate.shape[:-1], 2 * gate.shape[-1])
    into = both.tensor_split(2, dim=-1)
    backward(dy, gate, up, activation=activation, into=into, backend=backend)
    return both


for _key in ("CPU", "CUDA"):
    torch.library.impl("fastprompt::swiglu", _key, _forward)
    torch.library.impl("fastprompt::swiglu_backward", _key, _backward)


@torch.library.register_fake("fastprompt::swiglu")
def _result(gate, up, activation, backend):
    return gate.new_empty(gate.shape)


@torch.library.register_fake("fastprompt::swiglu_backward")
def _gradients(dy, gate, up, activation, backend):
    return gate.new_empty(*gate.shape[:-1], 2 * gate.shape[-1])


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation, backend):
        ctx.save_for_backward(gate, up)
        ctx.options = activation, backend
        return torch.ops.fastprompt.swiglu(gate, up, activation, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        both = torch.ops.fastprompt.swiglu_backward(dy, *ctx.saved_tensors, *ctx.options)
        grads = both.tensor_split(2, dim=-1)
        return (
            *(g if w else None for g, w in zip(grads, ctx.needs_input_grad, strict=False)),
            None,
            None,
        )


# ---- public ----


def swiglu(gate: Tensor, up: Tensor, *, activation: str = "silu", backend: str = "auto") -> Tensor:
    """``activation(gate) · up``, elementwise.

    Args:
        gate, up: [..., F] float32, float16, bfloat16 or float64, any strides with a contiguous
            last axis, such as the halves of one [..., 2F] (on CUDA leading axes that merge into
            three at most).
        activation: "silu" (Llama, Mistral, Qwen) or "gelu_tanh" (Gemma).
        backend: "triton" (CUDA; on the CPU its interpreter), "native" (csrc: float32 and bfloat16
            on the CPU), "plain" (torch's operations with a hand-written backward) or "reference".
            "auto" is Triton on CUDA, else native; what either does not take is plain, and float64
            is the reference unless "plain".

    Returns:
        [..., F] in gate's dtype, contiguous. Gradients go to both.

    Raises:
        ValueError: a shape, stride, dtype, device or activation that the op does not serve.
    """
    check_floats(gate=gate, up=up)
    check_backend(backend, gate.device, AND_NATIVE)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: want one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if gate.ndim == 0:
        raise ValueError("gate: want [..., F], got a single number")
    check_shape("up", up, gate.shape)
    if by_reference(gate, backend):
        return reference.swiglu(gate, up, activation)
    return _SwiGLU.apply(*distinct(gate, up, activation, backend))
