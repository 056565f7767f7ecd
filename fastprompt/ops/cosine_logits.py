"""Scaled cosine similarity of CLS to each prompt's output: the logits of an aligning loss.

    y_bc  = scale · c_b · t_bc / (|c_b| |t_bc|)                      0 with a row of length 0
    dt_bc = dy_bc (ĉ_b - s_bc t̂_bc) / |t_bc|,     dc_b = sum_c dy_bc (t̂_bc - s_bc ĉ_b) / |c_b|

with ^ for unit length and s for the cosine. Instruction-ViT (arXiv 2305.00201) trains with the
cross-entropy of these logits beside that of its head. Tokens of a batch are read once each way by
a Triton kernel on CUDA; one set of tokens for the whole batch is two of the vendor's products.
"""

import functools

import torch
from torch import Tensor

from fastprompt.ops import reference
from fastprompt.ops.checks import check_backend, check_floats
from fastprompt.ops.layout import distinct

MOST_CHANNELS = 8192  # that a program of the Triton kernels holds of a row

# ---- op: schema, fake, dispatch ----

torch.library.define("fastprompt::cosines", "(Tensor cls, Tensor tokens, str backend) -> Tensor")
torch.library.define(
    "fastprompt::cosines_backward",
    "(Tensor dout, Tensor cls, Tensor tokens, str backend) -> (Tensor, Tensor)",
)


@torch.library.register_fake("fastprompt::cosines")
def _outputs(cls, tokens, backend):
    return cls.new_empty(cls.shape[0], tokens.shape[-2], dtype=torch.float32)


@torch.library.register_fake("fastprompt::cosines_backward")
def _gradients(dout, cls, tokens, backend):
    return cls.new_empty(cls.shape), tokens.new_empty(tokens.shape)


def _by_triton(cls: Tensor, tokens: Tensor, backend: str) -> bool:
    if tokens.numel() == 0 or tokens.ndim == 2 or tokens.shape[2] > MOST_CHANNELS:
        return False
    return backend == "triton" or (backend == "auto" and cls.device.type == "cuda")


def _without_autocast(run):
    """A cosine is float32's to compute, whatever autocast would make of its products."""

    @functools.wraps(run)
    def wrapped(first, *rest):
        with torch.autocast(first.device.type, enabled=False):
            return run(first, *rest)

    return wrapped


@_without_autocast
def _forward(cls, tokens, backend):
    if _by_triton(cls, tokens, backend):
        from fastprompt.ops import cosine_logits_triton as triton

        return triton.forward(cls, tokens)
    return reference.cosine_logits(cls, tokens, 1.0)


@_without_autocast
def _backward(dout, cls, tokens, backend):
    if _by_triton(cls, tokens, backend):
        from fastprompt.ops import cosine_logits_triton as triton

        return triton.backward(dout, cls, tokens)
    c, c_factor, _ = reference.unit_rows(cls)
    t, t_factor, _ = reference.unit_rows(tokens)
    s = c @ t.mT if t.ndim == 2 else (t @ c[..., None]).squeeze(-1)
    pull = dout * s  # along the row itself, where a longer row changes nothing
    # a row of length 0 has no direction to be turned from: no gradient to it, nor by it
    c_lives, t_lives = c_factor > 0, (t_factor > 0).squeeze(-1)
    dout = dout * (c_lives & t_lives)
    if tokens.ndim == 2:
        dc = dout @ t - pull.sum(1, keepdim=True) * c
        dt = dout.mT @ c - pull.sum(0)[:, None] * t
    else:
        dc = (dout[:, None] @ t).squeeze(1) - pull.sum(1, keepdim=True) * c
        dt = dout[..., None] * c[:, None] - pull[..., None] * t
    return (dc * c_factor).to(cls.dtype), (dt * t_factor).to(tokens.dtype)


for _key in ("CPU", "CUDA"):
    torch.library.impl("fastprompt::cosines", _key, _forward)
    torch.library.impl("fastprompt::cosines_backward", _key, _backward)


class _Cosines(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cls, tokens, backend):
        ctx.save_for_backward(cls, tokens)
        ctx.backend = backend
        return torch.ops.fastprompt.cosines(cls, tokens, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        cls, tokens = ctx.saved_tensors
        grads = torch.ops.fastprompt.cosines_backward(dout, cls, tokens, ctx.backend)
        return *(g if w else None for g, w in zip(grads, ctx.needs_input_grad, strict=False)), None


# ---- public ----


def cosine_logits(
    cls: Tensor, tokens: Tensor, scale: float | Tensor = 1.0, *, backend: str = "auto"
) -> Tensor:
    """``scale`` times the cosine of each row of ``cls`` to each of its tokens.

    Args:
        cls: [B, D] float. Any strides with a contiguous last axis, here and below.
        tokens: [B, C, D] float, or [C, D] for the same tokens in every sample.
        scale: a number, or a scalar tensor that may train (1 / temperature).
        backend: "triton" (CUDA; on the CPU its interpreter), "plain" or "reference"
            (both torch's own operations). "auto" is Triton on CUDA, else plain.

    Returns:
        [B, C] float32 (float64 where an input is). 0 with a row of length 0, which gets no
        gradient; NaN with one whose squared length is not finite.

    Raises:
        ValueError: a shape, stride, dtype or device that the op does not serve.
    """
    _check(cls, tokens, scale, backend)
    if torch.float64 in (cls.dtype, tokens.dtype) or backend == "reference":
        with torch.autocast(cls.device.type, enabled=False):
            return reference.cosine_logits(cls, tokens, scale)
    return scale * _Cosines.apply(*distinct(cls, tokens, backend))


def _check(cls, tokens, scale, backend):
    check_floats(cls=cls)
    check_floats(tokens=tokens)  # of whatever dtype
    check_backend(backend, cls.device)
    B, D = cls.shape if cls.ndim == 2 else (None, None)
    if (
        cls.ndim != 2
        or tokens.ndim not in (2, 3)
        or tokens.shape[-1] != D
        or (tokens.ndim == 3 and tokens.shape[0] != B)
    ):
        got = f"{list(cls.shape)} and {list(tokens.shape)}"
        raise ValueError(f"want cls [B, D] and tokens [B, C, D] or [C, D]; got {got}")
    if tokens.device != cls.device:
        raise ValueError(f"tokens: want them on {cls.device}, got {tokens.device}")
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(f"scale: want a single number, got a tensor {list(scale.shape)}")
