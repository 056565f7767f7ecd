"""What a pool of prompts does around its tower: the query, the choice, the method's own loss."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastprompt import attention
from fastprompt.attention import SideKeys
from fastprompt.families import Block, Tower
from fastprompt.pools.parts import Components
from fastprompt.pools.side_keys import ChosenKeys, SummedKeys
from fastprompt.prompts import CHILD, Prompt

if TYPE_CHECKING:
    from fastprompt.methods.pool import PoolMethod

# what a caller asks of its own forward, and the query pass has no use for
_OUTPUTS = ("output_hidden_states", "output_attentions", "return_dict")


@dataclass(eq=False)
class Pool:
    """The pool of one patched tower.

    Before the tower's forward the frozen tower runs once without prompts, in evaluation mode and
    without a graph; its image feature [B, D] is the query. What the method chooses with it goes
    down to the blocks as a keyword of the forward, so that a block recomputed by gradient
    checkpointing meets the choice of its own forward again, and no query pass. One forward at a
    time: threads of their own want models of their own.

    Attributes:
        tower, method: whose pool it is, and what chooses.
        given: the caller's own query, in place of the pass.
        choice: of the forward under way, for blocks that get no keywords.
        loss: the method's own, of the last forward; ``batch``: its images.
    """

    tower: Tower
    method: PoolMethod
    given: Tensor | None = None
    choice: Tensor | None = None
    loss: Tensor | None = None
    batch: int = 0
    previous: str = "eager"  # the attention implementation that the tower had

    @property
    def keys(self) -> Tensor:
        """[M, D]: the keys that all blocks share."""
        return getattr(self.tower.model, CHILD).keys

    @property
    def prompts(self) -> list[Prompt]:
        layers = (block.layer for block in self.tower.blocks)
        return [getattr(layer, CHILD) for layer in layers if hasattr(layer, CHILD)]

    def side_keys(
        self, block: Block, prompt: Prompt | None, previous: str, backend: str
    ) -> SideKeys:
        """What the block's attention module gets."""
        self.previous = previous
        if prompt is None or prompt.tokens.ndim == 2:
            return SideKeys(block, prompt, previous, backend)
        kind = SummedKeys if isinstance(prompt, Components) else ChosenKeys
        return kind(block, prompt, previous, backend, self)

    def attach(self, model: nn.Module) -> list[Any]:
        """Hooks on the tower and on the whole model; returns their handles."""
        return [
            self.tower.model.register_forward_pre_hook(self.before, with_kwargs=True),
            self.tower.model.register_forward_hook(self.after, always_call=True),
            model.register_forward_hook(self.add_loss, with_kwargs=True),
        ]

    # ---- the hooks ----

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        images = kwargs.get("pixel_values", args[0] if args else None)
        if images is None:
            return None  # the forward itself says what it lacks
        query = self._query(args, kwargs) if self.given is None else self._given(len(images))
        # where asking is free, and not the compiler's to answer
        asks = query.device.type == "cpu" and not torch.compiler.is_compiling()
        if asks and not query.isfinite().all():
            raise ValueError("query: want finite image features, got NaN or infinity")
        # cosines decide, and a bfloat16 product would decide otherwise
        with torch.autocast(query.device.type, enabled=False):
            self.choice, self.loss = self.method.choose(query, self)
        self.batch = len(query)
        return args, kwargs | {attention.CHOICE: self.choice}

    def after(self, *_) -> None:
        self.choice = None

    def add_loss(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Add the method's loss to the model's own, where there is one and a gradient is wanted."""
        if self.loss is None or not torch.is_grad_enabled():
            return None
        items = kwargs.get("num_items_in_batch")
        # Trainer divides by the samples of all accumulated batches: so must a mean over this one
        loss = self.loss if items is None else self.loss * (self.batch / items)
        if isinstance(output, tuple):
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            labels = (dict(zip(names, args, strict=False)) | kwargs).get("labels")
            return None if labels is None else (output[0] + loss, *output[1:])
        if getattr(output, "loss", None) is not None:
            output.loss = output.loss + loss
        return None

    # ---- the query ----

    @torch.no_grad()
    def _query(self, args: tuple, kwargs: dict) -> Tensor:
        kwargs = {name: x for name, x in kwargs.items() if name not in _OUTPUTS}
        with self._as_it_was():
            out = self.tower.model.forward(*args, **kwargs, return_dict=True)
        return image_feature(self.tower.family, out)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """The tower with its own attention, which knows no prompts, and without dropout."""
        configs = [self.tower.model.config, *(b.attention.config for b in self.tower.blocks)]
        training = [module for module in self.tower.model.modules() if module.training]
        try:
            for config in configs:
                config._attn_implementation_internal = self.previous
            for module in training:
                module.training = False  # not eval(), which drops kept keys
            yield
        finally:
            for config in configs:
                config._attn_implementation_internal = attention.name_for(self.tower)
            for module in training:
                module.training = True

    def _given(self, batch: int) -> Tensor:
        width = self.tower.blocks[0].width
        if self.given.shape != (batch, width):
            raise ValueError(
                f"query: want [{batch}, {width}], one row for each image, "
                f"got {list(self.given.shape)}"
            )
        return self.given

    # ---- what a `Patch` hands on ----

    def features(self, pixel_values: Tensor) -> Tensor:
        """[B, D], what a query pass finds; the same every time, so it may be kept."""
        return self._query((), dict(pixel_values=pixel_values))

    @contextmanager
    def query(self, features: Tensor) -> Iterator[None]:
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise ValueError(f"query: want a float tensor [B, D], got {type(features).__name__}")
        before, self.given = self.given, features.detach()
        try:
            yield
        finally:
            self.given = before

    def auxiliary_loss(self) -> Tensor:
        if self.loss is None:
            raise ValueError("auxiliary_loss: want it after a forward, got none yet")
        return self.loss

    def __getstate__(self) -> dict:
        # a copy starts between two forwards; a graph could not be copied
        return {**self.__dict__, "given": None, "choice": None, "loss": None}


# towers whose feature is known, all of one width and with a batch axis
FAMILIES = (
    "vit",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "beit",
    "clip",
    "siglip",
)


def image_feature(family: str, out: Any) -> Tensor:
    """The feature [B, D] by which a tower's output stands for its image.

    The class token after the last norm (L2P's query); SigLIP has none and gives its pooled output,
    or without a pooling head the mean of its patches.
    """
    tokens = getattr(out, "last_hidden_state", None)
    if tokens is None:
        raise ValueError(
            f"{family}: want a tower that returns last_hidden_state to take a query from, got "
            f"{type(out).__name__}; give one: with patch.query(features)"
        )
    if family in ("clip", "siglip") and out.pooler_output is not None:
        return out.pooler_output  # CLIP norms its class token there alone
    return tokens.mean(1) if family == "siglip" else tokens[:, 0]
