"""The memory that results have: [B, rows, heads, d], so that a caller's reshape is free."""

from collections.abc import Iterator

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
