"""CLS, brought to mean 0 and deviation 1 in every feature."""

import torch
from torch import Tensor, nn

EPS = 1e-6
SLOWEST = 0.01  # share of the newest batch, once a hundred were seen


class Standard(nn.Module):
    """Standardises [B, D] by running statistics, in training too: any batch size will do.

    They are plain means over the first hundred batches and forget slowly from then on. No gradient
    passes through them, and until the first batch it changes nothing.
    """

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: Tensor, trains: bool) -> Tensor:
        if trains and len(x):
            self._see(x.detach().to(self.mean.dtype))
        return (x - self.mean) * (self.var + EPS).rsqrt()

    @torch.no_grad()
    def _see(self, x: Tensor) -> None:
        self.batches += 1
        share = (1 / self.batches).clamp(min=SLOWEST)
        old = self.mean.clone()
        self.mean.lerp_(x.mean(0), share)
        # around the old mean and the new (Welford): a mean that moves is a deviation, too
        self.var.lerp_(((x - old) * (x - self.mean)).mean(0), share)
