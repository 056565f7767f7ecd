"""The learned rows of one block, and the keys and values they become."""

from typing import Any

import torch
from torch import Tensor, nn

CHILD = "fastprompt"  # the prompt's name in its layer


class Prompt(nn.Module):
    """``tokens`` [P, D]: the rows that a block sees in front of its tokens.

    A child of its own block (``layer.fastprompt``), so that optimisers, DDP, FSDP, device maps and
    checkpoints find it there. float32 whatever the backbone is, since a bfloat16 Adam step loses
    updates of the usual size; float64 under a float64 backbone.
    """

    def __init__(self, tokens: Tensor):
        super().__init__()
        self.tokens = nn.Parameter(tokens)
        self._cached: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def cached(self, key: Any) -> tuple[Tensor, Tensor] | None:
        """Keys and values that were kept under the same key, if any."""
        return self._cached[1] if self._cached is not None and self._cached[0] == key else None

    def keep(self, key: Any, keys_values: tuple[Tensor, Tensor]) -> None:
        self._cached = (key, keys_values)

    def refresh(self) -> None:
        """Forget what is cached (wanted after a write through ``.data``, which leaves no trace)."""
        self._cached = None

    def train(self, mode: bool = True) -> "Prompt":
        self.refresh()
        return super().train(mode)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cached": None}  # a copy starts without a cache

    def extra_repr(self) -> str:
        return f"tokens={list(self.tokens.shape)}"


def row_like(weight: Tensor) -> Tensor:
    """[D]: the dtype that prompts have beside a norm's weight, its width and its device."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)
