"""What a vision-language model reads of its vision tower, and M2PT's visual prompts in it.

LLaVA taps one hidden state of the tower, takes the class token off its front and hands the rest to
the projector. The model's own pass of the tower is told by a keyword, which goes down to the
blocks: one that gradient checkpointing recomputes meets it again. In that pass

* blocks past the tap do not run: nothing reads them (DINOv2's of transformers 5.17, which hands no
  keywords on, do);
* `visual_prompts` puts prompt rows into the tapped state. The released code of M2PT
  (github.com/William-wAng618/M2PT) does so without saying: it taps the state after the next
  block's prompts were written into it, and takes one row off the front: a prompt's, not the class
  token. That is "raw". The paper's figure (arXiv 2409.15657, figure 2) shows the prompts' outputs
  before the patches: "context".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from fastprompt import placement
from fastprompt.families import Tower
from fastprompt.prompts import CHILD, Prompt
from fastprompt.shards import is_shard

IMAGE = "fastprompt_image"  # the keyword
SHOWN = ("drop", "raw", "context")


@dataclass(eq=False)
class HostMethod:
    """Stands in for a method of the vision-language model; follows it through deepcopy, pickle."""

    host: nn.Module
    name: ClassVar[str]

    def put_on(self) -> HostMethod:
        setattr(self.host, self.name, self)
        return self

    def undo(self) -> None:
        vars(self.host).pop(self.name, None)

    def own(self, *args, **kwargs) -> Any:
        # not bound first: torch.compile would look a bound method up on the instance, and find us
        return getattr(type(self.host), self.name)(self.host, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """`generate` asks which arguments there are: the class's own, without self."""
        signature = inspect.signature(getattr(type(self.host), self.name))
        return signature.replace(parameters=list(signature.parameters.values())[1:])


@dataclass(eq=False)
class TapImages(HostMethod):
    """Stands in for ``get_image_features``.

    Attributes:
        layer: the ``vision_feature_layer`` at patching; unread blocks are past it.
        shown: of `SHOWN`.
    """

    layer: int | list[int]
    shown: str = "drop"
    name: ClassVar[str] = "get_image_features"
    place: int = field(init=False)  # of the layer among positional arguments

    def __post_init__(self) -> None:
        self.place = list(self.__signature__.parameters).index("vision_feature_layer")

    def __call__(self, *args, **kwargs) -> Any:
        # a caller (or a config changed since) that taps another layer needs the unread blocks
        named = kwargs.get("vision_feature_layer")
        asked = args[self.place] if len(args) > self.place else named
        asked = self.host.config.vision_feature_layer if asked is None else asked
        if asked == self.layer:
            kwargs[IMAGE] = True
        elif self.shown != "drop":
            raise ValueError(
                f"visual_prompts={self.shown!r}: want vision_feature_layer {self.layer}, as at "
                f"patching; got {asked}"
            )
        return self.own(*args, **kwargs)


@dataclass(eq=False)
class RunIfRead:
    """Stands in for ``layer.forward`` of a block whose output nothing reads inside the host."""

    layer: nn.Module
    replaced: Callable | None  # what stood there before

    @classmethod
    def put_on(cls, layer: nn.Module) -> RunIfRead:
        made = cls(layer, placement.stands_in(layer))
        placement.put_in(layer, made)
        return made

    def undo(self) -> None:
        placement.take_out(self.layer, self, self.replaced)

    def __call__(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if kwargs.get(IMAGE):
            return hidden_states
        if self.replaced is not None:
            return self.replaced(hidden_states, *args, **kwargs)
        return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)


# ---- visual prompts in the tapped state ----


@dataclass(eq=False)
class ShowRaw:
    """Forward hook of the last block read: the next block's rows in front, as they are."""

    prompt: Prompt

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Any:
        if not kwargs.get(IMAGE):
            return None
        if is_shard(self.prompt.tokens):  # gathered for its own block's forward alone
            raise ValueError("visual_prompts='raw': want whole parameters, got FSDP's shards")
        return torch.cat([rows_for(self.prompt, output), output], dim=1)


@dataclass(eq=False)
class ShowContext:
    """The last block read has its prompt as tokens, whose outputs stand before the patches.

    `before` is its forward pre-hook; itself it is its forward hook.

    Attributes:
        front: rows before the patches that the model takes off: the class token, or none.
    """

    prompt: Prompt
    front: int

    def before(self, module: nn.Module, args: tuple) -> tuple:
        return torch.cat([rows_for(self.prompt, args[0]), args[0]], dim=1), *args[1:]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        P = len(self.prompt.tokens)
        prompts, tokens = output[:, :P], output[:, P:]
        if not kwargs.get(IMAGE):
            return tokens
        return torch.cat([tokens[:, : self.front], prompts, tokens[:, self.front :]], dim=1)


def rows_for(prompt: Prompt, like: Tensor) -> Tensor:
    """A prompt's rows [B, P, D] for hidden states [B, N, D]."""
    return prompt.rows().to(like.dtype).expand(len(like), -1, -1)


def show(tower: Tower, shown: str, front: int) -> list[Any]:
    """Hooks, whose handles are returned, on the last block read; its prompts are there already."""
    layer = tower.blocks[-1].layer
    # before transformers' recorder of hidden states, which may stand there already
    first = dict(with_kwargs=True, prepend=True)
    if shown == "raw":
        return [
            layer.register_forward_hook(ShowRaw(getattr(tower.unread[0].layer, CHILD)), **first)
        ]
    hook = ShowContext(getattr(layer, CHILD), front)
    return [
        layer.register_forward_pre_hook(hook.before),
        layer.register_forward_hook(hook, **first),
    ]


# ---- the other side: text with room for an image that is P rows longer ----


@dataclass(eq=False)
class CheckRoom(HostMethod):
    """Stands in for ``get_placeholder_mask``: too few image tokens, and the way to more."""

    rows: int
    shown: str
    name: ClassVar[str] = "get_placeholder_mask"

    def __call__(self, *args, **kwargs) -> Any:
        try:
            return self.own(*args, **kwargs)
        except ValueError as error:
            raise ValueError(
                f"visual_prompts={self.shown!r}: want {self.rows} image tokens more for each image "
                f"than without prompts, which patch.prepare(processor) sees to; {error}"
            ) from error


def make_room(processor: ProcessorMixin, model: nn.Module, tower: Tower, rows: int) -> None:
    """Let a LLaVA processor write as many image tokens as the model has rows for an image."""
    if not hasattr(processor, "num_additional_image_tokens"):
        raise ValueError(f"processor: want a LlavaProcessor, got {type(processor).__name__}")
    processor.patch_size = tower.model.config.patch_size
    processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
    # rows beside patches: a class token, which the processor counts as well, and prompts
    processor.num_additional_image_tokens = has_class_token(tower.model) + rows


def has_class_token(tower: nn.Module) -> bool:
    """Whether a vision encoder puts a class token before its patches."""
    names = ("class_embedding", "cls_token")
    return any(name.endswith(names) for name, _ in tower.named_parameters())


def rows_before_patches(tower: nn.Module) -> int:
    """Class token and registers, which a vision encoder puts before its patches."""
    return has_class_token(tower) + getattr(tower.config, "num_register_tokens", 0)
