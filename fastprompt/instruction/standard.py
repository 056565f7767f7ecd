"""CLS, brought to mean 0 and deviation 1 in every feature."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

EPS = 1e-6
SLOWEST = 0.01  # share of the newest batch, once a hundred of its size were seen


class Standard(nn.Module):
    """Standardises [B, D] by running statistics, in training too: any batch size will do.

    They are plain ones over the images of the first hundred batches and forget slowly from then on;
    all tasks share them, in float32. Rows that are not finite are left out. No gradient passes
    through them, and until two images were seen the deviation is taken for 1. Under DDP each
    process sees its own images, and the first one's statistics are handed to all.
    """

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))
        self.register_buffer("images", torch.zeros(()))

    def forward(self, x: Tensor, trains: bool) -> Tensor:
        if trains and len(x):
            self._see(x.detach().to(self.mean.dtype))
        var = torch.where(self.images > 1, self.var, 1.0)
        return (x - self.mean) * (var + EPS).rsqrt()

    @torch.no_grad()
    def _see(self, x: Tensor) -> None:
        finite = x.isfinite().all(1, keepdim=True)
        count = finite.sum()
        before = self.images.clamp(max=(1 / SLOWEST - 1) * len(x))
        self.images.copy_(before + count)
        share = count / self.images.clamp(min=1)
        old, count = self.mean.clone(), count.clamp(min=1)
        self.mean.lerp_(torch.where(finite, x, 0.0).sum(0) / count, share)
        # around the old mean and the new (Welford): a mean that moves is a deviation, too
        squares = torch.where(finite, (x - old) * (x - self.mean), 0.0)
        self.var.lerp_(squares.sum(0) / count, share)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        for name, x in self._buffers.items():
            self._buffers[name] = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return self
