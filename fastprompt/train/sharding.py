"""``--shard``: frozen blocks split over the processes (FSDP2), what trains whole in each (DDP).

The weight matrices of one block are one FSDP2 unit: gathered before the block's forward, freed
after it, gathered again for its backward. What trains stays whole in every process and DDP adds up
its gradients, so that optimiser, checkpoints and files are what they are without sharding. Norms,
biases, the scales of 4-bit weights, embeddings and heads stay whole too: they are read outside of
the blocks' forward, or too small to gain.

Processes gather together, so each must run the same blocks in the same order, forward and backward:
a batch of texts alone takes a blank image, whatever trains, and in evaluation as well.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BaseImageProcessor

from fastprompt.families import TEXT, VISION
from fastprompt.patching import Patch
from fastprompt.train.checking import TrainingError
from fastprompt.train.config import TrainConfig
from fastprompt.train.distributed import processes, sees, zero_of_a_blank_image


def check(config: TrainConfig) -> None:
    """Raises TrainingError where sharding is asked for in a way that is not served."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise TrainingError(
            "accelerate's own FSDP (--use_fsdp) is not served: it would shard what trains, too; "
            "want `accelerate launch --multi_gpu` or torchrun, and --shard"
        )
    if config.shard and config.method == "full":
        raise TrainingError("shard: want a method that leaves the blocks frozen, got full")
    if config.shard and processes() == 1:
        raise TrainingError(
            "shard: want two processes or more, started by torchrun or accelerate launch; got 1"
        )


@dataclass(eq=False)
class BlankImage:
    """Forward pre-hook of the module that runs both towers: texts alone come with a blank image,
    which enters their embeddings multiplied by 0, so that gradients go where an image's would.

    Inside of the forward, since DDP has collectives of its own at its beginning.
    """

    patch: Patch
    process: BaseImageProcessor
    dtype: torch.dtype

    def __call__(self, host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("pixel_values") is not None:
            return None
        embedded = kwargs.get("inputs_embeds")
        if embedded is None:
            embedded = host.get_input_embeddings()(kwargs["input_ids"])
        zero = zero_of_a_blank_image(self.patch, self.process, self.dtype)
        return args, {**kwargs, "input_ids": None, "inputs_embeds": embedded + zero}


def shard(patch: Patch, process: BaseImageProcessor, dtype: torch.dtype) -> DistributedDataParallel:
    """Split the frozen blocks of a patched vision-language model, and wrap what trains in DDP.

    The model is changed in place: from here on its forward and backward are run by all processes
    together, and `Patch.undo` refuses. Each process holds the whole model until now.

    Args:
        process, dtype: of images, for blank ones.
    """
    model, host = patch.model, patch.anatomy.host
    mesh = init_device_mesh(model.device.type, (processes(),))
    for layer in _layers(patch):
        whole = _matrices(layer)
        fully_shard(layer, mesh=mesh, ignored_params=set(layer.parameters()) - set(whole))
        for p in whole:
            p.data = p.data.new_empty(0)  # others, such as the patch, may hold it still
    # the root, with nothing of its own, lets one block be gathered while another computes
    fully_shard(host, mesh=mesh, ignored_params=set(host.parameters()))
    host.register_forward_pre_hook(BlankImage(patch, process, dtype), with_kwargs=True)
    # nothing writes into a block's output
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return DistributedDataParallel(model)


def describe(patch: Patch, config: TrainConfig) -> str:
    """What of the frozen blocks each process holds and sends, in one line."""
    count = processes()
    whole = sum(p.numel() * p.element_size() for m in _layers(patch) for p in _matrices(m))
    sent = config.accumulate * gathered_bytes(patch, count)
    return f"each holds 1/{count} of {whole:,} bytes of frozen blocks, and sends {sent:,} a step"


def gathered_bytes(patch: Patch, count: int) -> int:
    """Bytes that each of ``count`` processes receives, and sends, in a forward and its backward.

    A ring: all shards but its own, with FSDP2's padding of each weight to shards of one size.
    """
    layers = [*_layers(patch)]
    each = [(count - 1) * sum(_shard_bytes(p, count) for p in _matrices(m)) for m in layers]
    backward = _reached(patch, layers)
    if backward:  # FSDP2 fetches one block ahead: also the last that has none
        backward = min(backward + 1, len(layers))
    return sum(each) + sum(each[len(layers) - backward :])


def _layers(patch: Patch) -> Iterator[nn.Module]:
    """The blocks in the order in which they run; those whose output nothing reads are left out."""
    for kind in (VISION, TEXT):
        yield from (block.layer for block in patch.anatomy.tower(kind).blocks)


def _matrices(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if not p.requires_grad and p.ndim > 1]


def _shard_bytes(p: nn.Parameter, count: int) -> int:
    return -(-p.shape[0] // count) * p[0].numel() * p.element_size()


def _reached(patch: Patch, layers: list[nn.Module]) -> int:
    """How many of the blocks gradients pass through: the last ones."""
    text = patch.anatomy.tower(TEXT).blocks[0].layer
    for i, layer in enumerate(layers):
        if any(p.requires_grad for p in layer.parameters()) or (layer is text and sees(patch)):
            return len(layers) - i
    return 0
