"""The demo's models: class prompts of every kind, and what does as well if they are empty."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastprompt
from fastprompt.demo.instruction import encoder as encoders
from fastprompt.instruction import InstructionViT
from fastprompt.instruction.standard import Standard
from fastprompt.methods import VPT

OPTIONS = dict(standardise=True, alignment=0.3, temperature=0.1)
KINDS = ("none", "text", "image", "mixed", "text shuffled", "random rows", "VPT")


class Loss(NamedTuple):
    loss: Tensor | None
    logits: Tensor


class VptClassifier(nn.Module):
    """VPT-deep with as many tokens a block as there are classes, and a head on CLS."""

    def __init__(self, backbone: nn.Module, tokens: int, classes: int):
        super().__init__()
        fastprompt.patch(backbone, VPT(num_tokens=tokens, train_head=False))
        width = backbone.config.hidden_size
        # the head reads what the others' reads, in float32
        self.backbone, self.standard = backbone, Standard(width)
        self.head = nn.Linear(width, classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, *, query=None) -> Loss:
        cls = self.backbone(pixel_values=pixel_values).last_hidden_state[:, 0].float()
        logits = self.head(self.standard(cls, self.training and labels is not None))
        return Loss(None if labels is None else F.cross_entropy(logits, labels), logits)


def build(
    kind: str,
    encoder: encoders.DualEncoder,
    names: list[str],
    exemplars: list[Tensor],
    template: str,
    cache: str | None = None,
    **options: object,
) -> nn.Module:
    """A model of one of ``KINDS``, its head and rows drawn from torch's generator.

    exemplars: for each class its images' features [n, width].
    """
    backbone = encoders.backbone(cache, encoder.dtype)
    if kind == "VPT":
        return VptClassifier(backbone, len(names), len(names))
    base = kind if kind in ("none", "image", "mixed") else "text"
    options = OPTIONS | dict(kind=base, templates=[template]) | options
    model = InstructionViT(backbone, encoder, **options)
    model.set_classes(names, exemplars)
    prompts = model.tasks["default"]
    with torch.no_grad():
        if kind == "text shuffled":
            # by one place: no class keeps its own text
            prompts.rows.copy_(prompts.rows.roll(1, 0))
            prompts.keys.copy_(prompts.keys.roll(1, 0))
        if kind == "random rows":
            prompts.rows.copy_(normalize(torch.randn_like(prompts.rows), dim=-1))
            prompts.keys.copy_(prompts.rows[:, 0])
    return model
