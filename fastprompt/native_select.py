"""csrc's selection of prompts, as `ops.select_prompts_native` calls it."""

import torch
from torch import Tensor

from fastprompt import native


def select(
    query: Tensor,
    keys: Tensor,
    prompts: Tensor,
    k: int,
    rest: bool,
    key_scale: Tensor | None = None,
    total: Tensor | None = None,
    variant: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``k`` prompts of highest cosine, on torch.get_num_threads() threads.

    Args:
        query: [B, D], keys: [C, D], prompts: [C, L, E], each float32, bfloat16 or float16, keys
            int8 too; C below 2**31. Any strides with a contiguous last axis.
        k: 1 .. C. rest: add the mean of the others as last row (k below C).
        key_scale: [C] contiguous float32. total: [L, E] contiguous float64, the prompts' sum.
        variant: one of `variants()`; the best of them by default.

    Returns:
        tokens [B, k + rest, L, E], indices [B, k] int64, scores [B, k] float32.

    Raises:
        ValueError: an unknown variant, or a dtype, stride or device other than these.
        RuntimeError: the native part is missing.
    """
    module, index = native._module(variant)
    (B, D), (C, L, E) = query.shape, prompts.shape
    if keys.shape != (C, D) or not 1 <= k <= C - rest or C >= 2**31 or D == 0:
        raise ValueError(f"want keys [{C}, {D}] and k up to C; got {list(keys.shape)} and {k}")
    kinds, given = native.DTYPES | {torch.int8: 3}, dict(query=query, keys=keys, prompts=prompts)
    for name, x in given.items():
        rows = not x.numel() or x.shape[-1] == 1 or x.stride(-1) == 1
        if not x.is_cpu or kinds.get(x.dtype, 4) > 2 + (x is keys) or not rows:
            raise ValueError(f"{name}: want rows on the CPU, got {x.dtype} on {x.device}")
    tokens = prompts.new_empty(B, k + rest, L, E)
    indices, scores = torch.empty(B, k, dtype=torch.int64), torch.empty(B, k)
    module.select(
        [
            keys.data_ptr(),
            0 if key_scale is None else native._check("key_scale", key_scale, torch.float32, C),
            query.data_ptr(),
            prompts.data_ptr(),
            tokens.data_ptr(),
            indices.data_ptr(),
            scores.data_ptr(),
        ],
        [query.stride(0), keys.stride(0), *prompts.stride()[:2]],
        [B, C, D, L, E, k],
        [kinds[x.dtype] for x in given.values()],
        rest,
        0 if total is None else native._check("total", total, torch.float64, L * E),
        torch.get_num_threads(),
        index,
    )
    return tokens, indices, scores
