"""Pixels as DINOv2 wants them: white behind an emoji, or, augmented, any colour and place."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.demo.vision import IMAGE_MEAN, IMAGE_STD

SIZE = 56  # pixels: 4 x 4 patches of 14


def normalised(images: Tensor, size: int = SIZE) -> Tensor:
    """[B, 3, size, size] of images [B, 3, h, w] between 0 and 1."""
    if images.shape[-1] != size:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGE_MEAN, IMAGE_STD))
    return (images - mean) / std


def on_white(emoji: Tensor) -> Tensor:
    """[B, 3, h, w] between 0 and 1 of RGBA uint8 [B, 4, h, w]."""
    return _over(emoji, torch.ones(len(emoji), 3, 1, 1))


def augmented(emoji: Tensor, generator: torch.Generator) -> Tensor:
    """The same, each turned, moved, scaled, mirrored and recoloured a little, on any background."""
    B, _, h, w = emoji.shape

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*(shape or (B,)), generator=generator)

    turn, scale = uniform(-0.35, 0.35), uniform(0.85, 1.4)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = turn.cos() * scale, turn.sin() * scale
    x, y = uniform(-0.2, 0.2), uniform(-0.2, 0.2)
    affine = torch.stack([cos * mirror, -sin, x, sin * mirror, cos, y], 1).view(B, 2, 3)
    grid = F.affine_grid(affine, (B, 4, h, w), align_corners=False)
    moved = F.grid_sample(emoji.float() / 255, grid, align_corners=False)
    colour, alpha = moved[:, :3], moved[:, 3:]
    grey = colour.mean(1, keepdim=True)
    colour = grey + (colour - grey) * uniform(0.4, 1.4, B, 1, 1, 1)
    colour = (colour * uniform(0.75, 1.25, B, 3, 1, 1)).clamp(0, 1)
    back = torch.where(uniform(0, 1, B, 1, 1, 1) < 0.5, 1.0, uniform(0, 1, B, 3, 1, 1))
    return colour * alpha + back * (1 - alpha)


def _over(emoji: Tensor, back: Tensor) -> Tensor:
    rgba = emoji.float() / 255
    return rgba[:, :3] * rgba[:, 3:] + back * (1 - rgba[:, 3:])
