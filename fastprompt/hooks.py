"""The few things a patched model does around its towers, as hooks that deepcopy and pickle keep."""

import inspect
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastprompt.families import Tower


class CountFromText:
    """Forward pre-hook of a rotary language model: positions count from each row's first token.

    A plain forward of transformers lets a left-padded row start at the padding; prompts at
    positions -P .. -1 would then stand before the padding. Base logits do not change (rotary scores
    depend on differences alone), and `generate` does the same itself.
    """

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        mask, embeds = given.get("attention_mask"), given.get("inputs_embeds")
        tokens = embeds if embeds is not None else given.get("input_ids")
        if given.get("position_ids") is not None or tokens is None:
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < tokens.shape[1]:
            return None
        padding = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
        positions = (torch.arange(mask.shape[1], device=mask.device) - padding).clamp(min=0)
        positions = positions[:, -tokens.shape[1] :].to(tokens.device)
        return (), given | {"position_ids": positions}


@dataclass(eq=False)
class StillSwitchedOn:
    """Forward pre-hook of a tower: its blocks still call fastprompt's attention function.

    ``model.set_attn_implementation`` after patching would switch the prompts off, silently.
    """

    tower: Tower
    name: str

    def __call__(self, module: nn.Module, args: tuple) -> None:
        for config in (self.tower.model.config, self.tower.blocks[0].attention.config):
            if config._attn_implementation != self.name:
                raise ValueError(
                    f"{self.tower.name or self.tower.family}: want attention {self.name!r}, or no "
                    f"prompt would be seen; got {config._attn_implementation!r}, set after "
                    "patching: patch.undo() first, or set it before patching"
                )


@dataclass(eq=False)
class GradIntoFirstBlock:
    """Under reentrant checkpointing, the input of a tower's first block wants a gradient.

    Reentrant checkpointing gives no gradient at all to a segment none of whose inputs wants one,
    and a frozen tower's first block is such a segment. A forward hook of the tower's embeddings;
    `given` is a forward pre-hook of the tower, for embeddings that the caller made.
    """

    tower: Tower
    told: bool = False

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self._wanted(output):
            output.requires_grad_(True)

    def given(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or not self._wanted(embeds):
            return None
        return args, kwargs | {"inputs_embeds": embeds.detach().requires_grad_(True)}

    def _wanted(self, embeddings: Tensor) -> bool:
        layer = self.tower.blocks[0].layer
        if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
            return False
        options = getattr(layer._gradient_checkpointing_func, "keywords", {})
        reentrant = options.get("use_reentrant") is not False
        if not reentrant or not torch.is_grad_enabled() or embeddings.requires_grad:
            return False
        if not self.told:
            self.told = True
            warnings.warn(
                f"reentrant checkpointing: the input of {self.tower.name}'s first "
                "block now wants a gradient, or its prompts would get none; "
                "use_reentrant=False spares that work",
                stacklevel=2,
            )
        return True
