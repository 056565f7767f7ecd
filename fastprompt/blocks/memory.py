"""How much of each block is kept for backward, and who decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastprompt.blocks.offload import Host
from fastprompt.blocks.parts import Parts

if TYPE_CHECKING:
    from fastprompt.loss import FusedLoss

POLICIES = ("speed", "balanced", "low", "offload")  # the fastest first
CHOICES = ("auto", *POLICIES, "off")


def kept_bytes(parts: Parts, policy: str, stream: torch.dtype, dtype: torch.dtype) -> int:
    """Bytes that the block keeps for each token, on its device.

    Args:
        stream: the dtype of the residual stream; ``dtype``: what the block computes in.
    """
    wide, size = stream.itemsize, dtype.itemsize
    width = parts.down.out_features
    if policy == "offload":
        return 0
    if policy == "low":
        return width * wide
    heads = parts.q_proj.out_features // parts.head_dim
    rows = 2 * parts.q_proj.out_features + parts.k_proj.out_features + parts.v_proj.out_features
    total = 2 * width * wide + rows * size + heads * 4  # x, middle; q, k, v, out; log-sum-exp
    if policy == "speed":
        total += sum(part.out_features for part in parts.first) * size
    return total


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated there; None where nobody says."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        ours = torch.cuda.memory_allocated(device)
        unused = torch.cuda.memory_reserved(device) - ours  # reserved by torch, free to us
        capped = int(torch.cuda.get_per_process_memory_fraction(device) * total) - ours
        return max(0, min(free + unused, capped))
    try:
        with open("/proc/meminfo") as file:
            found = dict(line.split(":", 1) for line in file)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


@dataclass(eq=False)
class Memory:
    """The policy of one tower's blocks.

    "auto" takes, at the first training forward and again when the tokens or the logits grow, the
    fastest policy whose bytes fit into a share of what is free then: what the blocks keep, twice
    what one block keeps at most (for the block that is being computed), and the logits behind them.

    Attributes:
        asked: of `CHOICES`.
        blocks: the blocks that may run as one node.
        share: of the free memory, the most that this tower's blocks may take.
        behind: bytes of one row of logits and of their gradients, behind the blocks.
        loss: what computes the model's loss without whole logits, if something does.
        host: where the blocks send their inputs under "offload".
        chosen, tokens, rows, why: the last choice, for how many tokens, rows of logits, in words.
    """

    asked: str
    blocks: list[Parts] = field(default_factory=list)
    share: float = 0.8
    behind: int = 0
    loss: FusedLoss | None = None
    host: Host = field(default_factory=Host)
    chosen: str | None = None
    tokens: int = 0
    rows: int = 0
    why: str = ""

    def policy(self, x: Tensor, dtype: torch.dtype) -> str:
        """For a training forward of x [B, N, D] whose blocks compute in ``dtype``."""
        if self.asked != "auto":
            return self.asked
        if torch.compiler.is_compiling():  # free memory is not to be asked there
            return self.chosen or "speed"
        tokens = x.shape[0] * x.shape[1]
        rows = tokens if self.loss is None else self.loss.rows_at_once(tokens)
        if self.chosen is None or tokens > self.tokens or rows > self.rows:
            self._choose(x, dtype, tokens, rows)
        return self.chosen

    def _choose(self, x: Tensor, dtype: torch.dtype, tokens: int, rows: int) -> None:
        free = free_bytes(x.device)
        self.tokens, self.rows = tokens, rows
        if free is None:
            self.chosen, self.why = "speed", "free memory is not known here"
            return
        one = max((kept_bytes(p, "speed", x.dtype, dtype) for p in self.blocks), default=0)
        # on the CPU the host's memory is the device's
        last = "offload" if x.device.type == "cuda" else "low"
        for policy in POLICIES[: POLICIES.index(last) + 1]:
            each = sum(kept_bytes(p, policy, x.dtype, dtype) for p in self.blocks)
            needed = tokens * (each + 2 * one) + rows * self.behind
            if policy == last or needed <= self.share * free:
                break
        self.chosen = policy
        kept = size_text(tokens * each)
        self.why = f"{kept} kept for {tokens:,} tokens, {size_text(free)} were free"

    def describe(self) -> str:
        if self.asked != "auto":
            return self.asked
        if self.chosen is None:
            return "auto, decided at the first training forward"
        return f"auto: {self.chosen} ({self.why})"


def size_text(n: int) -> str:
    return f"{n / 2**30:.2f} GB" if n >= 2**30 else f"{n / 2**20:.1f} MB"
