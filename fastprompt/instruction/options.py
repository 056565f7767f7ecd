"""What `InstructionViT` accepts, and what it says of anything else."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastprompt.instruction.class_prompts import FEATURES, KINDS

PREDICT = ("head", "cosine", "both")
OTHERS = ("score", "random")


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: want one of {', '.join(choices)}; got {value!r}")


def check_options(
    *, kind: str, features: str, predict: str, train_others: str, train_k: int | None,
    top_k: int | None, temperature: float, token_scale: float, templates: Sequence[str],
    alignment: float,
) -> None:  # fmt: skip
    """Raises ValueError for an option of `InstructionViT`, or a pair of them, not served."""
    one_of("kind", kind, KINDS)
    one_of("features", features, FEATURES)
    one_of("predict", predict, PREDICT)
    one_of("train_others", train_others, OTHERS)
    for name, k in (("train_k", train_k), ("top_k", top_k)):
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(f"{name}: want a whole number of at least 1, or None; got {k!r}")
    for name, number in (("temperature", temperature), ("token_scale", token_scale)):
        if not 0 < number < float("inf"):
            raise ValueError(f"{name}: want a finite number above 0, got {number!r}")
    if not 0 <= alignment < float("inf"):
        raise ValueError(f"alignment: want a finite number of at least 0, got {alignment!r}")
    if kind == "none" and predict != "head":
        raise ValueError(f"predict: want 'head' without prompts, got {predict!r}")
    if features == "encoder" and kind not in ("text", "mixed"):
        raise ValueError(f"features='encoder': want kind 'text' or 'mixed', got {kind!r}")
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates: want a list of sentences, got {templates!r}")
    if train_k == 1 and alignment and kind != "none":
        raise ValueError("train_k: want at least 2 (one class has nothing to differ from), got 1")


def check_labels(labels: Tensor | None, B: int, C: int) -> None:
    """Raises ValueError for labels [B] of another shape or type, or (on the CPU) out of range."""
    if labels is None:
        return
    if labels.shape != (B,) or labels.dtype != torch.int64:
        raise ValueError(f"labels: want [{B}] int64, got {list(labels.shape)} {labels.dtype}")
    if labels.device.type == "cpu" and B and not 0 <= int(labels.min()) <= int(labels.max()) < C:
        raise ValueError(
            f"labels: want 0 .. {C - 1}, got {int(labels.min())} .. {int(labels.max())}"
        )


def check_query(query: Tensor, B: int, width: int) -> None:
    """Raises ValueError for a query of another shape, or (on the CPU) with what is no number."""
    if not isinstance(query, Tensor) or query.shape != (B, width):
        got = list(query.shape) if isinstance(query, Tensor) else type(query).__name__
        raise ValueError(f"query: want {[B, width]}, got {got}")
    if query.device.type == "cpu" and not query.isfinite().all():
        raise ValueError("query: want finite image features, got NaN or infinity")
