"""A vision transformer that takes tokens beside its own and gives back what became of them.

The tokens go in where the backbone's embeddings end (position embeddings are on the image's tokens
by then, and class prompts carry none) and before any norm in front of the blocks.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fastprompt import families, linear4bit

ORDERS = ("cls-prompts-patches", "cls-patches-prompts")


@dataclass(eq=False)
class _Anatomy:
    """What differs between libraries."""

    width: int
    entry: nn.Module  # the hidden states [B, N, D] with CLS first go into it, or come out of it
    comes_out: bool
    run: Callable[[Tensor], Tensor]  # pixels -> all hidden states after the last block
    norm: Callable[[Tensor], Tensor]  # of what `run` gives
    side: tuple[int, int]  # height and width of the images that it was made for
    # no closures above: they would not follow the model through deepcopy


class TokenBackbone(nn.Module):
    """CLS and prompt outputs of a transformers, timm or open_clip vision transformer.

    Args:
        model: ViT, DINOv2 or CLIP's vision tower of transformers (also under a head), dense or
            4-bit; a timm ``VisionTransformer``; an open_clip ``VisionTransformer`` or a CLIP model
            that holds one. It wants a CLS token.
        order: where prompts stand, one of ``ORDERS``. Attention without rotation does not see the
            difference; position embeddings are added before.

    Raises:
        ValueError: another model, or one without CLS.
    """

    def __init__(self, model: nn.Module, order: str = ORDERS[0]):
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"token_order: want one of {', '.join(ORDERS)}; got {order!r}")
        anatomy = _anatomy(model)
        # bitsandbytes alone is wrong, and slow, on the CPU
        self.__dict__["adopted"] = linear4bit.adopt(model)
        self.model, self.order, self.width = model, order, anatomy.width
        self.__dict__["_anatomy"] = anatomy  # not as a child: it holds parts of `model`

    def forward(self, pixel_values: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """CLS [B, D] and the tokens' outputs [B, T, D], after the backbone's last norm.

        pixel_values [B, 3, H, W]; tokens [B or 1, T, D], or None for the plain backbone.
        """
        anatomy, handles = self._anatomy, []
        like = next(self.model.parameters())
        if like.is_floating_point():  # timm's and open_clip's do not cast by themselves
            pixel_values = pixel_values.to(like.dtype)
        if tokens is not None:
            # for this forward alone: the model stays as its owner knows it
            handles.append(self._hook(tokens))
        try:
            hidden = anatomy.run(pixel_values)
        finally:
            for handle in handles:
                handle.remove()
        if tokens is None:
            return anatomy.norm(hidden[:, 0]), None
        T = tokens.shape[1]
        first = 1 if self.order == ORDERS[0] else hidden.shape[1] - T
        # CLS and prompts are all that is read, so nothing else is normalised
        read = anatomy.norm(torch.cat([hidden[:, :1], hidden[:, first : first + T]], dim=1))
        return read[:, 0], read[:, 1:]

    @torch.no_grad()
    def token_norm(self) -> float:
        """Mean norm of an image's own tokens where `forward` inserts others; of a noise image.

        DINOv2 ViT-S/14: 3.6 for noise, and 3.6 for 32 emoji.
        """
        first = next(self.model.parameters())
        dtype = first.dtype if first.is_floating_point() else torch.float32
        noise = torch.randn(1, 3, *self._anatomy.side, generator=torch.Generator().manual_seed(0))
        norms: list[float] = []

        def measure(hidden: Tensor) -> None:
            norms.append(hidden[:, 1:].float().norm(dim=-1).mean().item())
            raise _SeenEnough

        handle = self._at_entry(measure)
        try:
            self._anatomy.run(noise.to(first.device, dtype))
        except _SeenEnough:
            pass
        finally:
            handle.remove()
        return norms[0]

    def gradient_checkpointing_enable(self, **options: object) -> None:
        """transformers' own; timm's and open_clip's take no options."""
        model = self.model
        if hasattr(model, "gradient_checkpointing_enable"):
            model.gradient_checkpointing_enable(**options)
        else:
            getattr(model, "visual", model).set_grad_checkpointing(True)

    def _hook(self, tokens: Tensor) -> RemovableHandle:
        thread = threading.get_ident()

        def insert(hidden: Tensor) -> Tensor:
            if threading.get_ident() != thread:  # another's forward of the same model
                return hidden
            own = tokens.to(hidden.dtype).expand(len(hidden), -1, -1)
            at = 1 if self.order == ORDERS[0] else hidden.shape[1]
            return torch.cat([hidden[:, :at], own, hidden[:, at:]], dim=1)

        return self._at_entry(insert)

    def _at_entry(self, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
        entry = self._anatomy.entry
        if self._anatomy.comes_out:
            return entry.register_forward_hook(lambda _, __, out: change(out))
        return entry.register_forward_pre_hook(lambda _, given: (change(given[0]), *given[1:]))


class _SeenEnough(Exception):
    """Ends a forward of which the entry alone was wanted."""


def _anatomy(model: nn.Module) -> _Anatomy:
    if isinstance(model, PreTrainedModel):
        return _of_transformers(model)
    visual = getattr(model, "visual", model)
    if hasattr(visual, "ln_pre") and hasattr(visual, "ln_post") and hasattr(visual, "transformer"):
        return _of_open_clip(visual)
    if hasattr(model, "norm_pre") and hasattr(model, "forward_features"):
        return _of_timm(model)
    raise ValueError(
        f"backbone: want a ViT, DINOv2 or CLIP vision tower of transformers, a timm or an "
        f"open_clip VisionTransformer; got {type(model).__name__}"
    )


def _of_transformers(model: PreTrainedModel) -> _Anatomy:
    tower = families.anatomy(model).tower(families.VISION)
    if tower is None or tower.family not in ("vit", "dinov2", "clip"):
        what = "no vision tower" if tower is None else tower.family
        raise ValueError(f"backbone: want a ViT, DINOv2 or CLIP vision tower, got {what}")
    inside = getattr(tower.model, "vision_model", tower.model)
    # CLIP alone leaves the last norm to whoever pools
    norm = getattr(inside, "post_layernorm", nn.Identity())
    config, run = tower.model.config, _LastHiddenState(tower.model)
    return _Anatomy(config.hidden_size, tower.embeddings, True, run, norm, _two(config.image_size))


def _of_timm(model: nn.Module) -> _Anatomy:
    if getattr(model, "cls_token", None) is None:
        raise ValueError(f"backbone: want a CLS token, got {type(model).__name__} without one")
    if getattr(model, "rope", None) is not None:
        raise ValueError(
            f"backbone: want learned positions, got {type(model).__name__} with rotary ones, which "
            "tokens of no place do not have"
        )
    entry, run = model.norm_pre, model.forward_features
    side = _two(model.patch_embed.img_size or 224)  # None where any size goes
    return _Anatomy(model.embed_dim, entry, False, run, nn.Identity(), side)


def _of_open_clip(visual: nn.Module) -> _Anatomy:
    if getattr(visual, "attn_pool", None) is not None or not hasattr(visual, "class_embedding"):
        raise ValueError("backbone: want open_clip's pooling by CLS, got another")
    width, side = visual.class_embedding.shape[-1], _two(visual.image_size)
    return _Anatomy(width, visual.ln_pre, False, _BeforePooling(visual), visual.ln_post, side)


def _two(side: int | Sequence[int]) -> tuple[int, int]:
    height, width = (side, side) if isinstance(side, int) else side
    return height, width


class _LastHiddenState:
    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).last_hidden_state


class _BeforePooling:
    """open_clip pools inside its forward; what its blocks gave is kept on the way."""

    def __init__(self, visual: nn.Module):
        self.visual = visual

    def __call__(self, pixel_values: Tensor) -> Tensor:
        kept: dict[int, Tensor] = {}  # by thread: another may run the same model

        def hook(module: nn.Module, given: tuple, out: Tensor) -> None:
            kept[threading.get_ident()] = out

        keep = self.visual.transformer.register_forward_hook(hook)
        try:
            self.visual(pixel_values)
        finally:
            keep.remove()
        return kept[threading.get_ident()]
