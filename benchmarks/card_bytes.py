"""What a training step holds on its card, by arithmetic: computed, not measured.

Resident: weights as bitsandbytes packs them, what is dense in bfloat16, and 16 bytes for each
number that trains (value, gradient, AdamW's two moments, all float32). Then the larger of two
moments: the loss (what the blocks keep, and logits), and one block in backward (what the blocks
keep, that block's working set, decoded weights). Left out: the CUDA context, which a cap on the
allocator does not count either, fragments, cuBLAS's workspace, prompts' keys and values.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from benchmarks import llava
from benchmarks.llava import Tuning
from fastprompt import families
from fastprompt.blocks.memory import kept_bytes
from fastprompt.blocks.parts import Parts
from fastprompt.ops.linear_cross_entropy import rows_at_once

REF, OURS = WAYS = ("ref", "fastprompt")  # checkpointing, inputs on the card; memory="offload"
BF16 = torch.bfloat16
TRAINS = 16
LOGITS = 16  # bytes a number: half precision, float32, their logarithms, gradients of the first two


def packed_bytes(elements: int) -> int:
    """A weight in NF4, blocks of 64, absmax nested in blocks of 256; its code and offset."""
    blocks = -(-elements // 64)
    return -(-elements // 2) + blocks + 4 * -(-blocks // 256) + 4 + 16 * 4


def layer_bytes(layer: nn.Module) -> int:
    """A frozen layer: its linear weights packed, the rest in bfloat16."""
    packed = {id(m.weight) for m in layer.modules() if isinstance(m, nn.Linear)}
    sizes = ((id(p) in packed, p.numel()) for p in layer.parameters())
    return sum(packed_bytes(n) if is_packed else 2 * n for is_packed, n in sizes)


def own_bytes(parts: Parts) -> int:
    """Bytes a token that transformers' own block keeps in bfloat16, rows written before it;
    counted on small models (`tests/test_benchmarks_cards.py` holds it to that, to the byte)."""
    width, queries, keys = _sizes(parts)
    inner, heads = parts.gate.out_features, queries // parts.head_dim
    if parts.up is None:  # layer norms, a plain MLP with quick GELU
        return 8 * width + 4 * queries + 4 * inner + 4 * heads + 8
    return 8 * width + 4 * queries + 4 * keys + 6 * inner + 4 * heads + 8


def working_bytes(parts: Parts, way: str) -> int:
    """Bytes a token of one block in backward at its worst, all of it recomputed.

    Ours: what "speed" keeps, the gradient of the activation's result (those of gate and up are
    written over them), and two of the stream. Kernels on a card hold nothing besides.
    """
    width, inner = parts.down.out_features, parts.gate.out_features
    if way == REF:
        return own_bytes(parts) + 4 * inner + 8 * width
    return kept_bytes(parts, "speed", BF16, BF16) + 2 * inner + 4 * width


def scratch_bytes(parts: Parts) -> int:
    """Decoded weights: those of the largest call, side by side."""
    calls = (parts.qkv, (parts.o_proj,), parts.first, (parts.down,))
    return 2 * max(sum(p.in_features * p.out_features for p in call) for call in calls)


def _sizes(parts: Parts) -> tuple[int, int, int]:
    return parts.down.out_features, parts.q_proj.out_features, parts.k_proj.out_features


@dataclass(frozen=True)
class Card:
    """One LLaVA shape, tuned one ``way``."""

    shape: Tuning
    way: str

    @cached_property
    def _model(self) -> nn.Module:
        """Two layers of the language model (the resident part needs no more), on no device."""
        s = self.shape
        small = replace(s, text=replace(s.text, layers=1), vision=replace(s.vision, layers=2))
        with torch.device("meta"):
            return llava.kind(small)(llava.config(small))

    @cached_property
    def _layers(self) -> dict[str, tuple[int, nn.Module, Parts]]:
        """By tower: how many layers, one of them, its parts."""
        s = self.shape
        towers = {t.kind: t for t in families.anatomy(self._model).towers}
        depths = dict(vision=s.vision.layers, text=s.text.layers)
        return {
            kind: (depths[kind], t.blocks[0].layer, t.blocks[0].parts) for kind, t in towers.items()
        }

    @property
    def one_layer(self) -> int:
        """Bytes of one layer of the language model, its prompt too."""
        return layer_bytes(self._layers["text"][1]) + TRAINS * self.shape.textual * self.width

    @property
    def width(self) -> int:
        return self.shape.text.width

    @cached_property
    def packed(self) -> int:
        """Bytes of both towers' layers."""
        return sum(depth * layer_bytes(layer) for depth, layer, _ in self._layers.values())

    @cached_property
    def split(self) -> int:
        """Bytes of the 4-bit weights alone, without scales, of the layers that are read: what
        `fastprompt train --shard` splits."""
        found = (
            (depth - (kind == "vision"), layer) for kind, (depth, layer, _) in self._layers.items()
        )
        return sum(n * sum(p.numel() // 2 for p in m.parameters() if p.ndim > 1) for n, m in found)

    @cached_property
    def projector(self) -> int:
        return sum(p.numel() for p in self._model.model.multi_modal_projector.parameters())

    @cached_property
    def trained(self) -> int:
        """Numbers in prompts and projector."""
        s = self.shape
        prompts = s.text.layers * s.textual * self.width
        prompts += (s.vision.layers - 1) * s.visual * s.vision.width  # nothing reads the last
        return prompts + self.projector

    @cached_property
    def resident(self) -> int:
        """Bytes that are there between two steps."""
        model = self._model
        inside = {id(p) for _, layer, _ in self._layers.values() for p in layer.parameters()}
        inside |= {id(p) for p in model.model.vision_tower.encoder.layers.parameters()}
        dense = 2 * sum(p.numel() for p in model.parameters() if id(p) not in inside)
        # patch() keeps the projector that was there, for undo()
        dense -= 2 * self.projector * (self.way == REF)
        return self.packed + dense + TRAINS * self.trained

    def kept(self, kind: str) -> int:
        """Bytes a row of the batch that one layer of a tower keeps on the card until backward."""
        s, (_, _, parts) = self.shape, self._layers[kind]
        if self.way == OURS:
            return kept_bytes(parts, "offload", BF16, BF16)
        tokens, P = (s.N, s.textual) if kind == "text" else (s.vision.patches + 1, s.visual)
        return (tokens + P) * 2 * parts.down.out_features  # the block's input, with its rows

    def step(self, batch: int) -> int:
        """Bytes beside the resident ones at the worst moment of a step."""
        s, moments = self.shape, []
        depth, _, parts = self._layers["text"]
        kept = depth * self.kept("text") + (s.vision.layers - 1) * self.kept("vision")
        stream = 4 * s.N * self.width  # the last block's output and its gradient
        rows = s.N * batch
        if self.way == OURS:
            rows = min(rows_at_once(s.text.vocab), s.answer * batch)
        moments.append(batch * (kept + stream) + LOGITS * rows * s.text.vocab)
        rows = s.N + s.textual * (self.way == REF)
        working = batch * rows * working_bytes(parts, self.way)
        moments.append(batch * kept + working + scratch_bytes(parts))
        return max(moments)

    def largest(self, cap: int) -> int:
        """The largest batch whose step fits into ``cap`` bytes; 0: not even one row."""
        free, batch = cap - self.resident, 0
        while self.step(batch + 1) <= free:
            batch += 1
        return batch
