"""A training step of VPT-deep: ViT-B/16 with random weights, 50 prompt rows a block, its head."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from benchmarks import training
from benchmarks.registry import Benchmark
from benchmarks.training import ALL, BALANCED, HOST, MODES
from fastprompt.methods import VPT, Method


@dataclass(frozen=True)
class Images:
    B: int
    P: int = 50
    width: int = 768
    heads: int = 12
    layers: int = 12
    image: int = 224
    patch: int = 16
    classes: int = 100

    @property
    def N(self) -> int:
        return (self.image // self.patch) ** 2 + 1

    @property
    def tokens(self) -> int:
        return self.B * self.N

    def __str__(self) -> str:
        return f"B{self.B} N{self.N} D{self.width} L{self.layers} P{self.P}"


def _shapes(device: str, quick: bool) -> dict[str, Images]:
    if quick:
        return {"ViT-small": Images(B=2, P=5, width=64, heads=2, layers=2, image=64)}
    if device == "cpu":
        return {"ViT-Ti/16": Images(B=8, width=192, heads=3)}
    return {"ViT-B/16": Images(B=128)}


class Case(training.Case):
    parts = ("classifier",)

    @property
    def method(self) -> Method:
        return VPT(self.shape.P)

    def build(self) -> ViTForImageClassification:
        s = self.shape
        config = ViTConfig(
            hidden_size=s.width, num_attention_heads=s.heads, intermediate_size=4 * s.width,
            num_hidden_layers=s.layers, image_size=s.image, patch_size=s.patch,
            num_labels=s.classes,
        )  # fmt: skip
        return ViTForImageClassification(config).to(self.device, self.dtype)

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        s = self.shape
        torch.manual_seed(2)
        # rounded as the model's own dtype has them, whatever dtype is asked for
        pixels = torch.randn(s.B, 3, s.image, s.image).to(self.dtype)
        labels = torch.randint(s.classes, (s.B,))
        return dict(pixel_values=pixels.to(self.device, dtype), labels=labels.to(self.device))


def cost(s: Images, mode: str, itemsize: int) -> tuple[int, int]:
    """FLOPs of the blocks' products alone; they read what they multiply meanwhile."""
    forward = 12 * s.width**2  # q, k, v, o: 4; the MLP: 8
    each = 2 * forward * s.layers - 3 * s.width**2  # no gradient to the first block's tokens
    if mode == BALANCED:
        each += 4 * s.width**2 * s.layers
    if mode in (ALL, HOST):
        each += 8 * s.width**2 * s.layers  # all but the product that ends the MLP
    return 0, 2 * each * s.tokens


_RENAMED = {name.replace("ref", "concat"): p for name, p in training.PROVIDERS.items()}

BENCHMARK = Benchmark(
    name="vpt_step",
    about="a training step of VPT-deep: forward, backward, AdamW on prompts and head",
    modes=MODES,
    dtypes=dict(cuda=("bf16",), cpu=("fp32", "bf16")),
    baseline="concat",
    shapes=_shapes,
    case=Case,
    judge=training.judge,
    cost=cost,
    in_turn=True,
    truth=training.truth,
    providers=_RENAMED,
)
