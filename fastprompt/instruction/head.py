"""The linear layer on CLS."""

import warnings

import torch
from torch import Tensor, nn


class Head(nn.Linear):
    """A task's head, which knows whether it has ever been trained; CLS in float32."""

    def __init__(self, width: int, classes: int):
        super().__init__(width, classes)
        self.register_buffer("has_trained", torch.tensor(False))
        self.asked = False  # once, as asking a GPU means waiting for it

    def forward(self, cls: Tensor, trains: bool = True, read: bool = True) -> Tensor:
        if trains:
            self.has_trained.fill_(True)
        elif read and not self.asked:
            self.asked = True
            if not self.has_trained:
                warnings.warn("predicting from a head that was never trained", stacklevel=4)
        return super().forward(cls.to(self.weight.dtype)).float()
