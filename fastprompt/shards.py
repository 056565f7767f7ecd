"""Parameters that FSDP2 has split over processes: made whole, and written into."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def splits(model: nn.Module) -> bool:
    """Whether FSDP2 has split any of its parameters."""
    return any(_split(model))


def reshard(model: nn.Module) -> None:
    """Let the model show its shards: after a forward FSDP2 leaves whole parameters in the place of
    the outermost ones, to which a write would be lost."""
    for module in _split(model):
        module.reshard()


def _split(model: nn.Module) -> Iterator[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not there, not used
    return (m for m in model.modules() if fsdp is not None and isinstance(m, fsdp.FSDPModule))


def is_shard(p: Tensor) -> bool:
    """Whether this process holds a part of it alone."""
    return hasattr(p, "full_tensor")


def whole(p: Tensor) -> Tensor:
    """Its values. Of a shard all processes ask together."""
    return p.detach().full_tensor() if is_shard(p) else p.detach()


@torch.no_grad()
def fill(p: Tensor, value: Tensor) -> None:
    """Write whole values into it. Into a shard each process writes its part."""
    if is_shard(p):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(device=p.device, dtype=p.dtype)
        # each has all values already: nothing to send
        value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    p.copy_(value)


def writes_files(parameters: Iterable[Tensor]) -> bool:
    """Whether this process is to write a file of them: where they are shards, the first alone."""
    return not any(map(is_shard, parameters)) or dist.get_rank() == 0


def wait_for_files(parameters: Iterable[Tensor]) -> None:
    """Until the process that writes has written."""
    if any(map(is_shard, parameters)):
        dist.barrier()
