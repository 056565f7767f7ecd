"""A tap on prompted attention, for looking at it; costs nothing while nobody looks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

Listener = Callable[[str, tuple[Tensor, ...], dict], None]
_listeners: list[Listener] = []


def record(name: str, inputs: tuple[Tensor, ...], options: dict) -> None:
    """Tell every listener of one call: block, (q, k, v, prompt_k, prompt_v), the op's options.

    Under attention sinks ``options`` has ``sinks`` [Hq], which the op does not know.
    """
    for listener in _listeners:
        listener(name, inputs, options)


def listened_to() -> bool:
    return bool(_listeners)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
