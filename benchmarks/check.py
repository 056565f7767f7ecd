"""The accuracy rule of tests/compare.py, on tensors that are there already."""

import torch
from torch import Tensor
from torch.linalg import vector_norm as norm

from benchmarks.registry import Verdict

FLOOR = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # about one rounding


def limit(eager: Tensor, truth: Tensor) -> float:
    """The error that is allowed: twice eager's own, and one rounding."""
    return float(2 * norm(eager.double() - truth) + FLOOR[eager.dtype] * norm(truth))


def judge(
    results: dict[str, Tensor],
    truth: dict[str, Tensor],
    limits: dict[str, float],
    dtype: torch.dtype,
) -> Verdict:
    """The worst of ``results``, which must be all of ``truth``, against its limit.

    What is missing, or has another shape or dtype, is infinitely wrong.
    """
    worst = Verdict("", 0.0)
    for name, want in truth.items():
        got = results.get(name)
        if got is None or got.shape != want.shape or got.dtype != dtype:
            return Verdict(f"{name} {'' if got is None else list(got.shape)}", float("inf"))
        error = float(norm(got.double() - want))
        share = error / limits[name] if limits[name] else float("inf" if error else 0)
        if not share <= worst.share:  # a NaN is worst of all, and stays
            worst = Verdict(name, share)
        if share != share:
            break
    return worst
