"""The K prompts whose keys are most like a query, and the mean of all others.

    s_bc  = q_b · k_c / (|q_b| |k_c|)                      0 with a zero row, -inf with a bad one
    i_b   = the k classes of highest s_bc, ties by the lower c
    out_b = [p_c for c in i_b; mean of p_c over c not in i_b]

Instruction-ViT (arXiv 2305.00201) picks class prompts so, prompt pools (L2P, DualPrompt) with
``rest=None``. Gradients: each chosen row's own to its prompt, the mean's shared out evenly, and

    dq = sum_c ds_c (k̂_c - s_c q̂) / |q|,    dk_c = ds_c (q̂ - s_c k̂_c) / |k_c|       ^: at length 1

Backends: `select_prompts_triton` (CUDA), `select_prompts_native` (csrc, on the CPU), and
`select_prompts_plain` for whatever those do not take. None writes [B, C] scores to memory whole.
"""

import torch
from torch import Tensor

from fastprompt import native
from fastprompt.ops import reference
from fastprompt.ops import select_prompts_native as compiled
from fastprompt.ops import select_prompts_plain as plain
from fastprompt.ops.checks import AND_NATIVE, FLOATS, check_backend
from fastprompt.ops.layout import distinct

RESTS = ("mean", None)
MOST_BY_TRITON = 64  # candidates that a program holds in registers for each of its rows

# ---- op: schema, fake, dispatch ----

torch.library.define(
    "fastprompt::select_prompts",
    "(Tensor query, Tensor keys, Tensor prompts, SymInt k, bool rest, Tensor? key_scale, "
    "Tensor? total, str backend) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("fastprompt::select_prompts")
def _outputs(query, keys, prompts, k, rest, key_scale, total, backend):
    B = query.shape[0]
    tokens = prompts.new_empty(B, k + rest, *prompts.shape[1:])
    indices = query.new_empty(B, k, dtype=torch.int64)
    return tokens, indices, query.new_empty(B, k, dtype=torch.float32)


def chosen_backend(query: Tensor, k: int, backend: str = "auto") -> str:
    """Which implementation "auto" stands for."""
    if query.dtype == torch.float64:
        return "reference"
    if backend != "auto":
        return backend
    if query.device.type == "cuda":
        return "triton" if k <= MOST_BY_TRITON else "plain"
    return "native" if native.available() else "plain"


def _select(query, keys, prompts, k, rest, key_scale, total, backend):
    arguments = (query, keys, prompts, k, rest, key_scale, total)
    backend = chosen_backend(query, k, backend)
    if backend == "triton" and len(query):
        # imported on first use: triton exists on Linux alone
        from fastprompt.ops import select_prompts_triton as triton

        return triton.forward(*arguments)
    if backend == "native" and compiled.serves(query, keys, prompts, k):
        return compiled.forward(*arguments)
    with torch.autocast(query.device.type, enabled=False):  # the order is that of float32 cosines
        indices, scores = plain.top_k(query, keys, k, key_scale)
        return plain.gather(prompts, indices, rest, total), indices, scores


for _key in ("CPU", "CUDA"):
    torch.library.impl("fastprompt::select_prompts", _key, _select)


# ---- autograd ----


class _SelectPrompts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, keys, prompts, k, rest, key_scale, total, backend):
        outputs = torch.ops.fastprompt.select_prompts(
            query, keys, prompts, k, rest, key_scale, total, backend
        )
        ctx.save_for_backward(query, keys, key_scale, outputs[1])
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)
        ctx.rest, ctx.prompts_like = rest, (prompts.shape, prompts.dtype)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dtokens, _, dscores):
        query, keys, key_scale, indices = ctx.saved_tensors
        wants_query, wants_keys, wants_prompts = ctx.needs_input_grad[:3]
        dquery = dkeys = dprompts = None
        if wants_prompts and dtokens is not None:
            shape, dtype = ctx.prompts_like
            dprompts = _prompts_gradient(dtokens, indices, shape[0], ctx.rest)
            dprompts = dprompts.to(dtype).view(shape)
        if (wants_query or wants_keys) and dscores is not None:
            with torch.autocast(query.device.type, enabled=False):
                dquery, dkeys = _score_gradients(
                    dscores, query, keys, key_scale, indices, wants_keys
                )
        return dquery if wants_query else None, dkeys, dprompts, *[None] * 5


def _prompts_gradient(dtokens, indices, C, rest):
    """[C, E] in float32 or wider."""
    k = indices.shape[1]
    rows = dtokens.flatten(2).to(torch.promote_types(dtokens.dtype, torch.float32))
    chosen = rows[:, :k]
    if not rest:
        return _summed(chosen, indices, rows.new_zeros(C, rows.shape[2]))
    mean = rows[:, k] / (C - k)
    # every prompt is taken for one of the others first
    everyone = mean.sum(0).expand(C, -1).clone()
    return _summed(chosen - mean[:, None], indices, everyone)


def _score_gradients(dscores, query, keys, key_scale, indices, wants_keys):
    q, q_factor, _ = reference.unit_rows(query)
    near = keys[indices]
    scale = None if key_scale is None else key_scale[indices][..., None]
    key, key_factor, _ = reference.unit_rows(near if scale is None else near * scale)  # [B, k, D]
    cosine = (key @ q[:, :, None]).squeeze(2)
    dq = (dscores[:, None] @ key).squeeze(1) - (dscores * cosine).sum(1, keepdim=True) * q
    dq = (dq * q_factor).to(query.dtype)
    if not wants_keys:
        return dq, None
    # a query without length, or with a bad one, moves no key
    alive = (q_factor > 0)[:, :, None]
    dk = dscores[..., None] * (q[:, None] - cosine[..., None] * key) * key_factor * alive
    zeros = torch.zeros(keys.shape, dtype=torch.float32, device=keys.device)
    return dq, _summed(dk, indices, zeros).to(keys.dtype)


