"""How many rows the prompt of each block has: one number for all, one for each, or some blocks'."""

from collections.abc import Mapping

Lengths = int | tuple[int, ...] | dict[int, int]


def plain(value: object) -> object:
    """As a method keeps it: a list becomes a tuple, a dict's keys (text in a card) numbers.

    What is no length stays as it is, for `check` to refuse.
    """
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, Mapping):
        numbers = {int(k) if str(k).isdecimal() else k: n for k, n in value.items()}
        return dict(sorted(numbers.items())) if all(map(_is_int, numbers)) else numbers
    return value


def each(lengths: Lengths) -> tuple[int, ...]:
    """All lengths that are named."""
    if isinstance(lengths, dict):
        return tuple(lengths.values())
    return lengths if isinstance(lengths, tuple) else (lengths,)


def at(lengths: Lengths, layer: int) -> int:
    """The length for block ``layer``, from 0, of those that have a prompt."""
    return lengths if isinstance(lengths, int) else each(lengths)[layer]


def check(lengths: Lengths, what: str) -> None:
    """Raise a ValueError unless all are whole numbers, 0 or more, of layers that could be."""
    for length in each(lengths):
        if not _is_int(length) or length < 0:
            raise ValueError(f"{what}: want a length of 0 or more, got {length!r}")
    if isinstance(lengths, dict) and not all(_is_int(k) and k >= 0 for k in lengths):
        raise ValueError(f"{what}: want lengths by layer, from 0, got {lengths!r}")


def check_layers(lengths: Lengths, layers: str, chosen: int, count: int, what: str) -> None:
    """Raise a ValueError unless they fit a tower.

    Args:
        chosen: how many of its ``count`` blocks ``layers`` names.
    """
    if isinstance(lengths, dict):
        if layers != "all":
            raise ValueError(f"{what}: want lengths by layer, or layers={layers!r}; got both")
        if max(lengths) >= count:
            raise ValueError(f"{what}: want layers below {count}, got {max(lengths)}")
    if isinstance(lengths, tuple) and len(lengths) != chosen:
        raise ValueError(
            f"{what}: want {chosen} lengths, one for each block that layers={layers!r} names; "
            f"got {len(lengths)}"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
