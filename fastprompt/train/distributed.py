"""More than one process: which one this is, what they send, and steps without an image.

Started by ``torchrun`` or ``accelerate launch``; transformers' Trainer wraps the model in DDP,
which adds up the gradients of what trains and sends nothing else.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor, nn
from transformers import BaseImageProcessor

from fastprompt.families import VISION
from fastprompt.patching import Patch


def rank() -> int:
    """Of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def start_processes() -> None:
    """Let each process know its card, before it loads a model onto it and before Trainer asks."""
    if processes() > 1:
        PartialState(cpu=not torch.cuda.is_available())


def end_processes() -> None:
    """At the end of a program: threads of gloo that outlive it may abort it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def of_the_first(value: Any) -> Any:
    """The first process's ``value``, in all of them."""
    if processes() == 1:
        return value
    start_processes()
    return broadcast_object_list([value])[0]


def of_all(values: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other, in each of them."""
    return values if processes() == 1 else gather_object(values)


def asked_of_any(asked: bool, device: torch.device) -> bool:
    """Whether ``asked`` is true in one process at least: they go on, or stop, together."""
    if processes() == 1:
        return asked
    flag = torch.tensor(float(asked), device=device)
    torch.distributed.all_reduce(flag)
    return flag.item() > 0


def sent_bytes(parameters: list[nn.Parameter], count: int) -> int:
    """Bytes that each of ``count`` processes sends a step: a ring all-reduce of the gradients."""
    gradients = sum(p.numel() * p.element_size() for p in parameters)
    return round(2 * (count - 1) / count * gradients)


def sees(patch: Patch) -> bool:
    """Whether something trains that texts alone do not reach."""
    projector = patch.anatomy.parts.get("projector")
    tower = patch.anatomy.tower(VISION)
    parts = [name for name in (projector, tower and tower.name) if name]
    return any(name.startswith(f"{part}.") for name in patch.trainable for part in parts)


def zero_of_a_blank_image(patch: Patch, process: BaseImageProcessor, dtype: torch.dtype) -> Tensor:
    """0, by way of everything that sees images: added to the loss of texts alone.

    So each step gives each parameter a gradient. Under DDP a process whose rows have no image would
    otherwise leave the others waiting for its gradients for ever. One process alone does the same:
    AdamW passes over a parameter without a gradient, and moves on one whose gradient is 0.
    """
    device = next(patch.model.parameters()).device
    blank = process(images=[Image.new("RGB", (32, 32))], return_tensors="pt")
    pixels = blank["pixel_values"].to(device, dtype)
    found = patch.anatomy.host.get_image_features(pixel_values=pixels)
    found = getattr(found, "pooler_output", found)  # transformers 5.17 returns the features alone
    return 0 * sum(features.float().sum() for features in found)