def _summed(rows: Tensor, indices: Tensor, into: Tensor) -> Tensor:
    """``into`` [C, E] plus each of ``rows`` [B, k, E] at its index, in the same order every run."""
    rows, indices = rows.reshape(-1, rows.shape[-1]), indices.flatten()
    if into.device.type == "cpu":
        return into.index_add_(0, indices, rows)  # one row after another
    return into.index_put_((indices,), rows, accumulate=True)  # sorts first, on CUDA


# ---- public ----


def select_prompts(
    query: Tensor,
    keys: Tensor,
    prompts: Tensor,
    k: int,
    *,
    rest: str | None = "mean",
    key_scale: Tensor | None = None,
    total: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """For every query the ``k`` prompts of highest cosine, and the mean of the others.

    Args:
        query: [B, D] float, one row an image. Any strides with a contiguous last axis, here and
            below; dtypes may differ between the three.
        keys: [C, D] float, one row a class or pool entry; or int8 with ``key_scale``.
        prompts: [C, E] or [C, L, E] float: L rows a class.
        k: how many, 1 .. C.
        rest: "mean" adds the mean of the C - k prompts not chosen as last row (none if k is C);
            None adds nothing.
        key_scale: [C] float32 beside int8 keys: a row stands for ``keys[c] * key_scale[c]``.
        total: `sum_of(prompts)` [E] or [L, E] float64, for prompts that stand still: their sum is
            then not taken again. Gradients are the same.
        backend: "triton" (CUDA; on the CPU its interpreter; k up to 64), "native" (csrc, on the
            CPU), "plain" or "reference" (both torch's own operations). "auto" takes the first of
            them that the device and k allow.

    Returns:
        tokens: [B, k or k+1, E] or [B, k or k+1, L, E] in the dtype of ``prompts``, the most
            similar first.
        indices: [B, k] int64. Ties: the lower index first.
        scores: [B, k] float32 (float64 for float64 queries, and where the reference is asked for
            with any), the cosines. 0 with a row of length 0; -inf with one whose squared length is
            not finite in float32: nothing is checked for NaN, which would wait for a GPU.

        Gradients reach ``prompts``, and through scores ``query`` and float ``keys``.

    Raises:
        ValueError: a shape, stride, dtype or device that the op does not serve, or k beyond 1 .. C.
    """
    _check(query, keys, prompts, k, rest, key_scale, total)
    check_backend(backend, query.device, AND_NATIVE)
    if backend == "triton" and k > MOST_BY_TRITON:
        raise ValueError(f'backend: want k up to {MOST_BY_TRITON} for "triton", got {k}')
    if query.dtype == torch.float64 or backend == "reference":
        options = dict(rest=rest, key_scale=key_scale)
        with torch.autocast(query.device.type, enabled=False):
            return reference.select_prompts(query, keys, prompts, k, **options)
    adds_mean = rest is not None and k < len(keys)
    arguments = (query, keys, prompts, k, adds_mean, key_scale, total, backend)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, keys, prompts)):
        return _SelectPrompts.apply(*distinct(*arguments))
    return torch.ops.fastprompt.select_prompts(*arguments)


def sum_of(prompts: Tensor) -> Tensor:
    """What `select_prompts` takes as ``total``: [C, ...] -> [...] float64, summed over C."""
    return plain.sum_of(prompts)


def _check(query, keys, prompts, k, rest, key_scale, total):
    for name, x, sizes in (
        ("query", query, (2,)),
        ("keys", keys, (2,)),
        ("prompts", prompts, (2, 3)),
    ):
        if not isinstance(x, Tensor) or x.ndim not in sizes:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            want = {"query": "[B, D]", "keys": "[C, D]", "prompts": "[C, E] or [C, L, E]"}[name]
            raise ValueError(f"{name}: want a tensor {want}, got {got}")
        if x.dtype not in FLOATS and not (name == "keys" and x.dtype == torch.int8):
            raise ValueError(f"{name}: want one of {[*FLOATS]}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name}: want it on {query.device}, got {x.device}")
        if x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name}: want a contiguous last axis, got strides {x.stride()}")
    C, D = keys.shape
    if query.shape[1] != D or D == 0:
        raise ValueError(f"want query [B, D] and keys [C, D]; got {[*query.shape]} and {[C, D]}")
    if len(prompts) != C:
        raise ValueError(f"prompts: want one entry for each of {C} keys, got {len(prompts)}")
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)) or not 1 <= k <= C:
        raise ValueError(f"k: want a whole number from 1 to C = {C}, got {k!r}")
    if rest not in RESTS:
        raise ValueError(f"rest: want 'mean' or None, got {rest!r}")
    if (keys.dtype == torch.int8) != (key_scale is not None):
        raise ValueError(f"key_scale: want it with int8 keys and with no others, got {keys.dtype}")
    if key_scale is not None and key_scale.requires_grad:
        raise ValueError("key_scale: want it frozen (this op gives no gradient for it)")
    beside = [("key_scale", key_scale, (C,), torch.float32)]
    beside += [("total", total, prompts.shape[1:], torch.float64)]
    for name, x, shape, dtype in beside:
        if x is not None and (x.shape != shape or x.dtype != dtype or x.device != query.device):
            raise ValueError(
                f"{name}: want {list(shape)} {dtype} on {query.device}, "
                f"got {list(x.shape)} {x.dtype} on {x.device}"
            )
