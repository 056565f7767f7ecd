"""A validation step of Instruction-ViT by number of classes, with and without selection.

Random weights of ViT-B/16's shape (ViT-Ti/16's on the CPU) at 224 pixels, features of CLIP's width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from benchmarks.registry import Benchmark, NotMeasured, Provider, Step, Verdict
from fastprompt.instruction import Encoder, InstructionViT

WIDTH = 512  # of CLIP's features
MOST = 2500  # prompt tokens that anyone would let attend to each other


@dataclass(frozen=True)
class Validation:
    B: int
    classes: int
    width: int
    heads: int
    k: int = 16

    def __str__(self) -> str:
        return f"B{self.B} N{self.classes} D{self.width} k{self.k}"


def _shapes(device: str, quick: bool) -> dict[str, Validation]:
    size = dict(B=4, width=192, heads=3) if device == "cpu" else dict(B=128, width=768, heads=12)
    many = (37,) if quick else (37, 102, 1000, 21841)
    return {f"{classes} classes": Validation(classes=classes, **size) for classes in many}


class Given(Encoder):
    """An encoder whose features are there already: random, one row a class."""

    def __init__(self, classes: int):
        super().__init__()
        self.width, self.rows = WIDTH, nn.Parameter(torch.randn(classes, WIDTH))

    def encode_text(self, texts):
        return self.rows[[int(text) for text in texts]]


class Case:
    def __init__(self, shape: Validation, dtype: torch.dtype, device: str):
        self.shape, self.dtype, self.device = shape, dtype, device
        config = ViTConfig(
            hidden_size=shape.width, num_attention_heads=shape.heads,
            intermediate_size=4 * shape.width, num_hidden_layers=12,
        )  # fmt: skip
        model = InstructionViT(
            ViTModel(config).to(dtype), Given(shape.classes), templates=["{class}"]
        )
        model.set_classes([str(c) for c in range(shape.classes)])
        self.model = model.to(device).eval()
        self.pixels = torch.randn(shape.B, 3, 224, 224, dtype=dtype, device=device)
        self.query = torch.randn(shape.B, WIDTH, device=device)


def _build(selects: bool):
    def build(case, mode):
        if not selects and case.shape.classes > MOST:
            raise NotMeasured(f"{case.shape.classes} tokens beside those of each image")

        def run():
            case.model.top_k = case.shape.k if selects else None
            with torch.no_grad():
                return (case.model(case.pixels, query=case.query).logits,)

        return Step(run, lambda given: dict(logits=given[0]))

    return build


def judge(case: Case, mode: str, results: dict[str, Tensor]) -> Verdict:
    """Finite, one row an image: what they hold differs, as more prompts are other inputs."""
    got = results["logits"]
    right = got.shape == (case.shape.B, case.shape.classes) and bool(got.isfinite().all())
    return Verdict("logits", 0.0 if right else float("inf"))


BENCHMARK = Benchmark(
    name="instruction_step",
    about="one validation batch of Instruction-ViT (the encoder's own pass apart)",
    modes=("forward",),
    dtypes=dict(cuda=("bf16", "fp16", "fp32"), cpu=("fp32", "bf16")),
    baseline="all",
    shapes=_shapes,
    case=Case,
    judge=judge,
    providers={
        "all": Provider(_build(False), "every class prompt is a token", ours=True),
        "top_k": Provider(_build(True), "16 by cosine and the mean of the rest", ours=True),
    },
)
