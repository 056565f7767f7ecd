"""Prompts whose outputs are read: rows that go through all blocks as tokens of an image.

They enter before the first block, in front (attention without positions does not see where; the
image's position embeddings are on its tokens by then), and are taken out of what the last block
returns and of all hidden states that the tower returns, before any pooling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt.families import Tower
from fastprompt.prompts import CHILD, BlockPrompt
from fastprompt.tapping import rows_for

# towers whose blocks see one image [B, N, D], whatever N is
FAMILIES = (
    *("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit"),
    *("clip", "siglip", "internvl_vision"),
)
_PACKED = "its images follow one another in one row, and prompts would have to enter each"
_MASKED = "it masks the patches that an image lacks, and its masks have no room for prompts"
_REASONS = {
    "swin": "its blocks see windows, which are merged between stages: a prompt has no window",
    "beit": "it adds a bias to scores for each pair of places in an image, and prompts have none",
    "siglip2": _MASKED,
    "idefics3_vision": _MASKED,
    "smolvlm_vision": _MASKED,
    "pixtral": _PACKED,
}


def why_not(tower: Tower) -> str | None:
    """Why prompts cannot be tokens of this tower; None: they can."""
    if type(tower.model).__name__.endswith("Backbone"):
        return f"a {type(tower.model).__name__} makes feature maps inside its forward"
    if tower.family in FAMILIES:
        return None
    reason = _PACKED if tower.packed else _REASONS.get(tower.family, f"not of {FAMILIES}")
    return f"{tower.family}: {reason}"


@dataclass(eq=False)
class Tokens:
    """The hooks by which a prompt goes through a tower."""

    prompt: BlockPrompt

    def attach(self, tower: Tower) -> list[Any]:
        """Returns their handles."""
        first, last = tower.blocks[0].layer, [*tower.blocks, *tower.unread][-1].layer
        return [
            first.register_forward_pre_hook(self.enter, with_kwargs=True),
            last.register_forward_hook(self.leave),
            tower.model.register_forward_hook(self.clean),
        ]

    def enter(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is not None:
            raise ValueError(
                "prompts as tokens: want no attention_mask, which has no room for them"
            )
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = torch.cat([rows_for(self.prompt, hidden), hidden], dim=1)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    def leave(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output[:, self.prompt.length :]

    def clean(self, tower: nn.Module, args: tuple, output: Any) -> Any:
        """Take the rows out of ``hidden_states``, whose last may have none already."""
        N = output[0].shape[1]
        if isinstance(output, tuple):
            return tuple(self._without(x, N) if isinstance(x, tuple) else x for x in output)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = self._without(output.hidden_states, N)
        return output

    def _without(self, states: tuple[Tensor | None, ...], N: int) -> tuple[Tensor | None, ...]:
        """Attentions [B, H, N + P, N + P] stay whole."""
        whole = [x is None or x.ndim != 3 or x.shape[1] == N for x in states]
        return tuple(
            x if done else x[:, self.prompt.length :] for x, done in zip(states, whole, strict=True)
        )


def put_on(tower: Tower) -> list[Any]:
    """Let the prompt of a tower's first block go through all blocks; the hooks' handles."""
    return Tokens(getattr(tower.blocks[0].layer, CHILD)).attach(tower)
