"""Scratch memory for decoded weights: one piece that all of them share, one after the other.

On the CPU each thread has its own. On a GPU a piece belongs to a stream, whose order keeps its
users apart; a lock keeps apart the threads that launch there (autograd's backward runs in one of
its own, which so shares its piece with the forward). Under CUDA graph capture the memory is the
graph's own, which always writes to that address, whatever becomes of the shared piece.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Shared:
    """A piece of memory that grows to the largest that was asked for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.buffer: Tensor | None = None

    def take(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[n] of ``dtype``."""
        size = n * dtype.itemsize
        if self.buffer is None or self.buffer.numel() < size:
            self.buffer = None  # before there is another
            with torch.inference_mode(False):  # made there, training could not write to it
                self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        return self.buffer[:size].view(dtype)


_of_thread = threading.local()
_of_stream: dict[tuple[torch.device, int], Shared] = {}


@contextmanager
def scratch(n: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """[n] of ``dtype`` on ``device``, for as long as the ``with`` lasts.

    On the CPU, not for two uses of one thread at once.
    """
    if device.type == "cpu":
        shared = vars(_of_thread).setdefault("shared", Shared())
        yield shared.take(n, dtype, device)
    elif device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        yield torch.empty(n, dtype=dtype, device=device)
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
        shared = _of_stream.setdefault((device, stream), Shared())
        with shared.lock:
            yield shared.take(n, dtype, device)


def free_scratch() -> None:
    """Give back this thread's scratch on the CPU, and all that there is on GPUs."""
    vars(_of_thread).clear()
    _of_stream.clear()
