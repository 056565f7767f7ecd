"""Blocks' inputs in the host's memory, copied while the device computes: the policy "offload".

Forward sends each block's input to pinned memory on a stream of its own, beside the block that
reads it. Backward, which meets the blocks in the opposite order, fetches a block's input while the
block after it is computed, so that on the device lie two inputs at most.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Sent:
    """One block's input on the host.

    Attributes:
        pinned: [B, N, D] there; None once it was fetched.
        index: the block's place in its tower.
        before: what the block before sent, to be fetched next.
        copy: on its way back to the device, or there; ``done`` says which.
    """

    pinned: Tensor | None
    index: int
    device: torch.device
    stream: torch.cuda.Stream
    before: Sent | None = None
    copy: Tensor | None = None
    done: torch.cuda.Event | None = None

    def start(self) -> None:
        """Begin to fetch it; a second time nothing happens."""
        if self.copy is not None or self.pinned is None:
            return
        with torch.cuda.stream(self.stream):  # after what was sent, on the same stream
            self.copy = self.pinned.to(self.device, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record(self.stream)

    def fetch(self, saved: Tensor) -> Tensor:
        """The input on its device, for kernels of the current stream; begins to fetch the next.

        ``saved`` is what autograd kept of it: the pinned memory itself, unless hooks on saved
        tensors (or a second backward) have put something else in its place.
        """
        if self.pinned is None or saved.data_ptr() != self.pinned.data_ptr():
            x = saved.to(self.device, non_blocking=True)
        else:
            self.start()
            now = torch.cuda.current_stream(self.device)
            now.wait_event(self.done)
            self.copy.record_stream(now)  # allocated on the other
            x = self.copy
        if self.before is not None:
            self.before.start()
        # nothing of one step may hold on to the one before it
        self.pinned = self.before = self.copy = self.done = None
        return x


class Host:
    """Where the blocks of one tower send their inputs."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: weakref.ref[Sent] | None = None

    def send(self, x: Tensor, index: int) -> Sent:
        """A copy of ``x``, on a CUDA device, in pinned memory, under way."""
        last = None if self._last is None else self._last()
        stream = self._stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))  # x is being computed there
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        with torch.cuda.stream(stream):
            pinned.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is not free before the copy is done
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            stream.synchronize()  # whoever packs what is saved reads it on the host, at once
        sent = Sent(pinned, index, x.device, stream)
        if last is not None and last.index == index - 1:
            sent.before = last
        self._last = weakref.ref(sent)
        return sent

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def __deepcopy__(self, memo: dict) -> Host:
        return Host()  # streams are nobody's to copy, nor to pickle

    def __reduce__(self) -> tuple:
        return Host, ()
