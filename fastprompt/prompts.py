"""What one block's prompt is: learned rows, or free keys and values, or what makes either."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import placement

CHILD = "fastprompt"  # the prompt's name in its layer

# rows of hidden states [S, P, D] -> keys and values [S, Hkv, P, d], not rotated
Project = Callable[[Tensor], tuple[Tensor, Tensor]]


class BlockPrompt(nn.Module):
    """Base of one block's prompts: what they give as keys and values, and what is kept of these.

    A child of its own block (``layer.fastprompt``), so that optimisers, DDP, FSDP, device maps and
    checkpoints find it there. float32 whatever the backbone is, since a bfloat16 Adam step loses
    updates of the usual size; float64 under a float64 backbone.

    Args:
        dropout: the probability with which numbers of its rows are zeroed in training (and the
            others scaled up); one mask a forward for the whole batch.
    """

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self._cached: tuple[Any, tuple[Tensor, Tensor]] | None = None

    @property
    def length(self) -> int:
        """P: how many keys it gives."""
        raise NotImplementedError

    def learned(self) -> Tensor:
        """[P, ...]: its rows without dropout."""
        raise NotImplementedError

    def rows(self) -> Tensor:
        """[P, ...]: its rows as the block sees them now."""
        rows = self.learned()
        return F.dropout(rows, self.dropout) if self.dropout and self.training else rows

    def keys_values(self, project: Project) -> tuple[Tensor, Tensor]:
        """[Hkv, P, d] each, keys not rotated; ``project``: the block's own norm and projections."""
        # a batch axis of one: what modules and hooks of a block are used to
        k, v = project(self.rows().flatten(0, -2)[None])
        return k[0], v[0]

    def tensors(self) -> list[Tensor]:
        """All parameters that its keys and values depend on; not all need be its own."""
        return [*self.parameters()]

    def folded(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it: name -> tensor."""
        return dict(self.named_parameters())

    def cached(self, key: Any) -> tuple[Tensor, Tensor] | None:
        """Keys and values that were kept under the same key, if any."""
        return self._cached[1] if self._cached is not None and self._cached[0] == key else None

    def keep(self, key: Any, keys_values: tuple[Tensor, Tensor]) -> None:
        self._cached = (key, keys_values)

    def refresh(self) -> None:
        """Forget what is cached (wanted after a write through ``.data``, which leaves no trace)."""
        self._cached = None

    def train(self, mode: bool = True) -> "BlockPrompt":
        self.refresh()
        return super().train(mode)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cached": None}  # a copy starts without a cache


@contextmanager
def without_dropout(prompt: BlockPrompt) -> Iterator[None]:
    """What it gives inside is what it gives in evaluation."""
    training = prompt.training
    prompt.eval()
    try:
        yield
    finally:
        prompt.train(training)


class Prompt(BlockPrompt):
    """``tokens`` [P, D]: the rows of hidden states that a block sees in front of its tokens."""

    def __init__(self, tokens: Tensor, dropout: float = 0.0):
        super().__init__(dropout)
        self.tokens = nn.Parameter(tokens)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def learned(self) -> Tensor:
        return self.tokens

    def extra_repr(self) -> str:
        return f"tokens={list(self.tokens.shape)}"


class KeyValues(Prompt):
    """``tokens`` [P, 2, Hkv, d]: a block's keys, before rotation, and values themselves."""

    def keys_values(self, project: Project) -> tuple[Tensor, Tensor]:
        return free_keys_values(self.rows())


def free_keys_values(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[P, 2, Hkv, d] -> [Hkv, P, d] each."""
    k, v = rows.transpose(0, 2).unbind(1)
    return k, v


def row_like(norm: nn.Module) -> Tensor:
    """[D]: the dtype that prompts have beside a norm's weight, its width, and where it runs."""
    weight = norm.weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.empty(weight.shape, dtype=dtype, device=placement.device_of(norm))
