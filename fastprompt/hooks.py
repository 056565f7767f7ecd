"""The few things a patched model does around its towers, as hooks that deepcopy and pickle keep."""

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt import attention
from fastprompt.families import Tower
from fastprompt.prompts import CHILD
from fastprompt.sets.mixed import Mixed


@dataclass(eq=False)
class CountFromText:
    """Forward pre-hook of a rotary language model: positions count from each row's first token.

    A plain forward of transformers lets a left-padded row start at the padding; prompts at
    positions -P .. -1 would then stand before the padding. Base logits do not change (rotary scores
    depend on differences alone), and `generate` does the same itself. Also of a vision-language
    model that makes its language model's masks; then ``first`` is where its texts begin.
    """

    first: int = 0

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
        positions = positions + self.first
        positions = positions[:, -tokens.shape[1] :].to(tokens.device)
        return (), given | {"position_ids": positions}


@dataclass(eq=False)
class BeginAt:
    """Forward pre-hook of a language model with learned positions: its first token is at `first`,
    in rows that have prompts.

    Given ``position_ids`` are moved on by as much; where none are given they count what the tower's
    do, the columns or the tokens, those in the cache included.
    """

    tower: Tower
    first: int

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        if positions is None:
            embeds, cache = given.get("inputs_embeds"), given.get("past_key_values")
            tokens = embeds if embeds is not None else given["input_ids"]
            past, N = 0 if cache is None else cache.get_seq_length(), tokens.shape[1]
            by_tokens = self.tower.counts == "tokens"
            if by_tokens and isinstance(mask, Tensor) and mask.ndim == 2:
                seen = mask.long()
                positions = (seen.cumsum(-1) * seen - 1)[:, past : past + N]
            else:
                positions = torch.arange(past, past + N, device=tokens.device)[None]
        first = self._first(given.get(attention.CHOICE), positions.device)
        return (), given | {"position_ids": positions + first}

    def _first(self, choice: Any, device: torch.device) -> int | Tensor:
        """Of all rows, or [B, 1]: tokens without prompts in front are where the base model's are.

        ``choice``: what came with the batch, perhaps on another device.
        """
        blocks = self.tower.blocks
        if not isinstance(choice, Mixed):
            sides = [vars(block.attention)[attention.ATTRIBUTE] for block in blocks]
            return self.first if any(side.prompt is not None for side in sides) else 0
        firsts = [self.first * any(block.name in each for block in blocks) for each in choice.sets]
        if choice.index is None:
            return firsts[0]
        of_rows = sum((choice.index == i) * first for i, first in enumerate(firsts))
        return of_rows[:, None].to(device)


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
class PromptsStillTrain:
    """Forward pre-hook of a tower: says once, in training, that none of its prompts does.

    PEFT's ``get_peft_model`` after the patch freezes all but its own.
    """

    tower: Tower
    asked: bool = False

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if self.asked or not module.training or not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():
            return
        self.asked = True
        prompts = [getattr(block.layer, CHILD, None) for block in self.tower.blocks]
        wanted = [p.requires_grad for prompt in prompts if prompt for p in prompt.parameters()]
        if not any(wanted) and any(p.requires_grad for p in module.parameters()):
            warnings.warn(
                f"{self.tower.name or self.tower.family}: other parameters train, and none of the "
                "prompts: if get_peft_model froze them, patch.requires_grad_() lets them train",
                stacklevel=2,
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


@dataclass(eq=False)
class NotReentrant:
    """Forward pre-hook of a timm model: its gradient checkpointing is not the reentrant kind.

    That gives no gradient to a segment none of whose inputs wants one, and so to no prompt at all.
    """

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if not getattr(module, "grad_checkpointing", False) or not torch.is_grad_enabled():
            return
        from timm.layers import use_reentrant_ckpt

        if use_reentrant_ckpt():
            raise ValueError(
                "gradient checkpointing: want timm.layers.set_reentrant_ckpt(False), or no prompt "
                "would get a gradient; got True"
            )


@dataclass(eq=False)
class BiasOfPrompts:
    """Stands in for ``compute_bias`` of T5's first attention, whose bias every block adds.

    [1, H, N, P + M]: the bias that keys at -P .. -1 have, before that of the tokens.
    """

    attention: nn.Module
    rows: int

    @classmethod
    def put_on(cls, attention: nn.Module, rows: int) -> "BiasOfPrompts":
        attention.compute_bias = made = cls(attention, rows)
        return made

    def undo(self) -> None:
        vars(self.attention).pop("compute_bias", None)

    def __call__(
        self,
        query_length: int,
        key_length: int,
        device: torch.device | None = None,
        past_seen_tokens: int | Tensor = 0,
    ) -> Tensor:
        # all places move on by P, so that the first keys are those before the text
        forward, P = type(self.attention).compute_bias, self.rows
        return forward(self.attention, query_length, key_length + P, device, past_seen_tokens + P)
