"""Memory: how results lie ([B, rows, heads, d], so that a reshape is free), and views as rows."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


def rows_like(x: Tensor) -> Tensor:
    """An empty [B, heads, rows, d] of the shape of ``x``, laid out as [B, rows, heads, d]."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def in_our_layout(x: Tensor) -> Tensor:
    """``x`` [B, heads, rows, d] laid out as [B, rows, heads, d]; no copy where it is so already."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def distinct(*arguments: object) -> Iterator[object]:
    """The same, but no tensor twice: torch.compile takes none twice in an autograd function."""
    seen: list[Tensor] = []
    for x in arguments:
        if isinstance(x, Tensor):
            x = x.view_as(x) if any(x is other for other in seen) else x
            seen.append(x)
        yield x


def placed(result: Tensor, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``result`` in the memory given, or contiguous in ``dtype``: no copy where it is already."""
    return result.to(dtype).contiguous() if out is None else out.copy_(result)


PIECE = 2**16  # elements a thread works on at a time: a core's cache holds those of a few tensors


def pieces(first: Tensor, *others: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """The same rows of each tensor, few enough for the cores' caches; all of them on a GPU.

    So that torch's operations, one after the other on a piece, reach memory once and not once
    each. All have ``first``'s shape, but for the last axis.
    """
    if first.is_cuda or first.ndim == 1 or torch.compiler.is_compiling():
        yield first, *others
        return
    n, most = len(first), PIECE * torch.get_num_threads()
    if first.numel() <= most:
        yield first, *others
        return
    step = most // (first.numel() // n)
    for at in range(0, n, max(1, step)):
        rows = slice(at, at + step) if step else at
        part = tuple(t if t is None else t[rows] for t in (first, *others))
        yield from [part] if step else pieces(*part)


class Rows(NamedTuple):
    """Tensors of one shape as rows for a kernel: their leading axes, merged into three."""

    sizes: tuple[int, int, int]
    strides: tuple[tuple[int, int, int], ...]  # of each tensor, in elements

    @property
    def count(self) -> int:
        n0, n1, n2 = self.sizes
        return n0 * n1 * n2


def merged(*tensors: Tensor) -> tuple[list[int], list[list[int]]]:
    """(sizes, each tensor's strides) of the leading axes; those that adjoin in all become one."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for axis, n in enumerate(tensors[0].shape[:-1]):
        if n == 1:  # a stride along one element means nothing, and may be anything
            continue
        own = [t.stride(axis) for t in tensors]
        if sizes and all(s[-1] == n * o for s, o in zip(strides, own, strict=True)):
            sizes[-1] *= n
            for s, o in zip(strides, own, strict=True):
                s[-1] = o
            continue
        sizes.append(n)
        for s, o in zip(strides, own, strict=True):
            s.append(o)
    return sizes, strides


def rows_of(*tensors: Tensor) -> Rows:
    """Rows along the last axis.

    Raises:
        ValueError: more than three leading axes are left once merged (a kernel takes no more).
    """
    sizes, strides = merged(*tensors)
    if len(sizes) > 3:
        shapes = ", ".join(f"{list(t.shape)} with strides {t.stride()}" for t in tensors)
        raise ValueError(f"want leading axes that merge into three, got {shapes}")
    missing = 3 - len(sizes)
    n0, n1, n2 = [1] * missing + sizes
    return Rows((n0, n1, n2), tuple((*[0] * missing, *s) for s in strides))
